"""One measurement as one JSON line, and many of them as a table."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from linerate.shards.errors import UserError

# Kinds of measurement: rates of two sides over time, rates of ours alone, exact numbers.
Kind = Literal["time", "count"]
# Name, peer, work and unit.
Key = tuple[str, str, str, str]


class Worked(Protocol):
    """What has a name and a work."""

    @property
    def name(self) -> str: ...
    @property
    def work(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Record:
    """A line of results. Rates and counts are in `unit`; a ratio above 1 means that ours is better."""

    name: str
    """the benchmark; a row of the table of bars"""
    peer: str | None
    """what ours is held against; None where ours is measured alone"""
    work: str
    """what one measurement does, with its sizes"""
    unit: str
    kind: Kind = "time"
    ours: float | None = None
    """median rate, or the count; None where nothing was measured"""
    theirs: float | None = None
    ratio: float | None = None
    """median over rounds of ours over theirs; for counts theirs over ours"""
    ratio_low: float | None = None
    ratio_high: float | None = None
    bar: float | None = None
    bar_reads: str | None = None
    """the bar in words, such as `ratio >= 3.0`"""
    met: bool | None = None
    """None where there is no bar, or where the work is smaller than the bar's"""
    ours_p10: float | None = None
    ours_p90: float | None = None
    theirs_p10: float | None = None
    theirs_p90: float | None = None
    ours_s: tuple[float, ...] = ()
    """seconds per call, round by round; the same rounds as theirs_s"""
    theirs_s: tuple[float, ...] = ()
    amount: float = 1.0
    """units of work in one call"""
    equal: str | None = None
    """what was found equal before the clock started"""
    ceiling: str | None = None
    """what could not be beaten on this machine"""
    ceiling_rate: float | None = None
    ceiling_share: float | None = None
    """our share of the ceiling"""
    missing: str | None = None
    """the peer that is not installed, and how to bring it"""
    refused: str | None = None
    """why nothing was timed: the sides disagree, or the benchmark failed or ran past its limit"""
    note: str | None = None
    ranks: int | None = None
    """processes that worked together; None where that is not what varies"""
    stages: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """stage -> median seconds of one call, in the order of a batch's way; {} where nobody looked inside"""
    verdict: str | None = None
    """what bounds the rate, in one sentence"""
    suite: str = "cpu"
    measured_at: str = ""
    """UTC, ISO 8601"""
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What two records must share to be compared."""
        return (self.name, self.peer or "", self.work, self.unit)

    def to_json(self) -> dict[str, Any]:
        """The line as plain JSON types."""
        plain = dataclasses.asdict(dataclasses.replace(self, stages=dict(self.stages)))
        return {**plain, "ours_s": list(self.ours_s), "theirs_s": list(self.theirs_s)}


def append_jsonl(path: Path, record: Record) -> None:
    """Add one line to `path`, making it and its folder where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record.to_json(), allow_nan=False) + "\n")


def compact_json(record: Record) -> dict[str, Any]:
    """What a record found, without where and when and its single rounds; what is empty is left out."""
    left_out = {"machine", "ours_s", "theirs_s", "measured_at", "suite", "amount"}
    fields = {name: value for name, value in record.to_json().items() if name not in left_out}
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in fields.items()
        if value not in (None, "", {})
    }


def load_jsonl(path: Path) -> list[Record]:
    """The records of a results file, in order. Fields that a newer version added are dropped.

    Raises UserError for a file that is missing or is not one of ours.
    """
    if not path.is_file():
        raise UserError(f"there is no results file {path}; `linerate bench run --out {path}` writes one")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            records.append(from_json(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}, is no benchmark record ({error}); "
                "give a file that `linerate bench run --out` wrote"
            ) from None
    if not records:
        raise UserError(f"{path} holds no records; `linerate bench run --out {path}` writes some")
    return records


def from_json(fields: Mapping[str, Any]) -> Record:
    """The inverse of `to_json`; fields that a newer version added are dropped.

    Raises TypeError or AttributeError for what is no record.
    """
    known = {field.name for field in dataclasses.fields(Record)}
    record = Record(**{key: value for key, value in fields.items() if key in known})
    return dataclasses.replace(record, ours_s=tuple(record.ours_s), theirs_s=tuple(record.theirs_s))


def latest(records: Iterable[Record]) -> dict[Key, Record]:
    """The last record of each key: a results file is appended to, and the newest line counts."""
    return {record.key: record for record in records}


def results_table(records: Sequence[Record]) -> RenderableType:
    """The records as people read them, within 80 columns; what each line's work was stands below."""
    table = two_line_table(
        ("name", "against"), ("ours", "unit"), ("theirs", ""), ("ratio", "95 %"), ("bar", "")
    )
    for record in records:
        table.add_row(
            name_cell(record.name, record.peer),
            f"{number(record.ours)}\n[dim]{record.unit}[/]",
            number(record.theirs),
            _ratio_cell(record),
            _bar_cell(record),
        )
    return Group(table, works_table(records), _footer(records))


def two_line_table(*headers: tuple[str, str]) -> Table:
    """A table whose rows have two lines, the first column to the left and the rest to the right."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    widths = {0: 22, len(headers) - 1: 12}
    for place, (first, second) in enumerate(headers):
        justify: Literal["left", "right"] = "left" if place in widths else "right"
        header = f"{first}\n[dim]{second}[/]"
        table.add_column(header, justify=justify, min_width=widths.get(place, 0), overflow="fold")
    return table


def name_cell(name: str, peer: str | None) -> str:
    """The benchmark, and below it whom it is held against."""
    return f"[bold]{name}[/]\n[dim]{peer or '-'}[/]"


def works_table(records: Iterable[Worked]) -> Table:
    """What each benchmark did, each work once, and below it what its records note."""
    works: dict[tuple[str, str], dict[str, None]] = {}
    for record in records:
        notes = works.setdefault((record.name, record.work), {})
        if note := getattr(record, "note", None):
            notes[note] = None
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for (name, work), notes in works.items():
        table.add_row(f"[bold]{name}[/]", "\n".join([f"[dim]{work}[/]", *map(escape, notes)]))
    return table


def number(value: float | None) -> str:
    """Three significant digits with thousands separated; whole numbers whole."""
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def is_noisy(record: Record) -> bool:
    """The machine was too unquiet while this was measured."""
    return bool(record.machine.get("noise", {}).get("noisy"))


def _ratio_cell(record: Record) -> str:
    if record.refused:
        return f"[red]refused: {record.refused}[/]"
    if record.missing:
        return f"[yellow]{record.missing}[/]"
    if record.ratio is None:
        return "-"
    if record.kind == "count":
        return f"{record.ratio:.2f}x\n[dim]exact[/]"
    noisy = "[yellow]~[/] " if is_noisy(record) else ""
    return f"{noisy}{record.ratio:.2f}x\n[dim]{record.ratio_low:.2f} to {record.ratio_high:.2f}[/]"


def _bar_cell(record: Record) -> str:
    if record.bar_reads is None:
        return "-"
    verdict = {True: "[green]met[/]", False: "[red]not met[/]", None: "[dim]other size[/]"}[record.met]
    return f"{record.bar_reads.removeprefix('ratio ')}\n{verdict}"


def _footer(records: Sequence[Record]) -> str:
    lines = [
        f"{record.name}: {100 * record.ceiling_share:.0f} % of its ceiling here, {record.ceiling} "
        f"({number(record.ceiling_rate)} {record.unit})"
        for record in records
        if record.ceiling_share is not None
    ]
    if any(is_noisy(record) for record in records):
        lines.append("[yellow]~[/] the machine was busy with something else: trust these ratios less")
    if any(record.bar_reads and record.met is None and not record.missing for record in records):
        lines.append("other size: the bar is for larger work; `--suite cpu` measures that")
    return "\n".join(lines)
