"""`linerate shard pack`, and which function is which other `linerate shard ...`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from linerate.shards import terminal
from linerate.shards.errors import UserError, show_bytes
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.look_cli import main_beton, main_inspect, main_preview, main_verify
from linerate.shards.options import PackOptions
from linerate.shards.plan import DEFAULT_MEMORY

if TYPE_CHECKING:
    from linerate.shards.catalog import Catalog
    from linerate.shards.engines import Engine
    from linerate.shards.worker_index import Part


@dataclass(frozen=True, kw_only=True)
class PackArgs(PackOptions, FetchOptions):
    """Pack a folder of images, or tars of one, into shards: NAME-000042.tar with .idx and .parquet.

    The same command again continues where a killed one stopped.
    """

    paths: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE... OUT")]
    """SOURCE: a folder (class folders become labels), one or several tars (of class folders, or
    WebDataset), or manifests (Parquet, CSV, TSV or JSON lines with a column of paths or URLs); tars and
    manifests may be URLs, or an s3:// or gs:// prefix or pattern of them. OUT: the
    folder of the shards; new, empty, or begun by the same command; or an s3:// or gs:// URL."""
    ground_truth: Path | None = None
    """The classes of ImageNet's validation set: its devkit (ILSVRC2012_devkit_t12.tar.gz), Kaggle's
    LOC_val_solution.csv, or a text of one wnid per image in the order of their names."""
    staging: Path | None = None
    """Where OUT is a URL: the folder for the plan, for shards that are being packed (two for each worker),
    and for a copy of large tars while they are shuffled; by default under the system's temporary folder.
    With --engine ray one that all nodes share."""
    memory: str = DEFAULT_MEMORY
    """What planning may take of the memory; the list of more images spills into OUT."""
    append: bool = False
    """OUT holds finished shards: add the images whose keys they lack as further shards. Nothing that is there
    changes but the catalog."""
    workers: int | None = None
    """Processes; by default one per core (none for little work). The bytes are the same for any number."""
    engine: Literal["local", "ray"] = "local"
    """Processes of this machine, or tasks of a Ray cluster; OUT and SOURCE lie at the same place on every
    node."""
    ray_address: str = ""
    """Of a running cluster, such as auto; by default $RAY_ADDRESS, else one of this machine for this run."""
    worker_index: int | Literal["auto"] | None = None
    """Pack only the shards of this worker, 0 to N-1, beside others in one OUT; then `linerate shard finish
    OUT`. auto: by SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX."""
    worker_count: int | Literal["auto"] | None = None
    """How many workers there are, N."""
    plan_wait_s: float = 86400.0
    """A worker waits at most so long for the plan that another one makes."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""


def main(argv: list[str]) -> int:
    """Exit code of `linerate shard ...`."""
    commands: dict[str, tuple[terminal.Command, str]] = {
        "pack": (main_pack, "an image folder or tars of one -> shards"),
        "finish": (main_finish, "the catalog, after workers with --worker-index packed all shards"),
        "verify": (main_verify, "read every byte and compare it with checksums, index and catalog"),
        "inspect": (main_inspect, "totals, sizes, formats, classes, rejects"),
        "preview": (main_preview, "a contact sheet of random samples"),
        "beton": (main_beton, "the shards as one file for ffcv"),
    }
    return terminal.dispatch(commands, argv, prog="linerate shard")


def main_pack(argv: list[str]) -> int:
    args = terminal.parse_args(PackArgs, _paths_last(argv), prog="linerate shard pack")
    from linerate.shards.engines import Engine
    from linerate.shards.pack import pack
    from linerate.shards.upload import is_remote
    from linerate.shards.worker_index import choose_part

    if len(args.paths) < 2:
        raise UserError("`linerate shard pack SOURCE... OUT` needs a source and the folder for its shards")
    *sources, out = args.paths
    options = PackOptions(**{f.name: getattr(args, f.name) for f in dataclasses.fields(PackOptions)})
    fetch = FetchOptions(**{f.name: getattr(args, f.name) for f in dataclasses.fields(FetchOptions)})
    engine = Engine(kind=args.engine, ray_address=args.ray_address)
    if part := choose_part(args.worker_index, args.worker_count):
        return _pack_part(args, options, fetch, engine, part)
    started = time.perf_counter()
    with PackProgress() as bars:
        catalog = pack(
            sources,
            out,
            options=options,
            ground_truth=args.ground_truth,
            num_workers=args.workers,
            engine=engine,
            append=args.append,
            memory=args.memory,
            fetch=fetch,
            staging=args.staging,
            on_progress=bars.advance,
        )
    if is_remote(out):
        _show_remote(out, catalog, bars.num_packed, time.perf_counter() - started, json=args.json)
        return 0
    if bars.num_known and not args.json:
        Console().print(f"nothing new: the keys or the bytes of all {bars.num_known:,} images are there")
    _tell(catalog, args, num_packed=bars.num_packed, seconds=time.perf_counter() - started)
    return 0


def _pack_part(args: PackArgs, options: PackOptions, fetch: FetchOptions, engine: Engine, part: Part) -> int:
    from linerate.shards.pack import Effort, open_labelled
    from linerate.shards.worker_index import pack_part

    *sources, out = args.paths
    with PackProgress() as bars:
        report = pack_part(
            open_labelled(sources, options, ground_truth=args.ground_truth, fetch=fetch),
            out,
            part,
            options=options,
            append=args.append,
            effort=Effort(
                num_workers=args.workers,
                engine=engine,
                memory=args.memory,
                fetch=fetch,
                on_progress=bars.advance,
            ),
            staging=args.staging,
            on_wait=lambda whom: terminal.stderr.print(f"waiting for the plan, which {whom} makes"),
            wait_limit_s=args.plan_wait_s,
        )
    if args.json:
        terminal.emit_json(dataclasses.asdict(report))
    elif report.finished:
        Console().print(
            f"{out} is finished, nothing was left to do for {part}; its source was not compared",
            soft_wrap=True,
        )
    else:
        Console().print(
            f"{part}: its {report.mine} of {report.num_shards} shards are whole, {report.packed_now} packed "
            f"now; when all workers have ended: linerate shard finish {out}",
            soft_wrap=True,
        )
    return 0


@dataclass(frozen=True, kw_only=True)
class FinishArgs:
    """Write the catalog once the workers of --worker-index have packed all shards; needs no source."""

    out: Positional[str]
    """The folder or URL that they packed into."""
    staging: Path | None = None
    """Where OUT is a URL: the folder for what is made, as of `linerate shard pack`."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""


def main_finish(argv: list[str]) -> int:
    args = terminal.parse_args(FinishArgs, argv, prog="linerate shard finish")
    from linerate.shards.upload import is_remote
    from linerate.shards.worker_index import finish_parts

    started = time.perf_counter()
    catalog = finish_parts(args.out, staging=args.staging)
    seconds = time.perf_counter() - started
    if is_remote(args.out):
        _show_remote(args.out, catalog, 0, seconds, json=args.json)
    else:
        _tell(catalog, args, num_packed=0, seconds=seconds)
    return 0


def _tell(catalog: Catalog, args: PackArgs | FinishArgs, *, num_packed: int, seconds: float) -> None:
    """What OUT holds now, as a table or as JSON."""
    from linerate.shards.overview import NO_CLASS, summarize

    overview = summarize(catalog)
    if args.json:
        rates = {"seconds": seconds, "packed_now": num_packed, "filtered": catalog.filtered}
        terminal.emit_json(overview.to_json() | rates | {"appends": list(catalog.appends)})
        return
    table = Table(title=f"{catalog.root}", title_justify="left", show_header=False, box=None)
    num_classes = len(overview.classes.keys() - {NO_CLASS})
    unlabelled = overview.classes.get(NO_CLASS, 0) if num_classes else 0
    without = f", {unlabelled:,} without a class" if unlabelled else ""
    table.add_row("samples", f"{catalog.num_samples:,} in {num_classes or 'no'} classes{without}")
    table.add_row("shards", f"{catalog.num_shards} of {show_bytes(overview.num_bytes / catalog.num_shards)}")
    if catalog.appends:
        last = catalog.appends[-1]
        known = f", the bytes of {last['num_known_bytes']:,}" if last.get("num_known_bytes") else ""
        table.add_row(
            "appended",
            f"{len(catalog.appends)} times; last {last['num_samples']:,} samples in {last['num_shards']} "
            f"shards; the keys of {last['num_known']:,}{known} were there",
        )
        if unlike := last.get("num_incomparable"):
            table.add_row("", f"{unlike:,} there were written anew when packed: their equals are not found")
    table.add_row("bytes", show_bytes(overview.num_bytes))
    changed = {name: n for name, n in overview.formats.items() if name.endswith("when packed")}
    if changed:
        table.add_row("changed", _listed(changed).replace(" when packed", ""))
    if catalog.filtered:
        left_out = {f"by --{name}": count for name, count in catalog.filtered.items()}
        table.add_row("left out", _listed(left_out))
    table.add_row("rejected", _listed(overview.rejects) or "none")
    if not catalog.options.get("baseline") and any(
        reason.startswith("not a JPEG") for reason in overview.rejects
    ):
        table.add_row("", "shards hold JPEGs: with --baseline other formats are converted")
    if isinstance(args, PackArgs):
        rate = f", {num_packed / seconds:,.0f} images/s" if num_packed else ", nothing was left to do"
        table.add_row("time", f"{seconds:.1f} s{rate}")
    Console().print(table)


def _show_remote(url: str, catalog: Catalog, num_packed: int, seconds: float, *, json: bool) -> None:
    """What is known of shards that lie in a bucket without asking for their indices."""
    found = {
        "root": url,
        "num_shards": catalog.num_shards,
        "num_samples": catalog.num_samples,
        "num_planned": catalog.num_planned,
        "num_rejected": catalog.num_rejected,
        "num_bytes": int(catalog.shard_bytes.sum()),
    }
    if json:
        terminal.emit_json(found | {"seconds": seconds, "packed_now": num_packed})
        return
    table = Table(title=url, title_justify="left", show_header=False, box=None)
    table.add_row("samples", f"{catalog.num_samples:,}")
    table.add_row("shards", f"{catalog.num_shards}, {show_bytes(float(catalog.shard_bytes.sum()))}")
    table.add_row("rejected", f"{catalog.num_rejected:,}, see rejected.parquet")
    rate = f", {num_packed / seconds:,.0f} images/s" if num_packed else ", nothing was left to do"
    table.add_row("time", f"{seconds:.1f} s{rate}")
    Console().print(table)


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


class PackProgress:
    """Bars for fetching and listing the source, reading its tars, and packing it, from pack()'s calls."""

    def __init__(self) -> None:
        self.num_packed = 0
        self._fetching = False
        self.num_known = 0
        self._stack = contextlib.ExitStack()
        self._advance: Callable[[float], None] | None = None

    def __enter__(self) -> PackProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def advance(self, stage: str, amount: float) -> None:
        if stage == "to fetch":
            self._stack.close()
            fetched = self._stack.enter_context(
                terminal.progress("fetching the source", total=round(amount / 1e6), unit="MB")
            )
            self._advance = lambda num_bytes: fetched(num_bytes / 1e6)
            self._fetching = True
            return
        if self._fetching and stage != "fetch":
            self._stack.close()
            self._advance, self._fetching = None, False
        if stage in ("to spill", "plan"):
            self._stack.close()
            what = "packing" if stage == "plan" else "reading the tars"
            self._advance = self._stack.enter_context(terminal.progress(what, total=amount, unit="images"))
            return
        if stage == "list" and self._advance is None:
            self._advance = self._stack.enter_context(
                terminal.progress("listing the source", total=None, unit="files")
            )
        if stage == "known":
            self.num_known = int(amount)
            return
        if stage == "pack":
            self.num_packed += int(amount)
        if self._advance:
            self._advance(amount)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
