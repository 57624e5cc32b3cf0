"""`linerate bench pipeline` names the stage that was slowed down, whichever it is."""

import contextlib
import dataclasses
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from linerate.bench.bottleneck import Bottleneck
from linerate.bench.cli import main
from linerate.bench.loader_parts import LoaderParts
from linerate.bench.record import load_jsonl
from linerate.bench.suites import pipeline, pipeline_stages
from linerate.bench.suites.pipeline_stages import measure_stages
from linerate.bench.timing import Seconds, Side
from linerate.pipeline import dali_views, torch_views
from linerate.pipeline.cache import open_shards
from linerate.pipeline.loader import open_views
from linerate.pipeline.reader import ShardReader
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.pack import pack
from linerate.train import key_queue
from linerate.train.config import Dictionary, TrainConfig
from linerate.train.key_queue import KeyQueue
from linerate.train.learner import Learner
from linerate.train.recipes import find_recipe
from linerate.train.shuffle_bn import KeyShuffle
from linerate.train.step import MoCo

BATCH = 4
FLAGS = ["--global-batch", "4", "--lr", "0.01", "--bn-group", "2", "--encoder", "tiny-resnet-w4"]
FLAGS += ["--num-keys", "32", "--size", "16", "--backend", "torch", "--loader-threads", "1"]
LOADER_STAGES = ["read", "decode", "augment", "to-device"]
STEP_STAGES = ["query forward", "key forward", "shuffle", "loss", "backward", "optimizer+EMA", "enqueue"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread_and_little_garbage() -> Iterator[None]:
    torch.set_num_threads(1)
    gc.freeze()  # a collection takes most of a second where torch and DALI are loaded
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    root = tmp_path_factory.mktemp("pipeline")
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    for nth in range(16):
        pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{nth:02}.jpg")
    return pack(root / "images", root / "shards", num_workers=0)


def config(*, backend: Any = "torch", **parts: Any) -> TrainConfig:
    demo = find_recipe("demo").build()
    return dataclasses.replace(
        demo,
        views=dataclasses.replace(demo.views, size=16, backend=backend),
        model=dataclasses.replace(demo.model, encoder="tiny-resnet-w4"),
        dictionary=parts.get("dictionary", Dictionary(num_keys=32)),
        optim=dataclasses.replace(demo.optim, global_batch=BATCH),
        bn=dataclasses.replace(demo.bn, bn_group=2),
        speed=dataclasses.replace(demo.speed, loader_threads=1, prefetch=1),
        watch=dataclasses.replace(demo.watch, log_steps=1),
    )


def slow_down(patch: pytest.MonkeyPatch, stage: str, sleep: Callable[[], None]) -> None:
    """Have the function that does the stage sleep first."""

    def put(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            sleep()
            return real(*args, **kwargs)

        patch.setattr(owner, name, slow)

    def put_forward(encoder: str) -> None:
        real = Learner.__init__

        def init(self: Learner, *args: Any, **kwargs: Any) -> None:
            real(self, *args, **kwargs)
            getattr(self.moco, encoder).register_forward_pre_hook(lambda *_: sleep())

        patch.setattr(Learner, "__init__", init)

    if stage in ("query forward", "key forward"):
        put_forward("query_encoder" if stage == "query forward" else "key_encoder")
        return
    owner, name = {
        "read": (ShardReader, "read"),
        "decode": (torch_views, "decode_all"),
        "augment": (torch_views, "reference_views"),
        "to-device": (torch_views.TorchPixels, "to_device"),
        "shuffle": (KeyShuffle, "encode_along"),
        "loss": (key_queue, "infonce"),
        "backward": (Accelerator, "backward"),
        "optimizer+EMA": (MoCo, "update_key_encoder"),
        "enqueue": (KeyQueue, "enqueue"),
        "logging": (Learner, "read_metrics"),
    }[stage]
    put(owner, name)


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Sleeps for 1000 s of the measuring clock and none of ours; of one thread, so nothing is hidden."""
    asleep, real = [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() + asleep[0])
    # Nothing works on in the background.
    monkeypatch.setattr(pipeline.Stages, "settle", lambda self: None)

    def sleep() -> None:
        asleep[0] += 1000.0

    return sleep


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times every side once: what sleeps needs no median."""

    def once(sides: dict[str, Side], **_: Any) -> dict[str, Seconds]:
        return {name: np.array([seconds(side)]) for name, side in sides.items()}

    def seconds(side: Side) -> float:
        if side.prepare is not None:
            side.prepare()
        start = time.perf_counter()
        side.run()
        return time.perf_counter() - start

    monkeypatch.setattr(pipeline_stages, "interleave", once)


@pytest.mark.usefixtures("one_round")
@pytest.mark.parametrize("stage", [*LOADER_STAGES, *STEP_STAGES, "logging"])
def test_the_stage_that_sleeps_is_named(
    stage: str, catalog: Catalog, sleep: Callable[[], None], monkeypatch: pytest.MonkeyPatch
):
    slow_down(monkeypatch, stage, sleep)
    found = measure_stages(config(), catalog, budget_s=0.0)
    side = "loader" if stage in LOADER_STAGES else "step"
    assert (found.bottleneck.kind, found.bottleneck.stage) == (side, stage)
    assert found.verdict.startswith(f"{stage}-bound: ")
    calls = 2 if stage == "augment" else 1  # one for each view
    stages = found.model.stages()
    assert stages[stage] == pytest.approx(1000.0 * calls, rel=0.1)
    assert sum(seconds for other, seconds in stages.items() if other != stage) < 200.0
    times = found.model.times
    assert sum(times.loader_stages.values()) == pytest.approx(times.loader_s, abs=100.0)
    assert sum(times.step_stages.values()) == pytest.approx(times.step_s, abs=100.0)
    assert found.model.rates_if_free()[stage] > 2 * found.model.rate()


@pytest.mark.usefixtures("one_round")
def test_reading_that_really_takes_longer_than_the_step_beside_it_bounds_the_run(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
):
    """By the true clock: without its sleeps a batch takes a twentieth of a second on a busy machine."""
    slow_down(monkeypatch, "read", lambda: time.sleep(0.3))
    slow_down(monkeypatch, "loss", lambda: time.sleep(0.15))
    found = measure_stages(config(backend="dali"), catalog, budget_s=0.0)
    # If they took turns, as torch's loader without workers does, the kind would be `shared`.
    assert found.bottleneck == Bottleneck("loader", "read")
    assert found.verdict.startswith("read-bound: ")


@pytest.mark.usefixtures("one_round")
@pytest.mark.parametrize("stage", ["decode", "backward"])
def test_what_the_model_says_of_a_free_stage_is_measured_where_it_is_free(
    stage: str, catalog: Catalog, sleep: Callable[[], None], monkeypatch: pytest.MonkeyPatch
):
    def rate(slow: list[str]) -> tuple[float, float]:
        with monkeypatch.context() as patch:
            for one in slow:
                slow_down(patch, one, sleep)
            model = measure_stages(config(), catalog, budget_s=0.0).model
        return model.rate(), model.rates_if_free()[stage]

    every = [*LOADER_STAGES, *STEP_STAGES, "logging"]
    now, foretold = rate(every)
    free, _ = rate([one for one in every if one != stage])
    assert foretold == pytest.approx(free, rel=0.03)
    assert free > 1.05 * now


@pytest.mark.usefixtures("one_round")
def test_dali_is_taken_apart_by_its_own_decoder_and_reads_ahead(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
):
    decoded: list[int] = []
    real = dali_views.decoded

    def note(batches: Any, *, batch: int, **more: Any) -> Any:
        decoded.append(batch)
        return real(batches, batch=batch, **more)

    monkeypatch.setattr(dali_views, "decoded", note)
    times = measure_stages(config(backend="dali"), catalog, budget_s=0.0).model.times
    assert times.reads_ahead
    assert list(times.loader_stages) == LOADER_STAGES
    assert times.loader_stages["read"] > 0
    assert times.loader_stages["decode"] > 0
    assert set(decoded) == {BATCH}


@pytest.mark.usefixtures("one_round", "sleep")
def test_a_damaged_sample_is_replaced_as_in_a_run(catalog: Catalog, tmp_path: Path):
    shutil.copytree(catalog.root, tmp_path / "shards")
    damaged = open_shards(tmp_path / "shards")
    index = damaged.shard_index(0)
    with damaged.shard_path(0).open("r+b") as tar:
        tar.seek(int(index.offset[1]) + 40)
        tar.write(b"damage")
    found = measure_stages(config(), damaged, budget_s=0.0)
    assert found.verdict


@pytest.mark.usefixtures("one_round", "sleep")
@pytest.mark.parametrize("on_gpu", [False, True])
def test_more_threads_and_the_jpeg_unit_are_tried_where_decoding_bounds(
    on_gpu: bool, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
):
    """On a GPU by its twin: the probes are the same functions of a decoder."""
    asked: list[tuple[float, int | None]] = []

    class Parts(SimpleNamespace):
        num_threads = 4

        def decoder(self, load: float, num_threads: int | None = None) -> Any:
            asked.append((load, num_threads))
            return (load, num_threads)

    def seconds(decoders: Any, *_: Any) -> list[float]:
        return [0.016 if threads else 0.02 - 0.01 * load for load, threads in decoders]

    monkeypatch.setattr(pipeline_stages, "_decode_seconds", seconds)
    around = SimpleNamespace(config=config(backend="dali"), catalog=catalog, on_gpu=on_gpu)
    about = pipeline_stages._look_around(around, Parts(), Bottleneck("loader", "decode"), num=1)  # type: ignore[arg-type]
    # 0.0135 s by 4 threads and 0.016 s by 2: of the former 0.0025 s were halved.
    assert about.divided_share == pytest.approx(0.0025 / 0.0135)
    assert list(about.decode_s_by_load) == ([0.5, 0.65, 0.8, 0.9, 1.0] if on_gpu else [])
    pipeline_stages._look_around(around, Parts(), Bottleneck("step", "backward"), num=1)  # type: ignore[arg-type]
    assert len(asked) == 2 + len(about.decode_s_by_load), "nothing is tried where the step bounds"


@pytest.mark.usefixtures("one_round", "sleep")
def test_switches_that_hide_stages_are_off_where_stages_are_timed(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
):
    made: list[Learner] = []
    real = Learner.__init__

    def init(self: Learner, config: TrainConfig, *args: Any, **kwargs: Any) -> None:
        real(self, config, *args, **kwargs)
        # On a CPU the switch would be off as it is.
        self.switches = dataclasses.replace(self.switches, side_stream=config.speed.side_stream)
        made.append(self)

    monkeypatch.setattr(Learner, "__init__", init)
    asked = config()
    asked = dataclasses.replace(asked, speed=dataclasses.replace(asked.speed, side_stream=True))
    found = measure_stages(asked, catalog, budget_s=0.0)
    assert [learner.config.speed.side_stream for learner in made] == [True, False]
    assert found.notes == ("the step's stages are without --cuda-graphs and --side-stream, which hide them",)
    assert found.model.times.step_stages["key forward"] > 0


def test_a_round_is_a_whole_turn_of_the_workers(catalog: Catalog, monkeypatch: pytest.MonkeyPatch):
    """Batches of workers side by side come at once: a part of a turn would time what lay ready."""
    for name in ("load", "learn", "load_and_learn"):
        monkeypatch.setattr(pipeline.Stages, name, lambda *_: time.sleep(0.001))
    for backend, threads, prefetch, expected in (
        ("torch", 3, 2, (3, 4)),
        ("torch", 3, 7, (3, 10)),
        ("torch", 1, 2, (1, 3)),
        ("dali", 3, 2, (1, 3)),
    ):
        asked = config(backend=backend)
        speed = dataclasses.replace(asked.speed, loader_threads=threads, prefetch=prefetch)
        with contextlib.closing(pipeline.Stages(dataclasses.replace(asked, speed=speed), catalog)) as stages:
            assert (stages.fit(0.0, 7), stages.num_warm) == expected
            assert stages.fit(1000.0, 7) % stages.burst == 0
            assert stages.fit(1000.0, 7) > stages.burst


@pytest.mark.usefixtures("one_round", "sleep")
def test_a_memory_bank_has_no_keys_to_encode(catalog: Catalog):
    bank = Dictionary(dictionary="memory-bank", num_keys=32)
    found = measure_stages(config(dictionary=bank), catalog, budget_s=0.0)
    assert set(found.model.times.step_stages) == {*STEP_STAGES, "other"} - {"key forward", "shuffle"}


@pytest.mark.usefixtures("sleep")
def test_the_command_prints_a_verdict_and_keeps_records(
    catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "results.jsonl"
    words = ["pipeline", "demo", "--shards", str(catalog.root), "--seconds", "0.01", *FLAGS]
    assert main([*words, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    names = [row["stage"] for row in printed["stages"]]
    assert names == [*LOADER_STAGES, *STEP_STAGES, "other", "logging"]
    assert f"{printed['stage']}-bound: " in printed["verdict"] or printed["bound_by"] == "balanced"
    records = load_jsonl(out)
    assert [record.name for record in records] == ["pipeline"] * 3
    assert [record.verdict for record in records] == [None, None, printed["verdict"]]
    assert list(records[-1].stages) == names
    assert {record.amount for record in records} == {BATCH}, "seconds are those of a batch"
    assert records[-1].stages == {row["stage"]: row["seconds"] for row in printed["stages"]}


@pytest.mark.usefixtures("one_round", "sleep")
def test_the_table_fits_80_columns_and_names_every_stage(
    catalog: Catalog, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["pipeline", "demo", "--shards", str(catalog.root), "--seconds", "0.01", *FLAGS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    firsts = [line.strip().split("  ")[0] for line in lines]
    for stage in [*LOADER_STAGES, *STEP_STAGES, "logging", "loader alone", "step alone", "both together"]:
        assert stage in firsts
    assert "pairs/s if free" in " ".join(lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demo"], "--shards is missing: linerate bench pipeline demo --shards FOLDER"),
        (["--shards", "S"], "the recipe comes first"),
        (["dmeo", "--shards", "S"], "did you mean `demo`"),
        (
            ["demo", "--shards", "S", "--global-batch", "32", "--lr", "1", "--bn-group", "8"],
            "16 images do not fill one",
        ),
        (["demo", "--shards", "S", "--rounds", "3"], "give 7 or more"),
        (["demo", "--shards", "S", "--seconds", "0"], "--seconds 0 must be above 0"),
        (["demo", "--shards", "S", "--out", "."], "is a folder; name a file"),
        (["demo", "--shards", "S", "--backend", "synthetic"], "no loader to measure"),
        (["demo", "--shards", "S", "--profile", "FILE"], "--tuned"),
        (["demo", "--shards", "S", "--profile", "FILE/below"], "its folder .* cannot be made"),
        (["demo", "--shards", "S", "--out", "FILE/below"], "its folder .* cannot be made"),
        (["demo", "--shards", "S", "--tuned", "none.json"], "none.json is not there"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(catalog: Catalog, words: list[str], said: str):
    names = {"S": str(catalog.root), "FILE": __file__, "FILE/below": f"{__file__}/below"}
    recipe, rest = words[:1], [names.get(word, word) for word in words[1:]]
    flags = FLAGS if recipe == ["demo"] else []
    with pytest.raises(UserError, match=said):
        main(["pipeline", *recipe, *flags, *rest])


def test_several_ranks_are_refused(catalog: Catalog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="measures one rank"):
        main(["pipeline", "demo", "--shards", str(catalog.root), *FLAGS])


def test_the_loaders_parts_are_those_of_a_ranks_batch(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def decoded(batches: Any, *, batch: int, **_: Any) -> Iterator[Any]:
        asked.append(batch)
        return iter(batches)

    monkeypatch.setattr(dali_views, "decoded", decoded)
    made = config(backend="dali")
    loader = open_views(
        catalog,
        recipe=made.views.recipe(),
        seed=0,
        global_batch=BATCH,
        rank=0,
        world_size=2,
        num_lanes=2,
        num_threads=1,
    )
    with (
        contextlib.closing(loader),
        contextlib.closing(LoaderParts(made, loader, device="cpu", start_step=0)),
    ):
        assert asked == [BATCH // 2]


def test_a_file_of_tune_stands_for_its_flags_and_says_that_it_was_made_elsewhere(
    catalog: Catalog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    tuned = tmp_path / "tuned.json"
    other = {"device": "another GPU", "global_batch": 4}
    tuned.write_text(json.dumps({"profile_version": 1, "speed": {"prefetch": 5}, "made_for": other}))
    taken: list[int] = []

    def take(config: TrainConfig, *_: Any, **__: Any) -> Any:
        taken.append(config.speed.prefetch)
        raise UserError("enough")

    monkeypatch.setattr(pipeline_stages, "measure_stages", take)
    said = []
    for words in ([], ["--tuned", str(tuned)]):
        with pytest.raises(UserError, match="enough"):
            main(["pipeline", "demo", "--shards", str(catalog.root), *FLAGS, *words])
        said.append(" ".join(capsys.readouterr().err.split()))
    assert taken == [2, 5]
    assert "tuned for" not in said[0]
    assert "tuned for device another GPU (here " in said[1]


def test_the_help_of_bench_names_the_command(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    assert "pipeline" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["pipeline", "--help"])
    assert stopped.value.code == 0
    assert "linerate bench pipeline RECIPE --shards FOLDER" in capsys.readouterr().out
