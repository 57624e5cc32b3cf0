"""Samples that cannot be had though they were sound when packed: which, what stands in, how many are enough.

A sample is bad when its bytes are gone, fail their checksum or do not decode; a shard when it or its index is
gone. What stands in follows from what is bad alone, so every rank count and every restart finds the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError

DEFAULT_BAD_SHARE = 0.001
BAD_SAMPLES_FLOOR = 8
"""So many a rank may replace in an epoch, however small its share of the samples; unless none may be."""

Ints = NDArray[np.int64]
_log = logging.getLogger("linerate.bad_samples")


class BadSamples(UserError):
    """Samples of one batch that cannot be had, or all of one shard."""

    def __init__(
        self, sample_id: Sequence[int], position: Sequence[int], reason: str, shard: int | None = None
    ) -> None:
        """shard: the shard that is lost as a whole; the samples are those of it that were asked for."""
        self.sample_id, self.position = list(sample_id), list(position)
        self.reason = " ".join(reason.split())
        self.shard = shard
        super().__init__(self.describe())

    def describe(self) -> str:
        """The line for the user."""
        what = f"sample {self.names()}" if self.shard is None else "a shard"
        return f"cannot read {what}: {self.reason}; `linerate shard verify` lists all that is damaged"

    def names(self) -> str:
        """The ids, of many the first eight."""
        names = ", ".join(f"{one:012d}" for one in self.sample_id[:8])
        more = f" and {len(self.sample_id) - 8} more" if len(self.sample_id) > 8 else ""
        return names + more

    def __reduce__(self) -> tuple[object, ...]:
        """Workers send it to the parent by pickle."""
        return type(self), (self.sample_id, self.position, self.reason, self.shard)


@dataclass(frozen=True)
class KnownBad:
    """What a rank knows to be bad."""

    positions: frozenset[int] = frozenset()
    shards: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.positions or self.shards)

    def stand_ins(self, positions: Ints, starts: Ints) -> Ints:
        """The positions, with a neighbour in place of each that is known to be bad.

        That is the next position, or in place of a lost shard the same row of the next one.
        starts: (S+1,) position of each shard's first sample. Raises UserError where none is left.
        """
        if not self:
            return positions
        shards = np.searchsorted(starts, positions, side="right") - 1
        bad = np.isin(positions, list(self.positions)) | np.isin(shards, list(self.shards))
        out = positions.copy()
        for row in np.flatnonzero(bad).tolist():
            out[row] = self._neighbour(int(positions[row]), starts)
        return out

    def _neighbour(self, position: int, starts: Ints) -> int:
        num_samples, num_shards = int(starts[-1]), len(starts) - 1
        for _ in range(len(self.positions) + num_shards + 1):
            shard = shard_of(position, starts)
            if shard in self.shards:
                row = position - int(starts[shard])
                sizes = np.diff(starts)
                following = (np.arange(num_shards) + shard + 1) % num_shards
                shard = int(following[np.argmax(sizes[following] > 0)])
                position = int(starts[shard]) + row % int(sizes[shard])
            elif position in self.positions:
                position = (position + 1) % num_samples
            else:
                return position
        raise UserError(
            "no sample of these shards can be read; `linerate shard verify` lists what is damaged"
        )


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """One finding, for the log."""

    sample_id: int | None
    """None: a shard."""
    key: str | None
    """The sample's key in the source; None: a shard, or its index does not say."""
    shard: str
    """The tar's name."""
    reason: str
    epoch: int
    step: int
    """Of the epoch."""


def log_bad_sample(found: BadSample) -> None:
    """One line of Python's log."""
    what = "a whole shard" if found.sample_id is None else f"sample {found.sample_id:012d} ({found.key})"
    _log.warning("replaced %s of %s: %s", what, found.shard, found.reason)


@dataclass
class Replacements:
    """What one rank has replaced so far, and whether that is too much."""

    catalog: Catalog
    share: float = DEFAULT_BAD_SHARE
    """Of the samples that a rank reads in an epoch, the greatest share that may be replaced; 0: none."""
    on_bad: Callable[[BadSample], None] = log_bad_sample
    known: KnownBad = field(default_factory=KnownBad)
    num_replaced: int = 0
    """In all epochs."""
    _in_epoch: int = 0
    _last: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UserError(
                f"bad_share={self.share} is no share of the samples; give one in [0, 1), as 0.001"
            )

    def begin_epoch(self) -> None:
        """A lost shard may be back; what is damaged stays damaged."""
        self._in_epoch = 0
        self.known = KnownBad(self.known.positions)

    def learn(self, error: BadSamples, *, epoch: int, step: int) -> KnownBad:
        """What is known to be bad now. Raises the error itself where it is no news, or nothing may be bad."""
        if error.shard is None:
            known = KnownBad(self.known.positions | set(error.position), self.known.shards)
        else:
            known = KnownBad(self.known.positions, self.known.shards | {error.shard})
        if not self.share or known == self.known:
            raise error
        self._tell(error, epoch=epoch, step=step)
        self.known, self._last = known, error.reason
        return known

    def count(self, num: int, *, num_rank_samples: int) -> None:
        """Count samples as replaced. Raises UserError beyond the budget.

        num_rank_samples: how many samples this rank reads in the epoch.
        """
        self.num_replaced += num
        self._in_epoch += num
        allowed = max(BAD_SAMPLES_FLOOR, int(self.share * num_rank_samples))
        if self._in_epoch > allowed:
            raise UserError(
                f"{self._in_epoch} samples of this epoch had to be replaced on this rank, {allowed} of its "
                f"{num_rank_samples:,} may be (bad_share={self.share:g}); the last: {self._last}; "
                f"`linerate shard verify` lists what is damaged, --bad-share allows more"
            )

    def _tell(self, error: BadSamples, *, epoch: int, step: int) -> None:
        catalog = self.catalog
        if error.shard is not None:
            found: list[tuple[int | None, str | None, int]] = [(None, None, error.shard)]
        else:
            news = {p: i for i, p in zip(error.sample_id, error.position, strict=True)}
            at = [
                (i, p, shard_of(p, catalog.starts)) for p, i in news.items() if p not in self.known.positions
            ]
            found = [(i, _key(catalog, shard, p), shard) for i, p, shard in at]
        for sample_id, key, shard in found:
            name = catalog.files[shard]
            self.on_bad(
                BadSample(
                    sample_id=sample_id, key=key, shard=name, reason=error.reason, epoch=epoch, step=step
                )
            )


def shard_of(position: int, starts: Ints) -> int:
    """The shard that holds a position."""
    return int(np.searchsorted(starts, position, side="right")) - 1


def _key(catalog: Catalog, shard: int, position: int) -> str | None:
    """The sample's key in the source, if the index still says."""
    try:
        return catalog.keys(shard)[position - int(catalog.starts[shard])]
    except (UserError, KeyError, pa.ArrowException):
        return None
