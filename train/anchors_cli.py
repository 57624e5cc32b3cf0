"""`linerate anchors`: the published numbers, and which of them were run here."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json, parse_args
from linerate.train.anchors import ANCHORS, Anchor


@dataclass(frozen=True, kw_only=True)
class AnchorsCommand:
    """Every published number that this implementation is held against, its source, and its status."""

    find: str = ""
    """Only rows that hold this text, in any case, as `cifar` or `AP50`."""
    json: bool = False
    """One JSON object on stdout instead of a table."""


def main(argv: list[str]) -> int:
    """`linerate anchors [--find TEXT] [--json]`."""
    command = parse_args(AnchorsCommand, argv, prog="linerate anchors")
    found = [anchor for anchor in ANCHORS if command.find.lower() in _text(anchor).lower()]
    if not found:
        raise UserError(f"none of {len(ANCHORS)} anchors holds `{command.find}`; give another text, as cifar")
    if command.json:
        emit_json({"anchors": [asdict(anchor) for anchor in found]})
        return 0
    table = Table(box=None, padding=(0, 1), title="published numbers", title_justify="left")
    for name in ("part", "what", "metric"):
        table.add_column(name)
    table.add_column("published", justify="right")
    table.add_column("here")
    for anchor in found:
        table.add_row(anchor.part, anchor.what, anchor.metric, shown_value(anchor), shown_status(anchor))
    console = Console()
    console.print(table)
    ran = sum(anchor.result is not None for anchor in found)
    console.print(
        f"{len(found)} numbers, {ran} run here. (transcribed): read in a copy of the table; "
        "(memory): not read again. --json also has the source and the command of each.",
        highlight=False,
    )
    return 0


def shown_value(anchor: Anchor) -> str:
    """As `67.5 +- 0.1` or `54.9 (memory)`."""
    value = f"{anchor.value:.1f}" + (f" +- {anchor.spread:g}" if anchor.spread is not None else "")
    return value if anchor.mark == "read" else f"{value} ({anchor.mark})"


def shown_status(anchor: Anchor) -> str:
    """The status, and the file that it rests on."""
    return anchor.status if anchor.result is None else f"{anchor.status}: {anchor.result}"


def _text(anchor: Anchor) -> str:
    return " ".join(map(str, asdict(anchor).values()))
