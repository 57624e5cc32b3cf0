"""What `linerate shard inspect` prints: an overview as tables and bars, or the answer to a SELECT."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from linerate.shards.errors import show_bytes
from linerate.shards.overview import LARGEST_BIN, Hashtags, Overview, PackRates
from linerate.shards.sql import Answer
from linerate.shards.terminal import emit_json, visible

# Below so many characters a column is no longer read: the row is printed as lines.
MIN_COLUMN_CHARS = 9
BAR_CHARS = 40


def print_overview(overview: Overview, *, num_classes: int) -> None:
    """Everything of it; of the classes the largest, and the smallest where there are more."""
    console = Console()
    _say(
        console,
        f"{overview.num_samples:,} samples ({show_bytes(overview.jpeg_bytes)} of JPEG) in "
        f"{overview.num_shards} shards ({show_bytes(overview.num_bytes)}; {overview.smallest_shard} to "
        f"{overview.largest_shard} samples each); {overview.num_rejected:,} files rejected",
    )
    if overview.near_empty_shards:
        some = list(overview.near_empty_shards.items())
        listed = ", ".join(f"{name} ({n})" for name, n in some[:5]) + ", ..." * (len(some) > 5)
        _say(console, f"shards with fewer than half of the median's samples: {len(some)}, {listed}")
    console.print(_quantiles_table(overview))
    ends = {_bin_name(end): n for end, n in overview.size_histogram}
    console.print(_bars("size of a JPEG", ends))
    if overview.formats:
        console.print(_bars("properties", overview.formats))
    for title, counts in _class_parts(overview.classes, num_classes):
        console.print(_bars(title, counts, full=max(overview.classes.values())))
    if overview.hashtags:
        console.print(_bars(_tags_title(overview.hashtags), overview.hashtags.top))
    if overview.rejects:
        console.print(_bars("rejected", overview.rejects))
        for why, keys in overview.reject_examples.items():
            _say(console, f"   {why}: such as {keys[0]}")
    if overview.rates:
        console.print(_rates_table(overview.rates))
    given = {name: value for name, value in overview.options.items() if value is not None}
    _say(console, "options: " + ", ".join(f"{name}={value}" for name, value in given.items()))


def print_answer(answer: Answer, *, num_rows: int) -> None:
    """The first rows as a table; each row as lines where the columns do not fit beside one another."""
    console = Console()
    rows = list(itertools.islice(answer.rows, num_rows + 1))
    shown = [[visible(_cell(value)) for value in row] for row in rows[:num_rows]]
    names = [visible(name) for name in answer.columns]
    if len(names) * MIN_COLUMN_CHARS > console.width:
        for number, row in enumerate(shown):
            table = Table(title=f"row {number}", title_justify="left", show_header=False, box=None)
            for name, value in zip(names, row, strict=True):
                table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
            console.print(table)
    else:
        table = Table(box=box.SIMPLE_HEAD)
        for place, name in enumerate(names):
            numbers = all(isinstance(row[place], int | float | None) for row in rows)
            table.add_column(Text(name), overflow="fold", justify="right" if numbers else "left")
        for row in shown:
            table.add_row(*map(Text, row))
        console.print(table)
    more = "; there are more: --rows shows them" if len(rows) > num_rows else ""
    _say(console, f"{len(shown)} {'row' if len(shown) == 1 else 'rows'}{more}")


def write_answer_json(answer: Answer, *, num_rows: int | None) -> None:
    """{"columns": [...], "rows": [[...], ...]} on stdout."""
    rows = [list(row) for row in itertools.islice(answer.rows, num_rows)]
    emit_json({"columns": answer.columns, "rows": rows})


def write_answer_csv(answer: Answer, *, num_rows: int | None) -> None:
    """A line with the columns' names and one for each row on stdout, as they are fetched."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(answer.columns)
    for row in itertools.islice(answer.rows, num_rows):
        writer.writerow(["" if value is None else _cell(value) for value in row])
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "NULL" if value is None else str(value)


def _say(console: Console, text: str) -> None:
    console.print(Text(visible(text)), soft_wrap=True)


def _quantiles_table(overview: Overview) -> Table:
    names = ("min", "p1", "p10", "p50", "p90", "p99", "max", "mean")
    title = Text(visible(overview.root))
    table = Table("", *names, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name, values in (
        ("bytes", overview.sample_bytes),
        ("width", overview.width),
        ("height", overview.height),
    ):
        table.add_row(name, *(f"{values[key]:,.0f}" for key in names))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _bin_name(end: int) -> str:
    return "more" if end == LARGEST_BIN else f"<= {show_bytes(end)}"


def _class_parts(classes: Mapping[str, int], num: int) -> list[tuple[str, Mapping[str, int]]]:
    items = list(classes.items())
    parts: list[tuple[str, Mapping[str, int]]] = [
        (f"classes, the largest {min(num, len(items))} of {len(items):,}", dict(items[:num]))
    ]
    if smallest := items[max(num, len(items) - num) :]:
        parts.append((f"classes, the smallest {len(smallest)}", dict(smallest)))
    return parts


def _tags_title(tags: Hashtags) -> str:
    return (
        f"hashtags, the first {len(tags.top)} of {tags.num_tags:,}; {tags.num_untagged:,} samples have none"
    )


def _rates_table(rates: PackRates) -> Table:
    table = Table(title="packing, by shard", title_justify="left", show_header=False, box=None)
    for name, values, show in (
        ("samples/s", rates.samples_per_s, "{:,.0f}".format),
        ("bytes/s", rates.bytes_per_s, show_bytes),
    ):
        table.add_row(name, ", ".join(f"{key} {show(value)}" for key, value in values.items()))
    table.add_row(
        "work", f"{rates.num_shards} shards in {rates.seconds:,.1f} s of work on {rates.num_hosts} hosts"
    )
    table.add_row("memory", f"{show_bytes(rates.peak_rss_bytes)} at most in one process")
    slowest = ", ".join(
        f"{shard} ({rate:,.0f} samples/s, {seconds:,.1f} s)" for shard, seconds, rate in rates.slowest
    )
    table.add_row("slowest", slowest)
    return table


def _bars(title: str, counts: Mapping[str, int], *, full: int = 0) -> Table:
    """full: the count of a whole bar, where it is not the largest here."""
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None, padding=(0, 1))
    full = full or max(counts.values(), default=1)
    for name, count in counts.items():
        table.add_row(Text(visible(name)), f"{count:,}", "█" * -(-BAR_CHARS * count // max(1, full)))
    return table
