import contextlib
import copy
import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.classifier_ranks import run_both
from tests.train.rank_server import RankServer
from tests.train.small import SMALL
from tests.train.test_knn import RANKS_CASES, blobs
from torch import nn
from torch.nn.functional import cross_entropy

from linerate.pipeline.loader import open_training_images
from linerate.pipeline.recipe import crop_and_flip
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.checkpoint import TrainedEncoder
from linerate.train.evaluate import classify as classify_module
from linerate.train.evaluate.classifier import FrozenBackbone, hits, new_fc
from linerate.train.evaluate.classifier_folder import ClassifierFolder
from linerate.train.evaluate.classifier_recipes import ClassifierConfig, finetune_in1m, linear_v1
from linerate.train.evaluate.classifier_run import (
    ClassifierOutcome,
    RunOptions,
    _check_ranks,
    epoch_line,
    run_classifiers,
)
from linerate.train.evaluate.controls import calibrate_bn, untrained_encoder
from linerate.train.evaluate.features import open_evaluation
from linerate.train.evaluate.knn import knn_accuracy
from linerate.train.evaluate.labelled import LabelledSplit, open_labelled_split
from linerate.train.stop import StopRequest

LINEAR = dataclasses.replace(
    linear_v1(), size=16, backend="torch", global_batch=16, lr=1.0, epochs=2, milestones=(1,)
)
FINETUNE = dataclasses.replace(
    finetune_in1m(),
    **{"size": 16, "backend": "torch", "global_batch": 16, "lr": 0.05, "epochs": 2, "milestones": (1,)},
    bn_group=4,
)


@pytest.fixture(scope="module")
def labelled(shards: Catalog, test_shards: Catalog) -> LabelledSplit:
    return open_labelled_split(shards, test_shards)


@pytest.fixture(scope="module")
def trained(labelled: LabelledSplit) -> TrainedEncoder:
    return calibrated(labelled)


def calibrated(labelled: LabelledSplit) -> TrainedEncoder:
    """An encoder whose BN statistics are those of the images."""
    encoder = untrained_encoder(SMALL)
    images = open_evaluation(labelled.split.train, size=16, num_threads=1, backend="torch")
    calibrate_bn(encoder, (part.images for part in images))
    path = Path("run/checkpoints/step-000000012.pt")
    return TrainedEncoder(encoder=encoder, config=SMALL, step=12, images=192, path=path)


def _run(
    config: ClassifierConfig, trained: TrainedEncoder, labelled: LabelledSplit, out: Path, **options: Any
) -> ClassifierOutcome:
    # A copy: the frozen one is moved to the device's memory layout.
    own = dataclasses.replace(trained, encoder=copy.deepcopy(trained.encoder))
    return run_classifiers(config, own, labelled, RunOptions(out=out, num_threads=1, **options))


def _state(out: Path, name: str = "trained", seed: int = 0) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / name / f"seed-{seed}" / "state.pt", weights_only=True)
    return state


def _history(out: Path) -> list[dict[str, Any]]:
    lines = (out / "trained" / "seed-0" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_linear_probe_is_what_a_plain_loop_computes(
    trained: TrainedEncoder, labelled: LabelledSplit, shards: Catalog, tmp_path: Path
) -> None:
    _run(LINEAR, trained, labelled, tmp_path)
    encoder = copy.deepcopy(trained.encoder).eval()
    fc = new_fc(encoder.num_features, 3, seed=0)
    sgd = torch.optim.SGD(fc.parameters(), lr=1.0, momentum=0.9, weight_decay=0.0)
    losses = []
    for epoch in (0, 1):
        loader = open_training_images(
            shards,
            recipe=crop_and_flip(size=16),
            positions=labelled.split.train.positions,
            backend="torch",
            seed=0,
            global_batch=16,
            num_threads=1,
        )
        for batch in loader.epoch(epoch):
            sgd.param_groups[0]["lr"] = (1.0, 0.1)[epoch]
            with torch.no_grad():
                features = encoder.features(batch.images)
            loss = cross_entropy(fc(features), batch.label)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        loader.close()
    right = num = 0
    for part in open_evaluation(labelled.split.test, size=16, num_threads=1, backend="torch"):
        right += int((fc(encoder.features(part.images)).argmax(dim=1) == part.label).sum())
        num += len(part.label)
    history = _history(tmp_path)
    assert [line["loss"] for line in history] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4])
    assert [line["lr"] for line in history] == [1.0, pytest.approx(0.1)]
    assert history[-1]["top1"] == right / num
    torch.testing.assert_close(_state(tmp_path)["module"]["weight"], fc.weight.data, rtol=0, atol=1e-5)


def test_the_fast_variant_is_a_plain_loop_over_centre_crops_in_the_same_order(
    trained: TrainedEncoder, labelled: LabelledSplit, tmp_path: Path
) -> None:
    config = dataclasses.replace(LINEAR, features="centre-crop", epochs=1)
    _run(config, trained, labelled, tmp_path)
    encoder = copy.deepcopy(trained.encoder).eval()
    part = next(iter(open_evaluation(labelled.split.train, size=16, num_threads=1, backend="torch")))
    with torch.no_grad():
        features = encoder.features(part.images)
    loader = open_training_images(
        labelled.split.train.catalog,
        recipe=crop_and_flip(size=16),
        positions=labelled.split.train.positions,
        backend="torch",
        seed=0,
        global_batch=16,
        num_threads=1,
    )
    fc = new_fc(encoder.num_features, 3, seed=0)
    sgd = torch.optim.SGD(fc.parameters(), lr=1.0, momentum=0.9)
    for batch in loader.epoch(0):
        sgd.zero_grad()
        cross_entropy(fc(features[batch.position]), batch.label).backward()
        sgd.step()
    loader.close()
    torch.testing.assert_close(_state(tmp_path)["module"]["weight"], fc.weight.data, rtol=0, atol=1e-5)


def test_new_classifiers_are_the_references_and_differ_by_seed_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (new_fc(400, 50, seed=seed) for seed in (1, 1, 2))
    torch.set_rng_state(state)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert not one.bias.any()
    assert float(one.weight.detach().std()) == pytest.approx(0.01, rel=0.03)


def test_hits_count_the_first_and_the_first_five() -> None:
    logits = torch.arange(8.0).repeat(3, 1)
    assert hits(logits, torch.tensor([7, 3, 2])).tolist() == [1, 2]
    assert hits(logits[:, :3], torch.tensor([2, 0, 1])).tolist() == [1, 3]


def test_a_backbone_that_changes_is_caught_after_the_first_epoch(
    trained: TrainedEncoder, labelled: LabelledSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = FrozenBackbone(copy.deepcopy(trained.encoder), device="cpu", precision="fp32")
    frozen(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    frozen.require_unchanged()

    def forward_in_training_mode(self: FrozenBackbone, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._encoder.train().features(images)

    monkeypatch.setattr(FrozenBackbone, "__call__", forward_in_training_mode)
    with pytest.raises(RuntimeError, match=r"running_mean of the frozen backbone is not the checkpoint's"):
        _run(LINEAR, trained, labelled, tmp_path)


@pytest.mark.parametrize("config", [LINEAR, FINETUNE], ids=["linear", "finetune"])
def test_a_killed_training_goes_on_bit_by_bit(
    config: ClassifierConfig,
    trained: TrainedEncoder,
    labelled: LabelledSplit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _run(config, trained, labelled, tmp_path / "whole")
    step = classify_module.ClassifierTraining._step

    def killed(self: Any, *batch: Any) -> None:
        if self.step == 7:
            raise KeyboardInterrupt
        step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(classify_module.ClassifierTraining, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            _run(config, trained, labelled, tmp_path / "cut", checkpoint_steps=3)
    assert _state(tmp_path / "cut")["step"] == 6
    _run(config, trained, labelled, tmp_path / "cut", checkpoint_steps=5)
    whole, cut = (_state(tmp_path / name) for name in ("whole", "cut"))
    assert cut["step"] == 8
    for name, tensor in whole["module"].items():
        assert torch.equal(tensor, cut["module"][name]), name
    assert _history(tmp_path / "whole") == _history(tmp_path / "cut")


def test_a_signal_ends_it_between_steps_and_a_finished_part_is_not_done_again(
    trained: TrainedEncoder, labelled: LabelledSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopAtThree(StopRequest):
        asked = 0

        def __bool__(self) -> bool:
            self.asked += 1
            self.signal = signal.SIGTERM if self.asked >= 3 else None
            return self.signal is not None

    @contextlib.contextmanager
    def stop_at_three() -> Iterator[StopRequest]:
        yield StopAtThree()

    with monkeypatch.context() as patch:
        patch.setattr("linerate.train.evaluate.classifier_run.stop_on_signals", stop_at_three)
        outcome = _run(LINEAR, trained, labelled, tmp_path)
    assert (outcome.stopped_by, outcome.results) == (signal.SIGTERM, [])
    assert _state(tmp_path)["step"] == 3
    said: list[str] = []
    own = dataclasses.replace(trained, encoder=copy.deepcopy(trained.encoder))
    options = RunOptions(out=tmp_path, num_threads=1)
    outcome = run_classifiers(LINEAR, own, labelled, options, say=said.append)
    assert said[:2] == [f"cpu, 1 rank, fp32; in {tmp_path}", "trained, seed 0: continuing after step 3 of 8"]
    assert outcome.results[0]["finished"]
    written = (tmp_path / "trained" / "seed-0" / "state.pt").stat().st_mtime_ns
    again = _run(LINEAR, trained, labelled, tmp_path)
    assert again.results == outcome.results
    assert (tmp_path / "trained" / "seed-0" / "state.pt").stat().st_mtime_ns == written


def test_a_folder_of_another_evaluation_is_refused(
    trained: TrainedEncoder, labelled: LabelledSplit, tmp_path: Path
) -> None:
    config = dataclasses.replace(LINEAR, epochs=1)
    _run(config, trained, labelled, tmp_path)
    other = dataclasses.replace(config, lr=2.0)
    with pytest.raises(UserError, match=r"holds another evaluation: config\.lr=2\.0 \(there 1\.0\)"):
        _run(other, trained, labelled, tmp_path)
    encoder = copy.deepcopy(trained.encoder)
    with torch.no_grad():
        next(encoder.backbone.parameters()).add_(1.0)
    with pytest.raises(UserError, match=r"holds another evaluation: encoder\.weights_xxh3="):
        _run(config, dataclasses.replace(trained, encoder=encoder), labelled, tmp_path)


def test_what_is_no_whole_state_is_told_in_one_line(tmp_path: Path) -> None:
    folder = ClassifierFolder(tmp_path / "seed-0")
    assert folder.load({"a": 1}) is None
    folder.start({"a": 1})
    folder.state.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"state\.pt is damaged .* remove it to begin anew"):
        folder.load({"a": 1})
    torch.save({"format_version": 99}, folder.state)
    with pytest.raises(UserError, match="has format 99, this linerate reads 1"):
        folder.load({"a": 1})
    (folder.root / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        folder.load({"a": 1})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").touch()
    with pytest.raises(UserError, match="holds something that is no evaluation"):
        ClassifierFolder(tmp_path / "other").load({})
    (tmp_path / "taken" / "config.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"config\.json cannot be written"):
        ClassifierFolder(tmp_path / "taken").start({})


def test_a_diverged_training_says_so(
    trained: TrainedEncoder, labelled: LabelledSplit, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf) in epoch 1 .* it diverged"):
        _run(dataclasses.replace(FINETUNE, lr=1e30), trained, labelled, tmp_path)


def test_fine_tuning_changes_the_backbone_and_learns(
    trained: TrainedEncoder, labelled: LabelledSplit, tmp_path: Path
) -> None:
    _run(dataclasses.replace(FINETUNE, epochs=3), trained, labelled, tmp_path)
    module = _state(tmp_path)["module"]
    assert not [name for name in module if "head" in name]
    before = trained.encoder.backbone.state_dict()
    for name, tensor in before.items():
        if name.endswith(("weight", "running_mean")):
            assert not torch.equal(tensor, module[f"encoder.backbone.{name}"]), name
    losses = [line["loss"] for line in _history(tmp_path)]
    assert losses[-1] < losses[0]


def test_a_fine_tuning_is_what_a_plain_loop_computes(
    trained: TrainedEncoder, labelled: LabelledSplit, shards: Catalog, tmp_path: Path
) -> None:
    """With one BN group a batch; to 1e-4, since ours sums in the channels_last order."""
    config = dataclasses.replace(FINETUNE, epochs=1, bn_group=16)
    _run(config, trained, labelled, tmp_path)
    encoder = copy.deepcopy(trained.encoder).train()
    fc = new_fc(encoder.num_features, 3, seed=0)
    parameters = [*encoder.backbone.parameters(), *fc.parameters()]
    sgd = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)
    loader = open_training_images(
        shards,
        recipe=crop_and_flip(size=16),
        positions=labelled.split.train.positions,
        backend="torch",
        seed=0,
        global_batch=16,
        num_threads=1,
    )
    losses = []
    for batch in loader.epoch(0):
        loss = cross_entropy(fc(encoder.features(batch.images)), batch.label)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    loader.close()
    assert _history(tmp_path)[0]["loss"] == pytest.approx(sum(losses) / 4, abs=1e-4)
    weight = _state(tmp_path)["module"]["encoder.backbone.conv1.weight"]
    torch.testing.assert_close(weight, encoder.backbone.conv1.weight.detach(), rtol=0, atol=1e-4)


def test_a_signal_while_features_are_extracted_ends_it_at_once(
    trained: TrainedEncoder, labelled: LabelledSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    stop.signal = signal.SIGINT

    @contextlib.contextmanager
    def stopped() -> Iterator[StopRequest]:
        yield stop

    monkeypatch.setattr("linerate.train.evaluate.classifier_run.stop_on_signals", stopped)
    with pytest.raises(KeyboardInterrupt):
        _run(dataclasses.replace(LINEAR, features="centre-crop"), trained, labelled, tmp_path)
    assert not [*tmp_path.rglob("state.pt")]


def test_a_probe_ranks_a_trained_encoder_above_an_untrained_one(
    trained: TrainedEncoder, labelled: LabelledSplit, tmp_path: Path
) -> None:
    """Trained on the classes by fine-tuning; probed with a few steps of a low learning rate."""
    _run(dataclasses.replace(FINETUNE, epochs=6, milestones=(5,)), trained, labelled, tmp_path / "tuned")
    weights = _state(tmp_path / "tuned")["module"]
    prefix = "encoder.backbone."
    encoder = copy.deepcopy(trained.encoder)
    backbone = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    encoder.backbone.load_state_dict(backbone)
    better = dataclasses.replace(trained, encoder=encoder)
    config = dataclasses.replace(LINEAR, lr=0.1, epochs=1)
    outcome = _run(config, better, labelled, tmp_path / "probe", controls=True, num_runs=2)
    names = [row["name"] for row in outcome.results]
    assert names == ["trained", "untrained"]
    top1 = [row["top1_mean"] for row in outcome.results]
    assert top1[0] > top1[1] + 0.1
    assert [run["seed"] for run in outcome.results[0]["runs"]] == [0, 1]
    assert outcome.results[0]["top1_std"] is not None


def test_two_ranks_give_the_curves_of_one(
    shards: Catalog, test_shards: Catalog, ranks: RankServer, tmp_path: Path
) -> None:
    """Losses to 1e-4 and weights to 1e-3: sums are taken in another order, and BN groups of 4 amplify it."""
    run_both(shards, test_shards, tmp_path / "one")
    words = (shards.root, test_shards.root, tmp_path / "two")
    ranks.run("tests.train.classifier_ranks", *words, world_size=2, out=tmp_path).require_success()
    for protocol in ("linear", "finetune"):
        one, two = (tmp_path / name / protocol for name in ("one", "two"))
        for line, other in zip(_history(one), _history(two), strict=True):
            assert other["loss"] == pytest.approx(line["loss"], abs=1e-4)
            assert other["num_test"] == line["num_test"] == 30
            assert other["train_top1"] == pytest.approx(line["train_top1"], abs=0.02)
        for name, tensor in _state(one)["module"].items():
            torch.testing.assert_close(_state(two)["module"][name], tensor, rtol=0, atol=1e-3)
    (train, labels), (test, wanted) = blobs(41, seed=1), blobs(13, seed=2)
    alone = [
        knn_accuracy(train, labels, test, wanted, k=k, temperature=t, num_classes=5) for k, t in RANKS_CASES
    ]
    assert 0.3 < min(alone) < 1
    for rank in range(2):
        assert json.loads((tmp_path / f"two/knn-{rank}.json").read_text()) == pytest.approx(alone)


def test_what_cannot_work_is_refused_before_an_image_is_read(
    trained: TrainedEncoder, labelled: LabelledSplit, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="bn_group=32 does not divide the 16 images of a rank"):
        _run(dataclasses.replace(FINETUNE, bn_group=32), trained, labelled, tmp_path)
    with pytest.raises(UserError, match="72 images do not fill one global_batch=80"):
        _run(dataclasses.replace(LINEAR, global_batch=80), trained, labelled, tmp_path)
    with pytest.raises(UserError, match="--fast works in one process, not in 2 ranks"):
        _check_ranks(dataclasses.replace(LINEAR, features="centre-crop"), 2)
    assert not [*tmp_path.iterdir()]


def test_a_line_of_an_epoch_names_what_was_replaced() -> None:
    line = {"epoch": 2, "lr": 30.0, "loss": 1.5, "train_top1": 0.5, "top1": 0.25, "top5": 0.75}
    shown = epoch_line(line, epochs=9)
    assert shown == "epoch 2/9 lr 30 loss 1.500 train 50.0% | test top-1 25.0% top-5 75.0%"
    del line["top1"]
    assert epoch_line(line | {"replaced": 3}, epochs=9).endswith("train 50.0% replaced 3")


def test_the_module_of_a_probe_is_the_classifier_alone(
    trained: TrainedEncoder, labelled: LabelledSplit, tmp_path: Path
) -> None:
    _run(dataclasses.replace(LINEAR, epochs=1), trained, labelled, tmp_path)
    assert sorted(_state(tmp_path)["module"]) == sorted(nn.Linear(1, 1).state_dict())
