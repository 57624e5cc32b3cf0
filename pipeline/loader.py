"""`open_views`: the two views of every sample, in order, by the backend of your choice."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from linerate.pipeline.cores import default_num_threads
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.order import DEFAULT_WINDOW_SHARDS, EpochOrder, default_num_lanes, rank_lanes
from linerate.pipeline.reader import EpochFetch
from linerate.pipeline.recipe import ViewRecipe, find_recipe
from linerate.pipeline.two_views import TwoViews
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.terminal import nearest

# Imported when asked for: DALI takes two seconds.
_CLASSES = {
    "dali": ("linerate.pipeline.dali_views", "DaliViews"),
    "torch": ("linerate.pipeline.torch_views", "TorchViews"),
    "synthetic": ("linerate.pipeline.synthetic_views", "SyntheticViews"),
}
BACKENDS = tuple(_CLASSES)


class Backend(Protocol):
    """Turns encoded images into views, by the recipe's draws. To add one: a class and a line above."""

    def run(
        self, fetch: Callable[[int], EncodedBatch], steps: range, *, epoch: int
    ) -> Iterator[TwoViews]: ...

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
) -> Backend:
    """The backend of that name. Raises UserError with the nearest name where there is none."""
    if name not in _CLASSES:
        raise nearest(name, list(_CLASSES), what="backend")
    module, class_name = _CLASSES[name]
    backend: Backend = getattr(importlib.import_module(module), class_name)(
        recipe=recipe,
        seed=seed,
        batch=batch,
        device=device,
        num_threads=num_threads or default_num_threads(),
        prefetch=prefetch,
    )
    return backend


class ViewLoader:
    """A rank's views, epoch by epoch. (epoch, step) is the whole state of a run."""

    def __init__(
        self, backend: Backend, fetch: EpochFetch, *, steps_per_epoch: int, num_dropped: int
    ) -> None:
        self._backend, self._fetch = backend, fetch
        self.steps_per_epoch = steps_per_epoch
        self.num_dropped = num_dropped
        """Samples that each epoch leaves out, others every time."""
        self.rank_batch = fetch.rank_batch

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[TwoViews]:
        """The batches start_step..steps_per_epoch-1 of an epoch. Hold only the one at hand."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise UserError(f"start_step={start_step} is not in 0..{self.steps_per_epoch}, the epoch's steps")
        self._fetch = self._fetch.for_epoch(epoch)
        yield from self._backend.run(self._fetch, range(start_step, self.steps_per_epoch), epoch=epoch)

    def close(self) -> None:
        self._backend.close()
        self._fetch.close()


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
) -> ViewLoader:
    """The two views of every sample for one rank: same views whatever backend, world size or restart.

    num_lanes: None takes `default_num_lanes(global_batch)`; the world size must divide it.
    num_threads: None takes the cores that this rank has. prefetch: batches made ahead.
    Raises UserError before any image is read, for whatever cannot work.
    """
    catalog = catalog if isinstance(catalog, Catalog) else Catalog.load(catalog)
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    lanes = default_num_lanes(global_batch) if num_lanes is None else num_lanes
    _check_world_size(global_batch, lanes, rank=rank, world_size=world_size)
    order = EpochOrder(
        catalog.shard_sizes,
        seed=seed,
        epoch=0,
        global_batch=global_batch,
        num_lanes=lanes,
        window_shards=window_shards,
    )
    fetch = EpochFetch(
        catalog.root,
        seed=seed,
        epoch=0,
        global_batch=global_batch,
        num_lanes=lanes,
        window_shards=window_shards,
        rank=rank,
        world_size=world_size,
    )
    views = open_backend(
        backend,
        recipe=recipe,
        seed=seed,
        batch=fetch.rank_batch,
        device=device,
        num_threads=num_threads,
        prefetch=prefetch,
    )
    return ViewLoader(views, fetch, steps_per_epoch=order.num_steps, num_dropped=order.num_dropped)


def _check_world_size(global_batch: int, num_lanes: int, *, rank: int, world_size: int) -> None:
    if world_size > 0 and global_batch % world_size:
        below = global_batch // world_size * world_size
        near = [b for b in (below, below + world_size) if b]
        raise UserError(
            f"global_batch={global_batch} does not divide over {world_size} ranks; "
            f"the nearest that do are {' and '.join(map(str, near))}"
        )
    rank_lanes(num_lanes, rank=rank, world_size=world_size)
