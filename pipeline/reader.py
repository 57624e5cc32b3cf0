"""JPEG bytes by position, from local shards, with read-ahead over the steps that come."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.order import EpochOrder
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError

if TYPE_CHECKING:
    from linerate.shards.catalog import ShardIndex

Ints = NDArray[np.int64]
_COLUMNS = ("sample_id", "offset", "size", "height", "width", "label")


class ShardReader:
    """Reads any positions of a catalog; holds open files and indexes of the shards used last.

    The bytes of a batch are copied by pread into one buffer of its own. Not for two threads at once.
    """

    def __init__(self, catalog: Catalog, *, num_shards_at_hand: int = 64) -> None:
        """num_shards_at_hand: shards whose index is kept, 36 bytes a sample; see EpochFetch for a rank's."""
        self.catalog = catalog
        self._starts = catalog.starts
        self._index = lru_cache(maxsize=num_shards_at_hand)(catalog.shard_index)
        self._files = _OpenFiles(catalog.shard_path, max_files=min(num_shards_at_hand, _max_open_files()))

    def read(self, positions: Ints) -> EncodedBatch:
        """The samples at positions, in that order.

        Raises OSError with the file's name where a shard cannot be opened, UserError where it is short.
        """
        rows = self.index_rows(positions)
        return EncodedBatch(
            jpegs=self._read_bytes(rows["shard"], rows["offset"], rows["size"]),
            sample_id=rows["sample_id"],
            position=np.array(positions, dtype=np.int64),
            label=rows["label"],
            height=rows["height"],
            width=rows["width"],
        )

    def index_rows(self, positions: Ints) -> dict[str, Ints]:
        """Column of the index -> (N,) int64, and the shard: all that is known without reading an image."""
        shard = self._shards(positions)
        rows = {name: np.empty(len(positions), dtype=np.int64) for name in _COLUMNS}
        for one, nth, index in self._by_shard(shard, positions):
            at = shard == one
            for name, column in rows.items():
                column[at] = getattr(index, name)[nth]
        return rows | {"shard": shard}

    def advise(self, positions: Ints) -> None:
        """Let the kernel fetch the samples at positions in the background; returns at once."""
        for one, nth, index in self._by_shard(self._shards(positions), positions):
            file = self._files.open(one)
            for offset, size in zip(index.offset[nth].tolist(), index.size[nth].tolist(), strict=True):
                os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        self._files.close()

    def _shards(self, positions: Ints) -> Ints:
        return np.searchsorted(self._starts, positions, side="right") - 1

    def _by_shard(self, shard: Ints, positions: Ints) -> Iterator[tuple[int, Ints, ShardIndex]]:
        for one in np.unique(shard).tolist():
            yield one, positions[shard == one] - self._starts[one], self._index(one)

    def _read_bytes(self, shard: Ints, offset: Ints, size: Ints) -> list[NDArray[np.uint8]]:
        ends = np.concatenate([[0], np.cumsum(size)])
        buffer = np.empty(int(ends[-1]), dtype=np.uint8)
        view = buffer.data
        spans = list(pairwise(ends.tolist()))
        for one, start, (begin, end) in zip(shard.tolist(), offset.tolist(), spans, strict=True):
            if not _pread_exactly(self._files.open(one), view[begin:end], start):
                raise _cut_short(self.catalog.shard_path(one), promised=start + end - begin)
        return [buffer[begin:end] for begin, end in spans]


class EpochFetch:
    """Random access to the encoded batches of one rank in one epoch: `fetch(step)`.

    Pickles as its few settings, so a worker process can be given one; it opens the shards on first use.
    """

    def __init__(
        self,
        root: Path,
        *,
        seed: int,
        epoch: int,
        global_batch: int,
        num_lanes: int,
        window_shards: int,
        rank: int = 0,
        world_size: int = 1,
        ahead_steps: int = 4,
    ) -> None:
        """ahead_steps: how many steps before its own a batch is read into the page cache."""
        self.root, self.rank, self.world_size, self.ahead_steps = root, rank, world_size, ahead_steps
        self.seed, self.epoch = seed, epoch
        self.global_batch, self.num_lanes, self.window_shards = global_batch, num_lanes, window_shards
        self._order: EpochOrder | None = None
        self._reader: ShardReader | None = None
        self._advised = -1

    @property
    def rank_batch(self) -> int:
        return self.global_batch // self.world_size

    def positions(self, step: int) -> Ints:
        """(rank_batch,) int64: what this rank reads at step."""
        return self._open()[0].positions(step, rank=self.rank, world_size=self.world_size)

    def __call__(self, step: int) -> EncodedBatch:
        order, reader = self._open()
        # A worker that is given every fourth step advises every fourth: the others advise theirs.
        ahead = step + self.ahead_steps
        if self.ahead_steps and ahead < order.num_steps and ahead != self._advised:
            reader.advise(self.positions(ahead))
            self._advised = ahead
        return reader.read(self.positions(step))

    def for_epoch(self, epoch: int) -> EpochFetch:
        """The same rank in another epoch; takes over the open shards."""
        state = self.__getstate__() | {"epoch": epoch}
        other = EpochFetch.__new__(EpochFetch)
        other.__setstate__(state)
        other._reader = self._reader
        return other

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _open(self) -> tuple[EpochOrder, ShardReader]:
        if self._reader is None:
            # A lane holds one window, the reads ahead may stand in the next.
            lanes = self.num_lanes // self.world_size
            at_hand = lanes * 2 * (self.window_shards + 1)
            self._reader = ShardReader(Catalog.load(self.root), num_shards_at_hand=at_hand)
        if self._order is None:
            self._order = EpochOrder(
                self._reader.catalog.shard_sizes,
                seed=self.seed,
                epoch=self.epoch,
                global_batch=self.global_batch,
                num_lanes=self.num_lanes,
                window_shards=self.window_shards,
            )
        return self._order, self._reader

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order, self._reader, self._advised = None, None, -1


class _OpenFiles:
    """File descriptors of the shards used last."""

    def __init__(self, shard_path: Callable[[int], Path], *, max_files: int) -> None:
        self._shard_path, self._max_files = shard_path, max_files
        self._files: OrderedDict[int, int] = OrderedDict()

    def open(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is not None:
            self._files.move_to_end(shard)
            return file
        file = self._files[shard] = os.open(self._shard_path(shard), os.O_RDONLY | os.O_CLOEXEC)
        # Members are read in shuffled order: the kernel's own read-ahead would fetch the wrong ones.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        if len(self._files) > self._max_files:
            os.close(self._files.popitem(last=False)[1])
        return file

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()


def _max_open_files() -> int:
    return max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 1)


def _pread_exactly(file: int, view: memoryview, offset: int) -> bool:
    """Fill view from offset; False where the file ends before that."""
    while len(view):
        num_read = os.preadv(file, [view], offset)
        if num_read == 0:
            return False
        view, offset = view[num_read:], offset + num_read
    return True


def _cut_short(path: Path, *, promised: int) -> UserError:
    return UserError(
        f"{path} holds {path.stat().st_size:,} bytes, its index promises {promised:,} or more; "
        f"`linerate shard verify {path.parent}` lists what is damaged"
    )
