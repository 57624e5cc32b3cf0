import dataclasses
import os
from pathlib import Path

import pytest
import torch

from linerate.shards.errors import UserError
from linerate.train import checkpoint as checkpoint_module
from linerate.train.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    require_same_run,
    save_checkpoint,
)
from linerate.train.config import Model, Speed, TrainConfig
from linerate.train.config_json import load_config

CONFIG = TrainConfig(recipe="small")


def _checkpoint(step: int, config: TrainConfig = CONFIG) -> Checkpoint:
    return Checkpoint(
        step=step,
        epoch=step // 10,
        images=step * 256,
        config=config,
        moco={"queue": torch.full((3,), float(step))},
        optimizer={"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        rng={"cpu": torch.get_rng_state()},
    )


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _checkpoint(7), keep=3)
    found = load_checkpoint(path)
    assert (found.step, found.images, found.config) == (7, 7 * 256, CONFIG)
    assert torch.equal(found.moco["queue"], torch.full((3,), 7.0))
    assert found.optimizer["param_groups"] == [{"lr": 0.1}]
    assert torch.equal(found.rng["cpu"], torch.get_rng_state())
    assert load_config(path.with_suffix(".json")) == CONFIG


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save_checkpoint(tmp_path, _checkpoint(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-000000010.json",
        "step-000000010.pt",
        "step-000000011.json",
        "step-000000011.pt",
    ]


def test_a_save_that_fails_leaves_the_old_ones_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save_checkpoint(tmp_path, _checkpoint(1), keep=1)

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, _checkpoint(2), keep=1)
    assert list_checkpoints(tmp_path) == [old]
    assert not list(tmp_path.glob(".step*"))


def test_litter_of_a_killed_run_goes_with_the_next_save(tmp_path: Path) -> None:
    (tmp_path / f".step-000000001.pt.{os.getpid() + 1}").write_bytes(b"half")
    save_checkpoint(tmp_path, _checkpoint(2), keep=1)
    assert not list(tmp_path.glob(".step*"))


def test_the_newest_whole_one_is_found_and_broken_ones_are_named(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "none") is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, _checkpoint(step), keep=5)
    third, second, _ = list_checkpoints(tmp_path)
    third.write_bytes(third.read_bytes()[:-100])
    second.write_bytes(b"")
    found = load_newest(tmp_path)
    assert found is not None
    assert found[0].step == 1
    assert [line.split(" is ")[0] for line in found[1]] == [str(third), str(second)]


def test_when_none_is_whole_that_is_said(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _checkpoint(1), keep=1)
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"cut short or no checkpoint.*no older one is whole"):
        load_newest(tmp_path)


def test_another_file_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"model": torch.ones(1)}, tmp_path / "step-000000001.pt")
    with pytest.raises(UserError, match="no checkpoint of linerate"):
        load_checkpoint(tmp_path / "step-000000001.pt")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"format_version": 1, "config": Path("x")}, tmp_path / "step-000000001.pt")
    with pytest.raises(UserError, match="cut short or no checkpoint"):
        load_checkpoint(tmp_path / "step-000000001.pt")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    torch.save({"format_version": 99}, tmp_path / "step-000000001.pt")
    with pytest.raises(UserError, match="update linerate"):
        load_newest(tmp_path)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    other = dataclasses.replace(CONFIG, model=Model(encoder="resnet18"))
    with pytest.raises(UserError, match=r"model\.encoder=resnet50 \(there resnet18\)") as error:
        require_same_run(_checkpoint(1, other), CONFIG, run_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_other_speed_switches_are_the_same_run(tmp_path: Path) -> None:
    require_same_run(
        _checkpoint(1, dataclasses.replace(CONFIG, speed=Speed(prefetch=9))), CONFIG, run_dir=tmp_path
    )
