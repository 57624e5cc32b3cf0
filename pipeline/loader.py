"""`open_views`: the two views of every sample, in order, by the backend of your choice.

`open_training_images`: one view of every labelled sample that is wanted, in the same kind of order.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from linerate.pipeline.bad_samples import (
    DEFAULT_BAD_SHARE,
    BadSample,
    BadSamples,
    Replacements,
    log_bad_sample,
)
from linerate.pipeline.cache import lanes_here, open_shards, place_of, require_room
from linerate.pipeline.cores import default_num_threads
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.evaluation_views import LabelledImages
from linerate.pipeline.order import DEFAULT_WINDOW_SHARDS, EpochOrder, default_num_lanes, rank_lanes
from linerate.pipeline.reader import EpochFetch, Ints, subset_sizes
from linerate.pipeline.recipe import ImageRecipe, ViewRecipe, find_recipe
from linerate.pipeline.two_views import TwoViews
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.terminal import nearest

# Imported when asked for: DALI takes two seconds.
_CLASSES = {
    "dali": ("linerate.pipeline.dali_views", "DaliViews"),
    "torch": ("linerate.pipeline.torch_views", "TorchViews"),
    "webdataset": ("linerate.pipeline.wds_views", "WebdatasetViews"),
    "ffcv": ("linerate.pipeline.ffcv_views", "FfcvViews"),
    "synthetic": ("linerate.pipeline.synthetic_views", "SyntheticViews"),
}
BACKENDS = tuple(_CLASSES)
_IMAGE_CLASSES = {
    "dali": ("linerate.pipeline.dali_views", "DaliImages"),
    "torch": ("linerate.pipeline.torch_views", "TorchImages"),
}
BatchT = TypeVar("BatchT", TwoViews, LabelledImages)
BatchT_co = TypeVar("BatchT_co", TwoViews, LabelledImages, covariant=True)


class Backend(Protocol[BatchT_co]):
    """Turns encoded images into views, by the recipe's draws. To add one: a class and a line above."""

    own_order: bool
    """True: it takes neither the order nor the draws, as other projects' pipelines."""

    def run(
        self, fetch: Callable[[int], EncodedBatch], steps: range, *, epoch: int
    ) -> Generator[BatchT_co, None, None]: ...

    def close(self) -> None: ...


def open_backend(
    name: str,
    *,
    recipe: ViewRecipe,
    seed: int,
    batch: int,
    device: str = "cpu",
    num_threads: int | None = None,
    prefetch: int = 2,
    hw_decoder_load: float | None = None,
) -> Backend[TwoViews]:
    """The backend of that name. Raises UserError with the nearest name where there is none.

    hw_decoder_load: the share of a batch that a GPU's JPEG unit decodes for dali; None: dali_graph's own.
    """
    make = _find_class(name, _CLASSES)
    own = {"hw_decoder_load": hw_decoder_load} if name == "dali" and hw_decoder_load is not None else {}
    backend: Backend[TwoViews] = make(
        recipe=recipe,
        seed=seed,
        batch=batch,
        device=device,
        num_threads=num_threads or default_num_threads(),
        prefetch=prefetch,
        **own,
    )
    return backend


def _find_class(name: str, classes: dict[str, tuple[str, str]]) -> Callable[..., Any]:
    if name not in classes:
        raise nearest(name, list(classes), what="backend")
    module, class_name = classes[name]
    found: Callable[..., Any] = getattr(importlib.import_module(module), class_name)
    return found


class Loader(Generic[BatchT]):
    """A rank's batches, epoch by epoch. (epoch, step) is the whole state of a run."""

    def __init__(
        self,
        backend: Backend[BatchT],
        fetch: EpochFetch,
        replacements: Replacements,
        *,
        steps_per_epoch: int,
        num_dropped: int,
    ) -> None:
        self.backend: Backend[BatchT] = backend
        """What makes the views; while an epoch runs it is at work."""
        self._fetch = fetch
        self.replacements = replacements
        self.steps_per_epoch = steps_per_epoch
        self.num_dropped = num_dropped
        """Samples that each epoch leaves out, others every time."""
        self.rank_batch = fetch.rank_batch

    def epoch(self, epoch: int, *, start_step: int = 0) -> Generator[BatchT, None, None]:
        """The batches start_step..steps_per_epoch-1 of an epoch. Hold only the one at hand.

        Bad samples are replaced and counted; what the backend had in the making is made again then, so
        that no step is lost or done twice. Raises UserError where they are more than may be.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise UserError(f"start_step={start_step} is not in 0..{self.steps_per_epoch}, the epoch's steps")
        self.replacements.begin_epoch()
        self._fetch = self._fetch.for_epoch(epoch).without(self.replacements.known)
        step = start_step
        while step < self.steps_per_epoch:
            steps = range(step, self.steps_per_epoch)
            try:
                with contextlib.closing(self.backend.run(self._fetch, steps, epoch=epoch)) as batches:
                    for views in batches:
                        self._count(views, step)
                        step += 1
                        yield views
            except BadSamples as error:
                known = self.replacements.learn(error, epoch=epoch, step=step)
                self._fetch = self._fetch.without(known)
                if self.backend.own_order:  # it leaves them out
                    num = len(error.position) if error.shard is None else self._rows(error.shard)
                    self._replaced(num)

    def own_fetch(self) -> EpochFetch:
        """Another reader of the epoch at hand, by shards that it opens itself; whoever asks closes it."""
        return copy.copy(self._fetch)

    def _count(self, views: BatchT, step: int) -> None:
        if self.replacements.known and not self.backend.own_order:
            self._replaced(int((views.position.numpy() != self._fetch.positions(step)).sum()))

    def _replaced(self, num: int) -> None:
        self.replacements.count(num, num_rank_samples=self.steps_per_epoch * self.rank_batch)

    def _rows(self, shard: int) -> int:
        return int(self._fetch.starts[shard + 1] - self._fetch.starts[shard])

    def close(self) -> None:
        self.backend.close()
        self._fetch.close()


ViewLoader = Loader[TwoViews]
ImageLoader = Loader[LabelledImages]


def open_views(
    catalog: Catalog | Path | str,
    *,
    recipe: ViewRecipe | str,
    backend: str = "dali",
    device: str = "cpu",
    seed: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    num_lanes: int | None = None,
    window_shards: int = DEFAULT_WINDOW_SHARDS,
    num_threads: int | None = None,
    prefetch: int = 2,
    hw_decoder_load: float | None = None,
    bad_share: float = DEFAULT_BAD_SHARE,
    on_bad: Callable[[BadSample], None] = log_bad_sample,
) -> ViewLoader:
    """The two views of every sample for one rank: same views whatever backend, world size or restart.

    num_lanes: None takes `default_num_lanes(global_batch)`; the world size must divide it.
    num_threads: None takes the cores that this rank has. prefetch: batches made ahead.
    hw_decoder_load: as in `open_backend`.
    bad_share: the share of an epoch's samples that may be replaced; on_bad is told each that is found bad.
    Raises UserError before any image is read, for whatever cannot work.
    """
    catalog = catalog if isinstance(catalog, Catalog) else open_shards(catalog)
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    if backend == "ffcv" and catalog.bring:
        raise UserError(
            "--backend ffcv reads a .beton of the whole set, which a cache of shards is not; copy the shards "
            "here and run `linerate shard beton`, or take another --backend"
        )
    fetch, order = _open_fetch(
        catalog,
        seed=seed,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        num_lanes=num_lanes,
        window_shards=window_shards,
    )
    views = open_backend(
        backend,
        recipe=recipe,
        seed=seed,
        batch=fetch.rank_batch,
        device=device,
        num_threads=num_threads,
        prefetch=prefetch,
        hw_decoder_load=hw_decoder_load,
    )
    return Loader(
        views,
        fetch,
        Replacements(catalog, share=bad_share, on_bad=on_bad),
        steps_per_epoch=order.num_steps,
        num_dropped=order.num_dropped,
    )


def open_training_images(
    catalog: Catalog,
    *,
    recipe: ImageRecipe,
    positions: Ints,
    backend: str = "dali",
    device: str = "cpu",
    seed: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int | None = None,
    prefetch: int = 2,
    bad_share: float = DEFAULT_BAD_SHARE,
    on_bad: Callable[[BadSample], None] = log_bad_sample,
) -> ImageLoader:
    """One view of each sample at positions, an epoch's in an order of its own; one rank's share of it.

    positions: (N,) ascending; damaged samples are replaced from among them. The rest as in `open_views`.
    """
    fetch, order = _open_fetch(
        catalog, seed=seed, global_batch=global_batch, rank=rank, world_size=world_size, subset=positions
    )
    images: Backend[LabelledImages] = _find_class(backend, _IMAGE_CLASSES)(
        recipe=recipe,
        seed=seed,
        batch=fetch.rank_batch,
        device=device,
        num_threads=num_threads or default_num_threads(),
        prefetch=prefetch,
    )
    return Loader(
        images,
        fetch,
        Replacements(catalog, share=bad_share, on_bad=on_bad),
        steps_per_epoch=order.num_steps,
        num_dropped=order.num_dropped,
    )


def _open_fetch(
    catalog: Catalog,
    *,
    seed: int,
    global_batch: int,
    rank: int,
    world_size: int,
    num_lanes: int | None = None,
    window_shards: int = DEFAULT_WINDOW_SHARDS,
    subset: Ints | None = None,
) -> tuple[EpochFetch, EpochOrder]:
    """A rank's reader and the order of its first epoch. Raises UserError for what cannot work."""
    lanes = default_num_lanes(global_batch) if num_lanes is None else num_lanes
    _check_world_size(global_batch, lanes, rank=rank, world_size=world_size)
    order = EpochOrder(
        subset_sizes(catalog, subset),
        seed=seed,
        epoch=0,
        global_batch=global_batch,
        num_lanes=lanes,
        window_shards=window_shards,
    )
    require_room(catalog, num_lanes=lanes_here(lanes, world_size=world_size), window_shards=window_shards)
    fetch = EpochFetch(
        place_of(catalog),
        seed=seed,
        epoch=0,
        global_batch=global_batch,
        num_lanes=lanes,
        window_shards=window_shards,
        rank=rank,
        world_size=world_size,
        subset=subset,
    )
    return fetch, order


def _check_world_size(global_batch: int, num_lanes: int, *, rank: int, world_size: int) -> None:
    if world_size > 0 and global_batch % world_size:
        below = global_batch // world_size * world_size
        near = [b for b in (below, below + world_size) if b]
        raise UserError(
            f"global_batch={global_batch} does not divide over {world_size} ranks; "
            f"the nearest that do are {' and '.join(map(str, near))}"
        )
    rank_lanes(num_lanes, rank=rank, world_size=world_size)
