"""`bench pipeline --profile` leaves a trace whose ranges are the stages, and memory by stage."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from linerate.bench import pipeline_cli, pipeline_profile
from linerate.bench.pipeline_profile import (
    PeakMemoryWatcher,
    RangeWatcher,
    largest_kernels,
    peaks_in_trace,
    profile_pipeline,
)
from linerate.bench.stage_clock import Spans
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.pack import pack
from linerate.train.config import Dictionary, TrainConfig
from linerate.train.recipes import find_recipe
from linerate.train.step import MoCo

MIB = 2**20


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    root = tmp_path_factory.mktemp("profile")
    (root / "images").mkdir()
    for nth in range(8):
        Image.fromarray(np.full((24, 24, 3), nth, np.uint8)).save(root / "images" / f"{nth}.jpg")
    return pack(root / "images", root / "shards", num_workers=0)


def config() -> TrainConfig:
    demo = find_recipe("demo").build()
    return dataclasses.replace(
        demo,
        views=dataclasses.replace(demo.views, size=16, backend="torch"),
        model=dataclasses.replace(demo.model, encoder="tiny-resnet-w4"),
        dictionary=Dictionary(num_keys=32),
        optim=dataclasses.replace(demo.optim, global_batch=4),
        bn=dataclasses.replace(demo.bn, bn_group=2),
        speed=dataclasses.replace(demo.speed, loader_threads=1, prefetch=1),
    )


@pytest.fixture(scope="module")
def profiled(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of two steps whose EMA holds 48 MiB for a moment."""
    folder = tmp_path_factory.mktemp("out") / "deep" / "profile"
    real = MoCo.update_key_encoder

    def update(self: MoCo) -> None:
        torch.zeros(48 * MIB, dtype=torch.uint8)
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoCo, "update_key_encoder", update)
        files = profile_pipeline(config(), catalog, folder=folder, num_steps=2)
    assert sorted(path.name for path in files.values()) == sorted(path.name for path in folder.iterdir())
    return folder


def test_the_trace_has_every_stage_as_a_range_of_each_step(profiled: Path):
    events = json.loads((profiled / "trace.json").read_text())["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in pipeline_profile.STAGES]
    counts = {name: sum(e["name"] == name for e in ranges) for name in pipeline_profile.STAGES}
    assert counts.pop("other") == 0
    assert counts.pop("logging") == 1
    # The route of the shuffle and the shuffle; the opening of the dictionary and the loss.
    assert counts.pop("shuffle") == counts.pop("loss") == 4
    assert set(counts.values()) == {2}
    (first, second) = (e for e in ranges if e["name"] == "key forward")
    around = [e for e in ranges if e["name"] == "shuffle" and e["ts"] <= first["ts"] <= e["ts"] + e["dur"]]
    assert len(around) == 1, "the shuffle goes around the key forward"
    assert any(e["name"] == "aten::convolution" and first["ts"] <= e["ts"] < second["ts"] for e in events)


def test_memory_that_a_stage_holds_for_a_moment_is_its_peak_alone(profiled: Path):
    peaks = json.loads((profiled / "summary.json").read_text())["peak_bytes"]
    others = {stage: peak for stage, peak in peaks.items() if stage != "EMA"}
    assert peaks["EMA"] >= 48 * MIB
    assert max(others.values()) < 48 * MIB
    assert {"query forward", "backward", "loss"} <= set(others)
    assert peaks == peaks_in_trace(profiled / "trace.json")
    assert "EMA" in (profiled / "memory.txt").read_text()


def test_the_largest_operations_come_first_and_stages_are_none(profiled: Path):
    kernels = json.loads((profiled / "summary.json").read_text())["kernels"]
    times = [kernel["ms_a_step"] for kernel in kernels]
    assert times == sorted(times, reverse=True)
    names = [kernel["name"] for kernel in kernels]
    assert "aten::mkldnn_convolution" in names or "aten::convolution_backward" in names
    assert not set(names) & set(pipeline_profile.STAGES)
    assert sum(kernel["share"] for kernel in kernels) <= 1 + 1e-9
    text = (profiled / "kernels.txt").read_text().splitlines()
    assert [line.split()[-1] for line in text[1:4]] == [name.split()[-1] for name in names[:3]]


def test_shares_of_operations_are_of_all_their_time():
    class Row:
        def __init__(self, key: str, us: float, count: int) -> None:
            self.key, self.self_cpu_time_total, self.count = key, us, count

    rows = [Row("a", 1000.0, 2), Row("b", 3000.0, 4), Row("backward", 9000.0, 2), Row("c", 0.0, 1)]
    found = largest_kernels(rows, on_gpu=False, num_steps=2)
    assert [(one.name, one.ms_a_step, one.calls_a_step, one.share) for one in found] == [
        ("b", 1.5, 2.0, 0.75),
        ("a", 0.5, 1.0, 0.25),
    ]


class Nvtx:
    """Stands for torch.cuda.nvtx, which needs a GPU."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def range_push(self, msg: str) -> None:
        self.calls.append(msg)

    def range_pop(self) -> None:
        self.calls.append("end")


def test_on_a_gpu_every_stage_is_an_nvtx_range_as_well():
    nvtx, spans = Nvtx(), Spans()
    inner = spans.around(lambda: None, "key forward")
    outer = spans.around(inner, "shuffle")
    outer()
    assert nvtx.calls == [], "nobody watches yet"
    spans.watchers = (RangeWatcher(nvtx),)
    outer()
    assert nvtx.calls == ["shuffle", "key forward", "end", "end"]


def test_a_range_ends_where_its_stage_fails():
    nvtx, spans = Nvtx(), Spans()
    spans.watchers = (RangeWatcher(nvtx),)

    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        spans.around(fail, "loss")()
    assert nvtx.calls == ["loss", "end"]


def test_on_a_gpu_the_peak_of_a_nested_stage_is_not_that_of_the_one_around_it(
    monkeypatch: pytest.MonkeyPatch,
):
    """PeakMemoryWatcher's twin on the CPU: an allocator of two numbers."""
    held = {"now": 10, "peak": 10}

    def allocate(num: int) -> None:
        held["now"] += num
        held["peak"] = max(held["peak"], held["now"])

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=held["now"]))
    watcher, spans = PeakMemoryWatcher(), Spans()
    spans.watchers = (watcher,)

    def encode() -> None:
        allocate(100)
        allocate(-70)

    inner = spans.around(encode, "key forward")

    def shuffled() -> None:
        allocate(5)
        inner()
        allocate(1)

    spans.around(shuffled, "shuffle")()
    watcher.take("other")
    assert watcher.peaks == {"other": 46, "shuffle": 46, "key forward": 115}


def test_a_folder_that_cannot_be_made_is_one_line(catalog: Catalog, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"its folder .* cannot be made"):
        profile_pipeline(config(), catalog, folder=tmp_path / "file" / "below")


def test_the_command_lists_the_files(
    catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    measured: list[Any] = []
    monkeypatch.setattr(pipeline_cli, "as_json", lambda found: {"verdict": "v"})
    monkeypatch.setattr("linerate.bench.suites.pipeline_stages.measure_stages", lambda *a, **k: measured)
    files = {"a trace": tmp_path / "trace.json"}
    monkeypatch.setattr(pipeline_profile, "profile_pipeline", lambda *a, folder: files)
    words = ["demo", "--shards", str(catalog.root), "--global-batch", "4", "--lr", "1", "--bn-group", "2"]
    assert pipeline_cli.main([*words, "--profile", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "verdict": "v",
        "profile": {"a trace": str(tmp_path / "trace.json")},
    }
