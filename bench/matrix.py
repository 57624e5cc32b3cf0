"""Results of several machines side by side: a row a benchmark, a column a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table

from linerate.bench.fleet import Machine, machines_of, settled_work
from linerate.bench.record import Record, is_noisy, lacking, more_is_better
from linerate.bench.record_table import number, plain
from linerate.bench.report_parts import number_x

Of = Literal["both", "rate", "ratio", "share"]
RowKey = tuple[str, str, str, str, int]
# So many machines' cells fit 80 columns beside a benchmark's name.
MACHINES_ABREAST = 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """One benchmark on all machines."""

    name: str
    peer: str | None
    work: str
    """without the number of threads where that is only how large the machine is"""
    unit: str
    ranks: int | None
    cells: tuple[Record | None, ...]
    """by machine; None: not run there"""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Machines and rows."""

    machines: tuple[Machine, ...]
    rows: tuple[Row, ...]


def matrix_of(records: Sequence[Record]) -> Matrix:
    """The newest record of every benchmark on every machine. records: oldest first."""
    machines = machines_of(records)
    rows: dict[RowKey, list[Record | None]] = {}
    for place, machine in enumerate(machines):
        for record in machine.newest:
            key = (record.name, record.peer or "", settled_work(record), record.unit, record.ranks or 0)
            rows.setdefault(key, [None] * len(machines))[place] = record
    # Rows of one benchmark beside each other, in the order in which benchmarks first came.
    names = list(dict.fromkeys(key[0] for key in rows))
    ordered = sorted(rows.items(), key=lambda row: names.index(row[0][0]))
    return Matrix(
        machines=tuple(machines),
        rows=tuple(
            Row(name=name, peer=peer or None, work=work, unit=unit, ranks=ranks or None, cells=tuple(cells))
            for (name, peer, work, unit, ranks), cells in ordered
        ),
    )


def cell_text(record: Record | None, of: Of) -> str:
    """What stands in a cell: rate, ratio to the peer, share of the ceiling, or why there is none."""
    if record is None:
        return "-"
    if record.refused:
        return "refused"
    noisy = "~" if is_noisy(record) else ""
    ratio = None if record.ratio is None else number_x(record.ratio)
    if of == "share":
        return "-" if record.ceiling_share is None else f"{noisy}{100 * record.ceiling_share:.0f} %"
    without = lacking(record)
    if of == "ratio":
        return (without or "-") if ratio is None else f"{noisy}{ratio}"
    rate = "-" if record.ours is None else f"{noisy}{number(record.ours)}"
    return rate if of == "rate" else "\n".join(filter(None, (rate, ratio or without)))


def shown_rows(matrix: Matrix, of: Of) -> list[Row]:
    """The rows with something to show in any cell."""
    return [row for row in matrix.rows if any(cell_text(record, of) != "-" for record in row.cells)]


def best_place(row: Row, of: Of) -> int | None:
    """The machine whose value is the best; None where fewer than two have one."""
    values = {}
    for place, record in enumerate(row.cells):
        if record is None or record.refused:
            continue
        value = {"ratio": record.ratio, "share": record.ceiling_share}.get(of, record.ours)
        if value is not None:
            is_cost = of in ("both", "rate") and not more_is_better(record)
            values[place] = -value if is_cost else value
    return max(values, key=lambda place: values[place]) if len(set(values.values())) > 1 else None


def matrix_tables(matrix: Matrix, of: Of) -> list[Table]:
    """Tables of 80 columns, so many machines abreast; the works follow by their numbers."""
    tables = []
    rows = shown_rows(matrix, of)
    for start in range(0, len(matrix.machines), MACHINES_ABREAST):
        machines = matrix.machines[start : start + MACHINES_ABREAST]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("benchmark\n[dim]against, unit[/]", overflow="fold", width=22)
        for machine in machines:
            table.add_column(plain(machine.name), justify="right", overflow="fold", width=14)
        for number_, row in enumerate(rows, start=1):
            best = best_place(row, of)
            cells = []
            for place in range(start, start + len(machines)):
                text = plain_cell(cell_text(row.cells[place], of))
                cells.append(f"[bold green]{text}[/]" if place == best else text)
            ranks = f", {row.ranks} ranks" if row.ranks else ""
            against = plain(f"{row.peer or '-'}, {row.unit}{ranks}")
            about = f"[bold]{plain(row.name)}[/]\n[dim]{against}[/]"
            table.add_row(str(number_), about, *cells)
        tables.append(table)
    works = Table(box=None, show_header=False, padding=(0, 1))
    works.add_column(justify="right", no_wrap=True)
    works.add_column(overflow="fold")
    for number_, row in enumerate(rows, start=1):
        works.add_row(str(number_), f"[dim]{plain(row.work)}[/]")
    return [*tables, works]


def plain_cell(text: str) -> str:
    """As `plain`, of a cell of two lines."""
    return "\n".join(map(plain, text.split("\n")))


def matrix_markdown(matrix: Matrix, of: Of) -> str:
    """A table for a README or an issue; the best of each row is bold."""
    heads = ["benchmark", "against", "work", "unit", *(machine.name for machine in matrix.machines)]
    lines = [_markdown_row(heads), f"|{'---|' * 4}{'---:|' * len(matrix.machines)}"]
    for row in shown_rows(matrix, of):
        best = best_place(row, of)
        cells = []
        for place, record in enumerate(row.cells):
            text = _markdown(cell_text(record, of).replace("\n", ", "))
            cells.append(f"**{text}**" if place == best else text)
        ranks = f" ({row.ranks} ranks)" if row.ranks else ""
        about = [_markdown(text) for text in (row.name, row.peer or "", f"{row.work}{ranks}", row.unit)]
        lines.append(f"| {' | '.join([*about, *cells])} |")
    return "\n".join(lines)


def _markdown_row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown, texts))} |"


def _markdown(text: str) -> str:
    for character in ("\\", "|", "*", "`", "<", "[", "~"):
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def matrix_json(matrix: Matrix) -> dict[str, Any]:
    """The matrix as plain JSON types; a cell that was not run is null."""
    return {
        "machines": [{"name": machine.name, "facts": dict(machine.facts)} for machine in matrix.machines],
        "rows": [
            {
                "name": row.name,
                "peer": row.peer,
                "work": row.work,
                "unit": row.unit,
                "ranks": row.ranks,
                "cells": [None if record is None else _cell_json(record) for record in row.cells],
            }
            for row in matrix.rows
        ],
    }


def _cell_json(record: Record) -> dict[str, Any]:
    fields = (
        "ours",
        "theirs",
        "ratio",
        "ratio_low",
        "ratio_high",
        "ceiling_share",
        "met",
        "missing",
        "refused",
    )
    about = {name: getattr(record, name) for name in (*fields, "measured_at")}
    return {**about, "noisy": is_noisy(record)}
