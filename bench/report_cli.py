"""`linerate bench report` and `linerate bench matrix`: arguments and output only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console

from linerate.shards.errors import UserError, show_bytes
from linerate.shards.terminal import emit_json, make_parent, parse_args, visible

if TYPE_CHECKING:
    from linerate.bench.record import Record


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What results files say: bars, ceilings, scaling, stages, history, cost."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """results files (JSON lines) of one or more machines"""
    html: Path | None = None
    """page to write: one file that needs no other and no network; tables on the terminal without it"""
    price_per_hour: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """dollars an hour: 2.5 for all machines, NAME=2.5 for one (NAME: a part of its name); may be repeated"""
    json: bool = False
    """one JSON object on stdout, and nothing else there"""


@dataclass(frozen=True, kw_only=True)
class MatrixConfig:
    """Results of several machines in one table: a row a benchmark, a column a machine."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """results files (JSON lines); of one machine's several the newest lines count"""
    of: Literal["both", "rate", "ratio", "share"] = "both"
    """our rate, the ratio to the peer, or the share of the ceiling"""
    markdown: bool = False
    """a Markdown table on stdout"""
    json: bool = False
    """one JSON object on stdout, and nothing else there"""


def main_report(argv: list[str]) -> int:
    """Print the report, or write it as a page."""
    config = parse_args(ReportConfig, argv, prog="linerate bench report")
    if config.html is not None and config.html.is_dir():
        raise UserError(f"--html {config.html} is a folder; name a file, as {config.html / 'report.html'}")
    records = _load(config.files, command="report")
    from linerate.bench.cost import prices_of
    from linerate.bench.findings import find
    from linerate.bench.fleet import machines_of
    from linerate.bench.report_page import write_report
    from linerate.bench.report_terminal import report_json, report_tables

    findings = find(records, prices_of(config.price_per_hour, machines_of(records)))
    page = {}
    if config.html is not None:
        make_parent(config.html)
        write_report(config.html, findings, sources=list(dict.fromkeys(path.name for path in config.files)))
        page = {"html": str(config.html), "bytes": config.html.stat().st_size}
    if config.json:
        emit_json({**page, **report_json(findings)})
    elif config.html is not None:
        tally = ", ".join(f"{count} {name}" for name, count in findings.tally.items())
        print(f"{visible(str(config.html))} ({show_bytes(config.html.stat().st_size)}): {tally or 'no bars'}")
    else:
        console = Console()
        for part in report_tables(findings):
            console.print(part, highlight=False)
    return 0


def main_matrix(argv: list[str]) -> int:
    """Print the matrix."""
    config = parse_args(MatrixConfig, argv, prog="linerate bench matrix")
    if config.markdown and config.json:
        raise UserError("--markdown and --json contradict; keep one of them")
    records = _load(config.files, command="matrix")
    from linerate.bench.matrix import matrix_json, matrix_markdown, matrix_of, matrix_tables, shown_rows

    matrix = matrix_of(records)
    if config.json:
        emit_json(matrix_json(matrix))
    elif config.markdown:
        print(matrix_markdown(matrix, config.of))
    else:
        console = Console()
        for table in matrix_tables(matrix, config.of):
            console.print(table, highlight=False)
        if left_out := len(matrix.rows) - len(shown_rows(matrix, config.of)):
            console.print(f"{left_out} of {len(matrix.rows)} rows have no {config.of}", highlight=False)
    return 0


def _load(files: Sequence[Path], *, command: str) -> list[Record]:
    from linerate.bench.fleet import load_files

    if not files:
        raise UserError(f"FILES are missing; give results files, as: linerate bench {command} results.jsonl")
    return load_files(files)
