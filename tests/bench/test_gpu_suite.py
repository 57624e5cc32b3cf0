"""The suite of a GPU at its tiny size on a CPU: all of its paths but CUDA's own."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from linerate.bench import isolated
from linerate.bench.contest import Disagreement, Setting
from linerate.bench.record import Record
from linerate.bench.registry import SUITES, run_benchmark
from linerate.bench.stage_clock import StageClock
from linerate.bench.suites import gpu_step, gpu_views, step, step_start, view_backends, view_work
from linerate.bench.suites.step_stages import timed_step
from linerate.bench.suites.view_work import Work
from linerate.bench.timing import MIN_ROUNDS
from linerate.pipeline.recipe import v2
from linerate.pipeline.two_views import TwoViews
from linerate.train.step import train_step

# webdataset closes none of its tars.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True, scope="module")
def _small_and_eager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINERATE_BENCH_CACHE", str(tmp_path_factory.getbasetemp() / "bench-images"))
        patch.setenv("LINERATE_BENCH_PEERS", "/none/python")
        # A C++ compiler takes minutes for what a GPU's takes seconds; the form beside it is eager.
        patch.setattr(torch, "compile", lambda module: module)
        # Workers of DataLoaders start in seconds, which these tests would wait for many times.
        for module in (view_backends, gpu_views):
            patch.setattr(module, "usable_cores", lambda: 1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(size="tiny", scratch=tmp_path, rounds=MIN_ROUNDS, for_gpu=True)


def run(name: str, setting: Setting) -> list[Record]:
    return list(run_benchmark(name, setting=setting, suite="gpu"))


@pytest.mark.parametrize("name", ["views", "step", "train"])
def test_what_a_gpu_is_measured_by_runs_on_a_cpu(name: str, setting: Setting) -> None:
    records = run(name, setting)
    measured = [record for record in records if record.missing is None]
    assert measured
    for record in measured:
        assert record.refused is None
        assert record.name == name
        assert record.ours is not None
        assert record.ours > 0
        assert record.met is None, "a tiny size on a CPU says nothing about a GPU's bar"
    for record in records:
        assert record.missing is None or record.missing.startswith("lightly is not installed")


def test_every_name_of_the_suite_but_those_to_come_is_registered() -> None:
    assert set(SUITES["gpu"].limits_s) - set(SUITES["gpu"].names) <= {"sgd-ema"}


def test_the_sweep_names_its_best_cell(setting: Setting) -> None:
    *cells, best = run("views-sweep", setting)
    assert len(cells) == 2
    assert best.ours == max(cell.ours or 0 for cell in cells)
    assert best.work.startswith("the best cell: --hw-decoder-load ")
    assert cells[0].work.startswith("--hw-decoder-load 0.65 --loader-threads 1 --prefetch 2: ")


def test_the_stages_of_a_step_are_all_of_it_and_change_nothing() -> None:
    views = [step_start.random_views(8, 32, seed=view) for view in (0, 1)]

    def fresh() -> step.OurStep:
        return step.our_step(*step_start.start("tiny-resnet-w4", num_keys=64), bn_group=4)

    clock, plain = StageClock("cpu"), fresh()
    marked = timed_step(fresh(), clock)
    truth = train_step(
        plain.moco,
        *views,
        plain.optimizer,
        step=0,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    ).loss
    start = time.perf_counter()
    assert torch.equal(marked(*views), truth)
    took = time.perf_counter() - start
    found = clock.seconds()
    assert set(found) == {
        "shuffle",
        "key forward",
        "query forward",
        "loss",
        "backward",
        "optimizer",
        "EMA",
        "enqueue",
        "other",
    }
    assert 0.5 * took < sum(found.values()) <= took


def test_without_dali_the_suite_says_so_and_measures_the_rest(
    monkeypatch: pytest.MonkeyPatch, setting: Setting
) -> None:
    def missing(name: str) -> str | None:
        return "nvidia.dali is not installed; bring it with: pip install DALI" if name == "dali" else None

    monkeypatch.setattr(gpu_views, "missing_backend", missing)
    absent, pillow = run("views", setting)
    assert absent.missing is not None
    assert absent.missing.startswith("nvidia.dali is not installed")
    assert pillow.work.startswith("Pillow in a DataLoader")
    (sweep,) = run("views-sweep", dataclasses.replace(setting, scratch=setting.scratch / "other"))
    assert sweep.missing == absent.missing


def test_backends_are_held_against_torch_and_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, setting: Setting
) -> None:
    truth = view_backends.missing_backend

    def missing(name: str) -> str | None:
        return "ffcv is not installed; bring it with: make ffcv" if name == "ffcv" else truth(name)

    for module in (view_backends, view_work):
        monkeypatch.setattr(module, "missing_backend", missing)
    records = run(
        "views", dataclasses.replace(setting, for_gpu=False, backends=("dali", "webdataset", "ffcv"))
    )
    whole = {}
    for record in records:
        if record.work.startswith("--backend"):
            whole.setdefault(record.work.split()[1].rstrip(":"), []).append(record)
    assert {name: len(found) for name, found in whole.items()} == {
        "torch": 2,
        "dali": 2,
        "webdataset": 2,
        "ffcv": 2,
    }
    peers = {name: {one.peer for one in found} for name, found in whole.items()}
    assert peers == {"torch": {None}, "dali": {"torch"}, "webdataset": {"torch"}, "ffcv": {"torch"}}
    for record in whole["ffcv"]:
        assert (record.ours, record.missing) == (None, "ffcv is not installed; bring it with: make ffcv")
    assert all("views by the same draws" in (one.equal or "") for one in whole["dali"])
    assert all("are its own" in (one.equal or "") for one in whole["webdataset"])
    assert all(len(one.theirs_s) == MIN_ROUNDS for one in (*whole["dali"], *whole["webdataset"]))
    parts = [one for one in records if "alone" in one.work or one.work.startswith("flip")]
    assert len(parts) == 9
    named = {"all of dali's time", "all of torch's time", "all of webdataset's time"}
    assert {one.peer for one in parts} == named
    assert all("% of the time of the views" in (one.note or "") for one in parts)


def test_views_that_differ_from_the_references_are_refused() -> None:
    def views(level: int, *, first: int = 0, size: int = 4) -> TwoViews:
        pixels = torch.full((2, 3, size, size), level, dtype=torch.uint8)
        place = torch.arange(first, first + 2)
        return TwoViews(query=pixels, key=pixels, sample_id=place, position=place, label=place)

    work = dataclasses.replace(WORK, recipe=v2(size=4))
    check = view_backends.require_alike
    assert "to 0.00 grey levels" in check("dali", [views(7)], [views(7)], work)
    for ours, message in (
        (views(9), "lie 2.00 grey levels"),
        (views(7, first=1), "other samples"),
        (views(7, size=5), r"not \(2, 3, 4, 4\) uint8"),
        (dataclasses.replace(views(7), sample_id=torch.zeros(2)), "holds a sample twice"),
    ):
        with pytest.raises(Disagreement, match=message):
            check("dali", [ours], [views(7)], work)
    assert "are its own" in check("ffcv", [views(9, first=5)], [views(7)], work)


WORK = Work(
    catalog=None,  # type: ignore[arg-type]
    images=None,  # type: ignore[arg-type]
    recipe=v2(size=4),
    batch=2,
    num_threads=1,
    device="cpu",
    num_warm=1,
    num_timed=1,
)


def in_its_own_process(code: str, monkeypatch: pytest.MonkeyPatch, *, limit_s: float) -> list[Record]:
    """As run_isolated, with `python -c code` in the place of `python -m linerate bench run ...`."""
    start = isolated.subprocess.Popen
    monkeypatch.setattr(
        isolated.subprocess, "Popen", lambda command, **how: start([command[0], "-c", code], **how)
    )
    return list(isolated.run_isolated("toy", (), suite="gpu", limit_s=limit_s))


LINE = """
import json, sys, time
print(json.dumps({"name": "toy", "peer": None, "work": "w", "unit": "x/s", "ours": 2.0}), flush=True)
"""


@pytest.mark.parametrize(
    ("rest", "limit_s", "told"),
    [
        ("", 30.0, None),
        ("sys.exit(1)", 30.0, None),
        ("raise MemoryError('no room')", 30.0, "exit code 1 and said: MemoryError: no room"),
        ("import os; os.abort()", 30.0, "exit code -6"),
        ("time.sleep(600)", 1.5, "it ran past its limit of 1.5 s"),
    ],
)
def test_a_benchmark_that_fails_or_hangs_keeps_what_it_measured_and_says_why(
    rest: str, limit_s: float, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = in_its_own_process(LINE + rest, monkeypatch, limit_s=limit_s)
    assert records[0].ours == 2.0
    if told is None:
        assert len(records) == 1
    else:
        assert told in (records[1].refused or "")
        assert records[1].name == "toy"


def test_what_no_time_is_left_for_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = in_its_own_process("raise SystemExit(3)", monkeypatch, limit_s=0.0)
    assert record.refused == "no time was left for it"


def test_the_ceiling_of_a_step_is_of_its_own_work(setting: Setting) -> None:
    shape = gpu_step.shape_of(setting, batch=256)
    work = step.floor_work("tiny-resnet-w4", size=32, batch=8, num_keys=64, autocast=True)
    for form in ("eager", "compiled"):
        ceiling = gpu_step.ceiling_of(shape, form)
        moved = work.eager_bytes if form == "eager" else work.bn_relu_add_bytes
        # The products are of 128 x 128 matrices, the copies of 2**20 bytes; whichever is the slower.
        by_products, by_copies = 8 * 2 * 128**3 / work.flops, 8 * 2 * 2**20 / moved
        assert ceiling.amount == pytest.approx(by_products if "products" in ceiling.name else by_copies)
