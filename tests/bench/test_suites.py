"""Every benchmark runs once at a tiny size, and its sides are caught when they differ."""

import dataclasses
import functools
import gc
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from linerate.bench.contest import Disagreement, Setting
from linerate.bench.images import copy_folder, load_images
from linerate.bench.record import Record
from linerate.bench.record_table import results_table
from linerate.bench.registry import BENCHMARKS, run_benchmark
from linerate.bench.suites import gpu_views, shards, step, step_parts, view_backends, views
from linerate.bench.suites.ceilings import NO_GPU
from linerate.bench.suites.shard_peers import require_same_samples
from linerate.bench.suites.shard_resizers import (
    psnr,
    require_alike,
)
from linerate.pipeline.recipe import OneView

# webdataset closes none of its tars.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True, scope="module")
def _one_thread_and_own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINERATE_BENCH_CACHE", str(tmp_path_factory.getbasetemp() / "bench-images"))
        # Their real work is test_peers.py's.
        patch.setenv("LINERATE_BENCH_PEERS", "/none/python")
        # A C++ compiler takes minutes for what a GPU's takes seconds; the form beside it is eager.
        patch.setattr(torch, "compile", lambda module: module)
        # Workers of DataLoaders start in seconds, which these tests would wait for many times.
        patch.setattr(view_backends, "usable_cores", lambda: 1)
        patch.setattr(gpu_views, "usable_cores", lambda: 1)
        yield
    torch.set_num_threads(threads)
    gc.collect()


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(size="tiny", scratch=tmp_path, rounds=7)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Record]]:
    """Each benchmark's records at the tiny size; it runs when they are first asked for."""

    @functools.cache
    def run(name: str) -> list[Record]:
        setting = Setting(size="tiny", scratch=tmp_path_factory.mktemp(name), rounds=7)
        return list(run_benchmark(name, setting=setting, suite="tiny"))

    return run


def by_unit(records: list[Record]) -> dict[str, Record]:
    return {record.unit: record for record in records}


# tests/bench/test_scale.py starts its processes once for all that is said of them.
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "scale"])
def test_the_sides_agree_and_a_record_comes_out(name: str, measured: Callable[[str], list[Record]]):
    records = measured(name)
    assert records
    results_table(records)
    for record in records:
        assert json.loads(json.dumps(record.to_json(), allow_nan=False))["name"] == name
        assert record.refused is None
        without_gpu = (record.missing or "").endswith(NO_GPU)
        assert without_gpu or "make bench-peers" in (record.missing or "make bench-peers"), (
            "others come with us"
        )
        assert without_gpu or record.ours is not None
        if record.kind == "time" and record.ours is not None:
            reason = (record.ceiling or "").startswith("none: ")
            assert reason != (record.ceiling_share is not None), "a share of a ceiling, or why there is none"
        if record.kind == "time" and record.ours is not None:
            assert record.ours > 0
            assert len(record.ours_s) == 7
        if record.theirs_s:
            assert record.equal or name in ("draws", "train"), "equality comes first"
            assert record.ratio_low <= record.ratio <= record.ratio_high
        # A tiny size says nothing about a bar, except about one that holds at any size.
        assert record.met in (None, True)


def test_enqueue_copies_no_queue_and_waits_for_nothing_while_the_reference_does(
    measured: Callable[[str], list[Record]],
):
    found = by_unit(measured("enqueue"))
    assert (found["queue copies"].ours, found["queue copies"].theirs) == (0, 1)
    assert (found["host syncs"].ours, found["host syncs"].theirs) == (0, 1)


def test_the_update_of_both_encoders_is_one_launch(measured: Callable[[str], list[Record]]):
    assert by_unit(measured("sgd-ema"))["launches"].ours == 1


def test_the_step_has_fewer_operations_than_plain_eager_and_no_host_sync(
    measured: Callable[[str], list[Record]],
):
    found = by_unit(measured("step"))
    assert found["aten ops"].ours < found["aten ops"].theirs
    assert found["ops, ours opened"].ours > found["aten ops"].ours
    assert found["host syncs"].ours == 0


def test_two_processes_write_the_bytes_of_one(setting: Setting):
    images = copy_folder(load_images(None, num_images=20), setting.scratch / "images")
    contest = shards.two_processes(setting, images)
    assert contest.amount == 40
    assert contest.agree is not None
    assert contest.agree() == "every byte of every file written"


def test_samples_that_differ_are_told_apart():
    a, b = (b"one", 1), (b"two", 2)
    assert require_same_samples([a, b], [b, a]) == "bytes and label of every sample"
    assert require_same_samples([a], [b, a], may_leave_out=1)
    for ours, theirs in (([a], [a, b]), ([a, b], [a]), ([a, (b"two", 3)], [a, b]), ([a, a], [a, b])):
        with pytest.raises(Disagreement, match="of "):
            require_same_samples(ours, theirs)


def jpeg_of(level: int, size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(out, "JPEG")
    return out.getvalue()


def test_images_of_other_sizes_or_pixels_are_told_apart():
    ours = {0: jpeg_of(100), 1: jpeg_of(50)}
    limits = {"least_db": 35.0, "worst_db": 25.0}
    assert require_alike(ours, {0: jpeg_of(101), 1: jpeg_of(50)}, **limits).startswith("the size of every")
    for theirs, message in (
        ({0: jpeg_of(100)}, "ours holds 2 images, the peer 1"),
        ({0: jpeg_of(100, (8, 9)), 1: jpeg_of(50)}, r"image 0 has \(8, 8\) pixels, the peer's \(9, 8\)"),
        ({0: jpeg_of(110), 1: jpeg_of(60)}, "the images lie 28.1 dB"),
        ({0: jpeg_of(100), 1: jpeg_of(90)}, "the worst one 16.1"),
    ):
        with pytest.raises(Disagreement, match=message):
            require_alike(ours, theirs, **limits)
    assert psnr(0) == float("inf")
    assert psnr(255**2) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"jitter_probability": 0.0},
        {"hue": 0.0, "jitter_probability": 1.0},
        {"blur_probability": 0.0},
        {"gray_probability": 0.0},
        {"flip_probability": 0.0},
        {"crop_scale": (0.9, 1.0)},
    ],
)
def test_views_without_one_of_the_operations_are_told_apart(setting: Setting, change: dict[str, object]):
    work = views.load_work(setting, recipe="v2")
    always = OneView(
        jitter_probability=1.0, hue=0.3, gray_probability=0.5, blur_probability=1.0, blur_sigma=(2.0, 2.0)
    )
    whole = dataclasses.replace(work.recipe, query=always, key=always)
    without = dataclasses.replace(
        whole, query=dataclasses.replace(always, **change), key=dataclasses.replace(always, **change)
    )
    work = dataclasses.replace(work, recipe=whole)
    honest = views.OurViews(work, backend="torch")
    assert "grey levels" in views.require_same_views(honest, work)
    lazy = views.OurViews(dataclasses.replace(work, recipe=without), backend="torch")
    with pytest.raises(Disagreement, match="grey levels from the peer's"):
        views.require_same_views(lazy, work)


def test_a_step_that_learns_otherwise_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    shape = {"num_keys": 64, "size": 32, "batch": 8}
    assert "5 steps" in step.require_same_losses("tiny-resnet-w4", **shape)
    build = step.build_sides

    def with_another_rate(name: str, **how: object) -> object:
        ours, theirs = build(name, **how)
        theirs.optimizer.param_groups[0]["lr"] *= 2
        return ours, theirs

    monkeypatch.setattr(step, "build_sides", with_another_rate)
    with pytest.raises(Disagreement, match="losses of 5 steps"):
        step.require_same_losses("tiny-resnet-w4", **shape)


def test_tensors_that_differ_in_number_or_value_are_told_apart():
    one = torch.ones(3)
    assert step_parts.require_close([one], [one], what="x", atol=0) == "x, to 0.0e+00"
    with pytest.raises(Disagreement, match="2 tensors ours, 1 theirs"):
        step_parts.require_close([one, one], [one], what="x", atol=0)
    with pytest.raises(Disagreement, match="lie nan apart"):
        step_parts.require_close([one * float("nan")], [one], what="x", atol=1)
