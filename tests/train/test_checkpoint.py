import contextlib
import dataclasses
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train import checkpoint as checkpoint_module
from linerate.train.checkpoint import (
    Checkpoint,
    TrainedOn,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    require_same_run,
    save_checkpoint,
)
from linerate.train.config import Model, Speed, TrainConfig
from linerate.train.config_json import load_config

CONFIG = TrainConfig(recipe="small")


def _checkpoint(
    step: int, config: TrainConfig = CONFIG, *, trained_on: TrainedOn | None = None
) -> Checkpoint:
    return Checkpoint(
        step=step,
        epoch=step // 10,
        images=step * 256,
        config=config,
        trained_on=trained_on,
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


@contextlib.contextmanager
def _full_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow above num_bytes; the system answers each longer write with an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# torch's writer tells of a failed write by a RuntimeError, or by an OSError, depending on where it fails.
@pytest.mark.parametrize("num_bytes", [100, 5_000, 390_000, 401_500])
def test_a_full_disk_is_one_line_and_leaves_the_old_ones_and_no_litter(
    num_bytes: int, tmp_path: Path
) -> None:
    old = save_checkpoint(tmp_path, _checkpoint(1), keep=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    large = dataclasses.replace(_checkpoint(2), moco={"queue": torch.zeros(100_000)})
    with pytest.raises(UserError) as error, _full_disk(num_bytes):
        save_checkpoint(tmp_path, large, keep=1)
    line = str(error.value)
    assert "\n" not in line
    for words in ("step-000000002.pt cannot be written", "more than 400 kB", "--keep-checkpoints", old.name):
        assert words in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_at_the_first_save_says_that_there_is_no_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module.os, "fsync", no_space)
    with pytest.raises(UserError, match=r"\(No space left on device\).*there is no older one"):
        save_checkpoint(tmp_path, _checkpoint(2), keep=1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        UserError, match=r"cannot be written \(Not a directory\); mend that; there is no older"
    ):
        save_checkpoint(tmp_path / "file" / "checkpoints", _checkpoint(2), keep=1)


def test_a_defect_while_saving_stays_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(checkpoint_module.torch, "save", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):
        save_checkpoint(tmp_path, _checkpoint(2), keep=1)
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": "x"}, "its format_version is 'x'"),
        ({"format_version": None}, "its format_version is None"),
        ({"format_version": 0}, "its format_version is 0"),
        ({"format_version": True}, "its format_version is True"),
        ({"step": None}, "no step"),
        ({"optimizer": None}, "no optimizer"),
        ({"rng": {}}, "no cpu"),
        ({"step": "7"}, "step is str, not int"),
        ({"moco": {"queue": 3}}, "queue is no tensor"),
        ({"config": {"seed": 3}}, "recipe"),
        ({"config": {"recipe": "x", "sed": 3}}, "did you mean `seed`"),
        ({"config": {"recipe": "x", "views": {"size": "a"}}}, "size|not supported"),
        ({"trained_on": {"plan": 3}}, "trained_on|unexpected keyword"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_broken_as_a_cut_one(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path, _checkpoint(2), keep=2)
    older = save_checkpoint(tmp_path, _checkpoint(1), keep=2)
    state = torch.load(path, weights_only=True) | changes
    torch.save({k: v for k, v in state.items() if v is not None or k == "format_version"}, path)
    with pytest.raises(UserError, match=reason) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    found = load_newest(tmp_path)
    assert found is not None
    assert (found[0].step, found[1]) == (1, [str(error.value)])
    assert older.exists()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    torch.save({"format_version": 99}, tmp_path / "step-000000001.pt")
    with pytest.raises(UserError, match="update linerate"):
        load_newest(tmp_path)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(shards: Catalog, tmp_path: Path) -> None:
    other = dataclasses.replace(CONFIG, model=Model(encoder="resnet18"))
    with pytest.raises(UserError, match=r"model\.encoder=resnet50 \(there resnet18\)") as error:
        require_same_run(_checkpoint(1, other), CONFIG, shards, run_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_other_speed_switches_are_the_same_run(shards: Catalog, tmp_path: Path) -> None:
    other = dataclasses.replace(CONFIG, speed=Speed(prefetch=9))
    require_same_run(_checkpoint(1, other), CONFIG, shards, run_dir=tmp_path)


def test_the_same_shards_elsewhere_are_the_same_run(shards: Catalog, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _checkpoint(1, trained_on=TrainedOn.of(shards)), keep=1)
    moved = dataclasses.replace(shards, root=tmp_path / "moved")
    require_same_run(load_checkpoint(path), CONFIG, moved, run_dir=tmp_path)


@pytest.mark.parametrize("changes", [{"plan_id": "another"}, {"num_samples": 71}])
def test_other_shards_are_another_run(changes: dict[str, Any], shards: Catalog, tmp_path: Path) -> None:
    checkpoint = _checkpoint(1, trained_on=TrainedOn.of(shards))
    other = dataclasses.replace(shards, root=tmp_path / "other", **changes)
    with pytest.raises(UserError, match=r"other shards: 72 samples.*give the shards of before") as error:
        require_same_run(checkpoint, CONFIG, other, run_dir=tmp_path)
    for words in (str(shards.root), shards.plan_id, str(other.root), other.plan_id):
        assert words in str(error.value)


def test_a_checkpoint_without_its_shards_still_loads(shards: Catalog, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _checkpoint(1), keep=1)
    state = torch.load(path, weights_only=True)
    del state["trained_on"]
    torch.save(state, path)
    found = load_checkpoint(path)
    assert found.trained_on is None
    require_same_run(found, CONFIG, shards, run_dir=tmp_path)


def test_milestones_stay_for_ever_and_count_as_none_of_the_newest(tmp_path: Path) -> None:
    for step in range(1, 9):
        save_checkpoint(tmp_path, _checkpoint(step), keep=2, milestone=step % 3 == 0)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        f"step-{step:09}.pt" for step in (8, 7, 6, 3)
    ]
    # Another cadence later, as after --resume with other flags, drops none of the old ones.
    for step in (9, 10):
        save_checkpoint(tmp_path, _checkpoint(step), keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:09}.pt" for step in (10, 6, 3)]
    assert load_checkpoint(tmp_path / "step-000000003.pt").step == 3


def test_a_broken_one_of_a_later_step_takes_no_place_of_a_whole_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, _checkpoint(9), keep=1).write_bytes(b"cut")
    for step in (4, 5):
        save_checkpoint(tmp_path, _checkpoint(step), keep=1)
    found = load_newest(tmp_path)
    assert found is not None
    assert (found[0].step, len(found[1])) == (5, 1)


def test_a_scaler_is_saved_and_a_checkpoint_of_before_has_none(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    path = save_checkpoint(tmp_path, dataclasses.replace(_checkpoint(1), scaler=scaler.state_dict()), keep=1)
    found = load_checkpoint(path).scaler
    assert found is not None
    assert found["scale"] == 512.0
    state = torch.load(path, weights_only=True)
    del state["scaler"]
    torch.save(state, path)
    assert load_checkpoint(path).scaler is None
