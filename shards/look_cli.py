"""`linerate shard verify|inspect|preview|beton`: what is done with shards that are there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from linerate.shards import terminal
from linerate.shards.errors import show_bytes

if TYPE_CHECKING:
    from linerate.shards.repair import RepairReport


@dataclass(frozen=True, kw_only=True)
class VerifyArgs:
    """Read every byte of the shards and compare checksums, index, counts and images; exit 1 on a problem.

    With --repair, first write anew what is damaged: .idx, .parquet and catalog from the tars, whose bytes
    stay. What is broken in a tar is left out of every index and listed in rejected.parquet.
    """

    shards: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder of the shards."""
    decode: Literal["none", "header", "full"] = "header"
    """How far each image is looked into, besides its checksum."""
    repair: bool = False
    """Mend what can be mended before looking."""
    sample: float = 1.0
    """Read only this share of the shards, drawn at random; of the others only the tar's size is seen."""
    seed: int = 0
    """Another seed draws other shards for --sample."""
    workers: int | None = None
    """Processes; by default one per core."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""


@dataclass(frozen=True, kw_only=True)
class InspectArgs:
    """Show what the shards hold: totals, size histogram, formats, classes, what was rejected and why."""

    shards: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder of the shards."""
    classes: int = 10
    """How many of the largest classes to list."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""


@dataclass(frozen=True, kw_only=True)
class PreviewArgs:
    """Draw a contact sheet of random samples with their labels."""

    shards: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder of the shards."""
    out: Path
    """The picture to write, such as sheet.png."""
    num: int = 48
    """How many samples."""
    seed: int = 0
    """Another seed shows other samples."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""


@dataclass(frozen=True, kw_only=True)
class BetonArgs:
    """Write the shards as one .beton file for ffcv, JPEG bytes untouched; needs the extra `ffcv`."""

    shards: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder of the shards."""
    beton: Annotated[Positional[Path], tyro.conf.arg(metavar="X.beton")]
    """The file to write."""
    time_limit_s: float | None = None
    """End ffcv's writer after so many seconds; by default by the number of bytes."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""


def main_verify(argv: list[str]) -> int:
    args = terminal.parse_args(VerifyArgs, argv, prog="linerate shard verify")
    from linerate.shards.catalog import Catalog
    from linerate.shards.verify import verify_shards

    started = time.perf_counter()
    repaired = _repair(args) if args.repair else None
    catalog = Catalog.load(args.shards)
    with terminal.progress("verifying", total=args.sample * catalog.num_samples, unit="images") as advance:
        report = verify_shards(
            catalog,
            decode=args.decode,
            sample=args.sample,
            seed=args.seed,
            num_workers=args.workers,
            on_progress=advance,
        )
    seconds = time.perf_counter() - started
    if args.json:
        done = {"repaired": repaired.to_json()} if repaired else {}
        terminal.emit_json(report.to_json() | done | {"seconds": seconds})
        return int(not report.ok)
    console = Console()
    if repaired:
        for file, sample_id, why in repaired.left_out:
            console.print(f"{file} sample {sample_id} is left out: {why}", highlight=False, soft_wrap=True)
        said = f"{len(repaired.shards)} shards" if repaired.catalog else "nothing"
        console.print(f"repaired: {said}", highlight=False)
    for problem in report.problems:
        place = problem.file if problem.sample_id is None else f"{problem.file} sample {problem.sample_id}"
        console.print(f"[red]{place}[/]: {problem.what}", highlight=False, soft_wrap=True)
    verdict = "[green]all is well[/]" if report.ok else f"[red]{len(report.problems)} problems[/]"
    console.print(
        f"{verdict}: {report.num_samples:,} samples in {report.num_shards} shards, "
        f"{show_bytes(report.num_bytes)} in {seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    return int(not report.ok)


def _repair(args: VerifyArgs) -> RepairReport:
    from linerate.shards.repair import repair_shards

    with terminal.progress("repairing", total=None, unit="images") as advance:
        return repair_shards(args.shards, decode=args.decode, num_workers=args.workers, on_progress=advance)


def main_inspect(argv: list[str]) -> int:
    args = terminal.parse_args(InspectArgs, argv, prog="linerate shard inspect")
    from linerate.shards.catalog import Catalog
    from linerate.shards.overview import summarize

    overview = summarize(Catalog.load(args.shards))
    if args.json:
        terminal.emit_json(overview.to_json())
        return 0
    console = Console()
    table = Table("", "min", "p10", "p50", "p90", "max", "mean", title=str(args.shards), title_justify="left")
    for name, values in (
        ("bytes", overview.sample_bytes),
        ("width", overview.width),
        ("height", overview.height),
    ):
        table.add_row(name, *(f"{values[key]:,.0f}" for key in ("min", "p10", "p50", "p90", "max", "mean")))
    console.print(
        f"{overview.num_samples:,} samples ({show_bytes(overview.jpeg_bytes)} of JPEG) in "
        f"{overview.num_shards} shards ({show_bytes(overview.num_bytes)}; {overview.smallest_shard} to "
        f"{overview.largest_shard} samples each); {overview.num_rejected:,} files rejected",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)
    console.print(_bars("size of a JPEG", {f"<= {show_bytes(end)}": n for end, n in overview.size_histogram}))
    if overview.formats:
        console.print(_bars("properties", overview.formats))
    shown = dict(list(overview.classes.items())[: args.classes])
    console.print(_bars(f"classes, {len(shown)} of {len(overview.classes)}", shown))
    if overview.rejects:
        console.print(_bars("rejected", overview.rejects))
    return 0


def main_preview(argv: list[str]) -> int:
    args = terminal.parse_args(PreviewArgs, argv, prog="linerate shard preview")
    from linerate.shards.catalog import Catalog
    from linerate.shards.preview import write_contact_sheet

    catalog = Catalog.load(args.shards)
    path = write_contact_sheet(catalog, args.out, num=args.num, seed=args.seed)
    shown = min(args.num, catalog.num_samples)
    if args.json:
        terminal.emit_json({"out": str(path), "num": shown})
    else:
        Console().print(
            f"{path}: {shown} of {catalog.num_samples:,} samples", highlight=False, soft_wrap=True
        )
    return 0


def main_beton(argv: list[str]) -> int:
    args = terminal.parse_args(BetonArgs, argv, prog="linerate shard beton")
    from linerate.shards.beton import write_beton
    from linerate.shards.catalog import Catalog

    with terminal.stderr.status("writing, then comparing every image"):
        report = write_beton(Catalog.load(args.shards), args.beton, time_limit_s=args.time_limit_s)
    if args.json:
        terminal.emit_json(dataclasses.asdict(report))
    else:
        Console().print(
            f"{report.path}: {report.num_samples:,} samples, {show_bytes(report.num_bytes)}, "
            f"{report.num_converted} converted to RGB",
            highlight=False,
            soft_wrap=True,
        )
    return 0


def _bars(title: str, counts: Mapping[str, int]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 1))
    largest = max(counts.values(), default=1)
    for name, count in counts.items():
        table.add_row(name, f"{count:,}", "█" * -(-40 * count // max(1, largest)))
    return table
