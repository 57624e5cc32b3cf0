from pathlib import Path

import numpy as np
import pytest

from linerate.bench.contest import (
    Bar,
    Ceiling,
    Contest,
    Count,
    Disagreement,
    Setting,
    run_contest,
    timed_record,
)
from linerate.bench.peers import missing_peer
from linerate.bench.timing import Side


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(size="tiny", scratch=tmp_path, rounds=7)


def work(steps: int) -> int:
    return sum(i * i for i in range(steps))


def contest(**changes: object) -> Contest:
    fields: dict[str, object] = {
        "peer": "slow",
        "work": "squares",
        "unit": "squares/s",
        "amount": 1000,
        "ours": Side(run=lambda: work(1000)),
        "theirs": Side(run=lambda: work(8000)),
        "agree": lambda: "the sums",
        "bar": Bar(2.0),
    }
    return Contest(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_record_holds_both_sides_the_ratio_and_the_verdict(setting: Setting):
    record = run_contest("squares", contest(), setting=setting, suite="quick")
    assert record.ratio is not None
    assert record.ratio > 4
    assert record.ratio_low <= record.ratio <= record.ratio_high
    assert record.met is True
    assert record.bar_reads == "ratio >= 2"
    assert record.equal == "the sums"
    assert len(record.ours_s) == len(record.theirs_s) == 7
    assert record.ours_p10 <= record.ours <= record.ours_p90
    assert isinstance(record.machine["noise"]["noisy"], bool)


def test_sides_that_disagree_are_refused_before_anything_is_timed(setting: Setting):
    calls: list[str] = []

    def differ() -> str:
        raise Disagreement("ours has 3 images, theirs 4")

    record = run_contest(
        "squares",
        contest(
            agree=differ,
            ours=Side(run=lambda: calls.append("ours")),
            theirs=Side(run=lambda: calls.append("x")),
        ),
        setting=setting,
        suite="quick",
    )
    assert calls == []
    assert record.refused == "ours has 3 images, theirs 4"
    assert (record.ours, record.ratio, record.met) == (None, None, None)


def test_a_missing_peer_is_named_and_ours_is_still_measured(setting: Setting):
    missing = missing_peer("no_such_peer")
    assert missing == "no_such_peer is not installed; bring it with: pip install no_such_peer"
    record = run_contest("squares", contest(theirs=None, missing=missing), setting=setting, suite="quick")
    assert record.missing == missing
    assert record.ours > 0
    assert (record.theirs, record.ratio, record.met, record.equal) == (None, None, None, None)


def test_an_installed_peer_is_not_missing():
    assert missing_peer("torch") is None


def test_ours_is_also_a_share_of_the_ceiling(setting: Setting):
    ceiling = Ceiling(name="half the work", side=Side(run=lambda: work(500)))
    record = run_contest("squares", contest(ceiling=ceiling), setting=setting, suite="quick")
    assert record.ceiling == "half the work"
    assert 0.2 < record.ceiling_share < 0.9
    assert record.ceiling_share == pytest.approx(record.ours / record.ceiling_rate)


def test_a_slow_round_of_the_ceiling_lifts_no_share():
    times = {"ours": np.full(7, 1.0), "ceiling": np.array([0.8, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5])}
    held = contest(theirs=None, ceiling=Ceiling(name="a copy", side=Side(run=lambda: None)))
    record = timed_record("squares", held, times=times, noise={}, suite="")
    assert (record.ceiling_rate, record.ceiling_share) == (pytest.approx(1250), pytest.approx(0.8))


def test_smaller_work_than_the_bars_says_nothing_about_the_bar():
    assert Bar(3.0, full_size=False).met(ratio=9.0, ours=1.0) is None
    assert Bar(3.0).met(ratio=2.9, ours=1.0) is False
    assert Bar(900, of="ours", at_most=True).met(ratio=None, ours=900) is True
    assert Bar(900, of="ours", at_most=True).reads() == "ours <= 900"


def test_counts_are_exact_and_less_is_better(setting: Setting):
    count = Count(
        peer="eager", work="a step", unit="ops", ours=800, theirs=1000, bar=Bar(900, of="ours", at_most=True)
    )
    record = run_contest("step", count, setting=setting, suite="cpu")
    assert (record.kind, record.ratio, record.ratio_low, record.ratio_high) == ("count", 1.25, 1.25, 1.25)
    assert record.met is True


def test_a_count_of_zero_has_no_ratio_but_meets_its_bar(setting: Setting):
    bar = Bar(0, of="ours", at_most=True)
    count = Count(peer="reference", work="an enqueue", unit="syncs", ours=0, theirs=1, bar=bar)
    record = run_contest("enqueue", count, setting=setting, suite="cpu")
    assert (record.ratio, record.met) == (None, True)
