# ffcv and numba come without types.
# mypy: disable-error-code="misc,no-any-unimported"
"""Two views by ffcv over a .beton that `linerate shard beton` wrote: its order, its decoder, its crops.

What ffcv lacks (hue, gray, blur, solarize, one probability for the whole jitter) our kernels do inside its
compiled pipeline. Its order follows from the seed, its random numbers from nothing: no run repeats another's
views. It decodes each image once for each view, notices no damage, and keeps room for the largest image of
the set in every place of a batch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import queue
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from linerate.pipeline.cache import open_shards
from linerate.pipeline.cpu_kernels import finish_view
from linerate.pipeline.draws import JITTER_ORDERS, Draw
from linerate.pipeline.reader import EpochFetch
from linerate.pipeline.recipe import OneView, ViewRecipe
from linerate.pipeline.two_views import TwoViews
from linerate.shards.beton import count_samples
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError


def beton_path(catalog: Catalog) -> Path:
    """Where the backend looks for the file."""
    return catalog.root / f"{catalog.name}.beton"


class FfcvViews:
    """Views by ffcv's threads. Compiling takes some seconds at the first epoch of a process."""

    own_order = True

    def __init__(
        self, *, recipe: ViewRecipe, seed: int, batch: int, device: str, num_threads: int, prefetch: int
    ) -> None:
        """prefetch: batches in the making. Raises UserError where ffcv is not installed."""
        if importlib.util.find_spec("ffcv") is None:
            raise UserError(
                "--backend ffcv needs ffcv: apt-get install libturbojpeg0-dev libopencv-dev pkg-config, then "
                "pip install 'linerate[ffcv]'"
            )
        self._recipe, self._seed, self._batch = recipe, seed, batch
        self._device = torch.device(device)
        self._num_threads, self._prefetch = num_threads, max(1, prefetch)
        self._loader: Any = None

    def run(self, fetch: EpochFetch, steps: range, *, epoch: int) -> Generator[TwoViews, None, None]:
        """The batches of these steps of ffcv's own order. Raises UserError where the .beton is not there."""
        num_threads = torch.get_num_threads()
        from ffcv.loader.epoch_iterator import EpochIterator

        positions = self._positions(fetch, steps, epoch)
        if self._loader is None:
            self._loader = self._open(open_shards(fetch.place))
        batches = EpochIterator(self._loader, positions.ravel())
        # Importing ffcv sets it to 1, opening a loader to what that wants for itself.
        torch.set_num_threads(num_threads)
        try:
            for own in positions:
                label, sample_id, query, key = next(batches)
                # Copies: ffcv writes its next batches into the same memory.
                yield TwoViews(
                    query=query.to(self._device, copy=True).permute(0, 3, 1, 2),
                    key=key.to(self._device, copy=True).permute(0, 3, 1, 2),
                    sample_id=sample_id.flatten().clone(),
                    position=torch.from_numpy(own.astype(np.int64)),
                    label=label.flatten().clone(),
                )
        finally:
            batches.close()
            _join(batches)

    def close(self) -> None:
        self._loader = None

    def _positions(self, fetch: EpochFetch, steps: range, epoch: int) -> NDArray[np.uint64]:
        """(steps, batch): this rank's share of the epoch's permutation."""
        row = np.random.default_rng([self._seed % 2**63, epoch]).permutation(int(fetch.starts[-1]))
        share = row[fetch.rank :: fetch.world_size][: steps.stop * self._batch]
        return share.reshape(-1, self._batch)[steps.start :].astype(np.uint64)

    def _open(self, catalog: Catalog) -> Any:
        from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader
        from ffcv.pipeline import PipelineSpec
        from ffcv.transforms import ToTensor

        path = beton_path(catalog)
        if not path.is_file():
            raise UserError(f"there is no {path}; write it by `linerate shard beton {catalog.root} {path}`")
        if (num_samples := count_samples(path)) != catalog.num_samples:
            raise UserError(
                f"{path} holds {num_samples:,} samples, the shards {catalog.num_samples:,}; "
                f"write it anew by `linerate shard beton {catalog.root} {path}`"
            )
        size, specs = self._recipe.size, {}
        for name, one in (("query", self._recipe.query), ("key", self._recipe.key)):
            crop = RandomResizedCropRGBImageDecoder((size, size), scale=one.crop_scale, ratio=one.crop_ratio)
            specs[name] = PipelineSpec("image", decoder=crop, transforms=[finish_operation(one), ToTensor()])
        return Loader(
            str(path),
            batch_size=self._batch,
            num_workers=self._num_threads,
            os_cache=True,
            batches_ahead=self._prefetch,
            pipelines={"image": None, **specs},
        )


def decode_by_ffcv(jpeg: NDArray[np.uint8], *, height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3) uint8: what ffcv's decoder makes of a JPEG that is gray or RGB."""
    from ffcv.libffcv import imdecode

    image = np.zeros((height, width, 3), dtype=np.uint8)
    imdecode(jpeg, image, height, width, height, width)
    return image


def _join(batches: Any) -> None:
    """Wait for the thread, which writes into memory that goes with the iterator, and may wait for room."""
    while batches.is_alive():
        with contextlib.suppress(queue.Empty):
            batches.output_queue.get_nowait()
        batches.join(timeout=0.05)


def finish_operation(one: OneView) -> Any:
    """ffcv's Operation that does to a crop all that a recipe may do after it, drawing as it goes."""
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.state import State

    draw = _drawer(one)

    class Finish(Operation):
        def generate_code(self) -> Callable[..., Any]:
            rows, draw_row = Compiler.get_iterator(), Compiler.compile(draw)

            def finish(images, out):  # type: ignore[no-untyped-def]
                for i in rows(len(images)):
                    finish_view(out[i], images[i], draw_row())
                return out

            finish.is_parallel = True  # type: ignore[attr-defined]
            return finish

        def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
            memory = AllocationQuery(previous_state.shape, previous_state.dtype)
            return replace(previous_state, jit_mode=True), memory

    return Finish()


def _drawer(one: OneView) -> Callable[[], NDArray[np.float32]]:
    """A function for numba: one row of draws, but for the window. What it uses must be plain numbers."""
    brightness, contrast, saturation, hue = one.brightness, one.contrast, one.saturation, one.hue
    jitter, gray, gray_first = one.jitter_probability, one.gray_probability, one.gray_first
    blur, (sigma_min, sigma_max) = one.blur_probability, one.blur_sigma
    solarize, flip = one.solarize_probability, one.flip_probability
    num, num_orders = len(Draw), len(JITTER_ORDERS)
    at_brightness, at_contrast, at_saturation = int(Draw.BRIGHTNESS), int(Draw.CONTRAST), int(Draw.SATURATION)
    at_hue, at_order, at_jitter = int(Draw.HUE), int(Draw.JITTER_ORDER), int(Draw.JITTER)
    at_gray = int(Draw.GRAY_FIRST if gray_first else Draw.GRAY)
    at_sigma, at_solarize, at_flip = int(Draw.BLUR_SIGMA), int(Draw.SOLARIZE), int(Draw.FLIP)

    def draw() -> NDArray[np.float32]:
        row = np.zeros(num, np.float32)
        row[at_brightness] = np.random.uniform(max(0.0, 1 - brightness), 1 + brightness)
        row[at_contrast] = np.random.uniform(max(0.0, 1 - contrast), 1 + contrast)
        row[at_saturation] = np.random.uniform(max(0.0, 1 - saturation), 1 + saturation)
        row[at_hue] = np.random.uniform(-hue, hue)
        row[at_order] = np.random.randint(num_orders)
        row[at_jitter] = np.random.random() < jitter
        row[at_gray] = np.random.random() < gray
        if np.random.random() < blur:
            row[at_sigma] = np.random.uniform(sigma_min, sigma_max)
        row[at_solarize] = np.random.random() < solarize
        row[at_flip] = np.random.random() < flip
        return row

    return draw
