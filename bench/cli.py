"""`linerate bench run|compare|list`: arguments and output only."""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from linerate.shards.errors import UserError
from linerate.shards.terminal import dispatch, emit_json, parse_args, progress, stderr


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Measure, side by side with a peer, and print one record a contest."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """benchmarks to run (`linerate bench list` names them); all of the suite where none is given"""
    suite: Literal["cpu", "quick"] = "cpu"
    """cpu: the work that the bars name, minutes; quick: smaller work, about a minute"""
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
    commands = {
        "run": (main_run, "measure named benchmarks against their peers"),
        "compare": (main_compare, "hold one results file against another"),
        "list": (main_list, "name the benchmarks"),
    }
    return dispatch(commands, argv, prog="linerate bench")


def main_run(argv: list[str]) -> int:
    """Run benchmarks; records go to --out as they are measured, so an interrupted run keeps its lines."""
    config = parse_args(RunConfig, argv, prog="linerate bench run")
    from linerate.bench.contest import Setting
    from linerate.bench.record import append_jsonl, results_table
    from linerate.bench.registry import SUITES, run_benchmark, select
    from linerate.bench.timing import MIN_ROUNDS

    suite = SUITES[config.suite]
    names = select([*config.names])
    if not config.names:
        names = [name for name in names if name not in suite.only_by_name]
    rounds = suite.rounds if config.rounds is None else config.rounds
    if rounds < MIN_ROUNDS:
        raise UserError(f"--rounds {rounds} cannot carry a 95 % interval; give {MIN_ROUNDS} or more")
    if config.images is not None and not config.images.is_dir():
        raise UserError(f"--images {config.images} is no folder; give one that holds JPEGs")
    if config.out is not None and config.out.is_dir():
        raise UserError(
            f"--out {config.out} is a folder; name a file, such as {config.out / 'results.jsonl'}"
        )
    records = []
    with (
        scratch_folder(config.scratch) as scratch,
        progress("bench", total=len(names), unit="benchmarks") as advance,
    ):
        setting = Setting(size=suite.size, scratch=scratch, images=config.images, rounds=rounds)
        for name in names:
            for record in run_benchmark(name, setting=setting, suite=config.suite):
                records.append(record)
                if config.out is not None:
                    append_jsonl(config.out, record)
                if config.json:
                    emit_json(record.to_json())
                for trouble in filter(None, (record.missing, record.refused)):
                    stderr.print(f"{name}: {trouble}", highlight=False, markup=False)
            advance(1)
    if not config.json:
        Console().print(results_table(records))
    return int(any(record.refused for record in records))


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
    regressions = sum(difference.regressed for difference in differences)
    if config.json:
        rows = [dataclasses.asdict(difference) for difference in differences]
        emit_json({"regressions": regressions, "tolerance": config.tolerance, "differences": rows})
    else:
        console = Console()
        console.print(f"A = {config.a}\nB = {config.b}", highlight=False, markup=False)
        console.print(differences_table(differences))
        console.print(
            f"{regressions} of {len(differences)} slower by more than {100 * config.tolerance:g} %",
            highlight=False,
        )
    return int(regressions > 0)


def main_list(argv: list[str]) -> int:
    """Name every benchmark with its work and its peers, and which peers are missing."""
    config = parse_args(ListConfig, argv, prog="linerate bench list")
    from linerate.bench.contest import missing_peer
    from linerate.bench.registry import BENCHMARKS, SUITES

    missing = {name: [p for p in b.peers if missing_peer(p)] for name, b in BENCHMARKS.items()}
    if config.json:
        rows = {
            name: {"about": b.about, "peers": b.peers, "missing": missing[name]}
            for name, b in BENCHMARKS.items()
        }
        emit_json({"benchmarks": rows, "suites": {name: suite.about for name, suite in SUITES.items()}})
        return 0
    table = Table(box=None, padding=(0, 2), title="benchmarks", title_justify="left")
    for header in ("name", "work", "peers"):
        table.add_column(header)
    for name, benchmark in BENCHMARKS.items():
        peers = [f"[yellow]{p} (missing)[/]" if p in missing[name] else p for p in benchmark.peers]
        table.add_row(f"[bold cyan]{name}[/]", benchmark.about, ", ".join(peers) or "-")
    console = Console()
    console.print(table)
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
