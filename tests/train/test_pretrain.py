import dataclasses
import errno
import itertools
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small import SMALL, small

from linerate.pipeline.cores import usable_cores
from linerate.pipeline.loader import Loader
from linerate.pipeline.two_views import TwoViews
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train import pretrain as pretrain_module
from linerate.train import run_folder as run_folder_module
from linerate.train import stop as stop_module
from linerate.train.checkpoint import list_checkpoints, load_checkpoint, load_encoder, load_trained
from linerate.train.config import Dictionary, Model, Optim, Schedule, Speed, TrainConfig
from linerate.train.evaluate.features import Encode
from linerate.train.learner import Learner
from linerate.train.monitor import KnnMonitor
from linerate.train.pretrain import Summary, pretrain
from linerate.train.run_folder import RunFolder


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(run).load_log("step")]


@pytest.fixture(scope="module")
def whole(shards: Catalog, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary, list[Any]]:
    """A run from its first step to its last."""
    run = tmp_path_factory.mktemp("whole") / "run"
    events: list[Mapping[str, Any]] = []
    summary = pretrain(small(knn_epochs=2), shards=shards.root, run_dir=run, on_event=events.append)
    return run, summary, events


def test_a_run_does_all_its_steps_and_says_so(whole: tuple[Path, Summary, list[Any]]) -> None:
    run, summary, events = whole
    assert (summary.step, summary.total_steps, summary.images) == (12, 12, 192)
    assert summary.finished
    assert summary.world_size == 1
    assert events[0]["event"] == "start"
    assert events[0]["steps_per_epoch"] == 72 // 16
    assert events[0]["num_dropped"] == 72 % 16
    assert (events[0]["loader_threads"], events[0]["usable_cores"]) == (1, usable_cores())
    assert "1 loader thread a rank" in events[0]["device"]
    assert events[0]["chance_loss"] == pytest.approx(math.log(41))
    switches = events[0]["switches"]
    assert events[-1] == {"event": "end", "step": 12, "finished": True, "switches": switches}
    assert (switches["cuda_graphs"], summary.given_up) == ("off: no CUDA device", ())
    assert [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] == events


def test_every_logged_step_has_the_numbers_that_people_read(whole: tuple[Path, Summary, list[Any]]) -> None:
    steps = [event for event in whole[2] if event["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["epoch"] for line in steps] == [0] * 4 + [1] * 4 + [2] * 4
    assert steps[0]["lr"] == SMALL.optim.lr
    assert all(a["lr"] > b["lr"] for a, b in itertools.pairwise(steps))
    for line in steps:
        assert 0 <= line["pretext_top1"] <= line["pretext_top5"] <= 1
        assert line["images_per_s"] > 0
        assert 0 <= line["data_wait_share"] <= 1
    assert steps[-1]["left_s"] == 0


def test_the_monitor_runs_every_n_epochs_and_at_the_end(whole: tuple[Path, Summary, list[Any]]) -> None:
    lines = [event for event in whole[2] if event["event"] == "knn"]
    assert [line["epoch"] for line in lines] == [2, 3]
    assert all(0 <= line["knn_top1"] <= 1 for line in lines)
    assert whole[1].knn_top1 == lines[-1]["knn_top1"]


def test_checkpoints_come_every_n_steps_and_at_the_end(whole: tuple[Path, Summary, list[Any]]) -> None:
    run, summary, _ = whole
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == ["step-000000012.pt", "step-000000010.pt"]
    assert summary.checkpoint == str(run / "checkpoints" / names[0])


def test_the_encoder_of_a_run_loads(whole: tuple[Path, Summary, list[Any]]) -> None:
    run, summary, _ = whole
    trained = load_trained(run)
    assert (trained.step, trained.config.model) == (12, SMALL.model)
    assert load_trained(summary.checkpoint).step == 12
    backbone, config = load_encoder(run)
    assert config.seed == SMALL.seed
    assert backbone(torch.zeros(2, 3, 16, 16)).shape == (2, trained.encoder.num_features)


def test_a_run_that_stops_and_continues_has_the_same_losses(
    whole: tuple[Path, Summary, list[Any]], shards: Catalog, tmp_path: Path
) -> None:
    def stop_at_six(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "run"
    first = pretrain(SMALL, shards=shards.root, run_dir=run, on_event=stop_at_six)
    assert (first.stopped_by, first.finished) == ("SIGTERM", False)
    assert first.step < 12
    assert load_checkpoint(Path(first.checkpoint)).step == first.step
    # Another cadence of checkpoints, another prefetch: not another run.
    rest = dataclasses.replace(small(checkpoint_steps=100), speed=Speed(loader_threads=1, prefetch=3))
    second = pretrain(rest, shards=shards.root, run_dir=run, resume=True)
    assert second.finished
    assert _losses(run) == _losses(whole[0])


def test_a_run_with_a_memory_bank_has_a_row_for_every_sample_and_continues(
    shards: Catalog, tmp_path: Path
) -> None:
    bank = dataclasses.replace(SMALL, dictionary=Dictionary(dictionary="memory-bank", num_keys=40))
    events: list[Mapping[str, Any]] = []

    def stop_at_six(event: Mapping[str, Any]) -> None:
        events.append(event)
        if event["event"] == "step" and event["step"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    first = pretrain(bank, shards=shards.root, run_dir=tmp_path / "run", on_event=stop_at_six)
    assert load_checkpoint(Path(first.checkpoint)).moco["dictionary.bank"].shape == (72, 8)
    assert any("does nothing here: shuffle" in event.get("text", "") for event in events)
    assert pretrain(bank, shards=shards.root, run_dir=tmp_path / "run", resume=True).finished
    pretrain(bank, shards=shards.root, run_dir=tmp_path / "whole")
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")


def test_a_finished_run_resumes_to_nothing(whole: tuple[Path, Summary, list[Any]], shards: Catalog) -> None:
    run, summary, _ = whole
    before = (run / "log.jsonl").read_text().count('"step"')
    again = pretrain(small(knn_epochs=2), shards=shards.root, run_dir=run, resume=True)
    assert dataclasses.replace(again, stopped_by=None) == summary
    assert summary.loss is not None
    assert again.loss == _losses(run)[-1]
    assert (run / "log.jsonl").read_text().count('"step"') == before + 3  # start, note, end


def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(shards: Catalog, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(SMALL, shards=shards.root, run_dir=run)
    losses = _losses(run)
    newest = list_checkpoints(run / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    notes: list[str] = []

    def take(event: Mapping[str, Any]) -> None:
        if event["event"] == "note":
            notes.append(event["text"])

    pretrain(SMALL, shards=shards.root, run_dir=run, resume=True, on_event=take)
    assert "step-000000012.pt is cut short" in notes[0]
    assert notes[1] == "continuing after step 10"
    assert _losses(run) == losses


def test_a_folder_with_another_run_is_refused(
    whole: tuple[Path, Summary, list[Any]], shards: Catalog, tmp_path: Path
) -> None:
    run = whole[0]
    with pytest.raises(UserError, match="holds a run already; --resume continues it"):
        pretrain(SMALL, shards=shards.root, run_dir=run)
    other = dataclasses.replace(SMALL, model=Model(encoder="resnet18"))
    with pytest.raises(UserError, match=r"holds another run: model\.\w+="):
        pretrain(other, shards=shards.root, run_dir=run, resume=True)
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="holds something that is no run"):
        pretrain(SMALL, shards=shards.root, run_dir=tmp_path)
    with pytest.raises(UserError, match="is a file; --run names a folder"):
        pretrain(SMALL, shards=shards.root, run_dir=tmp_path / "photo.jpg")


def test_resume_without_a_run_starts_one(shards: Catalog, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, schedule=Schedule(epochs=None, iterations=1))
    assert pretrain(config, shards=shards.root, run_dir=tmp_path / "new", resume=True).step == 1


def test_a_length_in_iterations_may_end_within_an_epoch(shards: Catalog, tmp_path: Path) -> None:
    config = dataclasses.replace(small(log_steps=4), schedule=Schedule(epochs=None, iterations=6))
    assert pretrain(config, shards=shards.root, run_dir=tmp_path).step == 6
    assert [line["step"] for line in RunFolder(tmp_path).load_log("step")] == [4, 6]


def test_a_run_that_diverges_says_so_and_saves_nothing(shards: Catalog, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, optim=Optim(global_batch=16, lr=1e30))
    with pytest.raises(UserError, match=r"the loss is \w+ at step \d+.*lower --lr"):
        pretrain(config, shards=shards.root, run_dir=tmp_path)
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_a_state_that_is_not_finite_never_becomes_a_checkpoint(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(
        learner: Learner, batch: TwoViews, *, step: int, lr: float, ema_momentum: float | None = None
    ) -> None:
        taught(learner, batch, step=step, lr=lr)
        if step == 6:
            next(learner.moco.key_encoder.parameters()).data[0] = math.nan

    taught = Learner.step
    monkeypatch.setattr(Learner, "step", poison)
    # The first line of the log would come after step 12, the checkpoint is due after step 10.
    config = small(log_steps=100, checkpoint_steps=5)
    with pytest.raises(
        UserError, match=r"not finite at step 10 .*last checkpoint is .*000005\.pt; .*lower --lr"
    ):
        pretrain(config, shards=shards.root, run_dir=tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-000000005.pt"]


def test_a_run_continues_only_on_its_own_shards(
    whole: tuple[Path, Summary, list[Any]], test_shards: Catalog
) -> None:
    with pytest.raises(UserError, match=r"was trained on other shards: 72 samples.*hold 30"):
        pretrain(small(knn_epochs=2), shards=test_shards.root, run_dir=whole[0], resume=True)


def test_a_checkpoint_of_before_shards_were_kept_continues_with_a_note(
    whole: tuple[Path, Summary, list[Any]], shards: Catalog, tmp_path: Path
) -> None:
    run = shutil.copytree(whole[0], tmp_path / "run")
    newest = list_checkpoints(run / "checkpoints")[0]
    state = torch.load(newest, weights_only=True)
    del state["trained_on"]
    torch.save(state, newest)
    pretrain(small(knn_epochs=2), shards=shards.root, run_dir=run, resume=True)
    notes = [line["text"] for line in RunFolder(run).load_log("note")]
    assert f"the checkpoint does not say what it was trained on; {shards.root} is taken for it" in notes


def test_what_cannot_work_is_said_before_anything_is_built(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("open_monitor", "open_views", "Learner"):
        monkeypatch.setattr(pretrain_module, name, lambda *_, **__: pytest.fail("something was built"))
    large = dataclasses.replace(SMALL, optim=Optim(global_batch=80))
    with pytest.raises(UserError, match="72 images do not fill one global_batch=80"):
        pretrain(large, shards=shards.root, run_dir=tmp_path / "run")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(run_folder_module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"run cannot be written: .*Permission denied; name a folder"):
        pretrain(SMALL, shards=shards.root, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_trains_on_webdatasets_own_pipeline(shards: Catalog, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, views=dataclasses.replace(SMALL.views, backend="webdataset"))
    assert pretrain(config, shards=shards.root, run_dir=tmp_path).finished


def test_a_damaged_sample_is_replaced_counted_and_written_with_its_key(
    shards: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Catalog.load(shutil.copytree(shards.root, tmp_path / "damaged"))
    index, key = copy.shard_index(0), copy.keys(0)[2]
    with copy.shard_path(0).open("r+b") as file:
        file.seek(int(index.offset[2]) + 100)
        file.write(bytes(30))
    events: list[Mapping[str, Any]] = []
    run = tmp_path / "run"
    summary = pretrain(small(log_steps=4), shards=copy.root, run_dir=run, on_event=events.append)
    assert summary.finished
    # It may be among the eight that an epoch leaves out.
    replaced = [event["replaced"] for event in events if event["event"] == "step"]
    assert replaced == sorted(replaced)
    assert 2 <= replaced[-1] <= 3
    lines = (run / "bad_samples-rank00000.jsonl").read_text().splitlines()
    assert len(lines) == len(caplog.messages) == 1
    found = json.loads(lines[0])
    assert (found["rank"], found["key"], found["sample_id"]) == (0, key, int(index.sample_id[2]))
    assert "fail their checksum" in found["reason"]
    assert summary.replaced == replaced[-1]
    assert [(one.shard, one.num_samples) for one in summary.damage] == [(copy.files[0], 1)]
    assert summary.bad_sample_logs == (str(run / "bad_samples-rank00000.jsonl"),)


def _no_knn(run: Path) -> list[dict[str, Any]]:
    return [line for line in RunFolder(run).load_log("alarm") if line["alarm"] == "no-knn"]


def test_a_monitor_that_cannot_read_stops_no_run(shards: Catalog, tmp_path: Path) -> None:
    copy = Catalog.load(shutil.copytree(shards.root, tmp_path / "test"))
    for path in copy.root.glob("*.tar"):
        path.write_bytes(b"")
    config = small(knn_epochs=3, knn_train=str(shards.root), knn_test=str(copy.root))
    summary = pretrain(config, shards=shards.root, run_dir=tmp_path / "run")
    assert summary.finished
    assert summary.knn_top1 is None
    assert "no-knn" in summary.alarms
    (alarm,) = _no_knn(tmp_path / "run")
    assert "no kNN after epoch 3: cannot read sample" in alarm["text"]
    assert "traceback" not in alarm


def _failing(monkeypatch: pytest.MonkeyPatch, *errors: Exception | None) -> None:
    """Have each evaluation end so, after some images went through the encoder; None: as it does."""
    judge, left = KnnMonitor.judge, iter(errors)

    def failing(monitor: KnnMonitor, encode: Encode) -> dict[str, Any]:
        error = next(left)
        if error is None:
            return judge(monitor, encode)
        encode(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
        raise error

    monkeypatch.setattr(KnnMonitor, "judge", failing)


def test_a_monitor_that_fails_is_told_of_and_leaves_the_training_as_it_was(
    whole: tuple[Path, Summary, list[Any]],
    shards: Catalog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many_lines = "Error in CPU operator\n" * 99 + "encountered:\n" + "no memory\n" * 99
    full = OSError(errno.EIO, "Input/output error", "shard.tar")
    _failing(monkeypatch, RuntimeError(many_lines), full, None)
    summary = pretrain(small(knn_epochs=1), shards=shards.root, run_dir=tmp_path)
    assert summary.finished
    assert _losses(tmp_path) == _losses(whole[0])
    assert "no-knn" in summary.alarms
    (alarm,) = _no_knn(tmp_path)
    folder = RunFolder(tmp_path)
    assert alarm["text"].startswith("no kNN after epoch 1: RuntimeError: no memory no memory")
    assert len(alarm["text"]) < 500
    assert many_lines in alarm["traceback"]
    (note,) = folder.load_log("note")
    assert note["text"].startswith("no kNN after epoch 2: OSError: [Errno 5] Input/output error: 'shard.tar'")
    assert [line["epoch"] for line in folder.load_log("knn")] == [3]
    assert summary.knn_top1 == whole[1].knn_top1


@pytest.mark.parametrize("error", [TypeError("ours"), NotImplementedError("ours"), KeyError("ours")])
def test_a_defect_in_the_monitor_ends_the_run(
    error: Exception, shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing(monkeypatch, error)
    with pytest.raises(type(error), match="ours"):
        pretrain(small(knn_epochs=1), shards=shards.root, run_dir=tmp_path)


def _in(precision: Any, config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, speed=dataclasses.replace(config.speed, precision=precision))


def test_16_bits_learn_nearly_the_same(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From the usual 65,536 the scale is halved at first, and those steps are skipped.
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=256.0))
    short = dataclasses.replace(SMALL, schedule=Schedule(epochs=None, iterations=3))
    for precision in ("fp32", "bf16", "fp16"):
        pretrain(_in(precision, short), shards=shards.root, run_dir=tmp_path / precision)
    fp32, bf16, fp16 = (_losses(tmp_path / precision) for precision in ("fp32", "bf16", "fp16"))
    assert len({tuple(losses) for losses in (fp32, bf16, fp16)}) == 3
    assert bf16 == pytest.approx(fp32, rel=0.05)
    assert fp16 == pytest.approx(fp32, rel=0.01)


def test_fp16_says_what_it_costs_and_its_scale_continues_bit_for_bit(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A scale that must be halved, which skips steps, and grows again soon: it is part of the state.
    odd = {"init_scale": 2.0**40, "growth_interval": 3}
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, **odd))
    config = _in("fp16", dataclasses.replace(SMALL, schedule=Schedule(epochs=None, iterations=12)))
    for run, steps in (("whole", 12), ("cut", 7)):

        def stop(event: Mapping[str, Any], last: int = steps) -> None:
            if event["event"] == "step" and event["step"] == last < 12:
                os.kill(os.getpid(), signal.SIGUSR1)

        first = pretrain(config, shards=shards.root, run_dir=tmp_path / run, on_event=stop)
    assert (first.step, first.stopped_by) == (7, "SIGUSR1")
    notes = [line["text"] for line in RunFolder(tmp_path / "cut").load_log("note")]
    assert notes == ["fp16: the gradient scaler makes the host wait for the device each step; bf16 does not"]
    saved = load_checkpoint(Path(first.checkpoint)).scaler
    assert saved is not None
    assert saved["scale"] < 2.0**40
    odd["init_scale"] = 1.0
    second = pretrain(config, shards=shards.root, run_dir=tmp_path / "cut", resume=True)
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")
    assert load_checkpoint(Path(second.checkpoint)).scaler != saved


def test_milestones_come_at_their_epochs_and_stay(shards: Catalog, tmp_path: Path) -> None:
    config = small(checkpoint_steps=3, keep_checkpoints=1, milestone_epochs=1)
    pretrain(config, shards=shards.root, run_dir=tmp_path)
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == [f"step-{step:09}.pt" for step in (12, 9, 8, 4)]
    assert load_trained(tmp_path / "checkpoints" / names[-1]).step == 4


@pytest.mark.parametrize("comes", [True, False])
def test_a_signal_while_waiting_saves_at_once_and_leaves_though_no_batch_comes(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    """In a real run the process ends in leave(); here it lets the loader go on."""
    left: list[int] = []

    def starved(self: Loader[TwoViews], epoch: int, **kwargs: Any) -> Iterator[TwoViews]:
        for step, batch in enumerate(views(self, epoch, **kwargs)):
            if step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
                assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == [
                    "step-000000002.pt"
                ]
                if not comes:
                    end_s = time.monotonic() + 60
                    while not left and time.monotonic() < end_s:
                        time.sleep(0.01)
            yield batch

    views = Loader.epoch
    monkeypatch.setattr(Loader, "epoch", starved)
    monkeypatch.setattr(pretrain_module, "LEAVE_S", 60.0 if comes else 0.0)
    monkeypatch.setattr(stop_module.StopRequest.__init__, "__kwdefaults__", {"leave": left.append})
    summary = pretrain(small(checkpoint_steps=100), shards=shards.root, run_dir=tmp_path)
    assert (summary.step, summary.stopped_by, summary.finished) == (2, "SIGUSR1", False)
    assert left == ([] if comes else [0])


def test_a_signal_during_knn_ends_it(shards: Catalog, tmp_path: Path) -> None:
    def stop(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    summary = pretrain(small(knn_epochs=1), shards=shards.root, run_dir=tmp_path, on_event=stop)
    assert (summary.step, summary.knn_top1) == (4, None)
    assert "no-knn" not in summary.alarms
    notes = [line["text"] for line in RunFolder(tmp_path).load_log("note")]
    assert notes == ["no kNN after epoch 1: SIGTERM came"]
