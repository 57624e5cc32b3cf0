import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linerate.shards.errors import UserError
from linerate.train import kernels
from linerate.train.config import Optim, Schedule
from linerate.train.kernels import Unsuited, on_kernels
from linerate.train.key_queue import KeyQueue
from linerate.train.optimizers import FusedSgd, Lars, build_optimizer
from linerate.train.step import MoCo


def small_moco(device: str = "cpu") -> MoCo:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
    encoder(torch.zeros(2, 3, 6, 6))
    return MoCo(encoder, KeyQueue(8, 5)).to(device)


def give_gradients(params: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device)


def lars_plain(
    weight: Tensor, gradient: Tensor, velocity: Tensor, *, lr: float, decay: float, trust: float
) -> None:
    """One tensor's update as the paper writes it; momentum 0.9."""
    if weight.ndim > 1:
        gradient = gradient + decay * weight
        if weight.norm() > 0 and gradient.norm() > 0:
            gradient = gradient * (trust * weight.norm() / gradient.norm())
    velocity.copy_(0.9 * velocity + gradient)
    weight.sub_(lr * velocity)


def test_lars_equals_the_plain_rule_with_zero_weights_and_zero_gradients() -> None:
    torch.manual_seed(0)
    params = [
        torch.randn(4, 3),
        torch.randn(5),
        torch.zeros(2, 2),
        torch.randn(2, 3, 2, 2),
        torch.randn(3, 3),
    ]
    plain, velocities = copy.deepcopy(params), [torch.zeros_like(p) for p in params]
    lars = Lars(params, lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.02)
    for seed in range(4):
        give_gradients(params, seed)
        params[3].grad.zero_()
        for weight, param, velocity in zip(plain, params, velocities, strict=True):
            lars_plain(weight, param.grad, velocity, lr=0.5, decay=0.1, trust=0.02)
        # The last one has no gradient in the first step: it stays.
        if seed == 0:
            params[4].grad = None
            plain[4].copy_(params[4])
            velocities[4].zero_()
        lars.step()
    torch.testing.assert_close(params, plain)


def test_lars_state_goes_through_a_checkpoint() -> None:
    torch.manual_seed(0)
    ours = [torch.randn(4, 3), torch.randn(5)]
    lars = Lars(ours, lr=0.5)
    give_gradients(ours, 0)
    lars.step()
    theirs = copy.deepcopy(ours)
    restored = Lars(theirs, lr=0.1)
    restored.load_state_dict(copy.deepcopy(lars.state_dict()))
    for params, optimizer in ((ours, lars), (theirs, restored)):
        give_gradients(params, 1)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_configured_optimizer_is_built_and_knows_its_numbers() -> None:
    moco = small_moco()
    for optim, kind in ((Optim(lr=0.2), torch.optim.SGD), (Optim(lr=0.2, optimizer="lars"), Lars)):
        built = build_optimizer(optim, moco)
        assert type(built) is kind
        group = built.param_groups[0]
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.9, 1e-4)
        assert all(a is b for a, b in zip(group["params"], moco.query_encoder.parameters(), strict=True))
        assert not moco.ema_in_optimizer


def test_a_fused_update_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"fused_update=on is SGD's on a GPU with a key encoder; .*lars runs on cpu"
    ):
        build_optimizer(Optim(optimizer="lars"), small_moco(), fused_update="on")


def fused(moco: MoCo) -> FusedSgd:
    moco.ema_in_optimizer = True
    return FusedSgd(
        moco.query_params,
        moco.key_params,
        ema_momentum=lambda: moco.ema_momentum,
        lr=0.1,
        momentum=0.9,
        weight_decay=0.01,
    )


@pytest.mark.parametrize("form", ["foreach", "kernel"])
def test_fused_sgd_equals_torch_sgd_then_ema(form: str) -> None:
    pytest.importorskip("triton", reason="the fused update's kernel stays untested")
    from linerate.train.kernels import sgd_ema

    # The kernel needs a GPU, or the interpreter of tests/conftest.py.
    device = "cuda" if form == "kernel" and torch.cuda.is_available() else "cpu"
    ours, theirs = small_moco(device), small_moco(device)
    ours.ema_momentum = theirs.ema_momentum = 0.9
    one = fused(ours)
    two = torch.optim.SGD(theirs.query_params, lr=0.1, momentum=0.9, weight_decay=0.01)
    for seed in range(3):
        for moco, optimizer in ((ours, one), (theirs, two)):
            give_gradients(moco.query_params, seed)
            if form == "kernel" and optimizer is one:
                one.run_kernel(sgd_ema)
            else:
                optimizer.step()
            moco.update_key_encoder()
    torch.testing.assert_close(ours.query_params + ours.key_params, theirs.query_params + theirs.key_params)
    # Either goes on from the other's checkpoint.
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    one.load_state_dict(copy.deepcopy(two.state_dict()))
    give_gradients(ours.query_params, 9)
    give_gradients(theirs.query_params, 9)
    if form == "kernel":
        one.run_kernel(sgd_ema)
    else:
        one.step()
    two.step()
    torch.testing.assert_close(ours.query_params, theirs.query_params)


def test_fused_sgd_leaves_a_parameter_without_gradient_but_moves_its_key() -> None:
    moco = small_moco()
    optimizer = fused(moco)
    give_gradients(moco.query_params, 0)
    moco.query_params[0].grad = None
    before = moco.query_params[0].clone()
    with torch.no_grad():
        moco.key_params[0].add_(1.0)
    optimizer.run_kernel(SimpleNamespace())
    assert torch.equal(moco.query_params[0], before)
    torch.testing.assert_close(moco.key_params[0], before + 0.999)


class OnGpu:
    """A device that says it is a GPU."""

    type = "cuda"


def test_a_kernel_that_fails_is_said_once_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "given_up", {})
    monkeypatch.setattr(kernels, "_said", set())
    device: Any = OnGpu()

    def fails(error: Exception) -> Any:
        def run(_: object) -> str:
            raise error

        return run

    def call(run: Any) -> str:
        return on_kernels("infonce", device, run, otherwise=lambda: "torch")

    with caplog.at_level(logging.WARNING, logger="linerate"):
        for _ in range(2):
            assert call(fails(Unsuited("C=300"))) == "torch"
        assert call(lambda _: "kernel") == "kernel"
        with pytest.raises(torch.OutOfMemoryError):
            call(fails(torch.OutOfMemoryError("none left")))
        assert call(fails(RuntimeError("no compiler"))) == "torch"
        assert call(lambda _: "kernel") == "torch"
    lines = [record.message for record in caplog.records]
    assert lines == [
        "no Triton infonce for these tensors, its torch form runs instead: C=300",
        "no Triton infonce here, its torch form runs instead: RuntimeError: no compiler",
    ]
    assert kernels.given_up == {"infonce": "RuntimeError: no compiler"}
    assert (
        on_kernels("infonce", torch.device("cpu"), lambda _: "kernel", otherwise=lambda: "torch") == "torch"
    )


def test_impossible_optimizers_and_warm_ups_are_refused() -> None:
    with pytest.raises(UserError, match="trust_coefficient=0 must be above 0"):
        Optim(trust_coefficient=0)
    with pytest.raises(UserError, match="warmup_epochs=5 leaves nothing of epochs=5"):
        Schedule(warmup_epochs=5, epochs=5)
