"""The command in processes of its own: killed, stopped, and on two ranks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from linerate.shards.catalog import Catalog
from linerate.train.checkpoint import load_checkpoint, load_newest
from linerate.train.cli import main_train
from linerate.train.run_folder import RunFolder

FLAGS = [
    *("--encoder", "tiny-resnet-w4", "--size", "16", "--dim", "8", "--num-keys", "40", "--bn-group", "4"),
    *("--global-batch", "16", "--lr", "0.05", "--loader-threads", "1", "--log-steps", "1"),
    *("--checkpoint-steps", "3", "--knn-epochs", "0"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _command(shards: Catalog, run: Path, *flags: str) -> list[str]:
    # --run-dir: torchrun takes --run for a beginning of its own --run-path.
    return ["demo", "--shards", str(shards.root), "--run-dir", str(run), *FLAGS, *flags]


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(run).load_log("step")]


def _start(command: list[str], *, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "linerate", "train", *command],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_steps(run: Path, process: subprocess.Popen[str], num_steps: int) -> None:
    for _ in range(1200):
        if len(_losses(run)) >= num_steps:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("the run logs nothing")


def test_a_run_killed_by_sigkill_continues_bit_for_bit(shards: Catalog, tmp_path: Path) -> None:
    process = _start(_command(shards, tmp_path / "killed", "--epochs", "5"))
    _wait_for_steps(tmp_path / "killed", process, 5)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(_losses(tmp_path / "killed")) < 20
    for run, flags in (("killed", ["--resume"]), ("whole", [])):
        assert main_train(_command(shards, tmp_path / run, "--epochs", "5", "--json", *flags)) == 0
    assert len(_losses(tmp_path / "whole")) == 20
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_stopped_run_saves_and_says_how_to_go_on(
    shards: Catalog,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    def stop() -> None:
        while not _losses(tmp_path):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()
    assert main_train(_command(shards, tmp_path, "--epochs", "5000", "--json")) == code
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["stopped_by"], summary["finished"]) == (number.name, False)
    assert load_checkpoint(Path(summary["checkpoint"])).step == summary["step"]
    assert f"stopped by {number.name} after step {summary['step']:,}; --resume continues" in err


def test_two_ranks_have_the_losses_of_one(shards: Catalog, tmp_path: Path) -> None:
    flags = ("--iterations", "6", "--json")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = _start(_command(shards, tmp_path / "two", *flags), launcher=launcher)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    summary = json.loads(out)
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
