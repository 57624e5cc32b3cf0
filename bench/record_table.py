"""Records as people read them in a terminal: within 80 columns, what each line's work was below."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from linerate.bench.record import Record, is_noisy, is_projection, lacking
from linerate.shards.terminal import visible

# Name and work.
Named = tuple[str, str]


class Worked(Protocol):
    """What has a name and a work."""

    @property
    def name(self) -> str: ...
    @property
    def work(self) -> str: ...


def results_table(records: Sequence[Record]) -> RenderableType:
    """The records as people read them, within 80 columns; what each line's work was stands below."""
    names = numbered(records)
    table = two_line_table(
        ("name", "what, against"), ("ours", "unit"), ("theirs", ""), ("ratio", "95 %"), ("bar", "")
    )
    for record in records:
        table.add_row(
            name_cell(names[record.name, record.work], _what(record), record.peer),
            f"{number(record.ours)}\n[dim]{plain(record.unit)}[/]",
            number(record.theirs),
            _ratio_cell(record),
            _bar_cell(record),
        )
    return Group(table, works_table(records), _footer(records, names))


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


def numbered(records: Iterable[Worked]) -> dict[Named, str]:
    """(name, work) -> the name, and the work's number where the records do several of that name."""
    works: dict[str, dict[str, int]] = {}
    for record in records:
        of_name = works.setdefault(record.name, {})
        of_name.setdefault(record.work, len(of_name) + 1)
    return {
        (name, work): f"{name} #{place}" if len(of_name) > 1 else name
        for name, of_name in works.items()
        for work, place in of_name.items()
    }


def what_of(work: str) -> str | None:
    """What a work says of itself before its sizes: `--backend dali`, `loader alone`."""
    what, colon, _ = work.partition(":")
    return what if colon else None


def _what(record: Record) -> str | None:
    what = what_of(record.work)
    if what is None:
        return None
    return what if record.ranks is None else f"{what}, {record.ranks} rank{'s' if record.ranks > 1 else ''}"


def name_cell(name: str, what: str | None, peer: str | None) -> str:
    """The benchmark, and below it what was measured and whom it is held against, where it says so."""
    below = "\n".join(plain(text) for text in (what, peer) if text)
    return f"[bold]{plain(name)}[/]\n[dim]{below or '-'}[/]"


def plain(text: str) -> str:
    """A text as it came, within rich's markup and safe to print."""
    return escape(visible(text))


def works_table(records: Iterable[Worked]) -> Table:
    """What each benchmark did, each work once, and below it what its records note."""
    records = list(records)
    names = numbered(records)
    works: dict[Named, dict[str, None]] = {}
    for record in records:
        notes = works.setdefault((record.name, record.work), {})
        if note := getattr(record, "note", None):
            notes[note] = None
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for named, notes in works.items():
        told = "\n".join([f"[dim]{plain(named[1])}[/]", *map(plain, notes)])
        table.add_row(f"[bold]{plain(names[named])}[/]", told)
    return table


def number(value: float | None) -> str:
    """Three significant digits with thousands separated; whole numbers whole."""
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _ratio_cell(record: Record) -> str:
    if record.refused:
        return "[red]refused[/]"
    if without := lacking(record):
        return f"[yellow]{plain(without)}[/]"
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


def _footer(records: Sequence[Record], names: Mapping[Named, str]) -> str:
    title = {id(record): plain(names[record.name, record.work]) for record in records}
    lines = [
        f"{title[id(record)]}: {100 * record.ceiling_share:.0f} % of its ceiling here, "
        f"{plain(record.ceiling or '-')} ({number(record.ceiling_rate)} {plain(record.unit)})"
        for record in records
        if record.ceiling_share is not None
    ]
    for record in records:
        name = title[id(record)]
        lines += [f"[red]{name}: refused: {plain(record.refused)}[/]"] if record.refused else []
        lines += [f"[yellow]{name}: {plain(record.missing)}[/]"] if record.missing else []
    if any(is_noisy(record) for record in records):
        lines.append("[yellow]~[/] the machine was busy with something else: trust these ratios less")
    unjudged = [r for r in records if r.bar_reads and r.met is None and r.ours is not None]
    # Of a GPU's suite at its tiny size the larger work is that suite's, whatever it was tried on.
    suites = sorted({"gpu" if record.suite == "gpu" else "cpu" for record in unjudged})
    if suites:
        larger = " and ".join(f"`--suite {suite}`" for suite in suites)
        lines.append(f"other size: the bar is for the work of {larger}, or for what its note names")
    return "\n".join(lines)
