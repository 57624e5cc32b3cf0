"""A contest of ours against a peer: the sides must agree before the clock starts."""

import dataclasses
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from linerate.bench.machine import machine, noise, probe
from linerate.bench.record import Record
from linerate.bench.timing import Seconds, Side, interleave, paired_ratio

Size = Literal["tiny", "quick", "full"]
ValueT = TypeVar("ValueT")


class Disagreement(Exception):
    """The two sides do not produce the same, so their speeds say nothing."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How large, how often and on which images to measure."""

    size: Size = "full"
    """full is the work that the bars name; quick takes about a minute for all; tiny is for tests"""
    scratch: Path
    """folder for inputs and outputs, on tmpfs where there is one; the caller empties it"""
    images: Path | None = None
    """a folder of JPEGs to use instead of generated ones"""
    rounds: int = 9
    device: str = "cpu"
    """where the step and the views are measured: cpu or cuda"""
    for_gpu: bool = False
    """whether the contests are those of a GPU; at the tiny size they run on a CPU as well"""
    backends: tuple[str, ...] = ()
    """of `views`: what makes them; none: DALI on one core against Pillow"""
    recipe: str | None = None
    """of `views` by backends: v1, v2 or v3; None: v2"""
    max_ranks: int = 2
    """of `scale`: the most ranks on a CPU"""

    def pick(self, *, tiny: ValueT, quick: ValueT, full: ValueT) -> ValueT:
        """The value for this size."""
        return {"tiny": tiny, "quick": quick, "full": full}[self.size]

    @property
    def min_round_s(self) -> float:
        """Seconds that one side's round should last at least."""
        return self.pick(tiny=0.0, quick=0.02, full=0.1)


@dataclass(frozen=True)
class Bar:
    """What a measurement must reach, at the full size of its work."""

    value: float
    of: Literal["ratio", "ours"] = "ratio"
    at_most: bool = False
    full_size: bool = True
    """False: the work at hand is smaller than the bar's, so nothing is said about it"""

    def reads(self) -> str:
        """`ratio >= 3`"""
        return f"{self.of} {'<=' if self.at_most else '>='} {self.value:g}"

    def met(self, *, ratio: float | None, ours: float | None) -> bool | None:
        """None where the bar does not apply."""
        value = ratio if self.of == "ratio" else ours
        if value is None or not self.full_size:
            return None
        return value <= self.value if self.at_most else value >= self.value


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The same work stripped to what no implementation can leave out, at the rate of its fastest round.

    Our share of it is our median rate over that one, so that a slow round of the ceiling lifts no share over
    100 %. What stays over it is no noise of a round: ours leaves out what the ceiling does, or lies better in
    memory (`ema` beside a flat add of other buffers: 1.02).
    """

    name: str
    side: Side
    amount: float | None = None
    """units in one call; the contest's own where None"""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Two sides that do the same work."""

    peer: str | None
    work: str
    unit: str
    amount: float
    """units that one call of either side does"""
    ours: Side
    theirs: Side | None = None
    """None: the peer is missing, or there is none"""
    missing: str | None = None
    """which peer is missing, and how to bring it"""
    agree: Callable[[], str] | None = None
    """asserts that both sides produce the same and says what was found equal; raises Disagreement"""
    bar: Bar | None = None
    ceiling: Ceiling | None = None
    no_ceiling: str | None = None
    """why nothing is called this work's ceiling, where there is none"""
    ranks: int | None = None
    min_round_s: float | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Count:
    """A number that is exact on every machine, such as operations or bytes; less is better."""

    peer: str | None
    work: str
    unit: str
    ours: float
    theirs: float | None = None
    equal: str | None = None
    bar: Bar | None = None
    ranks: int | None = None
    note: str | None = None


def run_contest(name: str, contest: Contest | Count | Record, *, setting: Setting, suite: str) -> Record:
    """The record of one contest: agreement, interleaved rounds, ratio with interval, share of the ceiling.

    What is a record already stays as it is, but for where and when.
    """
    if isinstance(contest, Record):
        return dataclasses.replace(
            contest,
            suite=suite,
            machine=contest.machine or machine(),
            measured_at=contest.measured_at or _now(),
        )
    if isinstance(contest, Count):
        return _count_record(name, contest, suite)
    blank = _blank_record(name, contest, suite)
    equal = None
    if contest.agree is not None and contest.theirs is not None:
        try:
            equal = contest.agree()
        except Disagreement as error:
            return dataclasses.replace(blank, refused=str(error))
    sides = {"ours": contest.ours}
    if contest.theirs is not None:
        sides["theirs"] = contest.theirs
    if contest.ceiling is not None:
        sides["ceiling"] = contest.ceiling.side
    min_round_s = setting.min_round_s if contest.min_round_s is None else contest.min_round_s
    before = probe()
    times = interleave(sides, rounds=setting.rounds, min_round_s=min_round_s)
    return _time_record(dataclasses.replace(blank, equal=equal), contest, times, noise(before, probe()))


def timed_record(
    name: str, contest: Contest, *, times: dict[str, Seconds], noise: dict[str, Any], suite: str
) -> Record:
    """The record of a contest whose sides were timed already, among others.

    times: `ours`, and where there are such `theirs` and `ceiling`, as seconds per call round by round.
    """
    return _time_record(_blank_record(name, contest, suite), contest, times, noise)


def missing_record(name: str, contest: Contest, *, missing: str, suite: str = "") -> Record:
    """The record of a contest that cannot be held. missing: what is not installed, and how to bring it."""
    return dataclasses.replace(_blank_record(name, contest, suite), missing=missing)


def _blank_record(name: str, contest: Contest, suite: str) -> Record:
    return Record(
        name=name,
        peer=contest.peer,
        work=contest.work,
        unit=contest.unit,
        amount=contest.amount,
        missing=contest.missing,
        note=contest.note,
        ranks=contest.ranks,
        ceiling=f"none: {contest.no_ceiling}" if contest.no_ceiling else None,
        bar=contest.bar.value if contest.bar else None,
        bar_reads=contest.bar.reads() if contest.bar else None,
        suite=suite,
        measured_at=_now(),
        machine=machine(),
    )


def _time_record(blank: Record, contest: Contest, times: dict[str, Seconds], noise: dict[str, Any]) -> Record:
    ours, theirs, ceiling = times["ours"], times.get("theirs"), times.get("ceiling")
    rate = contest.amount / float(np.median(ours))
    record = dataclasses.replace(
        blank,
        ours=rate,
        ours_p10=_rate_quantile(ours, contest.amount, 0.1),
        ours_p90=_rate_quantile(ours, contest.amount, 0.9),
        ours_s=tuple(map(float, ours)),
        machine={**blank.machine, "noise": noise},
    )
    if theirs is not None:
        ratio = paired_ratio(theirs, ours)
        record = dataclasses.replace(
            record,
            theirs=contest.amount / float(np.median(theirs)),
            theirs_p10=_rate_quantile(theirs, contest.amount, 0.1),
            theirs_p90=_rate_quantile(theirs, contest.amount, 0.9),
            theirs_s=tuple(map(float, theirs)),
            ratio=ratio.median,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
        )
    if ceiling is not None and contest.ceiling is not None:
        most = (contest.ceiling.amount or contest.amount) / float(np.min(ceiling))
        record = dataclasses.replace(
            record, ceiling=contest.ceiling.name, ceiling_rate=most, ceiling_share=rate / most
        )
    if contest.bar is not None:
        met = contest.bar.met(ratio=record.ratio, ours=record.ours)
        record = dataclasses.replace(record, met=met)
    return record


def _count_record(name: str, count: Count, suite: str) -> Record:
    ratio = count.theirs / count.ours if count.theirs is not None and count.ours else None
    return Record(
        name=name,
        kind="count",
        peer=count.peer,
        work=count.work,
        unit=count.unit,
        ours=count.ours,
        theirs=count.theirs,
        ratio=ratio,
        ratio_low=ratio,
        ratio_high=ratio,
        bar=count.bar.value if count.bar else None,
        bar_reads=count.bar.reads() if count.bar else None,
        met=count.bar.met(ratio=ratio, ours=count.ours) if count.bar else None,
        equal=count.equal,
        note=count.note,
        ranks=count.ranks,
        suite=suite,
        measured_at=_now(),
        machine=machine(),
    )


def _rate_quantile(seconds: Seconds, amount: float, share: float) -> float:
    return float(np.quantile(amount / seconds, share))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
