"""Two results files held against each other: which differences are real."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.console import Group, RenderableType

from linerate.bench.record import Record, is_noisy, latest, name_cell, number, two_line_table, works_table
from linerate.bench.timing import Interval, unpaired_ratio

Of = Literal["rate", "ratio"]
Verdict = Literal["faster", "slower", "same", "only in A", "only in B", "not comparable"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One benchmark in both files."""

    name: str
    peer: str
    work: str
    unit: str
    a: float | None
    b: float | None
    ratio: Interval | None
    """B over A, above 1 means that B is better; None where one of them was not measured"""
    verdict: Verdict
    regressed: bool
    """B is really worse, by more than the tolerance"""
    caveat: str
    """why the verdict deserves less trust: a noisy or another machine"""


def compare_records(
    a: Sequence[Record], b: Sequence[Record], *, tolerance: float, of: Of = "rate"
) -> list[Difference]:
    """The newest record of every key of A against B's, in A's order, then what only B has.

    of="rate" compares our own rates; of="ratio" compares the ratios to the peer, which a slower or busier
    machine moves less. A difference is real when its 95 % interval excludes 1, and a regression when besides
    B is worse by more than `tolerance` (0.05 is 5 %). Counts are exact: any rise is real.
    """
    in_a, in_b = latest(a), latest(b)
    differences = []
    for key in [*in_a, *(key for key in in_b if key not in in_a)]:
        differences.append(_difference(in_a.get(key), in_b.get(key), tolerance, of))
    return differences


def _difference(a: Record | None, b: Record | None, tolerance: float, of: Of) -> Difference:
    shown = a or b
    assert shown is not None
    ratio = _ratio(a, b, of) if a is not None and b is not None else None
    if a is None or b is None:
        verdict: Verdict = "only in B" if a is None else "only in A"
    elif ratio is None:
        verdict = "not comparable"
    elif ratio.low > 1:
        verdict = "faster"
    else:
        verdict = "slower" if ratio.high < 1 else "same"
    return Difference(
        name=shown.name,
        peer=shown.peer or "",
        work=shown.work,
        unit=shown.unit if of == "rate" else "x",
        a=_value(a, of),
        b=_value(b, of),
        ratio=ratio,
        verdict=verdict,
        regressed=verdict == "slower" and ratio is not None and ratio.median < 1 - tolerance,
        caveat=_caveat(a, b),
    )


def _ratio(a: Record, b: Record, of: Of) -> Interval | None:
    if a.kind == "count" or b.kind == "count":
        if a.ours is None or b.ours is None or (a.ours != b.ours and not b.ours):
            return (
                None if not a.ours or b.ours is None else Interval(float("inf"), float("inf"), float("inf"))
            )
        exact = 1.0 if a.ours == b.ours else a.ours / b.ours
        return Interval(exact, exact, exact)
    if not a.ours_s or not b.ours_s:
        return None
    if of == "rate":
        seconds_a = np.array(a.ours_s) / a.amount
        seconds_b = np.array(b.ours_s) / b.amount
        return unpaired_ratio(seconds_a, seconds_b)
    if len(a.theirs_s) != len(a.ours_s) or len(b.theirs_s) != len(b.ours_s):
        return None
    ratios_a = np.array(a.theirs_s) / np.array(a.ours_s)
    ratios_b = np.array(b.theirs_s) / np.array(b.ours_s)
    return unpaired_ratio(ratios_b, ratios_a)


def _value(record: Record | None, of: Of) -> float | None:
    if record is None:
        return None
    return record.ours if of == "rate" or record.kind == "count" else record.ratio


def _caveat(a: Record | None, b: Record | None) -> str:
    if a is None or b is None:
        return ""
    caveats = [f"{side} noisy" for side, record in (("A", a), ("B", b)) if is_noisy(record)]
    hardware = [(r.machine.get("cpu"), r.machine.get("cores"), _gpu_name(r)) for r in (a, b)]
    if hardware[0] != hardware[1]:
        caveats.append("other machine")
    return ", ".join(caveats)


def _gpu_name(record: Record) -> str | None:
    gpu = record.machine.get("gpu")
    return gpu.get("name") if isinstance(gpu, dict) else None


def differences_table(differences: Sequence[Difference]) -> RenderableType:
    """The differences as people read them, within 80 columns."""
    table = two_line_table(("name", "against"), ("A", "unit"), ("B", ""), ("B/A", "95 %"), ("verdict", ""))
    for difference in differences:
        ratio = difference.ratio
        cell = "-" if ratio is None else f"{ratio.median:.2f}x\n[dim]{ratio.low:.2f} to {ratio.high:.2f}[/]"
        colour = {"faster": "green", "slower": "red" if difference.regressed else "yellow"}
        notes = ["past the tolerance"] if difference.regressed else []
        notes += [difference.caveat] if difference.caveat else []
        table.add_row(
            name_cell(difference.name, difference.peer),
            f"{number(difference.a)}\n[dim]{difference.unit}[/]",
            number(difference.b),
            cell,
            f"[{colour.get(difference.verdict, 'dim')}]{difference.verdict}[/]\n{', '.join(notes)}",
        )
    return Group(table, works_table(differences))
