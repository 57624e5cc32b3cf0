"""`linerate bench run|compare|list|...`: arguments and output only."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from linerate.shards.errors import UserError
from linerate.shards.terminal import dispatch, emit_json, nearest, parse_args, progress, stderr

if TYPE_CHECKING:
    from linerate.bench.contest import Setting
    from linerate.bench.record import Record


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Measure, side by side with a peer, and print one record a contest."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """benchmarks to run (`linerate bench list` names them); all of the suite where none is given"""
    suite: Literal["quick", "cpu", "gpu", "full"] = "cpu"
    """quick: smaller work, about a minute; cpu: the work that the bars name, minutes; gpu: what a CUDA device
    is measured by, each benchmark in a process of its own under a time limit; full: cpu with `plan`, more
    rounds and ranks, hours, and then gpu where there is a CUDA device"""
    tiny: bool = False
    """the smallest work, on the CPU: proves that the paths run, and measures nothing"""
    within_s: float | None = None
    """of --suite gpu: seconds after which no benchmark starts, and those at work end"""
    backends: str | None = None
    """of `views`: backends to hold against `torch`, as dali,torch,webdataset,ffcv"""
    recipe: Literal["v1", "v2", "v3"] | None = None
    """of `views` with --backends: the augmentation; v2 where it is not given"""
    out: Path | None = None
    """results file (JSON lines) to append to"""
    images: Path | None = None
    """folder of JPEGs to measure on, instead of generated ones of about 110 KB"""
    rounds: int | None = None
    """interleaved rounds, at least 7; the suite's own number where it is not given"""
    scratch: Path | None = None
    """folder for inputs and outputs; /dev/shm where there is one, else the temporary folder"""
    json: bool = False
    """one JSON line a record on stdout, and nothing else there"""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Hold results B against results A; exit 1 when something became really slower."""

    a: tyro.conf.Positional[Path]
    """results file of before"""
    b: tyro.conf.Positional[Path]
    """results file of after"""
    tolerance: float = 0.05
    """share by which B may be slower before that is a regression"""
    of: Literal["rate", "ratio"] = "rate"
    """rate: our own speed; ratio: our lead over the peer, which another machine moves less"""
    json: bool = False
    """one JSON object on stdout, and nothing else there"""


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """Name the benchmarks and suites."""

    json: bool = False
    """one JSON object on stdout, and nothing else there"""


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 a regression, or sides that disagree."""
    from linerate.bench.report_cli import main_matrix, main_report

    commands = {
        "run": (main_run, "measure named benchmarks against their peers"),
        "pipeline": (main_pipeline, "where a recipe's time goes, what bounds it and what would lift it"),
        "compare": (main_compare, "hold one results file against another"),
        "report": (main_report, "bars, ceilings, scaling, stages, history and cost; --html for a page"),
        "matrix": (main_matrix, "results of several machines in one table"),
        "floors": (main_floors, "count a recipe's step, and the time below which it cannot fall"),
        "scale": (main_scale, "measure ranks 1, 2, ... of a recipe; project to more"),
        "list": (main_list, "name the benchmarks"),
    }
    return dispatch(commands, argv, prog="linerate bench")


def main_run(argv: list[str]) -> int:
    """Run benchmarks; records go to --out as they are measured, so an interrupted run keeps its lines."""
    config = parse_args(RunConfig, argv, prog="linerate bench run")
    from linerate.bench.record import append_jsonl, compact_json
    from linerate.bench.record_table import results_table
    from linerate.bench.registry import SUITES, select

    suite = SUITES[config.suite]
    names = select([*config.names]) if config.names else suite.names
    _check_run(config, names)
    records = []
    with (
        scratch_folder(config.scratch) as scratch,
        progress("bench", total=len(names), unit="benchmarks") as advance,
    ):
        for record in _run_all(config, names, scratch=scratch, advance=advance):
            records.append(record)
            if config.out is not None:
                append_jsonl(config.out, record)
            if config.json:
                emit_json(record.to_json())
            for trouble in filter(None, (record.missing, record.refused)):
                stderr.print(f"{record.name}: {trouble}", highlight=False, markup=False)
    if not config.json:
        Console().print(results_table(records))
        if suite.limits_s:
            for record in records:
                emit_json(compact_json(record))
    return int(any(record.refused for record in records))


def _check_run(config: RunConfig, names: list[str]) -> None:
    """Raise UserError for what cannot be measured, before anything is."""
    from linerate.bench.timing import MIN_ROUNDS

    if config.rounds is not None and config.rounds < MIN_ROUNDS:
        raise UserError(f"--rounds {config.rounds} cannot carry a 95 % interval; give {MIN_ROUNDS} or more")
    if config.images is not None and not config.images.is_dir():
        raise UserError(f"--images {config.images} is no folder; give one that holds JPEGs")
    if config.out is not None and config.out.is_dir():
        raise UserError(
            f"--out {config.out} is a folder; name a file, such as {config.out / 'results.jsonl'}"
        )
    if config.within_s is not None and config.suite != "gpu":
        raise UserError(f"--within-s {config.within_s:g} is for --suite gpu; leave it out for {config.suite}")
    given = [f"--{name}" for name in ("backends", "recipe") if getattr(config, name) is not None]
    if given and names != ["views"]:
        raise UserError(
            f"{' and '.join(given)} are of `views` alone: linerate bench run views {given[0]} ..."
        )
    if config.recipe is not None and config.backends is None:
        raise UserError(f"--recipe {config.recipe} needs --backends, as --backends dali,torch")
    if config.suite == "gpu" and not config.tiny:
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                "--suite gpu needs a CUDA device, and torch sees none; --tiny tries its paths on a CPU"
            )


def _run_all(
    config: RunConfig, names: list[str], *, scratch: Path, advance: Callable[[float], None]
) -> Iterator[Record]:
    """Every record of every benchmark; several of a suite with limits each run in a process of their own."""
    from linerate.bench.disk import NUM_BYTES, disk_record
    from linerate.bench.registry import SUITES, run_benchmark

    suite = SUITES[config.suite]
    disk = {} if config.tiny else {"disk": disk_record(scratch, num_bytes=NUM_BYTES[suite.size])}
    if not suite.limits_s or len(names) == 1:
        setting = _setting(config, scratch)
        for name in names:
            for record in run_benchmark(name, setting=setting, suite=config.suite):
                yield dataclasses.replace(record, machine={**record.machine, **disk})
            advance(1)
        names = _left_for_gpu(config)
    yield from _run_apart(config, names, scratch=scratch, advance=advance)


def _left_for_gpu(config: RunConfig) -> list[str]:
    """What --suite full runs besides where there is a CUDA device."""
    import torch

    from linerate.bench.registry import SUITES

    wanted = config.suite == "full" and not config.names and not config.tiny
    return SUITES["gpu"].names if wanted and torch.cuda.is_available() else []


def _run_apart(
    config: RunConfig, names: list[str], *, scratch: Path, advance: Callable[[float], None]
) -> Iterator[Record]:
    """Benchmarks of the suite of a GPU, each in a process of its own, which finds the disk's rates there."""
    from linerate.bench.isolated import run_isolated
    from linerate.bench.registry import SUITES

    suite = SUITES["gpu"]
    options = [*_words(config), "--scratch", str(scratch)]
    deadline = float("inf") if config.within_s is None else time.monotonic() + config.within_s
    for name in names:
        left_s = max(0.0, deadline - time.monotonic())
        limit_s = min(suite.limits_s.get(name, max(suite.limits_s.values())), left_s)
        yield from run_isolated(name, options, suite="gpu", limit_s=limit_s)
        advance(1)


def _setting(config: RunConfig, scratch: Path) -> Setting:
    from linerate.bench.contest import Setting
    from linerate.bench.registry import SUITES
    from linerate.pipeline.loader import BACKENDS

    suite = SUITES[config.suite]
    backends = tuple((config.backends or "").split(",")) if config.backends is not None else ()
    for name in backends:
        if name not in BACKENDS or name == "synthetic":
            raise nearest(name, [one for one in BACKENDS if one != "synthetic"], what="backend to measure")
    return Setting(
        size="tiny" if config.tiny else suite.size,
        scratch=scratch,
        images=config.images,
        rounds=config.rounds or suite.rounds,
        device="cpu" if config.tiny else suite.device,
        for_gpu=bool(suite.device == "cuda"),
        backends=backends,
        recipe=config.recipe,
        max_ranks=suite.max_ranks,
    )


def _words(config: RunConfig) -> list[str]:
    """The options that a benchmark's own process needs as well."""
    words = ["--tiny"] if config.tiny else []
    for name in ("images", "rounds"):
        if (value := getattr(config, name)) is not None:
            words += [f"--{name}", str(value)]
    return words


def main_pipeline(argv: list[str]) -> int:
    """Measure a recipe on the user's shards, stage by stage."""
    from linerate.bench.pipeline_cli import main

    return main(argv)


def main_compare(argv: list[str]) -> int:
    """Exit code 1 when a benchmark is really slower in B, by more than the tolerance."""
    config = parse_args(CompareConfig, argv, prog="linerate bench compare")
    from linerate.bench.record import load_jsonl
    from linerate.bench.verdict import compare_records, differences_table

    if not 0 <= config.tolerance < 1:
        raise UserError(
            f"--tolerance {config.tolerance} is no share from 0 up to 1; 0.05 allows B to be 5 % slower"
        )
    differences = compare_records(
        load_jsonl(config.a), load_jsonl(config.b), tolerance=config.tolerance, of=config.of
    )
    if all(difference.verdict in ("only in A", "only in B") for difference in differences):
        raise UserError(
            f"{config.a} and {config.b} share no benchmark of the same peer, work and unit; "
            "measure the same suite for both"
        )
    regressions = sum(difference.regressed for difference in differences)
    if config.json:
        rows = [dataclasses.asdict(difference) for difference in differences]
        emit_json({"regressions": regressions, "tolerance": config.tolerance, "differences": rows})
    else:
        console = Console()
        console.print(f"A = {config.a}\nB = {config.b}", highlight=False, markup=False)
        console.print(differences_table(differences))
        console.print(
            f"{regressions} of {len(differences)} regressed: really worse by more than "
            f"{100 * config.tolerance:g} %, or refused in B",
            highlight=False,
        )
    return int(regressions > 0)


def main_floors(argv: list[str]) -> int:
    """`linerate bench floors RECIPE [--gb-per-s X --tflops Y] [flags of the recipe]`."""
    from linerate.bench.floors_cli import main

    return main(argv)


def main_scale(argv: list[str]) -> int:
    """`linerate bench scale RECIPE [--ranks 1 2 4] [--project-to 8 64 --link-gb-per-s X] [flags]`."""
    from linerate.bench.scale_cli import main

    return main(argv)


def main_list(argv: list[str]) -> int:
    """Name every benchmark with its work and its peers, which of them are missing, and what brings those."""
    config = parse_args(ListConfig, argv, prog="linerate bench list")
    from linerate.bench.peers import missing_peer
    from linerate.bench.registry import BENCHMARKS, SUITES

    peers = dict.fromkeys(peer for b in BENCHMARKS.values() for peer in b.peers)
    lines = {peer: line for peer in peers if (line := missing_peer(peer))}
    missing = {name: [p for p in b.peers if p in lines] for name, b in BENCHMARKS.items()}
    if config.json:
        rows = {
            name: {"about": b.about, "peers": b.peers, "missing": missing[name]}
            for name, b in BENCHMARKS.items()
        }
        about = {name: suite.about for name, suite in SUITES.items()}
        emit_json({"benchmarks": rows, "missing": lines, "suites": about})
        return 0
    table = Table(box=None, padding=(0, 2), title="benchmarks", title_justify="left")
    for header in ("name", "work", "peers"):
        table.add_column(header)
    for name, benchmark in BENCHMARKS.items():
        named = [f"[yellow]{p} (missing)[/]" if p in missing[name] else p for p in benchmark.peers]
        table.add_row(f"[bold cyan]{name}[/]", benchmark.about, ", ".join(named) or "-")
    console = Console()
    console.print(table)
    for line in lines.values():
        console.print(f"[yellow]missing[/]: {escape(line)}", highlight=False)
    for name, suite in SUITES.items():
        console.print(f"--suite [bold cyan]{name}[/]: {suite.about}", highlight=False)
    return 0


@contextlib.contextmanager
def scratch_folder(parent: Path | None) -> Iterator[Path]:
    """A folder of its own under `parent`, or on tmpfs; removed with all in it.

    Raises UserError where it cannot be made.
    """
    shared_memory = Path("/dev/shm")
    if parent is None and shared_memory.is_dir() and shutil.disk_usage(shared_memory).free > 4 * 2**30:
        parent = shared_memory
    try:
        made = tempfile.mkdtemp(prefix="linerate-bench-", dir=parent)
    except OSError as error:
        raise UserError(f"--scratch {parent}: {error.strerror}; give a folder that can be written") from None
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)
