"""What a report says of many records: bars met, shares of ceilings, scaling, stages, history, cost."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from linerate.bench.cost import Cost, costs_of
from linerate.bench.fleet import Machine, machines_of
from linerate.bench.record import Record, is_projection

Status = Literal["met", "not met", "other size", "no bar", "not measured", "refused"]
# Their records have a part of the report of their own; a sweep judges accuracy.
_ELSEWHERE = ("ceilings", "scale", "step-stages", "sweep")


@dataclass(frozen=True, kw_only=True)
class ScalePoint:
    """What so many ranks reached together."""

    ranks: int
    rate: float
    low: float | None
    high: float | None
    """10th and 90th percentile of the rate over rounds; None for a projection"""
    projected: bool
    ideal: float
    """n times one rank's rate"""
    efficiency: float
    """`Record.ratio` of `scale`, a median over rounds, so that noise parts it from rate over ideal; 1 of one
    rank"""
    record: Record


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """One work on more and more ranks of one machine."""

    machine: str
    title: str
    points: tuple[ScalePoint, ...]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One batch in a pipeline or a step, by its stages."""

    machine: str
    name: str
    work: str
    stages: Mapping[str, float]
    """stage -> seconds, in the order of a batch's way"""
    whole_s: float
    """seconds that one batch took in all; less than the stages' sum where they overlap"""
    verdict: str | None
    note: str | None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All of a report, computed."""

    machines: tuple[Machine, ...]
    costs: tuple[Cost, ...]
    scalings: tuple[Scaling, ...]
    stacks: tuple[Stack, ...]

    @property
    def tally(self) -> dict[Status, int]:
        """How many of the newest records stand where; those without bar and peer are left out."""
        found = [status(record) for machine in self.machines for record in judged(machine)]
        return {stands: found.count(stands) for stands in get_args(Status) if stands in found}


def find(records: Sequence[Record], prices: Mapping[str, float]) -> Findings:
    """The findings of records, oldest first. prices: machine name -> dollars an hour."""
    machines = machines_of(records)
    return Findings(
        machines=tuple(machines),
        costs=tuple(costs_of(machines, dict(prices))),
        scalings=tuple(one for machine in machines for one in scalings_of(machine)),
        stacks=tuple(one for machine in machines for one in stacks_of(machine)),
    )


def judged(machine: Machine) -> list[Record]:
    """The newest records that are held against something: a bar, a peer or a ceiling, there or not."""
    return [
        record
        for record in machine.newest
        if not is_elsewhere(record) and (_is_bound(record) or record.ratio or record.ceiling_share)
    ]


def is_elsewhere(record: Record) -> bool:
    """Whether another part of the report shows a record, so that it is in no row against bars."""
    return record.name == "ceilings" or (record.name in _ELSEWHERE and not _is_bound(record))


def _is_bound(record: Record) -> bool:
    return bool(record.bar_reads or record.refused or record.missing)


def status(record: Record) -> Status:
    """Where a record stands against its bar."""
    if record.refused:
        return "refused"
    if record.bar_reads is None:
        return "not measured" if record.missing else "no bar"
    if record.met is not None:
        return "met" if record.met else "not met"
    return "not measured" if record.missing or record.ours is None else "other size"


@dataclass(frozen=True)
class Reach:
    """A value as a share of its bar, or of its peer where it has none; 1 is there, more is better."""

    value: float
    low: float
    high: float
    of: Literal["bar", "peer"]


def reach(record: Record) -> Reach | None:
    """How far a record came on the way to its bar; None where nothing was measured against anything."""
    found = re.match(r"(ratio|ours) (>=|<=) ", record.bar_reads or "")
    if record.bar is not None and found:
        three = _ratios(record) if found[1] == "ratio" else _rates(record)
        if three is None:
            return None
        shares = [_share(value, record.bar, at_most=found[2] == "<=") for value in three]
        low, high = sorted(shares[1:])
        return Reach(shares[0], low, high, "bar")
    ratios = _ratios(record)
    return None if ratios is None else Reach(*ratios, "peer")


def _ratios(record: Record) -> tuple[float, float, float] | None:
    if record.ratio is None:
        return None
    low = record.ratio if record.ratio_low is None else record.ratio_low
    return record.ratio, low, record.ratio if record.ratio_high is None else record.ratio_high


def _rates(record: Record) -> tuple[float, float, float] | None:
    if record.ours is None:
        return None
    low = record.ours if record.ours_p10 is None else record.ours_p10
    return record.ours, low, record.ours if record.ours_p90 is None else record.ours_p90


def _share(value: float, bar: float, *, at_most: bool) -> float:
    above, below = (bar, value) if at_most else (value, bar)
    if below:
        return above / below
    return math.inf if above else 1.0


def scalings_of(machine: Machine) -> list[Scaling]:
    """The curves of `scale`: works that differ by their ranks alone are one."""
    series: dict[str, list[Record]] = {}
    for record in machine.newest:
        of_rate = record.name == "scale" and record.unit.endswith("pairs/s") and record.ours
        if of_rate and record.ranks and (record.ranks == 1 or record.ratio):
            series.setdefault(_title(record), []).append(record)
    return [
        Scaling(machine=machine.name, title=title, points=_points(records))
        for title, records in series.items()
    ]


def _title(record: Record) -> str:
    """The work without what varies along its curve: `strong: b256 on all ranks, resnet50, 224 px`.

    A projection of strong scaling names the batch of a rank, a measurement that of all.
    """
    mode, _, rest = record.work.partition(":")
    batch = re.search(r"\bb(\d+) a rank", rest)
    if batch and mode == "strong":
        rest = rest.replace(batch[0], f"b{int(batch[1]) * (record.ranks or 1)} on all ranks")
    return ", ".join((f"{mode}:{rest}" if rest else mode).split(", ")[:1] + _settled(rest.split(", ")[1:]))


def _settled(parts: Sequence[str]) -> list[str]:
    """Without the parts that say how many ranks there are, and on what."""
    return [part for part in parts if not re.search(r"\branks?\b|\bGPUs?\b|^gloo$|^projected$", part)]


def _points(records: Sequence[Record]) -> tuple[ScalePoint, ...]:
    ordered = sorted(records, key=lambda record: (record.ranks or 0, is_projection(record)))
    points = []
    for record in ordered:
        assert record.ours is not None
        assert record.ranks is not None
        efficiency = record.ratio or 1.0
        points.append(
            ScalePoint(
                ranks=record.ranks,
                rate=record.ours,
                low=record.ours_p10,
                high=record.ours_p90,
                projected=is_projection(record),
                # A projection has no other side that was timed.
                ideal=record.theirs or record.ours / efficiency,
                efficiency=efficiency,
                record=record,
            )
        )
    return tuple(points)


def stacks_of(machine: Machine) -> list[Stack]:
    """Every record that was looked into, and the records of `step-stages`, each of which is one stage."""
    stacks = []
    single: dict[str, list[Record]] = {}
    for record in machine.newest:
        if record.stages and record.ours:
            batch = re.search(r"\bb(\d+)\b", record.work)
            whole_s = (float(batch[1]) if batch else record.amount) / record.ours
            stacks.append(_stack(machine, record, work=record.work, stages=record.stages, whole_s=whole_s))
        elif record.name == "step-stages" and record.ours:
            single.setdefault(record.work.partition(": ")[2], []).append(record)
    for work, records in single.items():
        seconds = {record.work.partition(": ")[0]: record.amount / (record.ours or 1) for record in records}
        whole_s = seconds.pop("whole step", sum(seconds.values()))
        stacks.append(_stack(machine, records[0], work=work, stages=seconds, whole_s=whole_s))
    return [stack for stack in stacks if sum(stack.stages.values()) > 0]


def _stack(
    machine: Machine, record: Record, *, work: str, stages: Mapping[str, float], whole_s: float
) -> Stack:
    return Stack(
        machine=machine.name,
        name=record.name,
        work=work,
        stages={stage: seconds for stage, seconds in stages.items() if seconds >= 0},
        whole_s=whole_s,
        verdict=record.verdict,
        note=record.note,
    )
