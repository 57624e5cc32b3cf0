"""Every image once, in position order, resized and centre-cropped: for kNN and linear probes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from linerate.pipeline.cores import default_num_threads
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.reader import ShardReader
from linerate.pipeline.two_views import Origin
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.inspect_image import one_line

AHEAD_BATCHES = 2


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
    device: str = "cpu",
    num_threads: int | None = None,
    batch: int,
    positions: NDArray[np.int64] | None = None,
) -> Iterator[LabelledImages]:
    """The samples at positions (None: all) in that order, each exactly once; the last batch may be short.

    Pixels are those of torchvision's Resize(resize), bilinear and antialiased, then CenterCrop(size), on
    the image as RGB. Raises UserError where the crop is larger than the resized image, or a sample does
    not decode.
    """
    if not 1 <= size <= resize or batch < 1:
        raise UserError(
            f"size={size}, resize={resize}, batch={batch} must obey 1 <= size <= resize and 1 <= batch"
        )
    wanted = np.arange(catalog.num_samples) if positions is None else np.asarray(positions, dtype=np.int64)
    return _run(
        ShardReader(catalog, num_shards_at_hand=16),
        np.split(wanted, range(batch, len(wanted), batch)) if len(wanted) else [],
        size=size,
        resize=resize,
        device=device,
        num_threads=num_threads or default_num_threads(),
    )


def centre_crop(jpeg: NDArray[np.uint8], *, size: int, resize: int) -> NDArray[np.uint8]:
    """(size, size, 3) uint8: the image's short side brought to resize, its centre cut out."""
    image = decode_rgb(jpeg)
    stored = image.shape[:2]
    height, width = (
        resize if side == min(stored) else resize * max(stored) // min(stored) for side in stored
    )
    if stored != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


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


def _run(
    reader: ShardReader,
    batches: list[NDArray[np.int64]],
    *,
    size: int,
    resize: int,
    device: str,
    num_threads: int,
) -> Iterator[LabelledImages]:
    def submit(positions: NDArray[np.int64]) -> tuple[EncodedBatch, NDArray[np.uint8], list[Future[None]]]:
        encoded = reader.read(positions)
        out = np.empty((len(positions), size, size, 3), dtype=np.uint8)
        # Several images a job: for 32x32 ones a job of one costs more than the image.
        chunks = [range(i, min(i + chunk, len(positions))) for i in range(0, len(positions), chunk)]
        return encoded, out, [pool.submit(fill, out, images, encoded) for images in chunks]

    def fill(out: NDArray[np.uint8], images: range, encoded: EncodedBatch) -> None:
        for i in images:
            try:
                out[i] = centre_crop(encoded.jpegs[i], size=size, resize=resize)
            except ValueError as error:
                raise UserError(
                    f"sample {encoded.sample_id[i]:012d} in {reader.catalog.root} does not decode ({error}); "
                    f"`linerate shard verify {reader.catalog.root} --decode full` lists such samples, and "
                    "packing again with `--check decode` leaves them out"
                ) from error

    chunk = max(1, min(16, len(batches[0]) // (2 * num_threads))) if batches else 1

    with ThreadPoolExecutor(num_threads, thread_name_prefix="centre_crop") as pool:
        try:
            reader.will_read(_coming(reader.catalog, batches[: AHEAD_BATCHES + 1]))
            waiting = [submit(positions) for positions in batches[:AHEAD_BATCHES]]
            for nth in range(len(batches)):
                reader.will_read(_coming(reader.catalog, batches[nth : nth + AHEAD_BATCHES + 2]))
                encoded, out, jobs = waiting.pop(0)
                for job in jobs:
                    job.result()
                if nth + AHEAD_BATCHES < len(batches):
                    waiting.append(submit(batches[nth + AHEAD_BATCHES]))
                yield LabelledImages(
                    images=torch.from_numpy(out).to(device).permute(0, 3, 1, 2),
                    label=torch.from_numpy(encoded.label),
                    position=torch.from_numpy(encoded.position),
                    sample_id=torch.from_numpy(encoded.sample_id),
                )
        finally:
            pool.shutdown(cancel_futures=True)
            reader.close()
