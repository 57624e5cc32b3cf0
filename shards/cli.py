"""`linerate shard pack`, and which function is which other `linerate shard ...`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from linerate.shards import terminal
from linerate.shards.errors import UserError, show_bytes
from linerate.shards.look_cli import main_beton, main_inspect, main_preview, main_verify
from linerate.shards.options import PackOptions


@dataclass(frozen=True, kw_only=True)
class PackArgs(PackOptions):
    """Pack a folder of images, or tars of one, into shards: NAME-000042.tar with .idx and .parquet.

    The same command again continues where a killed one stopped.
    """

    paths: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="SOURCE... OUT")]
    """SOURCE: a folder (class folders become labels), or one or several tars (of class folders, or
    WebDataset). OUT: the folder of the shards; new, empty, or begun by the same command."""
    ground_truth: Path | None = None
    """The classes of ImageNet's validation set: its devkit (ILSVRC2012_devkit_t12.tar.gz), Kaggle's
    LOC_val_solution.csv, or a text of one wnid per image in the order of their names."""
    workers: int | None = None
    """Processes; by default one per core (none for little work). The bytes are the same for any number."""
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
        catalog = pack(
            sources,
            out,
            options=options,
            ground_truth=args.ground_truth,
            num_workers=args.workers,
            on_progress=bars.advance,
        )
    seconds = time.perf_counter() - started
    overview = summarize(catalog)
    if args.json:
        rates = {"seconds": seconds, "packed_now": bars.num_packed}
        terminal.emit_json(overview.to_json() | rates)
        return 0
    table = Table(title=f"{out}", title_justify="left", show_header=False, box=None)
    table.add_row("samples", f"{catalog.num_samples:,} in {len(overview.classes)} classes")
    table.add_row("shards", f"{catalog.num_shards} of {show_bytes(overview.num_bytes / catalog.num_shards)}")
    table.add_row("bytes", show_bytes(overview.num_bytes))
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
    """Bars for listing the source, reading its tars, and packing it, from pack()'s progress calls."""

    def __init__(self) -> None:
        self.num_packed = 0
        self._stack = contextlib.ExitStack()
        self._advance: Callable[[float], None] | None = None

    def __enter__(self) -> PackProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def advance(self, stage: str, amount: float) -> None:
        if stage in ("to spill", "plan"):
            self._stack.close()
            what = "packing" if stage == "plan" else "reading the tars"
            self._advance = self._stack.enter_context(terminal.progress(what, total=amount, unit="images"))
            return
        if stage == "list" and self._advance is None:
            self._advance = self._stack.enter_context(
                terminal.progress("listing the source", total=None, unit="files")
            )
        if stage == "pack":
            self.num_packed += int(amount)
        if self._advance:
            self._advance(amount)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
