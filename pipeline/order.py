"""Which samples a rank reads at a step: a pure function of (shard sizes, seed, epoch, batch, lanes).

The shards of an epoch stand in a shuffled row. The row is cut into L equal lanes, a lane is cut into
windows of a few shards, and a window is shuffled as a whole. Every global batch takes B/L samples from
each lane, so it holds the same samples whatever the world size; rank r of W reads lanes
[r L/W, (r+1) L/W) and nothing else. Only the windows at hand are computed, so a seek costs one window
and memory grows with the number of shards, not with the number of samples.

Legend: N samples, S shards, L lanes, B global batch, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from linerate.shards.errors import UserError

DEFAULT_WINDOW_SHARDS = 4
MAX_DEFAULT_LANES = 64

# Second word of the Philox key: what is drawn. One seed never draws the same numbers for two purposes.
_SHARD_ROW, _DROPPED_RUN, _WINDOW = 1, 2, 3

Ints = NDArray[np.int64]


def default_num_lanes(global_batch: int) -> int:
    """The lanes for a batch, whatever the world size: a divisor of it, at most 64.

    Of those the largest that keeps all factors of two (up to 64), since machines come in powers of two:
    256 -> 64, 96 -> 32, 120 -> 40, 100 -> 20.
    """
    power = 1
    while power < MAX_DEFAULT_LANES and global_batch % (2 * power) == 0:
        power *= 2
    return max(d for d in range(power, MAX_DEFAULT_LANES + 1, power) if global_batch % d == 0)


def rank_lanes(num_lanes: int, *, rank: int, world_size: int) -> range:
    """The lanes that rank reads. Raises UserError where the world size does not divide the lanes."""
    if not 0 <= rank < world_size:
        raise UserError(f"rank={rank} is not in 0..{world_size - 1} (world_size={world_size})")
    if num_lanes % world_size:
        near = _nearest_divisors(num_lanes, world_size)
        raise UserError(
            f"world_size={world_size} does not divide num_lanes={num_lanes}; the nearest world sizes that do "
            f"are {near}, or set num_lanes to a multiple of {world_size} that divides the global batch"
        )
    share = num_lanes // world_size
    return range(rank * share, (rank + 1) * share)


@dataclass(frozen=True)
class _Window:
    begin: int
    end: int
    positions: Ints


class EpochOrder:
    """The order of one epoch: `positions(step, ...)` for steps 0..num_steps-1."""

    num_samples: int
    num_steps: int
    """Global batches in the epoch; every rank does as many."""
    num_dropped: int
    """Samples that this epoch leaves out, fewer than one global batch; another run of them every epoch."""

    def __init__(
        self,
        shard_sizes: ArrayLike,
        *,
        seed: int,
        epoch: int,
        global_batch: int,
        num_lanes: int,
        window_shards: int = DEFAULT_WINDOW_SHARDS,
    ) -> None:
        """shard_sizes: (S,) samples per shard, in packed order.

        Raises UserError where lanes do not divide the batch or there are fewer samples than one batch.
        """
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(sizes.sum())
        _check(self.num_samples, global_batch=global_batch, num_lanes=num_lanes, window_shards=window_shards)
        self.seed, self.epoch = seed, epoch
        self.global_batch, self.num_lanes, self.window_shards = global_batch, num_lanes, window_shards
        self.num_steps = self.num_samples // global_batch
        self.num_dropped = self.num_samples - self.num_steps * global_batch
        self._lane_batch = global_batch // num_lanes
        self._lane_length = self.num_steps * self._lane_batch
        self._cut_row(sizes)
        self._windows: dict[int, _Window] = {}

    def positions(self, step: int, *, rank: int = 0, world_size: int = 1) -> Ints:
        """(global_batch // world_size,) int64: the positions that rank reads at step.

        Ranks in turn, joined, give the same array for every world size.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is not in 0..{self.num_steps - 1}")
        lanes = rank_lanes(self.num_lanes, rank=rank, world_size=world_size)
        size = self._lane_batch
        out = np.empty(len(lanes) * size, dtype=np.int64)
        for i, lane in enumerate(lanes):
            self._read_lane(lane, step * size, out[i * size : (i + 1) * size])
        return out

    def coming_shards(
        self, step: int, *, rank: int = 0, world_size: int = 1, num_windows: int = 2
    ) -> tuple[list[tuple[int, int]], int]:
        """What rank's lanes mix at step and in the windows after: (steps until it is read, shard) each.

        Soonest first, a shard once. Beside them the first later step at which a lane is in another window;
        num_steps where there is none.
        """
        soonest: dict[int, int] = {}
        change = self.num_steps
        for lane in rank_lanes(self.num_lanes, rank=rank, world_size=world_size):
            place = lane * self._lane_length + step * self._lane_batch
            nth, lane_windows = self._window_at(lane, place)
            for window in range(nth, min(nth + num_windows, lane_windows)):
                a, b = self._window_pieces(lane, window)
                begin, end = int(self._piece_begin[a]), int(self._piece_begin[b])
                wait = max(0, begin - place) // self._lane_batch
                if window == nth:
                    change = min(change, step - (place - end) // self._lane_batch)
                shards = np.searchsorted(self._starts, self._piece_position[a:b], side="right") - 1
                for shard in shards.tolist():
                    soonest[shard] = min(wait, soonest.get(shard, wait))
        return sorted((wait, shard) for shard, wait in soonest.items()), change

    def pieces(self, *, rank: int = 0, world_size: int = 1) -> tuple[Ints, Ints, Ints]:
        """What rank reads in the whole epoch, as runs of the shards: (shard, first row, rows), each (P,)."""
        lanes = rank_lanes(self.num_lanes, rank=rank, world_size=world_size)
        first, last = self._lane_pieces[lanes.start], self._lane_pieces[lanes.stop]
        begin = self._piece_position[first:last]
        shard = np.searchsorted(self._starts, begin, side="right") - 1
        return shard, begin - self._starts[shard], np.diff(self._piece_begin[first : last + 1])

    def _cut_row(self, sizes: Ints) -> None:
        """Cut the shuffled row of shards into pieces: runs of one shard that one lane reads.

        `place` counts the kept samples along the row, lane after lane. A piece is known by its first
        place and the packed position of its first sample.
        """
        shard_row = _permutation(len(sizes), self.seed, _SHARD_ROW, self.epoch)
        row_starts = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes[shard_row], out=row_starts[1:])
        kept = self.num_steps * self.global_batch
        turn, hole = self._place_dropped_run(kept, fewer_shards_than_lanes=len(sizes) < self.num_lanes)
        begins = (row_starts[:-1] - turn) % self.num_samples
        begins = np.where(begins > hole, np.maximum(begins - self.num_dropped, hole), begins)
        cuts = np.arange(self.num_lanes + 1) * self._lane_length
        cuts_and_begins = np.concatenate([begins, cuts, [hole]])
        self._piece_begin = np.unique(cuts_and_begins[cuts_and_begins <= kept])
        place = self._piece_begin[:-1]
        on_row = (place + turn + np.where(place >= hole, self.num_dropped, 0)) % self.num_samples
        nth = np.searchsorted(row_starts, on_row, side="right") - 1
        self._starts = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes, out=self._starts[1:])
        self._piece_position = self._starts[shard_row[nth]] + on_row - row_starts[nth]
        self._lane_pieces = np.searchsorted(self._piece_begin, cuts).tolist()

    def _place_dropped_run(self, kept: int, *, fewer_shards_than_lanes: bool) -> tuple[int, int]:
        """(turn, hole): the row begins `turn` samples late and leaves out the run after `hole` samples.

        The run lies elsewhere every epoch, so no sample is left out for good. With fewer shards than
        lanes the row is turned as well, so that lanes are cut at other samples every epoch; with more,
        that would only split one more shard between two ranks.
        """
        draw = int(_random(1, self.seed, _DROPPED_RUN, self.epoch)[0])
        if fewer_shards_than_lanes:
            return draw % self.num_samples, kept
        return 0, draw % (kept + 1) if self.num_dropped else kept

    def _read_lane(self, lane: int, start: int, out: Ints) -> None:
        place, end = lane * self._lane_length + start, lane * self._lane_length + start + len(out)
        filled = 0
        while place < end:
            window = self._windows.get(lane)
            if window is None or not window.begin <= place < window.end:
                window = self._windows[lane] = self._shuffle_window(lane, place)
            run = window.positions[place - window.begin : end - window.begin]
            out[filled : filled + len(run)] = run
            filled += len(run)
            place += len(run)

    def _shuffle_window(self, lane: int, place: int) -> _Window:
        """The window of the lane that holds place. A lane's windows are within one piece of equal."""
        nth, _ = self._window_at(lane, place)
        a, b = self._window_pieces(lane, nth)
        begins = self._piece_begin[a : b + 1]
        begin, end = int(begins[0]), int(begins[-1])
        positions = np.repeat(self._piece_position[a:b] - begins[:-1], np.diff(begins))
        positions += np.arange(begin, end)
        shuffled = positions[_permutation(end - begin, self.seed, _WINDOW, self.epoch, lane, nth)]
        return _Window(begin, end, shuffled)

    def _window_at(self, lane: int, place: int) -> tuple[int, int]:
        """Which of its windows the lane is in at place, and how many it has."""
        first, num = self._lane_pieces[lane], self._lane_pieces[lane + 1] - self._lane_pieces[lane]
        num_windows = -(-num // self.window_shards)
        piece = int(np.searchsorted(self._piece_begin, place, side="right")) - 1 - first
        return ((piece + 1) * num_windows - 1) // num, num_windows

    def _window_pieces(self, lane: int, nth: int) -> tuple[int, int]:
        """The pieces a..b-1 that the nth window of the lane mixes."""
        first, num = self._lane_pieces[lane], self._lane_pieces[lane + 1] - self._lane_pieces[lane]
        num_windows = -(-num // self.window_shards)
        return first + num * nth // num_windows, first + num * (nth + 1) // num_windows


def _random(
    count: int, seed: int, purpose: int, epoch: int, lane: int = 0, nth: int = 0
) -> NDArray[np.uint64]:
    """(count,) words of Philox. The raw words, since numpy keeps only those the same between versions."""
    words = 2**64
    generator = np.random.Philox(
        key=np.array([seed % words, purpose], dtype=np.uint64),
        counter=np.array([0, nth, lane, epoch], dtype=np.uint64),
    )
    return np.asarray(generator.random_raw(count))


def _permutation(count: int, seed: int, purpose: int, epoch: int, lane: int = 0, nth: int = 0) -> Ints:
    return np.argsort(_random(count, seed, purpose, epoch, lane, nth), kind="stable")


def _check(num_samples: int, *, global_batch: int, num_lanes: int, window_shards: int) -> None:
    if min(global_batch, num_lanes, window_shards) < 1:
        raise UserError(
            f"global_batch={global_batch}, num_lanes={num_lanes} and window_shards={window_shards} "
            "must each be 1 or more"
        )
    if global_batch % num_lanes:
        near = _nearest_divisors(global_batch, num_lanes)
        raise UserError(
            f"num_lanes={num_lanes} does not divide global_batch={global_batch}; "
            f"the nearest that do are {near}"
        )
    if num_samples < global_batch:
        raise UserError(
            f"{num_samples} samples do not fill one global_batch={global_batch}; "
            f"a batch of {num_samples} or less would work, or more images"
        )


def _nearest_divisors(number: int, wish: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < wish][-1:]
    above = [d for d in divisors if d > wish][:1]
    return " and ".join(str(d) for d in below + above)
