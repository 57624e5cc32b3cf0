"""One measurement as one JSON line, and many of them as a table."""

import dataclasses
import datetime
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from linerate.shards.errors import UserError
from linerate.shards.terminal import visible

# Kinds of measurement: rates of two sides over time, rates of ours alone, exact numbers.
Kind = Literal["time", "count"]
# Name, peer, work, unit and ranks.
Key = tuple[str, str, str, str, int]


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
    """what could not be beaten on this machine; `none: ...` says why there is no such thing"""
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
        return (self.name, self.peer or "", self.work, self.unit, self.ranks or 0)

    @property
    def measured(self) -> datetime.datetime:
        """When, in UTC; long ago where the record does not say."""
        try:
            when = datetime.datetime.fromisoformat(self.measured_at)
        except ValueError:
            return datetime.datetime.min.replace(tzinfo=datetime.UTC)
        return when if when.tzinfo else when.replace(tzinfo=datetime.UTC)

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
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; give a file that `linerate bench run --out` wrote") from None
    records = []
    for number, line in enumerate(lines, start=1):
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
    _require_types(record)
    return dataclasses.replace(record, ours_s=tuple(record.ours_s), theirs_s=tuple(record.theirs_s))


def _require_types(record: Record) -> None:
    """Raise TypeError for a field that holds something else than it is there for."""
    numbers: list[Any] = [*record.ours_s, *record.theirs_s, *record.stages.values()]
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if value is None and field.type in (str | None, float | None, int | None, bool | None):
            continue
        if field.type in (str, str | None) and not isinstance(value, str):
            raise TypeError(f"{field.name} {value!r} is no text")
        if field.type in (float, float | None, int | None):
            numbers.append(value)
    for value in numbers:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TypeError(f"{value!r} is no finite number")
    if not isinstance(record.machine, dict):
        raise TypeError(f"machine {record.machine!r} is no object")


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
            name_cell(record.name, record.peer or _what(record)),
            f"{number(record.ours)}\n[dim]{plain(record.unit)}[/]",
            number(record.theirs),
            _ratio_cell(record),
            _bar_cell(record),
        )
    return Group(table, works_table(records), _footer(records))


def two_line_table(*headers: tuple[str, str]) -> Table:
    """A table whose rows have two lines, the first column to the left and the rest to the right."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    widths = {0: 20, len(headers) - 1: 12}
    for place, (first, second) in enumerate(headers):
        justify: Literal["left", "right"] = "left" if place in widths else "right"
        header = f"{first}\n[dim]{second}[/]"
        widest = None if place in widths else 12
        table.add_column(
            header, justify=justify, min_width=widths.get(place, 0), max_width=widest, overflow="fold"
        )
    return table


def _what(record: Record) -> str | None:
    """What tells a record apart from others of its name that have no peer either."""
    what, colon, _ = record.work.partition(":")
    if not colon:
        return None
    return what if record.ranks is None else f"{what}, {record.ranks} rank{'s' if record.ranks > 1 else ''}"


def name_cell(name: str, peer: str | None) -> str:
    """The benchmark, and below it whom it is held against, or what was measured alone."""
    return f"[bold]{plain(name)}[/]\n[dim]{plain(peer or '-')}[/]"


def plain(text: str) -> str:
    """A text as it came, within rich's markup and safe to print."""
    return escape(visible(text))


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
        told = "\n".join([f"[dim]{plain(work)}[/]", *map(plain, notes)])
        table.add_row(f"[bold]{plain(name)}[/]", told)
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
    noise = record.machine.get("noise")
    return isinstance(noise, Mapping) and bool(noise.get("noisy"))


def more_is_better(record: Record) -> bool:
    """Rates and accuracies; other counts are costs, such as bytes or launches."""
    return record.kind == "time" or "top-1" in record.unit


def is_projection(record: Record) -> bool:
    """By formula from what was measured on fewer ranks; no measurement."""
    return (record.note or "").startswith("projection")


def _ratio_cell(record: Record) -> str:
    if record.refused:
        return "[red]refused[/]"
    if record.missing:
        return "[yellow]no peer[/]"
    if record.ratio is None:
        return "-"
    if record.kind == "count":
        return f"{record.ratio:.2f}x\n[dim]exact[/]"
    if is_projection(record):
        return f"{record.ratio:.2f}x\n[dim]projected[/]"
    noisy = "[yellow]~[/] " if is_noisy(record) else ""
    return f"{noisy}{record.ratio:.2f}x\n[dim]{record.ratio_low:.2f} to {record.ratio_high:.2f}[/]"


def _bar_cell(record: Record) -> str:
    if record.bar_reads is None:
        return "-"
    unmeasured = record.missing or record.refused or record.ours is None
    blank = f"[dim]{'not measured' if unmeasured else 'other size'}[/]"
    verdict = {True: "[green]met[/]", False: "[red]not met[/]", None: blank}[record.met]
    return f"{plain(record.bar_reads.removeprefix('ratio '))}\n{verdict}"


def _footer(records: Sequence[Record]) -> str:
    lines = [
        f"{plain(record.name)}: {100 * record.ceiling_share:.0f} % of its ceiling here, "
        f"{plain(record.ceiling or '-')} ({number(record.ceiling_rate)} {plain(record.unit)})"
        for record in records
        if record.ceiling_share is not None
    ]
    for record in records:
        lines += [f"[red]{plain(record.name)}: refused: {plain(record.refused)}[/]"] if record.refused else []
        lines += [f"[yellow]{plain(record.name)}: {plain(record.missing)}[/]"] if record.missing else []
    if any(is_noisy(record) for record in records):
        lines.append("[yellow]~[/] the machine was busy with something else: trust these ratios less")
    if any(record.bar_reads and record.met is None and record.ours is not None for record in records):
        lines.append("other size: the bar is for larger work; `--suite cpu` measures that")
    return "\n".join(lines)
