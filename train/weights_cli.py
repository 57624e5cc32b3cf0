"""`linerate import`: weights from elsewhere become a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from linerate.shards.terminal import emit_json, parse_args


@dataclass(frozen=True, kw_only=True)
class ImportCommand:
    """Make a run of a checkpoint in the layout of the official MoCo v1 and v2 code."""

    file: tyro.conf.Positional[Path]
    """The checkpoint, as moco_v2_200ep_pretrain.pth.tar."""
    run: Path
    """Run folder to make; eval, features, export and neighbours take it."""
    encoder: str | None = None
    """Which ResNet of torchvision's it holds; None: what the file says."""
    json: bool = False
    """One JSON object on stdout instead of a table."""


def main_import(argv: list[str]) -> int:
    """`linerate import FILE --run DIR [--encoder NAME]`."""
    command = parse_args(ImportCommand, argv, prog="linerate import")

    from linerate.train.import_moco import import_checkpoint

    report = import_checkpoint(command.file, run=command.run, encoder=command.encoder)
    result = dataclasses.asdict(report)
    if command.json:
        emit_json(result)
        return 0
    table = Table(title=f"{command.file.name} as a run", title_justify="left", show_header=False)
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)
    return 0
