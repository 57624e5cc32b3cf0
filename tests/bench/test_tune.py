"""linerate tune takes a switch only where it is surely faster and computes the same."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from linerate.bench import tune as tuning
from linerate.bench.timing import Interval
from linerate.bench.tune import Trial, candidates, compare_losses, tune
from linerate.bench.tune_cli import main
from linerate.bench.tune_ranks import Ranks
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.pack import pack
from linerate.train.config import Dictionary, TrainConfig
from linerate.train.recipes import find_recipe
from linerate.train.speed_profile import load_profile
from linerate.train.switches import resolve_switches

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
        monkeypatch.setattr(tuning, "compare_losses", lambda *_, **__: (0.0, {}))
        monkeypatch.setattr(tuning, "default_num_threads", lambda: 8)

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
    monkeypatch.setattr(tuning, "compare_losses", lambda *_, **__: (0.5, {}))
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
    assert compare_losses(other, other, catalog) == (0.0, {})


def test_switches_of_a_gpu_are_tried_on_one_alone():
    on_cpu, on_gpu = (
        {name for name, _, _ in candidates(config(), on_gpu=gpu, cores=8)} for gpu in (False, True)
    )
    assert on_gpu - on_cpu == {"compile", "cuda_graphs", "side_stream", "hw_decoder_load"}
    for name, _, values in candidates(config(), on_gpu=True, cores=8):
        assert getattr(config().speed, name) not in values


def test_two_runs_of_one_config_have_the_same_losses_and_nan_is_far(catalog: Catalog):
    assert compare_losses(config(), config(prefetch=3), catalog) == (0.0, {})
    broken = dataclasses.replace(config(), optim=dataclasses.replace(config().optim, lr=1e30))
    assert compare_losses(config(), broken, catalog)[0] == math.inf


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


def test_tuning_into_a_folder_is_refused(catalog: Catalog, tmp_path: Path):
    words = ["demo", "--shards", str(catalog.root), *FLAGS]
    with pytest.raises(UserError, match="is a folder"):
        main([*words, "--out", str(tmp_path)])


@dataclasses.dataclass(frozen=True)
class Beside(Ranks):
    """Rank 0 of two; the other one tells what `other` makes of this one's value."""

    other: Callable[[Any], Any] = lambda value: value

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other(value)]


def test_the_slowest_rank_decides_round_by_round():
    ours, others = np.array([1.0, 5.0, 1.0]), np.array([2.0, 2.0, 2.0])
    assert Beside(other=lambda _: others).slowest(ours).tolist() == [2.0, 5.0, 2.0]
    assert Ranks().slowest(ours).tolist() == ours.tolist()


def test_a_switch_that_slows_another_rank_down_is_not_taken(catalog: Catalog, monkeypatch: Any):
    class Idle:
        warm_both = settle = close = lambda self: None
        learn = load_and_learn = lambda self, num: None

        def __init__(self, *_: Any) -> None: ...

        def fit(self, *_: Any) -> int:
            return 1

    def interleave(sides: Any, **_: Any) -> dict[str, Any]:
        # Here prefetch=1 halves the time; on the other rank it doubles it.
        return {"ours": np.full(7, 1.0), "theirs": np.full(7, 2.0)}

    def other(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.full(7, 4.0 if value[0] == 1.0 else 2.0)
        return value

    few = (("prefetch", "run", (1,)),)
    monkeypatch.setattr(tuning, "Stages", Idle)
    monkeypatch.setattr(tuning, "candidates", lambda *_, **__: iter(few))
    monkeypatch.setattr(tuning, "interleave", interleave)
    assert tune(config(), catalog, budget_s=0.0).speed.prefetch == 1
    found = tune(config(), catalog, budget_s=0.0, ranks=Beside(other=other))
    assert found.trials[0].ratio == Interval(0.5, 0.5, 0.5)
    assert (found.trials[0].why, found.speed.prefetch) == ("slower", 2)


def test_a_micro_batch_must_fit_on_every_rank_and_in_the_memory_that_they_share(
    catalog: Catalog, clock: Any, monkeypatch: pytest.MonkeyPatch
):
    def need(c: TrainConfig, *, rank_batch: int, num_samples: int) -> dict[str, int]:
        return {"total": 100 * (c.speed.micro_batch or rank_batch)}

    clock(lambda c: 1.0)
    monkeypatch.setattr(tuning, "estimate_memory", need)
    monkeypatch.setattr(tuning, "free_bytes", lambda device: 1000)
    small = dataclasses.replace(config(), bn=dataclasses.replace(config().bn, bn_group=2))
    assert tune(small, catalog, budget_s=1.0, ranks=Beside(0, 2)).speed.micro_batch is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert tune(small, catalog, budget_s=1.0, ranks=Beside(0, 2)).speed.micro_batch == 4
    refused = iter(["needs more"])
    fuller = Beside(0, 2, other=lambda value: next(refused, None) if value is None else value)
    found = tune(small, catalog, budget_s=1.0, ranks=fuller)
    assert [trial.why for trial in found.trials if trial.name == "micro_batch"][-1] == "needs more"
    assert found.speed.micro_batch == 2


def test_a_switch_that_cannot_be_had_or_fails_is_not_timed(
    catalog: Catalog, clock: Any, monkeypatch: pytest.MonkeyPatch
):
    clock(lambda c: 0.1 if c.speed.cuda_graphs else 1.0)
    monkeypatch.setattr(tuning, "candidates", lambda *_, **__: iter([("cuda_graphs", "step", (True,))]))
    (trial,) = tune(config(), catalog, budget_s=1.0).trials
    assert (trial.kept, trial.ratio, trial.why) == (False, None, "off: no CUDA device")
    on = dataclasses.replace(resolve_switches(config(), world_size=1), cuda_graphs=True, reasons={})
    monkeypatch.setattr(tuning, "resolve_switches", lambda *_, **__: on)
    failed = (0.0, {"cuda_graphs": "the recording failed: no"})
    monkeypatch.setattr(tuning, "compare_losses", lambda *_, **__: failed)
    (trial,) = tune(config(), catalog, budget_s=1.0).trials
    assert (trial.kept, trial.ratio, trial.why) == (False, None, "off: the recording failed: no")


def test_a_candidate_out_of_memory_is_skipped_and_the_next_one_tried(
    catalog: Catalog, clock: Any, monkeypatch: pytest.MonkeyPatch
):
    clock(lambda c: 0.5 if c.speed.prefetch == 4 else 1.0)

    def refusal(best: TrainConfig, other: TrainConfig, *_: Any, **__: Any) -> str | None:
        if other.speed.prefetch == 1:
            raise torch.OutOfMemoryError("no memory")
        return None

    few = (("prefetch", "run", (1, 4)),)
    monkeypatch.setattr(tuning, "candidates", lambda *_, **__: iter(few))
    monkeypatch.setattr(tuning, "_refusal", refusal)
    found = tune(config(), catalog, budget_s=1.0)
    assert [(trial.value, trial.kept) for trial in found.trials] == [(1, False), (4, True)]
    assert found.trials[0].why == "does not fit the memory"
    assert found.speed.prefetch == 4


def test_no_rank_begins_a_step_while_another_has_no_room_for_it(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
):
    """On a GPU: by count this rank has room, the other one has not."""
    begun: list[int | None] = []

    class Begun:
        close = first_losses = lambda *_: None

        def __init__(self, c: TrainConfig, *_: Any) -> None:
            begun.append(c.speed.micro_batch)

    small = dataclasses.replace(config(), bn=dataclasses.replace(config().bn, bn_group=2))
    refused = iter(["needs more"])
    other = Beside(0, 2, other=lambda value: next(refused, None) if value is None else value)
    monkeypatch.setattr(tuning, "Stages", Begun)
    monkeypatch.setattr(tuning, "free_bytes", lambda device: 2**40)
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: True)
    fitted, trials = tuning._fitting(small, catalog, lambda _: None, ranks=other)
    assert [trial.why for trial in trials] == ["needs more"]
    assert fitted.speed.micro_batch == 4
    assert begun == [4]


def test_two_ranks_tune_together_and_find_the_same(catalog: Catalog, tmp_path: Path):
    out = tmp_path / "profile.json"
    words = ["demo", "--shards", str(catalog.root), "--out", str(out), "--minutes", "0.001", *FLAGS]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    worker = Path(__file__).with_name("tune_worker.py")
    small = ["--backend", "torch", "--size", "8", "--prefetch", "1", "--num-keys", "32"]
    command = [sys.executable, str(worker), str(port), str(tmp_path), *words, *small]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first["found"] == second["found"]
    assert first["steps"] == second["steps"] > 0
    assert [(trial["name"], bool(trial["ratio"])) for trial in first["found"]["trials"]] == [
        ("channels_last", True)
    ]
    assert (second["said"], str(out) in first["said"]) == ("", True)
    profile = load_profile(out)
    assert (profile.made_for["ranks"], profile.report["pairs_per_s"]) == (2, first["found"]["pairs_per_s"])
    assert done.stderr.count("channels_last = False") == 1
