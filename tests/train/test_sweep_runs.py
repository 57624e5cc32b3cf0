"""Cells as they run: one after the other, killed, stopped, continued, and what is left of them."""

import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.train.small import SMALL

from linerate.__main__ import main
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train import sweep as sweep_module
from linerate.train.config import TrainConfig
from linerate.train.pretrain import pretrain
from linerate.train.run_folder import RunFolder
from linerate.train.stop import StopRequest
from linerate.train.sweep import SweepEnd, TrainProcess, run_sweep
from linerate.train.sweep_plan import Cell, SweepPlan, plan_sweep
from linerate.train.sweep_results import NUM_POINTS, mean_and_range, rows_of, thinned

CONFIG = dataclasses.replace(SMALL, recipe="demo", watch=dataclasses.replace(SMALL.watch, knn_k=5))


def _plan(config: TrainConfig = CONFIG, **options: Any) -> SweepPlan:
    options = {"over": "m", "values": ("0.9", "0.5"), "num_images": 72, **options}
    return plan_sweep(config, **options)


class Here:
    """Runs a cell in this process; says which were started."""

    def __init__(self, shards: Catalog) -> None:
        self.shards, self.started = shards, list[str]()

    def __call__(self, cell: Cell, run_dir: Path, stop: StopRequest) -> str | None:
        self.started.append(cell.value)
        if cell.value == "0.5" and len(self.started) == 2 and self.breaks:
            return "it broke"
        pretrain(cell.config, shards=self.shards.root, run_dir=run_dir, resume=True)
        return None

    breaks = False


@pytest.fixture(scope="module")
def swept(shards: Catalog, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepEnd]:
    """Two cells from their first step to their last."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, run_sweep(_plan(), catalog=shards, out=out, start=Here(shards))


def test_every_cell_leaves_a_run_a_line_and_its_curves(swept: tuple[Path, SweepEnd]) -> None:
    out, end = swept
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(line["value"], line["status"], line["step"]) for line in lines] == [
        ("0.9", "finished", 12),
        ("0.5", "finished", 12),
    ]
    for line, result in zip(lines, end.results, strict=True):
        run = RunFolder(out / line["run"])
        assert line == dataclasses.asdict(result)
        assert line["ema_momentum"] == float(line["value"])
        assert line["images"] == 12 * 16
        assert line["curve"]["loss"] == [round(e["loss"], 5) for e in run.load_log("step")]
        assert line["knn_top1"] == run.load_log("knn")[-1]["knn_top1"]
        assert line["knn_curve"]["step"] == [4, 8, 12]
    assert (lines[0]["paper"]["top1"], lines[1]["paper"]) == (55.2, None)
    with Image.open(out / "sweep.png") as picture:
        assert picture.size == (1320, 418)


def test_the_same_sweep_again_starts_nothing(swept: tuple[Path, SweepEnd], shards: Catalog) -> None:
    again = Here(shards)
    end = run_sweep(_plan(), catalog=shards, out=swept[0], start=again)
    assert again.started == []
    assert end == swept[1]


def test_a_cell_that_fails_costs_no_other_and_is_tried_again(shards: Catalog, tmp_path: Path) -> None:
    plan, here = _plan(values=("0.9", "0.5", "0.1")), Here(shards)
    here.breaks = True
    end = run_sweep(plan, catalog=shards, out=tmp_path / "out", start=here)
    assert [(r.status, r.reason) for r in end.results] == [
        ("finished", None),
        ("failed", "it broke"),
        ("finished", None),
    ]
    assert [row.state for row in rows_of(plan, end.results) if row.results] == [
        "finished",
        "failed: it broke",
        "finished",
    ]
    again = Here(shards)
    end = run_sweep(plan, catalog=shards, out=tmp_path / "out", start=again)
    assert again.started == ["0.5"]
    assert all(result.finished for result in end.results)


def test_a_killed_cell_goes_on_from_its_checkpoint(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first cell is a process of `linerate train`, killed after its first checkpoint."""
    plan, out = _plan(values=("0.9",)), tmp_path / "out"
    log = RunFolder(out / plan.cells[0].name)

    def kill_at_a_checkpoint(child: subprocess.Popen[str], stop: StopRequest) -> None:
        while not log.load_log("checkpoint") and child.poll() is None:
            threading.Event().wait(0.02)
        child.kill()
        child.wait()

    monkeypatch.setattr(sweep_module, "_wait", kill_at_a_checkpoint)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    start = TrainProcess(recipe="demo", shards=str(shards.root))
    (killed,) = run_sweep(plan, catalog=shards, out=out, start=start).results
    assert (killed.status, killed.reason) == ("failed", "killed by SIGKILL")
    (result,) = run_sweep(plan, catalog=shards, out=out, start=Here(shards)).results
    assert result.finished
    notes = [line["text"] for line in log.load_log("note")]
    assert any(re.fullmatch(r"continuing after step (5|10)", note) for note in notes), notes
    assert result.curve["step"] == list(range(1, 13))


def _shell(script: str) -> TrainProcess:
    """Starts a shell instead of Python; it never looks at the words behind."""
    return TrainProcess(recipe="demo", shards="S", launcher=("sh", "-c", script))


def test_a_signal_is_passed_on_and_no_further_cell_begins(shards: Catalog, tmp_path: Path) -> None:
    mark = tmp_path / "told"
    script = f"trap 'touch {mark}; exit 0' TERM; kill -TERM $PPID; sleep 20 & wait; kill $!"
    end = run_sweep(_plan(), catalog=shards, out=tmp_path / "out", start=_shell(script))
    assert mark.exists()
    assert end.stopped_by == signal.SIGTERM
    assert [result.status for result in end.results] == ["not run", "not run"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo first >&2; echo 'linerate: error: no room' >&2; exit 2", "no room"),
        ("kill -9 $$", "killed by SIGKILL"),
        ("exit 3", "it ended with exit code 3"),
    ],
)
def test_why_a_cell_failed_is_told(
    script: str, reason: str, shards: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _plan(values=("0.9",))
    (result,) = run_sweep(plan, catalog=shards, out=tmp_path / "out", start=_shell(script)).results
    assert (result.status, result.reason) == ("failed", reason)
    if "first" in script:
        assert capsys.readouterr().err == "first\nlinerate: error: no room\n"


def test_a_launcher_that_is_not_there_is_named(shards: Catalog, tmp_path: Path) -> None:
    start = TrainProcess(recipe="demo", shards="S", launcher=("no-such-launcher",))
    with pytest.raises(UserError, match="no-such-launcher cannot be started"):
        run_sweep(_plan(), catalog=shards, out=tmp_path / "out", start=start)


def test_two_sweeps_cannot_work_in_one_folder(swept: tuple[Path, SweepEnd], shards: Catalog) -> None:
    with (swept[0] / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another sweep, or a cell that outlived one"):
            run_sweep(_plan(), catalog=shards, out=swept[0], start=Here(shards))


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (_plan(over="shuffle-bn", values=()), "another sweep: over=shuffle-bn"),
        (
            _plan(dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, lr=0.1))),
            "another config: optim.lr=0.1",
        ),
        (
            _plan(dataclasses.replace(CONFIG, watch=dataclasses.replace(CONFIG.watch, knn_k=9))),
            "another config: knn_k=9",
        ),
    ],
)
def test_a_folder_of_another_sweep_is_refused(
    plan: SweepPlan, told: str, swept: tuple[Path, SweepEnd], shards: Catalog
) -> None:
    here = Here(shards)
    with pytest.raises(UserError, match=told):
        run_sweep(plan, catalog=shards, out=swept[0], start=here)
    assert here.started == []


def test_a_folder_that_is_no_sweep_or_cannot_be_made_is_refused(shards: Catalog, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="cannot be written"):
        run_sweep(_plan(), catalog=shards, out=file / "out", start=Here(shards))
    for out in (tmp_path, file):
        with pytest.raises(UserError, match="something that is no sweep"):
            run_sweep(_plan(), catalog=shards, out=out, start=Here(shards))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text("[")
    with pytest.raises(UserError, match="is damaged"):
        run_sweep(_plan(), catalog=shards, out=tmp_path / "out", start=Here(shards))


def test_the_command_prints_the_papers_cells_beside_ours(
    shards: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(TrainProcess, "__call__", lambda self, *cell: Here(shards)(*cell))
    words = "--over m --values 0.9,0.5 --encoder tiny-resnet-w4 --size 16 --backend torch --global-batch 16"
    words += " --lr 0.05 --bn-group 4 --num-keys 40 --iterations 8 --loader-threads 1 --knn-k 5"
    argv = ["sweep", "demo", "--shards", str(shards.root), "--out", str(tmp_path / "out"), *words.split()]
    assert main([*argv, "--dry-run"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("linerate train demo --shards ")
    assert "--ema-momentum 0.5" in second
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["paper"]["m-0.9-seed0"]["top1"] == 55.2
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert re.search(r"m 0\.9 .*55\.2 .*finished", out)
    assert re.search(r"m 0 .*fails: the loss .*not in this sweep", out)
    assert re.search(r"m 0\.5 .*finished", out)
    assert main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [cell["status"] for cell in told["cells"]] == ["finished", "finished"]


def test_a_sweep_with_a_cell_that_failed_ends_with_1(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainProcess, "__call__", lambda self, *cell: "it broke")
    words = ["--over", "shuffle-bn", "--iterations", "8", "--out", str(tmp_path / "out")]
    assert main(["sweep", "demo", "--shards", str(shards.root), *words]) == 1


def test_a_long_log_becomes_few_points_and_keeps_its_mean_and_its_end() -> None:
    lines = [{"step": step, "loss": float(step)} for step in range(1, 601)]
    curve = thinned(lines, ("loss",))
    assert len(curve["step"]) == NUM_POINTS
    assert curve["step"][-1] == 600
    assert sum(curve["loss"]) / NUM_POINTS == pytest.approx(300.5)
    assert thinned([], ("loss",)) == {"step": [], "loss": []}


def test_several_seeds_are_a_mean_and_a_range() -> None:
    assert mean_and_range([0.25, 0.35, 0.33], scale=100) == "31.0 (25.0 to 35.0)"
    assert (mean_and_range([0.5], digits=2), mean_and_range([])) == ("0.50", "")
