"""JPEG bytes by position, from shards here or by the cache, with read-ahead over the steps that come."""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from linerate.pipeline.ahead import Ahead
from linerate.pipeline.bad_samples import BadSamples, KnownBad
from linerate.pipeline.cache import LostShardError, Place, ShardCache, open_shards
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.host_memory import shards_at_hand
from linerate.pipeline.order import EpochOrder
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError

if TYPE_CHECKING:
    from linerate.shards.catalog import ShardIndex

Ints = NDArray[np.int64]
_COLUMNS = ("sample_id", "offset", "size", "height", "width", "label", "xxh3_64")
# What is wrong with one shard or its disk; any other error (no more descriptors, say) concerns all.
_SHARD_IS_LOST = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ESTALE, errno.EIO, errno.ENXIO}
)


class ShardReader:
    """Reads any positions of a catalog; holds open files and indexes of the shards used last.

    The bytes of a batch are copied by pread into one buffer of its own. Not for two threads at once.
    """

    def __init__(self, catalog: Catalog, *, num_shards_at_hand: int = 64) -> None:
        """num_shards_at_hand: shards whose index is kept, 44 bytes a sample; see EpochFetch for a rank's."""
        self.catalog = catalog
        self._starts = catalog.starts
        self._index = lru_cache(maxsize=num_shards_at_hand)(catalog.shard_index)
        open_tar: Callable[[int], int] = partial(_open_local, catalog)
        self._ahead: Ahead | None = None
        if isinstance(catalog.bring, ShardCache):
            self._ahead, open_tar = Ahead(catalog.bring), catalog.bring.open_tar
        self._files = _OpenFiles(open_tar, max_files=min(num_shards_at_hand, _max_open_files()))

    def read(self, positions: Ints, *, verify: bool = False) -> EncodedBatch:
        """The samples at positions, in that order.

        verify: whether every sample is held against its checksum: 7 us for one of 110 KB.
        Raises BadSamples with all of them that cannot be had, or with the first shard that is lost.
        """
        if self._ahead is not None:
            self._have(self._ahead, positions)
        rows = self.index_rows(positions)
        jpegs, bad = self._read_bytes(rows["shard"], rows["offset"], rows["size"])
        if verify:
            for row in range(len(jpegs)):
                if row not in bad and xxh3_64_intdigest(jpegs[row].data) != rows["xxh3_64"][row]:
                    bad[row] = f"{self.catalog.shard_path(rows['shard'][row])}: its bytes fail their checksum"
        if bad:
            at = list(bad)
            raise BadSamples(rows["sample_id"][at].tolist(), positions[at].tolist(), bad[at[0]])
        return EncodedBatch(
            jpegs=jpegs,
            sample_id=rows["sample_id"],
            position=np.array(positions, dtype=np.int64),
            label=rows["label"],
            height=rows["height"],
            width=rows["width"],
        )

    def index_rows(self, positions: Ints) -> dict[str, NDArray[Any]]:
        """Column of the index -> (N,) integers, and the shard: all that is known without reading an image."""
        shard = self._shards(positions)
        rows: dict[str, NDArray[Any]] = {
            name: np.empty(len(positions), dtype=np.uint64 if name == "xxh3_64" else np.int64)
            for name in _COLUMNS
        }
        for one, nth, index in self._by_shard(shard, positions):
            at = shard == one
            for name, column in rows.items():
                column[at] = getattr(index, name)[nth]
        return rows | {"shard": shard}

    def advise(self, positions: Ints) -> None:
        """Let the kernel fetch the samples at positions in the background; returns at once."""
        if self._ahead is not None:  # what is not here yet is no read of the disk
            here = [self._ahead.has(shard) for shard in self._shards(positions).tolist()]
            positions = positions[here]
        for one, nth, index in self._by_shard(self._shards(positions), positions):
            file = self._open(one)
            for offset, size in zip(index.offset[nth].tolist(), index.size[nth].tolist(), strict=True):
                os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)

    @property
    def is_remote(self) -> bool:
        """Do the shards come by the cache?"""
        return self._ahead is not None

    def will_read(self, shards: Sequence[int]) -> None:
        """Fetch these shards in the background, the first ones first, and let the cache drop all others."""
        if self._ahead is not None:
            self._ahead.want(shards)
            self._files.close(but=frozenset(shards))

    def close(self) -> None:
        self._files.close()
        if self._ahead is not None:
            self._ahead.close()

    def _have(self, ahead: Ahead, positions: Ints) -> None:
        shards = self._shards(positions)
        try:
            ahead.need(np.unique(shards).tolist())
        except LostShardError as error:
            lost = positions[shards == error.shard].tolist()
            raise BadSamples([], lost, error.reason, shard=error.shard) from error

    def _shards(self, positions: Ints) -> Ints:
        return np.searchsorted(self._starts, positions, side="right") - 1

    def _by_shard(self, shard: Ints, positions: Ints) -> Iterator[tuple[int, Ints, ShardIndex]]:
        for one in np.unique(shard).tolist():
            asked = positions[shard == one]
            try:
                index = self._index(one)
            except UserError as error:
                raise BadSamples([], asked.tolist(), str(error), shard=one) from error
            yield one, asked - self._starts[one], index

    def _read_bytes(
        self, shard: Ints, offset: Ints, size: Ints
    ) -> tuple[list[NDArray[np.uint8]], dict[int, str]]:
        """The bytes of every row, and why the bad rows' are missing."""
        ends = np.concatenate([[0], np.cumsum(size)])
        buffer = np.empty(int(ends[-1]), dtype=np.uint8)
        view = buffer.data
        spans = list(pairwise(ends.tolist()))
        bad: dict[int, str] = {}
        places = zip(shard.tolist(), offset.tolist(), spans, strict=True)
        for row, (one, start, (begin, end)) in enumerate(places):
            try:
                whole = _pread_exactly(self._open(one), view[begin:end], start)
            except OSError as error:
                if error.errno not in _SHARD_IS_LOST:
                    raise
                bad[row] = f"{self.catalog.shard_path(one)}: {error.strerror}"
                continue
            if not whole:
                bad[row] = _cut_short(self.catalog.shard_path(one))
        return [buffer[begin:end] for begin, end in spans], bad

    def _open(self, shard: int) -> int:
        try:
            return self._files.open(shard)
        except LostShardError as error:
            raise BadSamples([], [], error.reason, shard=shard) from error
        except OSError as error:
            if error.errno not in _SHARD_IS_LOST:
                raise
            raise BadSamples([], [], f"{error.filename}: {error.strerror}", shard=shard) from error


class EpochFetch:
    """Random access to the encoded batches of one rank in one epoch: `fetch(step)`.

    Pickles as its few settings, so a worker process can be given one; it opens the shards on first use.
    """

    def __init__(
        self,
        place: Place,
        *,
        seed: int,
        epoch: int,
        global_batch: int,
        num_lanes: int,
        window_shards: int,
        rank: int = 0,
        world_size: int = 1,
        ahead_steps: int = 4,
        known_bad: KnownBad | None = None,
        subset: Ints | None = None,
    ) -> None:
        """place: the folder of the shards, or their mirror here (cache.place_of).

        ahead_steps: how many steps before its own a batch is read into the page cache.

        known_bad: what is replaced by its neighbours.

        subset: (N,) ascending positions, the only samples that are read; None: all. Neighbours are of it too.
        """
        self.place, self.rank, self.world_size, self.ahead_steps = place, rank, world_size, ahead_steps
        self.seed, self.epoch = seed, epoch
        self.global_batch, self.num_lanes, self.window_shards = global_batch, num_lanes, window_shards
        self.known_bad = known_bad or KnownBad()
        self.subset = subset
        self._order: EpochOrder | None = None
        self._reader: ShardReader | None = None
        self._advised = -1
        self._told = (0, 0)  # the steps whose coming shards the reader was told

    @property
    def rank_batch(self) -> int:
        return self.global_batch // self.world_size

    def positions(self, step: int) -> Ints:
        """(rank_batch,) int64: what this rank reads at step."""
        return self._taken(self._places(step))

    @property
    def starts(self) -> Ints:
        """(S+1,) position of each shard's first sample."""
        return self._open()[1].catalog.starts

    def __call__(self, step: int) -> EncodedBatch:
        """The batch of step, each byte checked. Raises BadSamples for what is not known to be bad yet."""
        order, reader = self._open()
        if reader.is_remote and not self._told[0] <= step < self._told[1]:
            self._tell_coming(order, reader, step)
        # A worker that is given every fourth step advises every fourth: the others advise theirs.
        ahead = step + self.ahead_steps
        if self.ahead_steps and ahead < order.num_steps and ahead != self._advised:
            reader.advise(self._stand_ins(ahead))
            self._advised = ahead
        return reader.read(self._stand_ins(step), verify=True)

    def _tell_coming(self, order: EpochOrder, reader: ShardReader, step: int) -> None:
        """Have the shards of this window and the next fetched, at an epoch's end those of the next epoch."""
        rank: dict[str, Any] = {"rank": self.rank, "world_size": self.world_size}
        coming, change = order.coming_shards(step, **rank)
        if change == order.num_steps:
            following = self._order_of(reader.catalog, self.epoch + 1)
            coming += following.coming_shards(0, num_windows=1, **rank)[0]
        reader.will_read([shard for _, shard in coming])
        self._told = step, change

    def _stand_ins(self, step: int) -> Ints:
        if self.subset is None:
            return self.known_bad.stand_ins(self._places(step), self.starts)
        bad = np.fromiter(self.known_bad.positions, dtype=np.int64)
        places = np.searchsorted(self.subset, bad)[np.isin(bad, self.subset)]
        known = KnownBad(frozenset(places.tolist()), self.known_bad.shards)
        return self._taken(known.stand_ins(self._places(step), np.searchsorted(self.subset, self.starts)))

    def _places(self, step: int) -> Ints:
        """What is read at step, as places in the subset: what the order counts."""
        return self._open()[0].positions(step, rank=self.rank, world_size=self.world_size)

    def _taken(self, places: Ints) -> Ints:
        return places if self.subset is None else self.subset[places]

    def for_epoch(self, epoch: int) -> EpochFetch:
        """The same rank in another epoch; takes over the open shards."""
        return self._with(epoch=epoch)

    def without(self, known_bad: KnownBad) -> EpochFetch:
        """The same rank and epoch, with those samples replaced; takes over the open shards."""
        return self._with(known_bad=known_bad)

    def _with(self, **changed: object) -> EpochFetch:
        state = self.__getstate__() | changed
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
            at_hand = shards_at_hand(self.num_lanes // self.world_size, window_shards=self.window_shards)
            self._reader = ShardReader(open_shards(self.place), num_shards_at_hand=at_hand)
        if self._order is None:
            self._order = self._order_of(self._reader.catalog, self.epoch)
        return self._order, self._reader

    def _order_of(self, catalog: Catalog, epoch: int) -> EpochOrder:
        return EpochOrder(
            subset_sizes(catalog, self.subset),
            seed=self.seed,
            epoch=epoch,
            global_batch=self.global_batch,
            num_lanes=self.num_lanes,
            window_shards=self.window_shards,
        )

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order, self._reader, self._advised, self._told = None, None, -1, (0, 0)


def subset_sizes(catalog: Catalog, subset: Ints | None) -> Ints:
    """(S,) samples of each shard that the subset (None: all) takes."""
    return catalog.shard_sizes if subset is None else np.diff(np.searchsorted(subset, catalog.starts))


class _OpenFiles:
    """File descriptors of the shards used last."""

    def __init__(self, open_shard: Callable[[int], int], *, max_files: int) -> None:
        self._open_shard, self._max_files = open_shard, max_files
        self._files: OrderedDict[int, int] = OrderedDict()

    def open(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is not None:
            self._files.move_to_end(shard)
            return file
        file = self._files[shard] = self._open_shard(shard)
        # Members are read in shuffled order: the kernel's own read-ahead would fetch the wrong ones.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        if len(self._files) > self._max_files:
            os.close(self._files.popitem(last=False)[1])
        return file

    def close(self, *, but: frozenset[int] = frozenset()) -> None:
        for shard in [*self._files]:
            if shard not in but:
                os.close(self._files.pop(shard))

    def __del__(self) -> None:
        self.close()


def _open_local(catalog: Catalog, shard: int) -> int:
    return os.open(catalog.shard_path(shard), os.O_RDONLY | os.O_CLOEXEC)


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


def _cut_short(path: Path) -> str:
    return f"{path}: it ends after {path.stat().st_size:,} bytes, before its index does"
