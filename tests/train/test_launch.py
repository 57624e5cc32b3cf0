"""The command in processes of its own: killed, stopped, and under a launcher."""

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
from linerate.train.checkpoint import load_checkpoint, load_newest
from linerate.train.cli import main_train
from linerate.train.launch import launch_note
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


# The command, killed and started again until it ends by itself. Each child dies at its n-th visit to one of
# the places below, n at random: between steps, within a write of a checkpoint, before and after its renaming.
KILLED = """
import os, random, signal, sys
from pathlib import Path
import torch
from linerate.__main__ import main
from linerate.train import checkpoint, pretrain
from linerate.train.learner import Learner
from linerate.train.run_folder import RunFolder

def deadly(owner, name):
    before = getattr(owner, name)
    def visit(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*args, **kwargs)
    setattr(owner, name, visit)

torch.set_num_threads(1)
for owner, name in (
    (checkpoint._Output, "write"), (checkpoint.os, "fsync"), (Path, "replace"), (Path, "unlink"),
    (checkpoint, "_drop_old"), (checkpoint, "write_config"), (RunFolder, "append"), (Learner, "step"),
):
    deadly(owner, name)
chance, kills = random.Random(int(sys.argv[1])), 0
while True:
    left = chance.randrange(1, 500) if kills < 8 else 0
    child = os.fork()
    if not child:
        os._exit(main(["train", *sys.argv[2:], "--resume"]))
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        break
    kills += 1
print(f"killed {kills} times", flush=True)
os._exit(os.WEXITSTATUS(status))
"""


def test_a_run_killed_at_random_points_ends_with_the_same_weights_to_the_bit(
    shards: Catalog, tmp_path: Path
) -> None:
    flags = ("--backend", "torch", "--epochs", "5")
    command = _command(shards, tmp_path / "killed", *flags)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "3", *command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "killed 8 times" in done.stdout
    assert main_train(_command(shards, tmp_path / "whole", *flags, "--json")) == 0
    assert len(_losses(tmp_path / "whole")) == 20
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")
    killed, whole = (load_newest(tmp_path / run / "checkpoints") for run in ("killed", "whole"))
    assert killed is not None
    assert whole is not None
    assert killed[1] == []
    states = [
        {**found.moco, **{f"momentum.{n}": s["momentum_buffer"] for n, s in found.optimizer["state"].items()}}
        for found, _ in (killed, whole)
    ]
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 0)])
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


def test_accelerate_launch_runs_the_command_and_one_process_for_two_is_told(
    shards: Catalog, tmp_path: Path
) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    flags = ("--backend", "torch", "--iterations", "4", "--json")
    done = _run(_command(shards, tmp_path / "run", *flags), launcher=launcher)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["step"], summary["finished"], summary["world_size"]) == (4, True, 1)
    assert load_checkpoint(Path(summary["checkpoint"])).step == 4
    (note,) = [line["text"] for line in RunFolder(tmp_path / "run").load_log("note")]
    assert note.startswith("accelerate launch was asked for 2 processes and started one")
    assert main_train(_command(shards, tmp_path / "alone", *flags)) == 0
    assert _losses(tmp_path / "run") == _losses(tmp_path / "alone")


def test_torchrun_runs_the_command_on_two_ranks(shards: Catalog, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    flags = ("--backend", "torch", "--iterations", "2", "--json")
    done = _run(_command(shards, tmp_path / "run", *flags), launcher=launcher)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["step"], summary["finished"], summary["world_size"]) == (2, True, 2)
    assert RunFolder(tmp_path / "run").load_log("note") == []


def test_torchruns_ranks_say_their_common_error_once_and_exit_with_2() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "linerate", "trian"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stderr.count("linerate: error: there is no command `trian`") == 1
    assert "exitcode  : 2" in done.stderr


def test_a_launcher_that_starts_what_it_was_asked_for_is_not_remarked_on() -> None:
    asked = ["python", "/usr/bin/accelerate", "launch", "--num_processes=2", "-m", "linerate"]
    assert launch_note(2, command=asked) is None
    assert "asked for 2 processes" in str(launch_note(1, command=asked))
    assert launch_note(1, command=[word.replace("=2", "=1") for word in asked]) is None
    assert launch_note(1, command=["bash", "train.sh", "--num_processes", "2"]) is None
    assert launch_note(1, command=[]) is None
