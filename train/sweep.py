"""A sweep runs its cells one after the other, each as a process of its own, and keeps what is finished.

OUT/<cell>/ is a run folder of `linerate train`; OUT/results.jsonl has a line for every cell, OUT/sweep.png
their curves, OUT/sweep.json what was swept. A cell that dies, of whatever, costs no other cell.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.checkpoint import TrainedOn
from linerate.train.config_json import first_difference, load_config, results_part
from linerate.train.launch import with_lanes
from linerate.train.recipes import find_recipe
from linerate.train.run_folder import RunFolder
from linerate.train.stop import StopRequest, stop_on_signals
from linerate.train.sweep_plan import Cell, SweepPlan, cell_flags, judged_by
from linerate.train.sweep_plot import write_plot
from linerate.train.sweep_results import CellResult, read_cell, write_results

MARK = "sweep.json"
RESULTS = "results.jsonl"
PLOT = "sweep.png"
LOCK = ".lock"
POLL_S = 0.2

StartCell = Callable[[Cell, Path, StopRequest], str | None]
"""(cell, its run folder, what may end it) -> None where it ended well, else what went wrong."""


@dataclass(frozen=True, kw_only=True)
class SweepEnd:
    """What a sweep leaves."""

    results: list[CellResult]
    """In the order of the plan's cells, those not run included."""
    stopped_by: signal.Signals | None
    """The signal that ended it early; the same command continues."""


def run_sweep(
    plan: SweepPlan,
    *,
    catalog: Catalog,
    out: Path,
    start: StartCell,
    on_cell: Callable[[str], None] = lambda line: None,
) -> SweepEnd:
    """Run every cell that is not finished; results.jsonl and sweep.png hold all there is after each.

    on_cell gets a line before and after each cell. Raises UserError, before anything runs, where OUT holds
    another sweep or a cell of another config, or where another process is at work in it.
    """
    with _claimed(out, plan, catalog), stop_on_signals() as stop:
        runs = [RunFolder(out / cell.name) for cell in plan.cells]
        for cell, run in zip(plan.cells, runs, strict=True):
            _require_same(cell, run)
        results = [read_cell(cell, run) for cell, run in zip(plan.cells, runs, strict=True)]
        for place, (cell, run) in enumerate(zip(plan.cells, runs, strict=True)):
            told = f"cell {place + 1} of {len(runs)}, {cell.label}, seed {cell.seed}"
            if results[place].finished:
                on_cell(f"{told}: finished before")
                continue
            if stop:
                break
            on_cell(f"{told}: begins")
            reason = start(cell, run.root, stop)
            # A cell that was asked to stop has not failed: it goes on from its checkpoint.
            results[place] = read_cell(cell, run, reason=None if stop else reason)
            _write(out, plan, results)
            on_cell(f"{told}: {results[place].reason or results[place].status}")
        _write(out, plan, results)
        return SweepEnd(results=results, stopped_by=stop.signal)


def _write(out: Path, plan: SweepPlan, results: Sequence[CellResult]) -> None:
    write_results(out / RESULTS, results)
    write_plot(out / PLOT, plan, results)


@contextlib.contextmanager
def _claimed(out: Path, plan: SweepPlan, catalog: Catalog) -> Iterator[None]:
    """OUT for this sweep alone, of these shards. Raises UserError where it is another's."""
    trained_on = TrainedOn.of(catalog)
    recipe = plan.cells[0].config.recipe
    mine = {"over": plan.over, "recipe": recipe, "plan_id": trained_on.plan_id}
    mark = out / MARK
    if out.is_file() or (out.is_dir() and not mark.exists() and any(out.iterdir())):
        raise UserError(f"--out {out} holds something that is no sweep; name a new or empty folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("a")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror or error}); name another") from None
    with lock:
        _lock(lock, out)
        if mark.exists():
            _require_mine(mark, mine)
        temporary = mark.with_name(f".{MARK}")
        temporary.write_text(json.dumps(mine) + "\n", encoding="utf-8")
        temporary.replace(mark)
        # A cell keeps it open: where its sweep is killed, nobody starts a second one beside it.
        os.set_inheritable(lock.fileno(), True)
        yield


def _lock(lock: IO[str], out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another sweep, or a cell that outlived one, is at work in {out}; wait until it ends, or end it"
        ) from None


def _require_mine(mark: Path, mine: dict[str, Any]) -> None:
    try:
        theirs = dict(json.loads(mark.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{mark} is damaged; name another --out, or remove it to keep the runs") from None
    if found := first_difference(mine, theirs):
        raise UserError(f"--out {mark.parent} holds another sweep: {found}; name another --out")


def _require_same(cell: Cell, run: RunFolder) -> None:
    """Raise UserError where the folder's run has another config, or was judged in another way."""
    if not run.config.exists():
        return
    theirs, config = load_config(run.config), with_lanes(cell.config)
    found = first_difference(results_part(config), results_part(theirs))
    found = found or first_difference(judged_by(config.watch), judged_by(theirs.watch))
    if found:
        raise UserError(f"{run.root} holds a run of another config: {found}; name another --out")


@dataclass(frozen=True, kw_only=True)
class TrainProcess:
    """Starts a cell as `linerate train RECIPE ... --resume` and passes on what it says."""

    recipe: str
    """The command's first word."""
    shards: str
    """Folder or URL."""
    more_words: tuple[str, ...] = ()
    """Flags that are no part of the config, as those of the shard cache."""
    launcher: tuple[str, ...] = (sys.executable,)
    """What comes before `-m linerate train`, as `torchrun --nproc-per-node 8`."""

    def train_words(self, cell: Cell, run_dir: Path) -> list[str]:
        """The words after `linerate`."""
        flags = cell_flags(cell.config, recipe=find_recipe(self.recipe).build())
        # Under torchrun --run alone is not understood.
        where = ["--shards", self.shards, "--run-dir", str(run_dir), "--resume"]
        return ["train", self.recipe, *where, *self.more_words, *flags]

    def __call__(self, cell: Cell, run_dir: Path, stop: StopRequest) -> str | None:
        command = [*self.launcher, "-m", "linerate", *self.train_words(cell, run_dir)]
        try:
            child = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, close_fds=False
            )
        except OSError as error:
            raise UserError(
                f"{command[0]} cannot be started ({error.strerror or error}); give another --launch"
            ) from None
        lines = _Lines(child.stderr)
        try:
            _wait(child, stop)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
            lines.join()
        return _reason(child.returncode, lines.last)


def _wait(child: subprocess.Popen[str], stop: StopRequest) -> None:
    told = False
    while True:
        try:
            child.wait(POLL_S)
            return
        except subprocess.TimeoutExpired:
            if stop and not told:
                # After a Ctrl-C on a terminal the child has had it too, and takes no notice of this.
                child.terminate()
                told = True


class _Lines:
    """A child's stderr, line by line on ours as it comes; the last one is kept."""

    def __init__(self, stream: IO[str] | None) -> None:
        assert stream is not None
        self.last = ""
        self._stream = stream
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for what a child that has ended has said; not for a grandchild that holds its stderr."""
        self._thread.join(timeout=5.0)

    def _pass_on(self) -> None:
        with self._stream:
            for line in self._stream:
                self.last = line.strip() or self.last
                sys.stderr.write(line)
                sys.stderr.flush()


def _reason(returncode: int, last_line: str) -> str | None:
    if returncode == 0:
        return None
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return last_line.removeprefix("linerate: error: ") or f"it ended with exit code {returncode}"
