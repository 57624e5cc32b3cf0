"""`linerate export` and `linerate import`: weights for other libraries, and from elsewhere as a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from linerate.shards.terminal import emit_json, parse_args


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write the query encoder for another library, with a model card; checked by loading it there."""

    run: tyro.conf.Positional[Path]
    """Run folder, or one checkpoint of it."""
    to: Literal["torchvision", "timm", "detectron2", "safetensors"]
    """The library: its names and its layout; safetensors keeps ours, with the head."""
    out: Path
    """File to write; its model card is beside it, OUT.md."""
    json: bool = False
    """One JSON object on stdout instead of a table."""


def main_export(argv: list[str]) -> int:
    """`linerate export RUN --to torchvision|timm|detectron2|safetensors --out FILE`."""
    command = parse_args(ExportCommand, argv, prog="linerate export")

    from linerate.train.checkpoint import load_trained
    from linerate.train.export import export_encoder

    report = export_encoder(load_trained(command.run), target=command.to, out=command.out)
    result = dataclasses.asdict(report)
    if command.json:
        emit_json(result)
        return 0
    table = Table(title=f"{command.run} for {command.to}", title_justify="left", show_header=False)
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)
    return 0


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
