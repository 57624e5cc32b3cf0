"""Sides timed fairly: interleaved in one process, warmed up, judged by medians over rounds.

A round times every side once, starting with another side each time, so that drift of the clock rate, the
page cache or a neighbour's load falls on all of them alike. Ratios are taken round by round; their interval
comes from resampling rounds, at the percentiles that small samples need (Hesterberg 2015, "expanded
percentiles"): the plain ones held the truth in 87 % of trials at 7 rounds. Seconds are per call of a side.
"""

import contextlib
import gc
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]

# Least rounds of a record. At five not even their whole range holds the true median in 95 % of trials.
MIN_ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Side:
    """One contestant."""

    run: Callable[[], object]
    """what the clock sees"""
    prepare: Callable[[], object] | None = None
    """what must happen before each call, outside the clock (an empty output folder, say)"""


@dataclass(frozen=True)
class Interval:
    """A ratio with its 95 % interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds per call of both sides, round by round."""

    ours_s: Seconds
    theirs_s: Seconds
    amount: float
    """units of work in one call"""

    @property
    def ratio(self) -> Interval:
        """How many times as fast ours is."""
        return paired_ratio(self.theirs_s, self.ours_s)

    @property
    def ours(self) -> float:
        """Median rate of ours, units/s."""
        return self.amount / float(np.median(self.ours_s))

    @property
    def theirs(self) -> float:
        """Median rate of theirs, units/s."""
        return self.amount / float(np.median(self.theirs_s))


def compare(
    ours: Side | Callable[[], object],
    theirs: Side | Callable[[], object],
    *,
    work: float = 1.0,
    rounds: int = 9,
    warmup: int = 1,
    min_round_s: float = 0.05,
) -> Comparison:
    """Both sides' seconds over interleaved rounds. work: units done by one call of either side.

    Equality of what the sides return is the caller's to assert first.
    """
    times = interleave(
        {"ours": ours, "theirs": theirs}, rounds=rounds, warmup=warmup, min_round_s=min_round_s
    )
    return Comparison(ours_s=times["ours"], theirs_s=times["theirs"], amount=work)


def measure(
    side: Side | Callable[[], object], *, rounds: int = 9, warmup: int = 1, min_round_s: float = 0.05
) -> Seconds:
    """(rounds,) seconds per call of one side alone."""
    return interleave({"ours": side}, rounds=rounds, warmup=warmup, min_round_s=min_round_s)["ours"]


def interleave(
    sides: Mapping[str, Side | Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    min_round_s: float = 0.05,
) -> dict[str, Seconds]:
    """name -> (rounds,) seconds per call; the round starts with another side each time.

    A side shorter than `min_round_s` is called as often as fills it, so that the clock's grain and the
    synchronisation of a GPU do not show. Raises ValueError for fewer than seven rounds.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds={rounds} cannot carry a 95 % interval; take {MIN_ROUNDS} or more")
    named = {name: side if isinstance(side, Side) else Side(run=side) for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in named}
    order = list(named)
    with _frozen_heap():
        calls = {name: _calls_to_fill(side, warmup, min_round_s) for name, side in named.items()}
        for index in range(rounds):
            first = index % len(order)
            for name in order[first:] + order[:first]:
                times[name].append(_seconds_per_call(named[name], calls[name]))
    return {name: np.asarray(seconds) for name, seconds in times.items()}


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """Garbage collection passes over what was alive before: with torch loaded one takes 0.2 s otherwise."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _calls_to_fill(side: Side, warmup: int, min_round_s: float) -> int:
    """Warm up, then size a round by the fastest of two timed calls."""
    for _ in range(warmup):
        _seconds_per_call(side, 1)
    if min_round_s <= 0:
        return 1
    fastest = min(_seconds_per_call(side, 1) for _ in range(2))
    return max(1, math.ceil(min_round_s / max(fastest, 1e-9)))


def _seconds_per_call(side: Side, calls: int) -> float:
    gc.collect()
    total = 0.0
    # Without a prepare step all calls share one clock reading: nothing of ours runs between them.
    batches, batch = (1, calls) if side.prepare is None else (calls, 1)
    for _ in range(batches):
        if side.prepare is not None:
            side.prepare()
        synchronize()
        start = time.perf_counter()
        for _ in range(batch):
            side.run()
        synchronize()
        total += time.perf_counter() - start
    return total / calls


def synchronize() -> None:
    """Wait for the GPU where one is in use; does not import torch, let alone start CUDA."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def paired_ratio(above: Seconds, below: Seconds, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Median over rounds of above/below and its bootstrap 95 % interval. Both (rounds,), same rounds."""
    ratios = np.asarray(above) / np.asarray(below)
    picks = np.random.default_rng(seed).integers(0, len(ratios), size=(resamples, len(ratios)))
    return _interval(float(np.median(ratios)), np.median(ratios[picks], axis=1), len(ratios))


def unpaired_ratio(above: Seconds, below: Seconds, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Ratio of the medians of two runs that share no rounds, with its bootstrap 95 % interval."""
    generator = np.random.default_rng(seed)
    above, below = np.asarray(above), np.asarray(below)
    drawn = [
        np.median(side[generator.integers(0, len(side), size=(resamples, len(side)))], axis=1)
        for side in (above, below)
    ]
    return _interval(
        float(np.median(above) / np.median(below)), drawn[0] / drawn[1], min(len(above), len(below))
    )


def _interval(median: float, resampled: Seconds, num_rounds: int) -> Interval:
    tail = expanded_tail(num_rounds)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(median, float(low), float(high))


def expanded_tail(num_rounds: int) -> float:
    """The percentile at which a bootstrap of so few rounds is cut for a 95 % interval; 0.025 for many."""
    z, v = 1.959964, max(1, num_rounds - 1)
    # Student's quantile by Cornish and Fisher's expansion, three digits from six degrees of freedom on.
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return statistics.NormalDist().cdf(-t * math.sqrt((v + 1) / v))


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """The whole process on one core: every thread that runs, and all that start meanwhile, children too.

    torch keeps one thread inside; it is loaded before, since it counts its threads when it first is.
    Where the system has no affinity calls, only torch is bounded.
    """
    with one_thread():
        if not hasattr(os, "sched_setaffinity"):
            yield
            return
        cores = os.sched_getaffinity(0)
        before = {thread: os.sched_getaffinity(thread) for thread in _threads()}
        try:
            for thread in before:
                _pin(thread, {max(cores)})
            yield
        finally:
            for thread in _threads():
                _pin(thread, before.get(thread, cores))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch with one intra-op thread inside."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _threads() -> list[int]:
    tasks = Path("/proc/self/task")
    return [int(task.name) for task in tasks.iterdir()] if tasks.is_dir() else [threading.get_native_id()]


def _pin(thread: int, cores: set[int]) -> None:
    # A thread may end between the listing and this call.
    with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(thread, cores)
