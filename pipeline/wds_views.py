"""Two views as others make them: webdataset's pipeline over our tars, Pillow and torchvision's transforms.

Its order and its random numbers are its own: whole shards are dealt out to ranks and workers, samples are
mixed in a buffer, and an epoch is so many steps of a stream that begins anew. The same seed, rank count and
number of workers repeat it; a restart in the middle of an epoch goes on with other samples.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from linerate.pipeline.bad_samples import BadSamples, KnownBad
from linerate.pipeline.cache import LostShardError, Place, open_shards
from linerate.pipeline.pillow_recipe import PillowView, decode
from linerate.pipeline.reader import EpochFetch
from linerate.pipeline.recipe import ViewRecipe
from linerate.pipeline.torch_views import worker_context
from linerate.pipeline.two_views import TwoViews
from linerate.pipeline.undecodable import UndecodableImages
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.inspect_image import one_line

SHUFFLE_BUFFER = 1000
_NUM_INDEXES = 64


class WebdatasetViews:
    """Views by DataLoader workers, one process a thread asked for; in this process if that is one."""

    own_order = True

    def __init__(
        self, *, recipe: ViewRecipe, seed: int, batch: int, device: str, num_threads: int, prefetch: int
    ) -> None:
        """batch: samples in a batch. prefetch: batches in the making, over all workers."""
        self._recipe, self._seed, self._batch = recipe, seed, batch
        self._device = torch.device(device)
        self._num_workers = num_threads if num_threads > 1 else 0
        self._prefetch = max(1, prefetch)

    def run(self, fetch: EpochFetch, steps: range, *, epoch: int) -> Generator[TwoViews, None, None]:
        """len(steps) batches of this rank's shards. Raises BadSamples, and UserError for too few shards."""
        stream = _Stream(
            place=fetch.place,
            seed=(self._seed, epoch, fetch.rank, steps.start),
            shards=_deal(open_shards(fetch.place), fetch, seed=self._seed, epoch=epoch),
            known_bad=fetch.known_bad,
            recipe=self._recipe,
            batch=self._batch,
        )
        num_workers = min(self._num_workers, len(stream.shards), len(steps))
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=math.ceil(self._prefetch / num_workers) if num_workers else None,
            multiprocessing_context=worker_context() if num_workers else None,
            pin_memory=self._device.type == "cuda",
        )
        for pixels, origin in islice(loader, len(steps)):
            if isinstance(origin, BadSamples):
                raise origin
            query, key = (
                one.to(self._device, non_blocking=True).contiguous(memory_format=torch.channels_last)
                for one in pixels
            )
            sample_id, position, label = origin
            yield TwoViews(query=query, key=key, sample_id=sample_id, position=position, label=label)

    def close(self) -> None:
        """Nothing outlives run."""


def _deal(catalog: Catalog, fetch: EpochFetch, *, seed: int, epoch: int) -> tuple[int, ...]:
    """This rank's shards of the epoch. Raises UserError where a rank would get none."""
    filled = np.flatnonzero(catalog.shard_sizes)
    if len(filled) < fetch.world_size:
        raise UserError(
            f"webdataset deals whole shards: {len(filled)} are too few for {fetch.world_size} ranks; take as "
            f"many ranks at most, pack smaller shards, or another --backend"
        )
    row = np.random.default_rng([seed % 2**63, epoch]).permutation(filled)
    own = (int(shard) for shard in row[fetch.rank :: fetch.world_size])
    return tuple(shard for shard in own if shard not in fetch.known_bad.shards)


Item = tuple[tuple[Tensor, Tensor] | None, Tensor | BadSamples]


@dataclass(frozen=True)
class _Stream(IterableDataset[Item]):
    """Endless batches of one worker: ((query, key), (sample_id, position, label) as rows of one tensor)."""

    place: Place
    seed: tuple[int, ...]
    shards: tuple[int, ...]
    known_bad: KnownBad
    recipe: ViewRecipe
    batch: int

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        nth, num = (info.id, info.num_workers) if info else (0, 1)
        seed = np.random.SeedSequence([word % 2**63 for word in (*self.seed, nth)])
        order, shuffle, views = (np.random.default_rng(one) for one in seed.spawn(3))
        catalog = open_shards(self.place)
        shards = np.array(self.shards[nth::num])
        if not len(shards):
            raise UserError("none of a rank's shards is left; `linerate shard verify` lists what is damaged")
        samples = _Samples(catalog, self.known_bad)
        make = _Maker(self.recipe, samples, views)

        def passes() -> Iterator[Any]:
            # A buffer for each: one over them all would give samples again before others have come once.
            while True:
                yield from webdataset.DataPipeline(
                    partial(_shard_urls, catalog, order.permutation(shards).tolist()),
                    _open_tars,
                    tar_file_expander,
                    group_by_keys,
                    webdataset.select(samples.has),
                    webdataset.shuffle(SHUFFLE_BUFFER, seed=int(shuffle.integers(2**31))),
                    webdataset.map(make),
                )

        try:
            yield from webdataset.DataPipeline(passes, webdataset.batched(self.batch, collation_fn=_collate))
        except BadSamples as error:
            # Raised here it would reach the parent with the worker's traceback for a message.
            yield None, error


def _shard_urls(catalog: Catalog, shards: list[int]) -> Iterator[dict[str, Any]]:
    """The tars. Raises BadSamples for one that is not as long as it was packed."""
    for shard in shards:
        try:
            path = catalog.ready_path(shard)
        except LostShardError as error:
            raise BadSamples([], [], error.reason, shard) from error
        size = path.stat().st_size if path.exists() else 0
        if size != catalog.shard_bytes[shard]:
            raise BadSamples([], [], f"{path} holds {size:,} bytes of {catalog.shard_bytes[shard]:,}", shard)
        yield {"url": str(path)}


def _open_tars(sources: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """webdataset's own opener leaves the tar at hand open when an epoch ends in the middle of it."""
    for source in sources:
        with Path(source["url"]).open("rb") as stream:
            yield source | {"stream": stream}


class _Samples:
    """From a sample of webdataset's to what our index knows of it."""

    def __init__(self, catalog: Catalog, known_bad: KnownBad) -> None:
        self._catalog, self._known_bad = catalog, known_bad
        self._shards = {str(catalog.shard_path(shard)): shard for shard in range(catalog.num_shards)}
        self._index = lru_cache(maxsize=_NUM_INDEXES)(catalog.shard_index)

    def origin(self, sample: dict[str, Any]) -> tuple[int, int, int]:
        """sample_id, position and label."""
        sample_id, shard = int(sample["__key__"]), self._shards[sample["__url__"]]
        index = self._index(shard)
        row = int(np.searchsorted(index.sample_id, sample_id))
        return sample_id, int(self._catalog.starts[shard]) + row, int(index.label[row])

    def has(self, sample: dict[str, Any]) -> bool:
        """Whether it is not known to be bad."""
        return not self._known_bad.positions or self.origin(sample)[1] not in self._known_bad.positions


class _Maker:
    """A sample of webdataset's -> its two views and its origin. Raises UndecodableImages."""

    def __init__(self, recipe: ViewRecipe, samples: _Samples, random: np.random.Generator) -> None:
        self._views = [PillowView(recipe.view(view), size=recipe.size) for view in (0, 1)]
        self._samples, self._random = samples, random

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
        origin = self._samples.origin(sample)
        try:
            image = decode(np.frombuffer(sample["jpg"], dtype=np.uint8))
        except Exception as error:  # Pillow: OSError, ValueError, TypeError or SyntaxError, by the damage
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UndecodableImages([origin[0]], [origin[1]], reason) from error
        # torchvision draws from torch's one generator, which the trainer of this process may use as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(self._random.integers(2**63)))
            query, key = (view.random(image) for view in self._views)
        return query, key, origin


def _collate(samples: list[tuple[Tensor, Tensor, tuple[int, int, int]]]) -> Item:
    query, key, origin = zip(*samples, strict=True)
    return (torch.stack(query), torch.stack(key)), torch.tensor(origin).T.contiguous()
