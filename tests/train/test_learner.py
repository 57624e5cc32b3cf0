import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from linerate.pipeline.two_views import TwoViews
from linerate.train import kernels
from linerate.train.checkpoint import TrainedOn
from linerate.train.config import Dictionary, Loss, TrainConfig
from linerate.train.launch import open_accelerator
from linerate.train.learner import Learner, build_moco

TRAINED_ON = TrainedOn(plan_id="plan", num_samples=64, folder="shards")


class CountReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a value of the device."""

    num_reads = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.num_reads += func.__name__.startswith(("_local_scalar_dense", "nonzero", "is_nonzero"))  # type: ignore[attr-defined]
        return func(*args, **(kwargs or {}))


def _batch(seed: int) -> TwoViews:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8, generator=generator) for _ in "qk")
    place = torch.arange(16)
    return TwoViews(query=query, key=key, sample_id=place, position=place, label=place)


def _variant(*, symmetric: bool = False, micro_batch: int | None = None, **dictionary: Any) -> TrainConfig:
    return dataclasses.replace(
        SMALL,
        loss=Loss(temperature=0.2, symmetric=symmetric),
        dictionary=Dictionary(num_keys=40, **dictionary),
        speed=dataclasses.replace(SMALL.speed, micro_batch=micro_batch),
    )


VARIANTS = {
    "queue": SMALL,
    "bf16-queue": _variant(queue_dtype="bf16"),
    "symmetric": _variant(symmetric=True, micro_batch=8),
    "end-to-end": _variant(dictionary="end-to-end"),
    "memory-bank": _variant(dictionary="memory-bank", micro_batch=4),
    "nce": _variant(dictionary="memory-bank", bank_loss="nce"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_never_read_the_device_and_the_log_reads_it_once(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    with open_accelerator(config, run_dir=tmp_path) as accelerator:
        learner = Learner(config, accelerator, num_samples=20)
        learner.step(_batch(0), step=0, lr=0.1)
        with CountReads() as steps:
            for step in (1, 2):
                learner.step(_batch(step), step=step, lr=0.1)
        assert steps.num_reads == 0
        with CountReads() as control:
            torch.ones(1).item()
        assert control.num_reads == 1


def test_metrics_are_the_means_since_the_last_reading(tmp_path: Path) -> None:
    with open_accelerator(SMALL, run_dir=tmp_path) as accelerator:
        each, both = Learner(SMALL, accelerator), Learner(SMALL, accelerator)
        losses = []
        for step in (0, 1):
            each.step(_batch(step), step=step, lr=0.1)
            losses.append(each.read_metrics()["loss"])
            both.step(_batch(step), step=step, lr=0.1)
        assert both.read_metrics()["loss"] == pytest.approx(sum(losses) / 2)
        assert losses[0] != losses[1]


def test_the_log_tells_the_queue_s_fill_and_age(tmp_path: Path) -> None:
    with open_accelerator(SMALL, run_dir=tmp_path) as accelerator:
        learner = Learner(SMALL, accelerator)
        found = []
        for step in range(3):
            learner.step(_batch(step), step=step, lr=0.1)
            means = learner.read_metrics()
            found.append((means["queue_fill"], means["queue_age_steps"]))
        assert found == [(pytest.approx(0.4), 0), (pytest.approx(0.8), 1), (1, 2)]


def test_a_symmetric_step_enqueues_both_views(tmp_path: Path) -> None:
    config = VARIANTS["symmetric"]
    with open_accelerator(config, run_dir=tmp_path) as accelerator:
        learner = Learner(config, accelerator)
        learner.step(_batch(0), step=0, lr=0.1)
        means = learner.read_metrics()
        assert (means["queue_fill"], means["queue_age_steps"]) == (pytest.approx(0.8), 0)


def test_a_memory_bank_needs_the_number_of_samples() -> None:
    with pytest.raises(ValueError, match="say how many there are"):
        build_moco(VARIANTS["memory-bank"])


def test_the_queue_s_dtype_is_the_config_s() -> None:
    for name, dtype in (("queue", torch.float32), ("bf16-queue", torch.bfloat16)):
        assert build_moco(VARIANTS[name]).state_dict()["dictionary.keys"].dtype == dtype


@pytest.mark.parametrize("name", VARIANTS)
def test_a_restored_learner_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    with open_accelerator(config, run_dir=tmp_path) as accelerator:
        first = Learner(config, accelerator, num_samples=20)
        first.step(_batch(0), step=0, lr=0.1)
        path = tmp_path / "state.pt"
        torch.save(
            first.checkpoint(step=1, epoch=0, trained_on=TRAINED_ON).__dict__
            | {"config": None, "trained_on": None},
            path,
        )
        state = torch.load(path, weights_only=True)
        second = Learner(config, accelerator, num_samples=20)
        second.restore(type(first.checkpoint(step=1, epoch=0, trained_on=TRAINED_ON))(**state))
        for learner in (first, second):
            learner.step(_batch(1), step=1, lr=0.1)
        ours, theirs = first.moco.state_dict(), second.moco.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_encoding_is_in_eval_mode_and_training_goes_on_after(tmp_path: Path) -> None:
    with open_accelerator(SMALL, run_dir=tmp_path) as accelerator:
        learner = Learner(SMALL, accelerator)
        images = _batch(0).query
        for features, dim in (("backbone", learner.moco.query_encoder.num_features), ("projection", 8)):
            with learner.encoding(features) as encode, torch.no_grad():  # type: ignore[arg-type]
                together, alone = encode(images), encode(images[:1])
            assert together.shape == (16, dim)
            assert torch.allclose(together[:1], alone, atol=1e-5)
        assert learner.moco.query_encoder.training


def test_kernels_that_failed_are_told_as_off_where_they_were_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "given_up", {"infonce": "RuntimeError: no compiler"})
    with open_accelerator(SMALL, run_dir=tmp_path) as accelerator:
        learner = Learner(SMALL, accelerator)
    assert learner.given_up() == {}
    assert learner.switch_words()["kernels"] == "off: no CUDA device"
    learner.switches = dataclasses.replace(learner.switches, kernels=True, fused_update=True, reasons={})
    failed = "the kernel infonce failed: RuntimeError: no compiler"
    assert learner.given_up() == {"kernels": failed}
    assert learner.switch_words()["kernels"] == f"off: {failed}"
    assert learner.switch_words()["fused_update"] == "on"
