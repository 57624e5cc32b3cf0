"""Every image once, in position order, resized and centre-cropped: for all that judges an encoder.

The crops are DALI's, on the CPU or on the GPU, or Pillow's in threads; they differ by a level at most.
On one core DALI takes 2.1 ms a photo where Pillow takes 3.1, and 0.07 against 0.02 ms for 32x32, which is
little beside an encoder.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from linerate.pipeline.cores import default_num_threads
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.reader import ShardReader
from linerate.pipeline.recipe import CentreCrop
from linerate.pipeline.two_views import Origin
from linerate.pipeline.undecodable import UndecodableImages
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.inspect_image import one_line

CropBackend = Literal["dali", "torch"]
"""torch is Pillow in threads; it needs no DALI."""
AHEAD_BATCHES = 2
DECODED_BYTES = 64 * 2**20
"""Most that the images of one of DALI's batches may take decoded; a single one may take more."""


@dataclass(frozen=True)
class LabelledImages:
    """A batch of N images, each seen once."""

    images: Tensor
    """(N, 3, S, S) uint8, channels_last strides, on the device."""
    label: Tensor
    """(N,) int64 on the CPU, -1 where a sample has none."""
    position: Tensor
    """(N,) int64 on the CPU."""
    sample_id: Tensor
    """(N,) int64 on the CPU."""

    @classmethod
    def of(cls, pixels: Sequence[Tensor], origin: Origin) -> LabelledImages:
        """pixels: the one view of each."""
        (images,) = pixels
        sample_id, position, label = origin
        return cls(images=images, label=label, position=position, sample_id=sample_id)


def open_images(
    catalog: Catalog,
    *,
    size: int,
    resize: int,
    backend: CropBackend = "dali",
    device: str = "cpu",
    num_threads: int | None = None,
    batch: int,
    positions: NDArray[np.int64] | None = None,
) -> Iterator[LabelledImages]:
    """The samples at positions (None: all) in that order, each exactly once; batches may be short.

    Pixels are those of torchvision's Resize(resize), bilinear and antialiased, then CenterCrop(size), on
    the image as RGB: with torch to the level, with dali to one level and half a level on average. A batch in
    which DALI refuses an image is made with torch. Of damage inside an image that `shard pack --check decode`
    finds, torch refuses some that DALI, as in training, fills with gray. Raises UserError where the crop is
    larger than the resized image, or a sample does not decode.
    """
    crop = CentreCrop(size=size, resize=resize)
    if batch < 1:
        raise UserError(f"batch={batch} must be at least 1")
    if backend == "dali":
        # DALI holds whole decoded images of one or two batches, Pillow one a thread.
        batch = batch_within(batch, decoded_bytes=3 * catalog.max_height * catalog.max_width)
    wanted = np.arange(catalog.num_samples) if positions is None else np.asarray(positions, dtype=np.int64)
    batches = np.split(wanted, range(batch, len(wanted), batch)) if len(wanted) else []
    make = _by_dali if backend == "dali" else _by_torch
    reader = ShardReader(catalog, num_shards_at_hand=16)
    return _closing(
        reader,
        make(
            _Batches(reader, batches), crop, device=device, num_threads=num_threads or default_num_threads()
        ),
    )


def batch_within(batch: int, *, decoded_bytes: int) -> int:
    """That many images for DALI at a time, or fewer, of that size decoded, that take DECODED_BYTES."""
    return max(1, min(batch, DECODED_BYTES // max(1, decoded_bytes)))


def _closing(reader: ShardReader, images: Iterator[LabelledImages]) -> Iterator[LabelledImages]:
    try:
        yield from images
    finally:
        reader.close()


@dataclass(frozen=True)
class _Batches:
    """What is read, step by step, with the shards of the next steps on their way."""

    reader: ShardReader
    positions: list[NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, step: int) -> EncodedBatch:
        self.reader.will_read(_coming(self.reader.catalog, self.positions[step : step + AHEAD_BATCHES + 2]))
        return self.reader.read(self.positions[step])

    def only(self, step: int) -> _Batches:
        return _Batches(self.reader, [self.positions[step]])


def centre_crop(jpeg: NDArray[np.uint8], crop: CentreCrop) -> NDArray[np.uint8]:
    """(size, size, 3) uint8: the image's short side brought to crop.resize, its centre cut out."""
    image = decode_rgb(jpeg)
    height, width, top, left = map(int, crop.place(*np.array(image.shape[:2])))
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    return image[top : top + crop.size, left : left + crop.size]


def decode_rgb(jpeg: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: Pillow's pixels. Gray is repeated, CMYK converted, EXIF orientation left alone.

    simplejpeg gives the same pixels as Pillow, in 1.3 against 2.1 ms a photo and 10 against 95 us for
    32x32; what it refuses (CMYK, damage that Pillow forgives) goes to Pillow.
    Raises ValueError, in one line, for what both refuse.
    """
    with contextlib.suppress(ValueError):
        return np.asarray(simplejpeg.decode_jpeg(jpeg, colorspace="RGB", strict=True))
    try:
        with Image.open(io.BytesIO(jpeg.data)) as stored:
            return np.asarray(stored.convert("RGB"))
    except Exception as error:  # OSError, ValueError, TypeError or SyntaxError, by the damage
        raise ValueError(one_line(error)) from None


def _coming(catalog: Catalog, batches: list[NDArray[np.int64]]) -> list[int]:
    """The shards of these batches and the one after; none where no shard has to be fetched."""
    if not catalog.bring or not batches:
        return []
    shards = np.unique(np.searchsorted(catalog.starts, np.concatenate(batches), side="right") - 1).tolist()
    return [*shards, *range(shards[-1] + 1, min(shards[-1] + 2, catalog.num_shards))]


def _by_dali(
    batches: _Batches, crop: CentreCrop, *, device: str, num_threads: int
) -> Iterator[LabelledImages]:
    if not len(batches):
        return
    # Imported when it is wanted: two seconds.
    from linerate.pipeline.dali_crops import DaliCrops

    dali = DaliCrops(
        crop,
        batch=len(batches.positions[0]),
        device=device,
        num_threads=num_threads,
        prefetch=AHEAD_BATCHES,
    )
    step = 0
    while step < len(batches):
        try:
            with contextlib.closing(dali.run(batches.read, range(step, len(batches)), epoch=0)) as made:
                for images in made:
                    step += 1
                    yield images
        except UndecodableImages:
            # Pillow takes some that DALI does not, as CMYK on some GPUs; what neither takes is named there.
            yield from _by_torch(batches.only(step), crop, device=device, num_threads=num_threads)
            step += 1


def _by_torch(
    batches: _Batches, crop: CentreCrop, *, device: str, num_threads: int
) -> Iterator[LabelledImages]:
    def submit(step: int) -> tuple[EncodedBatch, NDArray[np.uint8], list[Future[None]]]:
        encoded = batches.read(step)
        num = len(encoded.jpegs)
        out = np.empty((num, crop.size, crop.size, 3), dtype=np.uint8)
        # Several images a job: for 32x32 ones a job of one costs more than the image.
        chunk = max(1, min(16, num // (2 * num_threads)))
        chunks = [range(i, min(i + chunk, num)) for i in range(0, num, chunk)]
        return encoded, out, [pool.submit(fill, out, images, encoded) for images in chunks]

    def fill(out: NDArray[np.uint8], images: range, encoded: EncodedBatch) -> None:
        for i in images:
            try:
                out[i] = centre_crop(encoded.jpegs[i], crop)
            except ValueError as error:
                root = batches.reader.catalog.root
                raise UserError(
                    f"sample {encoded.sample_id[i]:012d} in {root} does not decode ({error}); "
                    f"`linerate shard verify {root} --decode full` lists such samples, and "
                    "packing again with `--check decode` leaves them out"
                ) from error

    with ThreadPoolExecutor(num_threads, thread_name_prefix="centre_crop") as pool:
        try:
            waiting = [submit(step) for step in range(min(AHEAD_BATCHES, len(batches)))]
            for step in range(len(batches)):
                encoded, out, jobs = waiting.pop(0)
                for job in jobs:
                    job.result()
                if step + AHEAD_BATCHES < len(batches):
                    waiting.append(submit(step + AHEAD_BATCHES))
                yield LabelledImages(
                    images=torch.from_numpy(out).to(device).permute(0, 3, 1, 2),
                    label=torch.from_numpy(encoded.label),
                    position=torch.from_numpy(encoded.position),
                    sample_id=torch.from_numpy(encoded.sample_id),
                )
        finally:
            pool.shutdown(cancel_futures=True)
