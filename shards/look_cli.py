"""`linerate shard verify|inspect|preview|beton`: what is done with shards that are there."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from linerate.shards import terminal
from linerate.shards.errors import UserError, show_bytes

if TYPE_CHECKING:
    from linerate.shards.catalog import Catalog
    from linerate.shards.repair import RepairReport

SHOWN_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class LookArgs:
    """Which shards are looked at."""

    shards: Annotated[Positional[str], tyro.conf.arg(metavar="OUT")]
    """Folder of the shards, or an s3:// or gs:// URL."""
    staging: Path | None = None
    """Where OUT is a URL: the folder for what is fetched of it, which is removed at the end; by default the
    system's for temporary files."""


@dataclass(frozen=True, kw_only=True)
class VerifyArgs(LookArgs):
    """Read every byte of the shards and compare checksums, index, counts and images; exit 1 on a problem.

    With --repair, first write anew what is damaged: .idx, .parquet and catalog from the tars, whose bytes
    stay. What is broken in a tar is left out of every index and listed in rejected.parquet.
    """

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
class InspectArgs(LookArgs):
    """Show what the shards hold: totals, sizes, formats, classes, hashtags, what was rejected and why.

    With --sql, the answer to a SELECT over `samples` (a row for each, with shard, position and class_name),
    `shards` and `rejected`; DESCRIBE samples names the columns. Nothing else can be read, nothing written.
    """

    classes: int = 10
    """How many of the largest and of the smallest classes to list."""
    sql: str | None = None
    """A SELECT, such as "SELECT class_name, avg(size) FROM samples GROUP BY ALL ORDER BY 2"."""
    rows: int | None = None
    """Of --sql: at most so many rows; by default 40, all with --json and --csv."""
    csv: bool = False
    """Of --sql: print CSV."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""

    def __post_init__(self) -> None:
        if self.sql is None and (self.csv or self.rows is not None):
            raise UserError(
                "--csv and --rows are of the answer to --sql; give a SELECT there, or leave them out"
            )
        if self.csv and self.json:
            raise UserError("--csv and --json are two forms of one answer; give one of them")
        for name in ("classes", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}, at least 1 is needed")


@dataclass(frozen=True, kw_only=True)
class PreviewArgs(LookArgs):
    """Draw a contact sheet of random samples, or write a page of thumbnails by class, hashtag, shard or size.

    The page is one HTML file that loads nothing. What was rejected stands at its end with the reasons, and
    with a picture where the source is still there and some decoder makes anything of the file.
    """

    out: Path | None = None
    """The picture to write, such as sheet.png."""
    html: Path | None = None
    """The page to write, such as page.html."""
    num: int = 48
    """Of --out: how many samples."""
    by: Literal["class", "hashtag", "shard", "size"] = "class"
    """Of --html: what the samples are grouped by."""
    groups: int = 50
    """Of --html: at most so many groups, of classes and hashtags the most frequent."""
    per: int = 12
    """Of --html: at most so many samples in a group."""
    seed: int = 0
    """Another seed shows other samples."""
    source: tuple[Path, ...] = ()
    """Of --html: where the rejects lie, as it was given to `pack`; by default where it lay then."""
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
    from linerate.shards.look_there import look_at
    from linerate.shards.verify import verify_shards

    started = time.perf_counter()
    repaired = _repair(args) if args.repair else None
    with look_at(args.shards, staging=args.staging) as look:
        total = args.sample * look.catalog.num_samples
        with terminal.progress("verifying", total=total, unit="images") as advance:
            report = verify_shards(
                look.catalog,
                decode=args.decode,
                sample=args.sample,
                seed=args.seed,
                num_workers=args.workers,
                url=look.url,
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
    from linerate.shards.remote_url import is_url
    from linerate.shards.repair import repair_shards

    if is_url(args.shards):
        raise UserError(
            f"--repair mends shards in a folder, not {args.shards}; copy them to a disk, repair them there, "
            f"and copy .idx, .parquet and, last, catalog.json back"
        )
    with terminal.progress("repairing", total=None, unit="images") as advance:
        return repair_shards(
            Path(args.shards), decode=args.decode, num_workers=args.workers, on_progress=advance
        )


def main_inspect(argv: list[str]) -> int:
    args = terminal.parse_args(InspectArgs, argv, prog="linerate shard inspect")
    from linerate.shards.look_there import look_at
    from linerate.shards.overview import summarize
    from linerate.shards.show_overview import print_overview

    with look_at(args.shards, staging=args.staging) as look:
        look.bring_indexes()
        if args.sql is not None:
            return _answer(look.catalog, args.sql, args)
        overview = dataclasses.replace(summarize(look.catalog), root=look.place)
    if args.json:
        terminal.emit_json(overview.to_json())
    else:
        print_overview(overview, num_classes=args.classes)
    return 0


def _answer(catalog: Catalog, query: str, args: InspectArgs) -> int:
    from linerate.shards import show_overview
    from linerate.shards.sql import run_select

    with run_select(catalog, query) as answer:
        if args.csv:
            show_overview.write_answer_csv(answer, num_rows=args.rows)
        elif args.json:
            show_overview.write_answer_json(answer, num_rows=args.rows)
        else:
            show_overview.print_answer(answer, num_rows=args.rows or SHOWN_ROWS)
    return 0


def main_preview(argv: list[str]) -> int:
    args = terminal.parse_args(PreviewArgs, argv, prog="linerate shard preview")
    from linerate.shards.look_there import look_at

    if args.out is None and args.html is None:
        raise UserError("nothing to write: give --out sheet.png, --html page.html, or both")
    if args.source and args.html is None:
        raise UserError("--source is where the rejects of a page lie; give --html page.html, or leave it out")
    with look_at(args.shards, staging=args.staging) as look:
        sheet = _write_sheet(look.catalog, args.out, args) if args.out else {}
        if args.html:
            look.bring_indexes()
        page = _write_page(look.catalog, args.html, args) if args.html else None
    if args.json:
        terminal.emit_json({**sheet, **({"html": page} if page else {})})
    return 0


def _write_sheet(catalog: Catalog, out: Path, args: PreviewArgs) -> dict[str, Any]:
    from linerate.shards.preview import write_contact_sheet

    path = write_contact_sheet(catalog, out, num=args.num, seed=args.seed)
    shown = min(args.num, catalog.num_samples)
    if not args.json:
        Console().print(
            f"{path}: {shown} of {catalog.num_samples:,} samples", highlight=False, soft_wrap=True
        )
    return {"out": str(path), "num": shown}


def _write_page(catalog: Catalog, out: Path, args: PreviewArgs) -> dict[str, Any]:
    from linerate.shards.gallery import write_gallery

    with terminal.progress("drawing", total=None, unit="images") as advance:
        report = write_gallery(
            catalog,
            out,
            by=args.by,
            per_group=args.per,
            num_groups=args.groups,
            seed=args.seed,
            source=args.source,
            on_cells=advance,
        )
    if not args.json:
        broken = f", {report.num_broken} of them do not decode" if report.num_broken else ""
        if report.num_rejects_drawn:
            broken += f", {report.num_rejects_drawn} rejects"
        Console().print(
            f"{report.out}: {report.num:,} images in {len(report.groups)} of {report.num_groups:,} groups"
            f"{broken}, {show_bytes(report.num_bytes)}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    return dataclasses.asdict(report)


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
