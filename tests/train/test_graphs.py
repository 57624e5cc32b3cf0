"""The recording of a step's passes, by a twin that calls again what a GPU would replay.

Like a recording, the twin freezes whatever is no tensor in a buffer, and its results lie where the first lay.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small import SMALL
from tests.train.test_step import pixels
from torch import Tensor

from linerate.shards.catalog import Catalog
from linerate.train import learner as learner_module
from linerate.train.encoder import build_encoder
from linerate.train.graphs import WARM_UP_STEPS, RecordedPasses
from linerate.train.in_batch import InBatch
from linerate.train.key_queue import KeyQueue
from linerate.train.key_stream import KeyStream
from linerate.train.memory_bank import MemoryBank
from linerate.train.pretrain import pretrain
from linerate.train.run_folder import RunFolder
from linerate.train.shuffle_bn import Exchange, Route
from linerate.train.step import Gradients, MoCo, StepInputs, train_step
from linerate.train.switches import Switches, resolve_switches

STEPS = WARM_UP_STEPS + 4


class Twin:
    """Calls again instead of replaying."""

    def __init__(self) -> None:
        self.num_aside = self.num_recorded = self.num_replayed = 0

    def aside(self, run: Callable[[], Gradients]) -> Gradients:
        self.num_aside += 1
        return run()

    def record(self, run: Callable[[], Gradients]) -> Callable[[], Gradients]:
        self.num_recorded += 1
        first: list[Gradients] = []

        def replay() -> Gradients:
            self.num_replayed += 1
            found = run()
            if not first:
                first.append(found)
            for here, there in zip(results(first[0]), results(found), strict=True):
                if here is not there:
                    here.copy_(there.clone())
            return first[0]

        return replay


def results(found: Gradients) -> list[Tensor]:
    about = [found.metrics.loss, found.metrics.top1, found.metrics.top5, found.queries]
    keys = [lookup.keys for lookup in found.lookups if lookup.keys is not None]
    gradients = [gradient for gradient in found.of_params if gradient is not None]
    return [tensor.detach() for tensor in (*about, *keys, *gradients)]


def build(kind: str) -> tuple[MoCo, torch.optim.Optimizer]:
    torch.manual_seed(0)
    encoder = build_encoder("tiny-resnet-w4", dim=8, stem="cifar").double()
    dictionary = InBatch() if kind == "end-to-end" else KeyQueue(20, 8, dtype=torch.float64)
    moco = MoCo(encoder, dictionary, bn_group=4, symmetric=kind == "symmetric", ema_momentum=0.9)
    sgd = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=True)
    return moco, sgd


def run(
    moco: MoCo, sgd: torch.optim.Optimizer, steps: range, *, micro_batch: int | None = None, **how: Any
) -> list[float]:
    losses = []
    for step in steps:
        # What a schedule moves.
        sgd.param_groups[0]["lr"], moco.ema_momentum = 0.1 / (1 + step), 1 - 0.1 / (1 + step)
        views = pixels(8, seed=2 * step), pixels(8, seed=2 * step + 1)
        losses.append(float(train_step(moco, *views, sgd, step=step, micro_batch=micro_batch, **how).loss))
    return losses


@pytest.mark.parametrize(
    ("kind", "micro_batch"), [("queue", None), ("queue", 4), ("symmetric", None), ("end-to-end", None)]
)
def test_recorded_steps_are_the_eager_ones_to_the_bit(kind: str, micro_batch: int | None) -> None:
    (eager, eager_sgd), (moco, sgd) = build(kind), build(kind)
    twin = Twin()
    recorded = RecordedPasses(twin, moco.query_params)
    expected = run(eager, eager_sgd, range(STEPS), micro_batch=micro_batch)
    assert run(moco, sgd, range(STEPS), micro_batch=micro_batch, recorded=recorded) == expected
    for mine, other in zip(moco.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    assert (twin.num_aside, twin.num_recorded, twin.num_replayed) == (WARM_UP_STEPS, 1, 4)


def test_a_gradient_that_was_cleared_meanwhile_comes_back() -> None:
    """A replay writes into the recording's own tensors and knows of no other."""
    moco, sgd = build("queue")
    recorded = RecordedPasses(Twin(), moco.query_params)
    run(moco, sgd, range(STEPS), recorded=recorded)
    own = [param.grad for param in moco.query_params]
    sgd.zero_grad(set_to_none=True)
    run(moco, sgd, range(STEPS, STEPS + 1), recorded=recorded)
    assert all(param.grad is gradient for param, gradient in zip(moco.query_params, own, strict=True))


def test_a_recording_that_fails_is_given_up_and_the_steps_run_as_they_are() -> None:
    class Broken(Twin):
        def record(self, run: Callable[[], Gradients]) -> Callable[[], Gradients]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    (eager, eager_sgd), (moco, sgd) = build("queue"), build("queue")
    recorded = RecordedPasses(Broken(), moco.query_params)
    assert run(moco, sgd, range(STEPS), recorded=recorded) == run(eager, eager_sgd, range(STEPS))
    assert recorded.given_up == "the recording failed: operation not permitted when stream is capturing"


def test_a_run_whose_recording_fails_says_so_in_its_log_once_and_at_its_end(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Twin):
        def record(self, run: Callable[[], Gradients]) -> Callable[[], Gradients]:
            raise RuntimeError("no such luck")

    def with_graphs(*args: Any, **kwargs: Any) -> Switches:
        found = resolve_switches(*args, **kwargs)
        reasons = {name: why for name, why in found.reasons.items() if name != "cuda_graphs"}
        return dataclasses.replace(found, cuda_graphs=True, reasons=reasons)

    monkeypatch.setattr(learner_module, "resolve_switches", with_graphs)
    monkeypatch.setattr(learner_module, "CudaRecorder", Broken)
    summary = pretrain(SMALL, shards=shards.root, run_dir=tmp_path)
    told = "cuda_graphs off: the recording failed: no such luck"
    folder = RunFolder(tmp_path)
    assert folder.load_log("start")[0]["switches"]["cuda_graphs"] == "on"
    assert [(line["step"], line["text"]) for line in folder.load_log("note")] == [(WARM_UP_STEPS + 1, told)]
    assert folder.load_log("end")[0]["switches"]["cuda_graphs"] == told.removeprefix("cuda_graphs ")
    assert summary.given_up == (told,)


def test_want_of_memory_while_recording_is_passed_on() -> None:
    class Full(Twin):
        def record(self, run: Callable[[], Gradients]) -> Callable[[], Gradients]:
            raise torch.OutOfMemoryError("2 GiB")

    moco, sgd = build("queue")
    with pytest.raises(torch.OutOfMemoryError):
        run(moco, sgd, range(STEPS), recorded=RecordedPasses(Full(), moco.query_params))


def test_another_batch_than_the_recorded_one_is_refused() -> None:
    moco, sgd = build("queue")
    recorded = RecordedPasses(Twin(), moco.query_params)
    run(moco, sgd, range(STEPS), recorded=recorded)
    with pytest.raises(ValueError, match=r"\(16, 3, 8, 8\) where \(8, 3, 8, 8\) was recorded"):
        train_step(moco, pixels(16), pixels(16), sgd, step=0, recorded=recorded)


def test_what_the_host_draws_or_sends_each_step_is_not_recorded() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("tiny-resnet-w4", dim=8, stem="cifar")
    moco = MoCo(encoder, MemoryBank(16, 4, 8), bn_group=4)
    sgd = torch.optim.SGD(encoder.parameters(), lr=0.1)
    recorded = RecordedPasses(Twin(), moco.query_params)
    recorded._num_warm = WARM_UP_STEPS
    views, position = (pixels(8), pixels(8)), torch.arange(8)
    with pytest.raises(ValueError, match="looks up positions"):
        train_step(moco, *views, sgd, step=0, position=position, recorded=recorded)
    place = torch.arange(8)
    across = Route(rows=place, place_of=place, exchange=Exchange(send=[8], receive=[8], place=place))
    inputs = StepInputs(step=0, query_images=pixels(8), key_images=pixels(8), routes=[across], position=None)
    recorded = RecordedPasses(Twin(), moco.query_params)
    recorded._num_warm = WARM_UP_STEPS
    with pytest.raises(ValueError, match="change their rank"):
        recorded(lambda _: pytest.fail("must not run"), inputs)


class FakeStream:
    """Notes who waits for whom."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def wait_stream(self, other: "FakeStream") -> None:
        self.notes.append(f"{self.name} waits for {other.name}")


def test_the_key_forward_waits_for_what_was_before_and_the_loss_for_the_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes: list[str] = []
    main, side = (FakeStream(name, notes) for name in ("main", "side"))

    @contextlib.contextmanager
    def entered(stream: FakeStream) -> Iterator[None]:
        notes.append(f"on {stream.name}")
        yield
        notes.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(Tensor, "record_stream", lambda _, stream: notes.append(f"kept for {stream.name}"))
    moco, sgd = build("queue")
    moco.key_stream = KeyStream(side)  # type: ignore[arg-type]
    for name in ("query_forward", "key_forward"):
        forward = getattr(moco, name)
        setattr(moco, name, lambda x, n=name, f=forward: (notes.append(n), f(x))[1])
    moco.compare = lambda *about, compare=moco.compare: (notes.append("loss"), compare(*about))[1]  # type: ignore[misc,assignment]
    (loss,) = run(moco, sgd, range(1))
    assert notes == [
        "side waits for main",
        "on side",
        "key_forward",
        "off side",
        "query_forward",
        "main waits for side",
        "kept for main",
        "loss",
    ]
    plain, plain_sgd = build("queue")
    assert run(plain, plain_sgd, range(1)) == [loss]
