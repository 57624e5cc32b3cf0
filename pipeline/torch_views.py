"""Views by Pillow and torchvision v2, two or one: the truth that the other backends are held against."""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import multiprocessing.context
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from linerate.pipeline.bad_samples import BadSamples
from linerate.pipeline.draws import JITTER_ORDERS, Draw, Draws, draw_views
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.evaluation_views import LabelledImages
from linerate.pipeline.recipe import ImageRecipe, ViewRecipe
from linerate.pipeline.two_views import Origin, TwoViews
from linerate.pipeline.undecodable import UndecodableImages
from linerate.shards.inspect_image import one_line

Fetch = Callable[[int], EncodedBatch]
_JITTER_OPS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


class TorchPixels:
    """Views by DataLoader workers, one process a thread asked for; in this process if that is one.

    Each worker makes whole batches. A batch is yours for as long as you hold it.
    """

    own_order = False

    def __init__(
        self,
        *,
        recipe: ViewRecipe | ImageRecipe,
        seed: int,
        batch: int,
        device: str,
        num_threads: int,
        prefetch: int,
    ) -> None:
        """batch is there for the sake of the protocol. prefetch: batches in the making, over all workers."""
        self._recipe, self._seed = recipe, seed
        self._device = torch.device(device)
        self._num_workers = num_threads if num_threads > 1 else 0
        self._prefetch = max(1, prefetch)

    def pixels(
        self, fetch: Fetch, steps: range, *, epoch: int
    ) -> Generator[tuple[list[Tensor], Origin], None, None]:
        """The views of fetch(step), each (N, 3, S, S) uint8, and their samples, for every step, in order.

        Raises BadSamples.
        """
        num_workers = min(self._num_workers, len(steps))
        loader = DataLoader(
            _Steps(fetch, self._recipe, self._seed, epoch, steps),
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=math.ceil(self._prefetch / num_workers) if num_workers else None,
            multiprocessing_context=worker_context() if num_workers else None,
            pin_memory=self._device.type == "cuda",
        )
        for pixels, origin in loader:
            if isinstance(origin, BadSamples):
                raise origin
            sample_id, position, label = origin
            yield self.to_device(pixels), (sample_id, position, label)

    def to_device(self, pixels: list[Tensor]) -> list[Tensor]:
        """(N, S, S, 3) of the workers as (N, 3, S, S) on the device."""
        return [one.to(self._device, non_blocking=True).permute(0, 3, 1, 2) for one in pixels]

    def close(self) -> None:
        """Nothing outlives run."""


class TorchViews(TorchPixels):
    """The two views of an image. recipe: a ViewRecipe."""

    def run(self, fetch: Fetch, steps: range, *, epoch: int) -> Generator[TwoViews, None, None]:
        """As `pixels`, as TwoViews."""
        with contextlib.closing(self.pixels(fetch, steps, epoch=epoch)) as batches:
            for pixels, origin in batches:
                yield TwoViews.of(pixels, origin)


class TorchImages(TorchPixels):
    """The one view of an image, with its label. recipe: an ImageRecipe."""

    def run(self, fetch: Fetch, steps: range, *, epoch: int) -> Generator[LabelledImages, None, None]:
        """As `pixels`, as LabelledImages."""
        with contextlib.closing(self.pixels(fetch, steps, epoch=epoch)) as batches:
            for pixels, origin in batches:
                yield LabelledImages.of(pixels, origin)


def worker_context() -> multiprocessing.context.BaseContext:
    """Workers are forked from a server that has imported all they need, once for the life of this process.

    Forking this process itself can hang in the locks of CUDA's, DALI's and OpenMP's threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


Item = tuple[list[Tensor] | None, Tensor | BadSamples]


@dataclass(frozen=True)
class _Steps(Dataset[Item]):
    """Step of an epoch -> (its views in NHWC, (sample_id, position, label) as rows of one tensor)."""

    fetch: Fetch
    recipe: ViewRecipe | ImageRecipe
    seed: int
    epoch: int
    steps: range

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, place: int) -> Item:
        try:
            batch = self.fetch(self.steps[place])
            images = decode_all(batch)
        except BadSamples as error:
            # Raised here it would reach the parent with the worker's traceback for a message.
            return None, error
        origin = np.stack([batch.sample_id, batch.position, batch.label])
        views = [
            reference_views(images, self._draws(batch, view), size=self.recipe.size)
            for view in range(self.recipe.num_views)
        ]
        return views, torch.from_numpy(origin)

    def _draws(self, batch: EncodedBatch, view: int) -> Draws:
        return draw_views(
            self.recipe,
            seed=self.seed,
            epoch=self.epoch,
            sample_id=batch.sample_id,
            height=batch.height,
            width=batch.width,
            view=view,
        )


def decode_all(batch: EncodedBatch) -> list[Tensor]:
    """(3, H, W) uint8 RGB of every image. Raises UndecodableImages with all that fail."""
    images: list[Tensor] = []
    bad: dict[int, str] = {}
    for row, jpeg in enumerate(batch.jpegs):
        try:
            images.append(decode_rgb(jpeg))
        # Pillow raises TypeError, ValueError, SyntaxError and struct.error on broken files, besides OSError.
        except Exception as error:
            bad[row] = f"{type(error).__name__}: {one_line(error)}"
    if bad:
        rows = list(bad)
        raise UndecodableImages(
            batch.sample_id[rows].tolist(), batch.position[rows].tolist(), next(iter(bad.values()))
        )
    return images


def decode_rgb(jpeg: npt.NDArray[np.uint8]) -> Tensor:
    """(3, H, W) uint8 with the strides of (H, W, 3); gray and CMYK become RGB, EXIF turns nothing."""
    with Image.open(io.BytesIO(jpeg.data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def reference_views(images: list[Tensor], draws: Draws, *, size: int) -> Tensor:
    """(N, S, S, 3) uint8: one view of each image."""
    return torch.stack(
        [reference_view(image, row, size=size) for image, row in zip(images, draws.array, strict=True)]
    )


def reference_view(image: Tensor, draws: npt.NDArray[np.float32], *, size: int) -> Tensor:
    """(S, S, 3) uint8: what torchvision v2 makes of a (3, H, W) uint8 image by one row of draws."""
    top, left, bottom, right = (int(edge) for edge in draws[Draw.TOP : Draw.RIGHT + 1])
    view = F.resized_crop(image, top, left, bottom - top, right - left, [size, size], antialias=True)
    if draws[Draw.GRAY_FIRST]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if draws[Draw.JITTER]:
        for op in JITTER_ORDERS[int(draws[Draw.JITTER_ORDER])]:
            view = _JITTER_OPS[op](view, float(draws[Draw.BRIGHTNESS + op]))
    if draws[Draw.GRAY]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if draws[Draw.BLUR_SIGMA]:
        view = gaussian_blur(view, float(draws[Draw.BLUR_SIGMA]))
    if draws[Draw.SOLARIZE]:
        view = F.solarize(view, threshold=128)
    if draws[Draw.FLIP]:
        view = F.horizontal_flip(view)
    finished: Tensor = view.permute(1, 2, 0).contiguous()
    return finished


def gaussian_blur(view: Tensor, sigma: float) -> Tensor:
    """torchvision's, with a window of 5.5 sigma to each side (23 at sigma 2), 11 at least.

    Less where the view is smaller than that, since torchvision reflects each edge once only.
    """
    radius = min(max(11, math.ceil(5.5 * sigma)), view.shape[-1] - 1)
    blurred: Tensor = F.gaussian_blur(view, kernel_size=[2 * radius + 1] * 2, sigma=[sigma, sigma])
    return blurred
