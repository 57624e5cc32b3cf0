"""linerate tune takes a switch only where it is surely faster and computes the same."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from linerate.bench import tune as tuning
from linerate.bench.timing import Interval
from linerate.bench.tune import Trial, candidates, loss_difference, tune
from linerate.bench.tune_cli import main
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.pack import pack
from linerate.train.config import Dictionary, TrainConfig
from linerate.train.recipes import find_recipe
from linerate.train.speed_profile import load_profile

FLAGS = ["--global-batch", "16", "--lr", "0.01", "--bn-group", "8", "--encoder", "tiny-resnet-w4"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    root = tmp_path_factory.mktemp("tune")
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    for nth in range(32):
        pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{nth:02}.jpg")
    return pack(root / "images", root / "shards", num_workers=0)


def config(**speed: Any) -> TrainConfig:
    demo = find_recipe("demo").build()
    return dataclasses.replace(
        demo,
        model=dataclasses.replace(demo.model, encoder="tiny-resnet-w4"),
        optim=dataclasses.replace(demo.optim, global_batch=16),
        bn=dataclasses.replace(demo.bn, bn_group=8),
        speed=dataclasses.replace(demo.speed, **speed),
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[TrainConfig], float]], None]:
    """Lets a test say how long a config takes, with an interval of 2 % around the ratio."""

    def install(seconds: Callable[[TrainConfig], float]) -> None:
        def time(ours: TrainConfig, theirs: TrainConfig, *_: Any, **__: Any) -> tuple[float, Interval]:
            ratio = seconds(theirs) / seconds(ours)
            return 16 / seconds(ours), Interval(ratio, 0.98 * ratio, 1.02 * ratio)

        monkeypatch.setattr(tuning, "_time", time)
        monkeypatch.setattr(tuning, "loss_difference", lambda *_: 0.0)
        monkeypatch.setattr(tuning, "usable_cores", lambda: 8)

    return install


def test_the_fastest_of_all_candidates_is_found(catalog: Catalog, clock: Any):
    def seconds(c: TrainConfig) -> float:
        threads = c.speed.loader_threads or 8
        return 1.0 + abs(threads - 4) / 10 + (0.5 if c.speed.prefetch < 4 else 0.0) + c.speed.channels_last

    clock(seconds)
    found = tune(config(), catalog, budget_s=1.0)
    assert (found.speed.loader_threads, found.speed.prefetch, found.speed.channels_last) == (4, 4, False)
    assert found.ratio is not None
    assert found.ratio.median == pytest.approx(2.9 / 1.0)


def test_what_is_not_surely_faster_stays_as_the_recipe_has_it(catalog: Catalog, clock: Any):
    clock(lambda c: 1.0 if c.speed.prefetch == 2 else 0.99)
    found = tune(config(), catalog, budget_s=1.0)
    assert found.speed == config().speed
    assert found.ratio is None
    assert {trial.why for trial in found.trials} <= {"no clear gain", "slower"}


def test_switches_that_lose_together_are_given_up(catalog: Catalog, clock: Any, monkeypatch: Any):
    clock(lambda c: 1.0)
    real = tuning._time
    calls: list[str] = []

    def time(ours: TrainConfig, theirs: TrainConfig, shards: Catalog, part: str, **more: Any) -> Any:
        calls.append(part)
        if len(calls) == 1:
            return 20.0, Interval(1.2, 1.1, 1.3)
        return real(ours, theirs, shards, part, **more)

    monkeypatch.setattr(tuning, "_time", time)
    found = tune(config(), catalog, budget_s=1.0)
    assert found.trials[0].kept
    assert found.speed == config().speed


def test_a_switch_that_moves_the_loss_is_refused(catalog: Catalog, clock: Any, monkeypatch: Any):
    clock(lambda c: 1.0 if c.speed.channels_last else 0.1)
    monkeypatch.setattr(tuning, "loss_difference", lambda *_: 0.5)
    found = tune(config(), catalog, budget_s=1.0)
    assert found.speed.channels_last
    assert "moves the loss by 0.5" in found.trials[0].why


def test_the_largest_micro_batch_that_fits_the_memory_is_taken(
    catalog: Catalog, clock: Any, monkeypatch: pytest.MonkeyPatch
):
    clock(lambda c: 1.0)

    def need(c: TrainConfig, *, rank_batch: int, num_samples: int) -> dict[str, int]:
        return {"activations": 0, "total": 100 * (c.speed.micro_batch or rank_batch)}

    monkeypatch.setattr(tuning, "estimate_memory", need)
    monkeypatch.setattr(tuning, "free_bytes", lambda device: 1000)
    told: list[Trial] = []
    found = tune(config(), catalog, budget_s=1.0, on_trial=told.append)
    assert found.speed.micro_batch == 8
    assert [trial.value for trial in told if trial.name == "micro_batch"] == [16]
    monkeypatch.setattr(tuning, "free_bytes", lambda device: 10)
    with pytest.raises(UserError, match="one BN group"):
        tune(config(), catalog, budget_s=1.0)


@pytest.mark.parametrize("kind", ["end-to-end", "memory-bank"])
def test_every_dictionary_is_tuned(catalog: Catalog, clock: Any, kind: Any):
    clock(lambda c: 1.0)
    other = dataclasses.replace(config(), dictionary=Dictionary(dictionary=kind, num_keys=32))
    assert tune(other, catalog, budget_s=1.0).speed == other.speed
    assert loss_difference(other, other, catalog) == 0.0


def test_switches_of_a_gpu_are_tried_on_one_alone():
    on_cpu, on_gpu = (
        {name for name, _, _ in candidates(config(), on_gpu=gpu, cores=8)} for gpu in (False, True)
    )
    assert on_gpu - on_cpu == {"compile", "cuda_graphs", "side_stream", "hw_decoder_load"}
    for name, _, values in candidates(config(), on_gpu=True, cores=8):
        assert getattr(config().speed, name) not in values


def test_two_runs_of_one_config_have_the_same_losses_and_nan_is_far(catalog: Catalog):
    assert loss_difference(config(), config(prefetch=3), catalog) == 0.0
    broken = dataclasses.replace(config(), optim=dataclasses.replace(config().optim, lr=1e30))
    assert loss_difference(config(), broken, catalog) == math.inf


def test_the_command_writes_a_profile_that_train_takes(
    catalog: Catalog,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    few = (("channels_last", "step", (False,)), ("prefetch", "run", (1,)))
    monkeypatch.setattr(tuning, "candidates", lambda *_, **__: iter(few))
    out = tmp_path / "profile.json"
    words = ["demo", "--shards", str(catalog.root), "--out", str(out), "--minutes", "0.001", *FLAGS]
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    profile = load_profile(out)
    assert printed["speed"] == profile.speed
    assert profile.made_for["global_batch"] == 16
    assert profile.report["pairs_per_s"] > 0
    assert [trial["name"] for trial in profile.report["trials"]] == ["channels_last", "prefetch"]
    assert set(profile.speed) <= {"channels_last", "prefetch"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demo", "--out", "p.json"], "--shards is missing"),
        (["demo", "--shards", "S"], "--out is missing"),
        (["demo", "--shards", "S", "--out", "p.json", "--minutes", "0"], "--minutes 0"),
        (["--shards", "S"], "the recipe comes first"),
        ([], "the recipe comes first"),
    ],
)
def test_wrong_words_are_one_line(catalog: Catalog, words: list[str], said: str):
    with pytest.raises(UserError, match=said):
        main([*(str(catalog.root) if word == "S" else word for word in words), *(FLAGS if words else [])])


def test_tuning_under_a_launcher_or_into_a_folder_is_refused(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ["demo", "--shards", str(catalog.root), *FLAGS]
    with pytest.raises(UserError, match="is a folder"):
        main([*words, "--out", str(tmp_path)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one rank"):
        main([*words, "--out", str(tmp_path / "p.json")])
