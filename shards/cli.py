"""`linerate shard pack|verify|inspect|preview|beton`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from linerate.shards import terminal
from linerate.shards.errors import UserError
from linerate.shards.options import PackOptions


@dataclass(frozen=True, kw_only=True)
class PackArgs(PackOptions):
    """Pack a folder of images, or tars of one, into shards: NAME-000042.tar with .idx and .parquet.

    The same command again continues where a killed one stopped.
    """

    paths: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="SOURCE... OUT")]
    """SOURCE: a folder (class folders become labels), or one or several tars (of class folders, or
    WebDataset). OUT: the folder of the shards; new, empty, or begun by the same command."""
    workers: int | None = None
    """Processes; by default one per core (none for little work). The bytes are the same for any number."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""


@dataclass(frozen=True, kw_only=True)
class VerifyArgs:
    """Read every byte of the shards and compare checksums, index, counts and images; exit 1 on a problem."""

    shards: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder of the shards."""
    decode: Literal["none", "header", "full"] = "header"
    """How far each image is looked into, besides its checksum."""
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


def main(argv: list[str]) -> int:
    """Exit code of `linerate shard ...`."""
    commands: dict[str, tuple[terminal.Command, str]] = {
        "pack": (main_pack, "an image folder or tars of one -> shards"),
        "verify": (main_verify, "read every byte and compare it with checksums, index and catalog"),
        "inspect": (main_inspect, "totals, sizes, formats, classes, rejects"),
        "preview": (main_preview, "a contact sheet of random samples"),
        "beton": (main_beton, "the shards as one file for ffcv"),
    }
    return terminal.dispatch(commands, argv, prog="linerate shard")


def main_pack(argv: list[str]) -> int:
    args = terminal.parse_args(PackArgs, _paths_last(argv), prog="linerate shard pack")
    from linerate.shards.overview import summarize
    from linerate.shards.pack import pack

    if len(args.paths) < 2:
        raise UserError("`linerate shard pack SOURCE... OUT` needs a source and the folder for its shards")
    *sources, out = args.paths
    options = PackOptions(**{f.name: getattr(args, f.name) for f in dataclasses.fields(PackOptions)})
    started = time.perf_counter()
    with PackProgress() as bars:
        catalog = pack(sources, out, options=options, num_workers=args.workers, on_progress=bars.advance)
    seconds = time.perf_counter() - started
    overview = summarize(catalog)
    if args.json:
        rates = {"seconds": seconds, "packed_now": bars.num_packed}
        terminal.emit_json(overview.to_json() | rates)
        return 0
    table = Table(title=f"{out}", title_justify="left", show_header=False, box=None)
    table.add_row("samples", f"{catalog.num_samples:,} in {len(overview.classes)} classes")
    table.add_row("shards", f"{catalog.num_shards} of {_size(overview.num_bytes / catalog.num_shards)}")
    table.add_row("bytes", _size(overview.num_bytes))
    changed = {name: n for name, n in overview.formats.items() if name.endswith("when packed")}
    if changed:
        table.add_row("changed", _listed(changed).replace(" when packed", ""))
    table.add_row("rejected", _listed(overview.rejects) or "none")
    if not options.baseline and any(reason.startswith("not a JPEG") for reason in overview.rejects):
        table.add_row("", "shards hold JPEGs: with --baseline other formats are converted")
    rate = f", {bars.num_packed / seconds:,.0f} images/s" if bars.num_packed else ", nothing was left to do"
    table.add_row("time", f"{seconds:.1f} s{rate}")
    Console().print(table)
    return 0


def main_verify(argv: list[str]) -> int:
    args = terminal.parse_args(VerifyArgs, argv, prog="linerate shard verify")
    from linerate.shards.catalog import Catalog
    from linerate.shards.verify import verify_shards

    catalog = Catalog.load(args.shards)
    started = time.perf_counter()
    with terminal.progress("verifying", total=catalog.num_samples, unit="images") as advance:
        report = verify_shards(catalog, decode=args.decode, num_workers=args.workers, on_progress=advance)
    seconds = time.perf_counter() - started
    if args.json:
        terminal.emit_json(report.to_json() | {"seconds": seconds})
        return int(not report.ok)
    console = Console()
    for problem in report.problems:
        place = problem.file if problem.sample_id is None else f"{problem.file} sample {problem.sample_id}"
        console.print(f"[red]{place}[/]: {problem.what}", highlight=False, soft_wrap=True)
    verdict = "[green]all is well[/]" if report.ok else f"[red]{len(report.problems)} problems[/]"
    console.print(
        f"{verdict}: {report.num_samples:,} samples in {report.num_shards} shards, "
        f"{_size(report.num_bytes)} in {seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    return int(not report.ok)


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
        f"{overview.num_samples:,} samples ({_size(overview.jpeg_bytes)} of JPEG) in "
        f"{overview.num_shards} shards ({_size(overview.num_bytes)}; {overview.smallest_shard} to "
        f"{overview.largest_shard} samples each); {overview.num_rejected:,} files rejected",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)
    console.print(_bars("size of a JPEG", {f"<= {_size(end)}": n for end, n in overview.size_histogram}))
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


def _paths_last(argv: list[str]) -> list[str]:
    """argv with options first: tyro takes a list of paths only where it is not interrupted."""
    options: list[str] = []
    paths: list[str] = []
    names = [field.name.replace("_", "-") for field in dataclasses.fields(PackArgs) if field.default is False]
    switches = {"-h", "--help"} | {f"--{no}{name}" for name in names for no in ("", "no-")}
    words = iter(argv)
    for word in words:
        if word == "--":
            paths.extend(words)
        elif not word.startswith("-") or word == "-":
            paths.append(word)
        else:
            options.append(word)
            if word not in switches and "=" not in word:
                options.extend(itertools.islice(words, 1))
    return options + paths


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
            f"{report.path}: {report.num_samples:,} samples, {_size(report.num_bytes)}, "
            f"{report.num_converted} converted to RGB",
            highlight=False,
            soft_wrap=True,
        )
    return 0


class PackProgress:
    """A bar for listing the source, then one for packing it, from pack()'s progress calls."""

    def __init__(self) -> None:
        self.num_packed = 0
        self._stack = contextlib.ExitStack()
        self._advance: Callable[[float], None] | None = None

    def __enter__(self) -> PackProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def advance(self, stage: str, amount: float) -> None:
        if stage == "plan":
            self._stack.close()
            self._advance = self._stack.enter_context(
                terminal.progress("packing", total=amount, unit="images")
            )
            return
        if stage == "list" and self._advance is None:
            self._advance = self._stack.enter_context(
                terminal.progress("listing the source", total=None, unit="files")
            )
        if stage == "pack":
            self.num_packed += int(amount)
        if self._advance:
            self._advance(amount)


def _bars(title: str, counts: Mapping[str, int]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 1))
    largest = max(counts.values(), default=1)
    for name, count in counts.items():
        table.add_row(name, f"{count:,}", "█" * -(-40 * count // max(1, largest)))
    return table


def _size(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
