import os
import time
from types import SimpleNamespace

import numpy as np
import pytest

from linerate.bench import timing
from linerate.bench.timing import (
    Side,
    compare,
    expanded_tail,
    interleave,
    measure,
    one_core,
    paired_ratio,
    unpaired_ratio,
)


class Clock:
    """Time that passes only where a test says so: what else the machine does is not in it."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_paired_ratio_is_the_median_of_the_rounds_ratios():
    theirs = np.array([2.0, 8.0, 3.0])
    ours = np.array([1.0, 2.0, 1.0])
    assert paired_ratio(theirs, ours).median == 3.0


def test_a_drift_that_hits_both_sides_of_a_round_cancels():
    drift = np.linspace(1.0, 5.0, 9)
    ratio = paired_ratio(2.0 * drift, drift)
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("num_rounds", [7, 9, 15])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(num_rounds: int):
    covered = 0
    for seed in range(400):
        generator = np.random.default_rng(seed)
        theirs = 3.0 * generator.lognormal(0.0, 0.1, size=num_rounds)
        ours = generator.lognormal(0.0, 0.1, size=num_rounds)
        interval = paired_ratio(theirs, ours, resamples=500)
        covered += interval.low <= 3.0 <= interval.high
    assert covered / 400 >= 0.94


def test_the_cut_of_few_rounds_is_student_s_and_of_many_the_normal_one():
    assert expanded_tail(7) == pytest.approx(0.0041, abs=0.0002)
    assert expanded_tail(10_000) == pytest.approx(0.025, abs=0.0001)


def test_unpaired_ratio_of_known_samples():
    a, b = np.array([1.0, 1.1, 0.9, 1.0, 1.0]), np.array([2.0, 2.2, 1.8, 2.0, 2.0])
    ratio = unpaired_ratio(b, a)
    assert ratio.median == 2.0
    assert 1.6 <= ratio.low <= 2.0 <= ratio.high <= 2.5


def test_sides_take_turns_and_another_starts_each_round():
    calls: list[str] = []
    sides = {name: Side(run=lambda name=name: calls.append(name)) for name in ("a", "b", "c")}
    interleave(sides, rounds=7, warmup=0, min_round_s=0.0)
    rounds = "".join(calls)
    assert [rounds[i : i + 3] for i in range(0, 21, 3)] == ["abc", "bca", "cab", "abc", "bca", "cab", "abc"]


def test_warm_up_and_preparation_stay_outside_the_clock(clock):
    prepared: list[int] = []

    def prepare() -> None:
        prepared.append(1)
        clock.work(10.0)

    side = Side(run=lambda: clock.work(1.0), prepare=prepare)
    seconds = measure(side, rounds=7, warmup=2, min_round_s=0.0)
    assert len(prepared) == 2 + 7
    assert seconds.tolist() == [1.0] * 7


def test_a_short_side_is_called_until_its_round_is_long_enough(clock):
    calls: list[int] = []

    def run() -> None:
        calls.append(1)
        clock.work(1.0)

    measure(run, rounds=7, warmup=0, min_round_s=20.0)
    assert len(calls) == 2 + 7 * 20


def test_compare_finds_the_ratio_of_two_known_sides(clock):
    comparison = compare(lambda: clock.work(2.0), lambda: clock.work(6.0), work=10, rounds=7, min_round_s=0.0)
    ratio = comparison.ratio
    assert (ratio.low, ratio.median, ratio.high) == (3.0, 3.0, 3.0)
    assert (comparison.ours, comparison.theirs) == (10 / 2.0, 10 / 6.0)


def test_the_clock_of_a_measurement_is_a_real_one():
    assert measure(lambda: time.sleep(0.001), rounds=7, warmup=0, min_round_s=0.0).min() >= 0.001


def test_fewer_than_seven_rounds_are_refused():
    with pytest.raises(ValueError, match="take 7 or more"):
        measure(lambda: None, rounds=6)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="pinning untested: no affinity calls here")
def test_one_core_pins_and_gives_back():
    before = os.sched_getaffinity(0)
    with one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
