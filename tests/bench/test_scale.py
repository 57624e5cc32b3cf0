"""The step on two ranks by torchrun, once; projections and the reference's bytes against formulas by hand."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from linerate.bench import cli
from linerate.bench.contest import Count, Setting
from linerate.bench.counting import OpCounter
from linerate.bench.fleet import machines_of
from linerate.bench.projection import Traffic, project
from linerate.bench.record import Record, load_jsonl
from linerate.bench.registry import run_benchmark
from linerate.bench.suites import scale, shuffle_bn
from linerate.bench.suites.scale import Scaling, reference_traffic
from linerate.bench.suites.scale_rank import Launched, Rank
from linerate.shards.errors import UserError
from linerate.train.config import TrainConfig
from linerate.train.encoder import build_encoder
from linerate.train.recipes import find_recipe

GRADIENTS, IMAGES, KEYS = 1000, 600, 40


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """The benchmark at its tiny size; two ranks are two processes."""
    threads = torch.get_num_threads()
    setting = Setting(size="tiny", scratch=tmp_path_factory.mktemp("scale"), rounds=7)
    records = list(run_benchmark("scale", setting=setting, suite="tiny"))
    assert torch.get_num_threads() == threads
    return records


def test_both_modes_are_rates_of_one_and_two_ranks_with_their_efficiency(measured: list[Record]) -> None:
    timed = [record for record in measured if record.kind == "time"]
    modes = [(record.work.partition(":")[0], record.ranks) for record in timed]
    assert modes == [("weak", 1), ("weak", 2), ("strong", 1), ("strong", 2)]
    for record in timed:
        assert record.ours is not None
        assert record.ours > 0
        assert len(record.ours_s) == 7
        assert json.loads(json.dumps(record.to_json(), allow_nan=False))["ranks"] == record.ranks
        if record.ranks == 1:
            assert record.ratio is None
        else:
            assert record.ratio == pytest.approx(float(np.median(np.divide(record.theirs_s, record.ours_s))))
            assert "the ratio is the efficiency" in (record.note or "")
        assert record.ceiling_share is None, "the efficiency has one form"
    weak_one, _, strong_one, strong_two = timed
    assert (weak_one.amount, strong_one.amount, strong_two.amount) == (8, 16, 16)
    # Twice one rank needs half of its time for the same images.
    assert strong_two.theirs_s == pytest.approx([one / 2 for one in strong_one.ours_s])


def test_a_step_of_two_ranks_sends_images_once_and_keys_and_no_buffer(measured: list[Record]) -> None:
    counts = {record.unit: record for record in measured if record.kind == "count"}
    assert all(record.ranks == 2 and record.work.startswith("weak: ") for record in counts.values())
    with torch.device("meta"):
        model = find_recipe("demo").build().model
        encoder = build_encoder("tiny-resnet-w4", dim=model.dim, head=model.head, stem=model.stem)
    gradients = 4 * sum(parameter.numel() for parameter in encoder.parameters())
    ours = {unit: record.ours for unit, record in counts.items()}
    assert ours == {
        "collectives besides gradients": 2,
        "buffer broadcasts": 0,
        "bytes of images": 8 * 3 * 16**2,
        "bytes of keys": 16 * 128 * 4,
        "bytes of buffers": 0,
        "bytes of gradients": gradients,
    }
    assert all(record.met is not False for record in counts.values())


def test_the_references_bytes_are_those_that_its_collectives_fill() -> None:
    config = find_recipe("demo").build()
    found = reference_traffic(config, ranks=4, rank_batch=8)
    images = torch.zeros(8, 3, 32, 32)
    with shuffle_bn.fake_ranks(4), OpCounter() as counter:
        shuffle_bn._all_gather_floats(images)
    assert found["images"] + found["keys"] == counter.collective_bytes
    # Mean, variance and the batches seen of each BN in both encoders; then the queue and its pointer.
    with torch.device("meta"):
        encoder = build_encoder("tiny-resnet-w16", dim=128, stem="cifar")
    bn = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    queue = config.dictionary.num_keys * 128 * 4 + 8
    assert found["buffers"] == 2 * sum(2 * 4 * m.num_features + 8 for m in bn) + queue


def test_a_ring_an_all_to_all_and_a_gather_send_what_the_formulas_say() -> None:
    traffic = Traffic(gradient_bytes=GRADIENTS, image_bytes=IMAGES, key_bytes=KEYS)
    assert traffic.sent_bytes(1) == 0
    assert traffic.sent_bytes(4) == 2 * 3 / 4 * GRADIENTS + 3 / 4 * IMAGES + 3 * KEYS
    assert traffic.scaled(0.5) == Traffic(gradient_bytes=GRADIENTS, image_bytes=300, key_bytes=20)
    found = project(traffic, ranks=4, rank_batch=8, compute_s=1e-6, link_gb_per_s=1.0)
    assert found.send_s == pytest.approx(2070e-9)
    assert found.pairs_per_s == pytest.approx(32 / 3.07e-6)
    assert found.efficiency == pytest.approx(1 / 3.07)


class Steady:
    """Stands for ranks: a step takes no time, and sends what a counter would have seen."""

    def __init__(self, config: TrainConfig, *_: Any, **__: Any) -> None:
        self.closed = False

    def answer(self, ask: str, batch: int) -> dict[str, Any]:
        calls = {"alltoall_base_": 1, "_allgather_base_": 1, "allreduce_": 3, "broadcast_": 2}
        filled = {"alltoall_base_": IMAGES, "_allgather_base_": 2 * KEYS, "broadcast_": 7}
        found = {"calls": calls, "bytes": filled, "gradient_calls": 3, "gradient_bytes": GRADIENTS}
        return found if ask == "count" else {}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def _without_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(scale, "Rank", Steady)
    monkeypatch.setattr(scale, "Launched", Steady)
    return


@pytest.mark.usefixtures("_without_processes")
def test_collectives_besides_gradients_and_broadcasts_are_counted_and_miss_their_bar() -> None:
    counts = {
        one.unit: one for one in _scaling(2).measure(rounds=7, min_round_s=0.0) if isinstance(one, Count)
    }
    assert counts["collectives besides gradients"].ours == 4
    broadcasts = counts["buffer broadcasts"]
    assert broadcasts.bar is not None
    assert (broadcasts.ours, broadcasts.bar.met(ratio=None, ours=broadcasts.ours)) == (2, False)
    assert counts["bytes of buffers"].ours == 7


@pytest.mark.usefixtures("_without_processes")
def test_more_ranks_than_cores_say_what_they_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "usable_cores", lambda: 2)
    scaling = Scaling(_config(), [1, 2, 4])
    timed = [one for one in scaling.measure(rounds=7, min_round_s=0.0) if isinstance(one, Record)]
    notes = {record.ranks: record.note for record in timed}
    assert notes == {
        1: None,
        2: "the ratio is the efficiency",
        4: "the ratio is the efficiency; 4 ranks on 2 cores reach 0.50 at most",
    }


@pytest.mark.usefixtures("_without_processes")
def test_ranks_that_end_are_a_refused_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def end(self: Steady, ask: str, batch: int) -> dict[str, Any]:
        raise UserError("2 ranks ended: out of memory")

    monkeypatch.setattr(Steady, "answer", end)
    (record,) = run_benchmark("scale", setting=Setting(size="tiny", scratch=tmp_path), suite="tiny")
    assert record.refused == "2 ranks ended: out of memory"


@pytest.mark.usefixtures("_without_processes")
def test_a_projection_is_called_one_and_has_no_rounds() -> None:
    scaling = _scaling(2)
    with pytest.raises(UserError, match="needs the bytes of at least two ranks"):
        list(scaling.project([8], link_gb_per_s=1))
    list(scaling.measure(rounds=7, min_round_s=0.0))
    scaling.times = {key: np.full(7, 1e-3) for key in scaling.times}
    found = {
        (one.work.partition(":")[0], one.ranks): one for one in scaling.project([4, 8], link_gb_per_s=1e-3)
    }
    # 64 images in BN groups of 16 are no more than four ranks'.
    assert list(found) == [("weak", 4), ("weak", 8), ("strong", 4)]
    weak, strong = found["weak", 4], found["strong", 4]
    sent = 1.5 * GRADIENTS + 0.75 * IMAGES + 3 * KEYS
    assert weak.ours == pytest.approx(4 * 32 / (1e-3 + sent / 1e6))
    sent = 1.5 * GRADIENTS + 0.75 * IMAGES / 2 + 3 * KEYS / 2
    assert strong.ours == pytest.approx(64 / (1e-3 / 4 + sent / 1e6))
    for one in found.values():
        assert (one.note or "").startswith("projection: ")
        assert one.ours_s == ()


@pytest.mark.usefixtures("_without_processes")
def test_the_command_prints_the_projection_apart_and_keeps_every_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["scale", "demo", "--bn-group", "16", "--rounds", "7", "--out", str(tmp_path / "scale.jsonl")]
    assert cli.main([*words, "--project-to", "8", "--link-gb-per-s", "50"]) == 0
    measured, _, projected = capsys.readouterr().out.partition("projection: by formula")
    assert "projected" not in measured
    assert "nothing overlapped" in projected
    records = load_jsonl(tmp_path / "scale.jsonl")
    assert [bool(record.ours_s) for record in records if record.kind == "time"] == [True] * 4 + [False]
    assert {record.suite for record in records} == {"scale"}
    assert len(machines_of(records)) == 1, "what is projected stands beside what it is projected from"
    assert all(record.measured_at for record in records)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--project-to", "8"], "go together"),
        (["--link-gb-per-s", "50"], "go together"),
        (["--project-to", "8", "--link-gb-per-s", "0"], "must be above 0"),
        (["--project-to", "8", "--link-gb-per-s", "inf"], "must be above 0"),
        (["--out", "."], "is a folder; name a file"),
        (["--ranks", "1", "--project-to", "8", "--link-gb-per-s", "50"], "at least two ranks"),
        (["--ranks", "0"], "each must be at least 1"),
        (["--rounds", "3"], "give 7 or more"),
        (["--ranks", "3"], "does not fit on 3 ranks"),
    ],
)
def test_what_cannot_be_scaled_is_one_clear_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cli.main(["scale", "demo", "--bn-group", "16", *words])


def test_ranks_that_end_say_why(tmp_path: Path) -> None:
    config = _config()
    # More images in a group than a rank is asked to take: the rank raises, and its words are handed on.
    rank = Rank(config, tmp_path)
    with pytest.raises(UserError, match="multiple of bn_group"):
        rank.answer("step", 3)
    rank.close()
    ended = object.__new__(Launched)
    with (tmp_path / "said").open("w+") as said, (tmp_path / "asked").open("w") as asked:
        said.write("RuntimeError: out of memory\n")
        said.flush()
        ended._num, ended._said, ended._asked, ended._answers = 2, said, asked, (tmp_path / "said").open()
        with pytest.raises(UserError, match="2 ranks ended: RuntimeError: out of memory; give fewer --ranks"):
            ended.answer("step", 3)
        ended._answers.close()


def _config() -> TrainConfig:
    config = find_recipe("demo").build()
    return dataclasses.replace(config, bn=dataclasses.replace(config.bn, bn_group=16))


def _scaling(most: int) -> Scaling:
    return Scaling(_config(), [1, most])
