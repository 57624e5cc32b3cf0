"""Two results files held against each other: which differences are real."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.console import Group, RenderableType

from linerate.bench.fleet import same_hardware
from linerate.bench.record import Record, is_noisy, latest, more_is_better
from linerate.bench.record_table import (
    name_cell,
    number,
    numbered,
    plain,
    two_line_table,
    what_of,
    works_table,
)
from linerate.bench.timing import Interval, unpaired_ratio

Of = Literal["rate", "ratio"]
Verdict = Literal["faster", "slower", "same", "only in A", "only in B", "refused in B", "not comparable"]
# Units of counts that are one reading of resident memory, in bytes or as growth.
GROWTH = "%"
READINGS = ("MiB", GROWTH)
READING_WANDER = 0.1


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
    """B is really worse, by more than the tolerance, or its sides no longer agree"""
    caveat: str
    """why the verdict deserves less trust, or why there is none"""


def compare_records(
    a: Sequence[Record], b: Sequence[Record], *, tolerance: float, of: Of = "rate"
) -> list[Difference]:
    """The newest record of every key of A against B's, in A's order, then what only B has.

    of="rate" compares our own rates; of="ratio" compares the ratios to the peer, which a slower or busier
    machine moves less. A difference is real when its 95 % interval excludes 1, and a regression when besides
    B is worse by more than `tolerance` (0.05 is 5 %). Counts are exact: any rise is real, but for single
    readings of the system's memory, which wander: within a tenth, or of growth below the bar.
    What was measured in A and refused in B is a regression, too.
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
    elif b.refused and not a.refused:
        verdict = "refused in B"
    elif ratio is None:
        verdict = "not comparable"
    elif _wanders(a, b, ratio):
        verdict = "same"
    elif ratio.low > 1:
        verdict = "faster"
    else:
        verdict = "slower" if ratio.high < 1 else "same"
    return Difference(
        name=shown.name,
        peer=shown.peer or "",
        work=shown.work,
        unit=shown.unit if of == "rate" or shown.kind == "count" else "x",
        a=_value(a, of),
        b=_value(b, of),
        ratio=ratio,
        verdict=verdict,
        regressed=verdict == "refused in B"
        or (verdict == "slower" and ratio is not None and ratio.median < 1 - tolerance),
        caveat=_caveat(a, b),
    )


def _ratio(a: Record, b: Record, of: Of) -> Interval | None:
    if a.refused or b.refused:
        return None
    if a.kind == "count" or b.kind == "count":
        return _exact_ratio(*((b, a) if more_is_better(a) else (a, b)))
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


def _wanders(a: Record, b: Record, ratio: Interval) -> bool:
    """Both are readings of memory that are no further apart than two of one program."""
    if a.kind != "count" or a.unit not in READINGS:
        return False
    return bool(a.met and b.met) if a.unit == GROWTH else abs(ratio.median - 1) <= READING_WANDER


def _exact_ratio(above: Record, below: Record) -> Interval | None:
    if above.ours is None or below.ours is None:
        return None
    if above.ours == below.ours:
        return Interval(1.0, 1.0, 1.0)
    ratio = above.ours / below.ours if below.ours else math.inf
    return Interval(ratio, ratio, ratio)


def _value(record: Record | None, of: Of) -> float | None:
    if record is None:
        return None
    return record.ours if of == "rate" or record.kind == "count" else record.ratio


def _caveat(a: Record | None, b: Record | None) -> str:
    if a is None or b is None:
        return ""
    sides = (("A", a), ("B", b))
    caveats = [f"{side} refused: {record.refused}" for side, record in sides if record.refused]
    caveats += [f"{side} has no rounds" for side, record in sides if _lacks_rounds(record)]
    caveats += [f"{side} noisy" for side, record in sides if is_noisy(record)]
    if not same_hardware(a, b):
        caveats.append("other machine")
    return ", ".join(caveats)


def _lacks_rounds(record: Record) -> bool:
    return record.kind == "time" and not record.ours_s and not record.refused


def differences_table(differences: Sequence[Difference]) -> RenderableType:
    """The differences as people read them, within 80 columns."""
    names = numbered(differences)
    table = two_line_table(
        ("name", "what, against"), ("A", "unit"), ("B", ""), ("B/A", "95 %"), ("verdict", "")
    )
    for difference in differences:
        ratio = difference.ratio
        colour = {"faster": "green", "refused in B": "red"}
        colour["slower"] = "red" if difference.regressed else "yellow"
        notes = ["past the tolerance"] if difference.regressed and ratio is not None else []
        notes += [plain(difference.caveat)] if difference.caveat else []
        table.add_row(
            name_cell(names[difference.name, difference.work], what_of(difference.work), difference.peer),
            f"{number(difference.a)}\n[dim]{plain(difference.unit)}[/]",
            number(difference.b),
            _ratio_cell(ratio, exactly="one reading" if difference.unit in READINGS else "exact"),
            f"[{colour.get(difference.verdict, 'dim')}]{difference.verdict}[/]\n{', '.join(notes)}",
        )
    return Group(table, works_table(differences))


def _ratio_cell(ratio: Interval | None, *, exactly: str) -> str:
    if ratio is None:
        return "-"
    if ratio.low == ratio.high:
        return f"{'to 0' if math.isinf(ratio.median) else f'{ratio.median:.2f}x'}\n[dim]{exactly}[/]"
    return f"{ratio.median:.2f}x\n[dim]{ratio.low:.2f} to {ratio.high:.2f}[/]"
