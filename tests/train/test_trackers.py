"""What TensorBoard and Weights & Biases are given, and that neither ends a run."""

import dataclasses
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.train.small import small

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train import trackers as trackers_module
from linerate.train.config import Schedule, TrainConfig
from linerate.train.pretrain import pretrain
from linerate.train.run_folder import RunFolder
from linerate.train.trackers import require_trackers


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(run).load_log("step")]


def _tracked(*trackers: str, iterations: int = 4) -> TrainConfig:
    return dataclasses.replace(
        small(trackers=trackers), schedule=Schedule(epochs=None, iterations=iterations)
    )


def _stop_at_two(event: Mapping[str, Any]) -> None:
    if event["event"] == "step" and event["step"] == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_log_goes_to_tensorboard_too_and_a_resumed_run_goes_on_there(
    shards: Catalog, tmp_path: Path
) -> None:
    config = _tracked("tensorboard")
    pretrain(config, shards=shards.root, run_dir=tmp_path, on_event=_stop_at_two)
    pretrain(config, shards=shards.root, run_dir=tmp_path, resume=True)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [scalar.step for scalar in found.Scalars("loss")] == [1, 2, 3, 4]
    assert [scalar.value for scalar in found.Scalars("loss")] == pytest.approx(_losses(tmp_path))
    (parameters, *_) = (tmp_path / "tensorboard").glob("*/hparams.yml")
    assert "optim.lr: 0.05" in parameters.read_text()


def test_the_log_goes_to_wandb_too_and_a_resumed_run_goes_on_there(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: its tracker stays untested")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = _tracked("tensorboard", "wandb")
    pretrain(config, shards=shards.root, run_dir=tmp_path, on_event=_stop_at_two)
    identity = (tmp_path / "wandb-id.txt").read_text().strip()
    pretrain(config, shards=shards.root, run_dir=tmp_path, resume=True)
    assert (tmp_path / "wandb-id.txt").read_text().strip() == identity
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/*.wandb"))
    assert len({path.parent for path in runs}) == 2
    assert sum(b"pretext_top1" in path.read_bytes() for path in runs) == 2


def test_a_tracker_that_is_not_there_is_refused(shards: Catalog, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are tensorboard, wandb"):
        pretrain(small(trackers=("tensorbord",)), shards=shards.root, run_dir=tmp_path)


def test_a_tracker_whose_package_is_missing_is_told_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="trackers=wandb needs the package wandb: pip install wandb"):
        require_trackers(("wandb",))


def _refuse_to_start(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(trackers_module, "require_trackers", lambda names: None)
    monkeypatch.setattr(Accelerator, "init_trackers", refuse)


def test_a_wandb_that_does_not_start_is_a_user_error_and_resume_begins_the_run(
    shards: Catalog, tmp_path: Path
) -> None:
    # Its own errors are of a module of its own, and not to be imported where it is not installed.
    of_wandb = type("UsageError", (Exception,), {"__module__": "wandb.errors.errors"})
    with pytest.MonkeyPatch.context() as patch:
        _refuse_to_start(patch, of_wandb("No API key configured.\nUse `wandb login`"))
        with pytest.raises(
            UserError, match=r"cannot start .*No API key configured\. Use .*WANDB_MODE=offline"
        ):
            pretrain(_tracked("tensorboard"), shards=shards.root, run_dir=tmp_path)
    assert pretrain(_tracked("tensorboard"), shards=shards.root, run_dir=tmp_path, resume=True).finished


def test_a_defect_at_the_start_of_the_trackers_is_not_taken_for_wandb_s(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse_to_start(monkeypatch, TypeError("ours"))
    with pytest.raises(TypeError, match="ours"):
        pretrain(_tracked("tensorboard"), shards=shards.root, run_dir=tmp_path)


def test_a_tracker_that_fails_in_the_middle_is_switched_off_and_told_once(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = TensorBoardTracker.log

    def lost_at_two(tracker: TensorBoardTracker, values: Any, step: int | None = None, **more: Any) -> None:
        if step == 2:
            raise ConnectionResetError("Connection lost")
        log(tracker, values, step=step, **more)

    def no_finish(tracker: TensorBoardTracker) -> None:
        raise RuntimeError("nobody there")

    monkeypatch.setattr(TensorBoardTracker, "log", lost_at_two)
    monkeypatch.setattr(TensorBoardTracker, "finish", no_finish)
    summary = pretrain(_tracked("tensorboard"), shards=shards.root, run_dir=tmp_path)
    assert summary.finished
    assert len(_losses(tmp_path)) == 4
    (note,) = RunFolder(tmp_path).load_log("note")
    assert note["text"] == "trackers off (ConnectionResetError: Connection lost); log.jsonl goes on"
    assert note["step"] == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "note: tensorboard did not finish (RuntimeError: nobody there)" in told
