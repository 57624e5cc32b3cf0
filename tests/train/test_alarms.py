"""Each alarm, provoked by what it is for, and silent where all is well."""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small import SMALL, small
from torch import Tensor

from linerate.pipeline.loader import Loader
from linerate.pipeline.two_views import TwoViews
from linerate.shards.catalog import Catalog
from linerate.train import learner as learner_module
from linerate.train.alarms import Alarms, feature_std
from linerate.train.config import Optim, Schedule, ShuffleBN, TrainConfig, Watch
from linerate.train.encoder import Encoder
from linerate.train.key_queue import KeyQueue
from linerate.train.learner import Learner
from linerate.train.pretrain import pretrain
from linerate.train.run_folder import RunFolder

HEALTHY = {
    "loss": 2.0,
    "pretext_top1": 0.5,
    "feature_std": 0.6,
    "turnover": 1.0,
    "data_wait_share": 0.02,
}


def _alarms(**watch: Any) -> Alarms:
    return Alarms(Watch(alarm_steps=10, **watch), chance_loss=math.log(101), global_batch=10, num_keys=100)


def _names(run: Path) -> list[str]:
    return [line["alarm"] for line in RunFolder(run).load_log("alarm")]


def _watched(config: TrainConfig = SMALL, **watch: Any) -> TrainConfig:
    """Alarms after four steps; how fast this machine makes views is another test's business."""
    watched = dataclasses.replace(config.watch, **{"alarm_steps": 4, "alarm_data_wait": 1.0, **watch})
    return dataclasses.replace(config, watch=watched)


def test_the_std_is_one_of_even_directions_and_zero_of_equal_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(2000, 32, generator=generator)
    assert feature_std(even).item() == pytest.approx(1.0, abs=0.02)
    assert feature_std(7 * even).item() == pytest.approx(feature_std(even).item())
    assert feature_std(even[:1].expand(8, -1)).item() == 0.0


def test_a_healthy_run_gives_no_alarm(shards: Catalog, tmp_path: Path) -> None:
    summary = pretrain(_watched(small(knn_epochs=1)), shards=shards.root, run_dir=tmp_path)
    assert summary.alarms == ()
    assert _names(tmp_path) == []
    line = RunFolder(tmp_path).load_log("step")[-1]
    assert line["feature_std"] > 0.1
    assert line["turnover"] == pytest.approx(16 / 40)


def test_a_collapsed_encoder_gives_alarm_of_features_loss_and_queue_once_each(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapsed(*args: Any, **kwargs: Any) -> Encoder:
        encoder = build(*args, **kwargs)
        head = [p for name, p in encoder.named_parameters() if "head" in name or "projection" in name]
        assert head
        for parameter in head:
            torch.nn.init.constant_(parameter, float(parameter.ndim == 1))
        return encoder

    build = learner_module.build_encoder
    monkeypatch.setattr(learner_module, "build_encoder", collapsed)
    config = _watched(dataclasses.replace(SMALL, optim=Optim(global_batch=16, lr=1e-9)))
    summary = pretrain(config, shards=shards.root, run_dir=tmp_path)
    assert summary.finished
    assert summary.alarms == ("chance-loss", "collapse", "still-queue")
    assert sorted(_names(tmp_path)) == ["chance-loss", "collapse", "still-queue"]
    assert all(line["fatal"] is False for line in RunFolder(tmp_path).load_log("alarm"))


def test_keys_that_are_not_enqueued_give_alarm(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(self: KeyQueue, keys: Tensor) -> None:
        self.num_enqueued.add_(len(keys))

    monkeypatch.setattr(KeyQueue, "enqueue", forgetful)
    summary = pretrain(_watched(), shards=shards.root, run_dir=tmp_path)
    assert "still-queue" in summary.alarms
    (text,) = [
        line["text"] for line in RunFolder(tmp_path).load_log("alarm") if line["alarm"] == "still-queue"
    ]
    assert text.startswith("0.0% of the dictionary's keys changed in 1 steps, 40.0% were due")


def test_a_slow_loader_gives_alarm_and_a_slow_step_none(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_views(self: Loader[TwoViews], epoch: int, **kwargs: Any) -> Iterator[TwoViews]:
        for batch in views(self, epoch, **kwargs):
            time.sleep(slow_s["views"])
            yield batch

    def slow_step(self: Learner, *args: Any, **kwargs: Any) -> None:
        taught(self, *args, **kwargs)
        time.sleep(slow_s["step"])

    views, taught, slow_s = Loader.epoch, Learner.step, {"views": 0.2, "step": 0.0}
    monkeypatch.setattr(Loader, "epoch", slow_views)
    monkeypatch.setattr(Learner, "step", slow_step)
    config = _watched(dataclasses.replace(SMALL, schedule=Schedule(epochs=None, iterations=4)))
    late = dataclasses.replace(config, watch=dataclasses.replace(config.watch, alarm_data_wait=0.4))
    summary = pretrain(late, shards=shards.root, run_dir=tmp_path / "loader")
    assert summary.alarms == ("data-wait",)
    assert len(_names(tmp_path / "loader")) == 1
    slow_s = {"views": 0.0, "step": 0.5}
    assert pretrain(late, shards=shards.root, run_dir=tmp_path / "step").alarms == ()


def test_a_wait_must_last_for_two_lines_and_the_first_does_not_count() -> None:
    alarms = _alarms()
    shares = [0.9, 0.9, 0.0, 0.2, 0.2, 0.9]
    told = [
        [a.name for a in alarms.after_log(n, {**HEALTHY, "data_wait_share": share}, steps=10)]
        for n, share in enumerate(shares)
    ]
    assert told == [[], [], [], [], ["data-wait"], []]
    assert alarms.names == ("data-wait",)


def test_a_loss_must_stay_at_chance_for_all_the_steps() -> None:
    alarms = _alarms()
    losses = {0: math.log(101), 5: 4.0, 6: 4.60, 11: 4.63, 15: 4.61, 16: 4.61, 30: 4.61}
    told = {
        step: [a.name for a in alarms.after_log(step, {**HEALTHY, "loss": loss}, steps=10)]
        for step, loss in losses.items()
    }
    assert [step for step, names in told.items() if names] == [16]
    assert told[16] == ["chance-loss"]


def test_a_run_without_shuffling_whose_knn_falls_gives_alarm_above_the_limit_of_the_pretext(
    shards: Catalog, tmp_path: Path
) -> None:
    """So small an encoder solves no pretext task: the limit is put below what it reaches."""
    config = dataclasses.replace(
        # So high a rate brings the loss near chance, too, which is another alarm's business.
        _watched(
            small(log_steps=4, knn_epochs=1, knn_k=5, knn_test_share=0.4, alarm_top1=0.02),
            alarm_chance_share=0.0,
        ),
        bn=ShuffleBN(bn_group=2, shuffle=False),
        optim=Optim(global_batch=16, lr=0.1),
        schedule=Schedule(decay="cosine", epochs=12),
    )
    summary = pretrain(config, shards=shards.root, run_dir=tmp_path)
    shares = [line["knn_top1"] for line in RunFolder(tmp_path).load_log("knn")]
    assert min(now - max(shares[:n]) for n, now in enumerate(shares) if n) < -0.01, shares
    assert summary.alarms == ("bn-cheating",)


def test_a_run_that_is_resumed_gives_the_alarms_of_one_without_a_break_once() -> None:
    lines: list[dict[str, Any]] = [{"event": "start", "step": 0}]
    for step in range(2, 32, 2):
        loss = math.log(101) if step > 8 else 2.0
        lines.append({"event": "step", "step": step, **HEALTHY, "loss": loss, "pretext_top1": 0.995})
        lines.append({"event": "knn", "step": step, "knn_top1": 0.5 - abs(step - 12) / 100})

    def told(alarms: Alarms, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        events = []
        for line in lines:
            events.append(line)
            found = alarms.after_knn(line["knn_top1"]) if line["event"] == "knn" else iter(())
            if line["event"] == "step":
                found = alarms.after_log(line["step"], line, steps=2)
            events += [{"event": "alarm", "step": line["step"], "alarm": alarm.name} for alarm in found]
        return events

    whole = told(_alarms(), lines)
    given = {line["alarm"]: line["step"] for line in whole if line["event"] == "alarm"}
    assert given == {"bn-cheating": 14, "chance-loss": 20}
    for cut in range(0, 32, 2):
        log = told(_alarms(), [line for line in lines if line["step"] <= cut])
        resumed = _alarms()
        resumed.go_on(log)
        assert [*log, *told(resumed, [line for line in lines if line["step"] > cut])] == whole
        assert resumed.names == ("bn-cheating", "chance-loss")


def test_alarms_are_those_of_the_whole_run_after_a_stop_and_of_the_checkpoint_after_a_loss(
    shards: Catalog, tmp_path: Path
) -> None:
    def stop_at_six(event: Any) -> None:
        if event["event"] == "step" and event["step"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    # Every loss is within all of chance: the alarm is due eight steps after the first.
    config = _watched(small(checkpoint_steps=4), alarm_steps=8, alarm_chance_share=1.0)
    first = pretrain(config, shards=shards.root, run_dir=tmp_path, on_event=stop_at_six)
    assert (first.stopped_by, first.alarms) == ("SIGTERM", ())
    second = pretrain(config, shards=shards.root, run_dir=tmp_path, resume=True)
    assert (second.alarms, _names(tmp_path)) == (("chance-loss",), ["chance-loss"])
    assert RunFolder(tmp_path).load_log("alarm")[0]["step"] == 9
    again = pretrain(config, shards=shards.root, run_dir=tmp_path, resume=True)
    assert (again.alarms, _names(tmp_path)) == (("chance-loss",), ["chance-loss"])
    # Back to step 8, before it was given: the steps are done again, and so is the alarm.
    (tmp_path / "checkpoints" / "step-000000012.pt").write_bytes(b"")
    last = pretrain(config, shards=shards.root, run_dir=tmp_path, resume=True)
    assert (last.alarms, _names(tmp_path)) == (("chance-loss",), ["chance-loss"])


def test_a_certain_pretext_gives_alarm_only_while_knn_falls() -> None:
    def told(top1: float, *knn: float) -> list[str]:
        alarms = _alarms()
        assert not list(alarms.after_log(5, {**HEALTHY, "pretext_top1": top1}, steps=10))
        return [alarm.name for share in knn for alarm in alarms.after_knn(share)]

    assert told(0.999, 0.3, 0.4, 0.35, 0.2) == ["bn-cheating"]
    assert told(0.999, 0.3, 0.4, 0.395, 0.5) == []
    assert told(0.9, 0.3, 0.4, 0.2) == []
