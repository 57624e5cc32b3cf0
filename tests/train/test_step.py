import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from linerate.shards.errors import UserError
from linerate.train.encoder import build_encoder
from linerate.train.key_queue import KeyQueue
from linerate.train.step import MoCo, train_step


def pixels(num: int = 8, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (num, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return image.permute(0, 3, 1, 2)


def build(*, dim: int = 8, bn_group: int | None = 4, seed: int = 0) -> tuple[MoCo, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    encoder = build_encoder("tiny-resnet-w4", dim=dim, stem="cifar")
    moco = MoCo(encoder, KeyQueue(20, dim), bn_group=bn_group, ema_momentum=0.9)
    sgd = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=True)
    return moco, sgd


def test_key_encoder_starts_as_a_copy_and_never_gets_a_gradient() -> None:
    moco, sgd = build()
    pairs = list(zip(moco.key_encoder.parameters(), moco.query_encoder.parameters(), strict=True))
    assert all(torch.equal(key, query) and key is not query for key, query in pairs)
    train_step(moco, pixels(), pixels(seed=1), sgd, step=0)
    assert all(not key.requires_grad and key.grad is None for key, _ in pairs)
    assert all(query.grad is not None for _, query in pairs)


def test_metrics_are_detached_scalars() -> None:
    moco, sgd = build()
    metrics = train_step(moco, pixels(), pixels(seed=1), sgd, step=0)
    for value in (metrics.loss, metrics.top1, metrics.top5):
        assert value.shape == ()
        assert not value.requires_grad
    assert 0 <= metrics.top1 <= metrics.top5 <= 1


def test_a_step_reads_the_device_at_no_time() -> None:
    """Fake tensors hold no values: whatever asked for one, as .item() or a branch, would raise."""
    moco, sgd = build()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Names():
        views = mode.from_tensor(pixels()), mode.from_tensor(pixels(seed=1))
        metrics = train_step(moco, *views, sgd, step=0)
    assert metrics.loss.shape == ()
    assert names.count("linerate::infonce") == 1
    assert names.count("aten::lerp_.Scalar") == 1
    assert not [name for name in names if "_local_scalar_dense" in name or "nonzero" in name]


def test_both_encoders_get_the_autocast() -> None:
    moco, sgd = build()
    seen: list[torch.dtype] = []
    for encoder in (moco.query_encoder, moco.key_encoder):
        encoder.backbone.conv1.register_forward_hook(  # type: ignore[union-attr]
            lambda _module, _inputs, output: seen.append(output.dtype)
        )

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    metrics = train_step(moco, pixels(), pixels(seed=1), sgd, step=0, autocast=autocast)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert metrics.loss.dtype == moco.dictionary.keys.dtype == torch.float32
    assert {p.dtype for p in moco.key_encoder.parameters()} == {torch.float32}


def test_backward_and_the_wrapped_encoder_are_the_caller_s() -> None:
    moco, sgd = build()
    calls: list[str] = []
    forward = moco.query_encoder.forward

    def wrapped(images: Tensor) -> Tensor:
        calls.append("forward")
        return forward(images)  # type: ignore[no-any-return]

    def backward(loss: Tensor) -> None:
        calls.append("backward")
        loss.backward()  # type: ignore[no-untyped-call]

    moco.query_forward = wrapped
    train_step(moco, pixels(), pixels(seed=1), sgd, step=0, backward=backward)
    assert calls == ["forward", "backward"]


def test_keys_enter_the_dictionary_after_the_loss() -> None:
    moco, sgd = build()
    negatives: list[Tensor] = []

    @contextlib.contextmanager
    def autocast() -> Iterator[None]:
        negatives.append(moco.dictionary.keys.clone())
        yield

    before = moco.dictionary.keys.clone()
    train_step(moco, pixels(), pixels(), sgd, step=0, autocast=autocast)
    assert all(torch.equal(seen, before) for seen in negatives)
    assert int(moco.dictionary.pointer) == 8
    assert not torch.equal(moco.dictionary.keys[:8], before[:8])
    assert torch.equal(moco.dictionary.keys[8:], before[8:])


def test_state_goes_on_bit_for_bit() -> None:
    (moco, sgd), (other, other_sgd) = build(), build(seed=9)
    train_step(moco, pixels(), pixels(seed=1), sgd, step=0)
    other.load_state_dict({name: value.clone() for name, value in moco.state_dict().items()})
    other_sgd.load_state_dict(copy.deepcopy(sgd.state_dict()))
    losses = [
        train_step(each, pixels(seed=2), pixels(seed=3), optimizer, step=1).loss
        for each, optimizer in ((moco, sgd), (other, other_sgd))
    ]
    assert torch.equal(*losses)
    for mine, theirs in zip(moco.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing() -> None:
    moco, _ = build()
    before = {name: value.clone() for name, value in moco.state_dict().items()}
    with pytest.raises(UserError, match=r"head.weight is \(16, 32\) there and \(8, 32\) here"):
        moco.load_state_dict(build(dim=16, seed=1)[0].state_dict())
    cut = {name: value for name, value in before.items() if "queue" not in name and "keys" not in name}
    with pytest.raises(UserError, match=r"dictionary.keys is absent there"):
        moco.load_state_dict(cut)
    assert all(torch.equal(value, before[name]) for name, value in moco.state_dict().items())


@pytest.mark.parametrize(("bn_group", "micro_batch"), [(4, 3), (4, 2), (None, 4)])
def test_micro_batches_that_would_change_the_result_are_refused(
    bn_group: int | None, micro_batch: int
) -> None:
    moco, sgd = build(bn_group=bn_group)
    with pytest.raises(UserError, match=f"micro_batch={micro_batch} must divide the 8 images"):
        train_step(moco, pixels(), pixels(), sgd, step=0, micro_batch=micro_batch)


def test_micro_batches_count_as_one_batch_in_the_running_statistics() -> None:
    (whole, whole_sgd), (parts, parts_sgd) = build(), build()
    for step in range(2):
        views = pixels(16, seed=2 * step), pixels(16, seed=2 * step + 1)
        one = train_step(whole, *views, whole_sgd, step=step)
        two = train_step(parts, *views, parts_sgd, step=step, micro_batch=8)
        torch.testing.assert_close(one.loss, two.loss)
        torch.testing.assert_close((one.top1, one.top5), (two.top1, two.top5))
    for mine, theirs in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_moving_keeps_the_parameters_that_the_optimizer_holds() -> None:
    moco, _ = build()
    before = list(moco.query_encoder.parameters())
    moco.to("cpu", channels_last=True)
    assert all(a is b for a, b in zip(before, moco.query_encoder.parameters(), strict=True))
    weight = next(p for p in moco.key_encoder.parameters() if p.ndim == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)
