"""A tuned profile changes switches of speed alone, and says where it was made for something else."""

import dataclasses
import json
from pathlib import Path

import pytest

from linerate.shards.errors import UserError
from linerate.train.cli import parse_train
from linerate.train.config_json import results_part
from linerate.train.recipes import find_recipe
from linerate.train.speed_profile import TUNABLE, SpeedProfile, load_profile, made_for


def profile(**speed: object) -> SpeedProfile:
    return SpeedProfile(speed=speed, made_for=made_for(find_recipe("demo").build()))


def test_a_profile_comes_back_from_its_file(tmp_path: Path):
    saved = profile(prefetch=4, channels_last=False)
    saved.save(tmp_path / "new" / "profile.json")
    assert load_profile(tmp_path / "new" / "profile.json") == saved
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["profile.json"]


def test_a_profile_changes_speed_alone(tmp_path: Path):
    demo = find_recipe("demo").build()
    speed = {"prefetch": 7, "loader_threads": None, "compile": "encoders", "channels_last": False}
    path = tmp_path / "p.json"
    profile(**speed, hw_decoder_load=0.9).save(path)
    _, tuned = parse_train(["demo", "--profile", str(path)])
    assert tuned.speed == dataclasses.replace(demo.speed, **speed, hw_decoder_load=0.9)
    assert results_part(tuned) == results_part(demo)
    assert tuned.watch == demo.watch


def test_a_micro_batch_of_other_bn_groups_than_the_recipes_comes_back(tmp_path: Path):
    path = tmp_path / "p.json"
    profile(micro_batch=8).save(path)
    flags = ["--global-batch", "16", "--bn-group", "4", "--lr", "0.1"]
    _, config = parse_train(["demo", "--profile", str(path), *flags])
    assert config.speed.micro_batch == 8
    _, config = parse_train(["demo", "--profile", str(path), *flags, "--micro-batch", "None"])
    assert config.speed.micro_batch is None


def test_a_profile_for_another_batch_or_encoder_says_so():
    demo = find_recipe("demo").build()
    assert profile(prefetch=4).notes(demo, world_size=1) == []
    larger = dataclasses.replace(demo, optim=dataclasses.replace(demo.optim, global_batch=128))
    (note,) = profile(prefetch=4).notes(larger, world_size=1)
    assert "global_batch 64 (here 128)" in note


def test_flags_count_more_than_the_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "profile.json"
    profile(prefetch=4, loader_threads=3).save(path)
    for words in (["--profile", str(path)], [f"--profile={path}"]):
        _, config = parse_train(["demo", "--dry-run", *words, "--loader-threads", "5"])
        assert (config.speed.prefetch, config.speed.loader_threads) == (4, 5)
    assert capsys.readouterr().err == ""
    parse_train(["cifar10", "--dry-run", "--profile", str(path)])
    assert "encoder tiny-resnet-w16 (here resnet18)" in " ".join(capsys.readouterr().err.split())


def test_a_plan_for_other_ranks_is_held_against_those_that_the_profile_was_made_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "profile.json"
    made = made_for(find_recipe("demo").build()) | {"ranks": 2}
    SpeedProfile(speed={"prefetch": 4}, made_for=made).save(path)
    words = ["demo", "--dry-run", "--profile", str(path)]
    parse_train([*words, "--ranks", "2"])
    assert capsys.readouterr().err == ""
    for flags, here in ((["--ranks", "4"], 4), ([], 1)):
        parse_train([*words, *flags])
        assert f"ranks 2 (here {here})" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "is no profile"),
        ("[]", "is no profile"),
        ('{"profile_version": 1, "speed": {}}', "is no profile"),
        ('{"profile_version": 99, "speed": {}, "made_for": {}}', "version 99"),
        ('{"profile_version": 1, "speed": {"precision": "bf16"}, "made_for": {}}', "sets precision"),
        ('{"profile_version": 1, "speed": {"prefetch": "two"}, "made_for": {}}', "prefetch='two'"),
        ('{"profile_version": 1, "speed": {"prefetch": true}, "made_for": {}}', "prefetch=True"),
        ('{"profile_version": 1, "speed": {"compile": true}, "made_for": {}}', "compile=True"),
        ('{"profile_version": 1, "speed": {"compile": "yes"}, "made_for": {}}', "compile='yes'"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str, said: str):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match=said):
        load_profile(tmp_path / "p.json")


def test_a_profile_that_is_missing_names_the_command_that_makes_one(tmp_path: Path):
    with pytest.raises(UserError, match="linerate tune"):
        load_profile(tmp_path / "none.json")


def test_a_value_that_does_not_fit_is_refused_as_a_flag_is(tmp_path: Path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"profile_version": 1, "speed": {"prefetch": 0}, "made_for": {}}))
    with pytest.raises(UserError, match="prefetch=0"):
        parse_train(["demo", "--dry-run", "--profile", str(path)])


def test_precision_is_not_tuned():
    assert "precision" not in TUNABLE
    assert "loader_threads" in TUNABLE
