"""The command in processes of its own: killed, stopped, and on two ranks."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from linerate.shards.catalog import Catalog
from linerate.train.checkpoint import list_checkpoints, load_checkpoint, load_newest
from linerate.train.cli import main_train
from linerate.train.run_folder import RunFolder

FLAGS = [
    *("--encoder", "tiny-resnet-w4", "--size", "16", "--dim", "8", "--num-keys", "40", "--bn-group", "4"),
    *("--global-batch", "16", "--lr", "0.05", "--loader-threads", "1", "--log-steps", "1"),
    *("--checkpoint-steps", "3", "--knn-epochs", "0"),
]
# HF_HOME: the answers that this machine's user gave to `accelerate config` do not count here.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": "/nonexistent"}


def _command(shards: Catalog, run: Path, *flags: str) -> list[str]:
    # --run-dir: torchrun takes --run for a beginning of its own --run-path.
    return ["demo", "--shards", str(shards.root), "--run-dir", str(run), *FLAGS, *flags]


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(run).load_log("step")]


def _run(command: list[str], *, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, "-m", "linerate", "train", *command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


# The command, killed by itself as soon as the log holds step 7: it cannot end before, on any machine.
KILLED = """
import os, signal, sys
from linerate.__main__ import main
from linerate.train.run_folder import RunFolder

def append(folder, event, append=RunFolder.append):
    append(folder, event)
    if event["event"] == "step" and event["step"] == 7:
        os.kill(os.getpid(), signal.SIGKILL)

RunFolder.append = append
main(["train", *sys.argv[1:]])
"""


def test_a_run_killed_by_sigkill_continues_bit_for_bit(shards: Catalog, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, *_command(shards, tmp_path / "killed", "--epochs", "5")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(_losses(tmp_path / "killed")) == 7
    newest, *_ = list_checkpoints(tmp_path / "killed" / "checkpoints")
    assert newest.name == "step-000000006.pt"
    for run, flags in (("killed", ["--resume"]), ("whole", [])):
        assert main_train(_command(shards, tmp_path / run, "--epochs", "5", "--json", *flags)) == 0
    assert len(_losses(tmp_path / "whole")) == 20
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_stopped_run_saves_and_says_how_to_go_on(
    shards: Catalog,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    def stop_at_two(folder: RunFolder, event: Mapping[str, Any]) -> None:
        append(folder, event)
        if event["event"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), number)

    append = RunFolder.append
    monkeypatch.setattr(RunFolder, "append", stop_at_two)
    assert main_train(_command(shards, tmp_path, "--epochs", "5000", "--json")) == code
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["stopped_by"], summary["finished"]) == (number.name, False)
    assert load_checkpoint(Path(summary["checkpoint"])).step == summary["step"]
    assert f"stopped by {number.name} after step {summary['step']:,}; --resume continues" in err


def test_accelerate_launch_runs_the_command(shards: Catalog, tmp_path: Path) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    done = _run(_command(shards, tmp_path / "run", "--iterations", "4", "--json"), launcher=launcher)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["step"], summary["finished"], summary["world_size"]) == (4, True, 1)
    assert load_checkpoint(Path(summary["checkpoint"])).step == 4
    assert main_train(_command(shards, tmp_path / "alone", "--iterations", "4")) == 0
    assert _losses(tmp_path / "run") == _losses(tmp_path / "alone")


def test_two_ranks_have_the_losses_of_one(shards: Catalog, tmp_path: Path) -> None:
    flags = ("--iterations", "6", "--json")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = _run(_command(shards, tmp_path / "two", *flags), launcher=launcher)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["world_size"] == 2
    assert summary["images"] == 6 * 16
    assert main_train(_command(shards, tmp_path / "one", *flags)) == 0
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), rel=1e-4)
    # BN statistics, too: each rank has seen its own half, the checkpoint holds the mean.
    two, one = (load_newest(tmp_path / run / "checkpoints") for run in ("two", "one"))
    assert two is not None
    assert one is not None
    assert two[0].moco.keys() == one[0].moco.keys()
    for name, tensor in two[0].moco.items():
        assert torch.allclose(tensor, one[0].moco[name], rtol=1e-3, atol=1e-4), name
