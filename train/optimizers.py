"""What moves the encoders: SGD, SGD and the key encoder's EMA in one kernel, or LARS for large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from linerate.shards.errors import UserError
from linerate.train.config import Optim, Speed
from linerate.train.ema import ema_update
from linerate.train.kernels import on_kernels
from linerate.train.moco import MoCo


def build_optimizer(
    optim: Optim, moco: MoCo, *, fused_update: str = Speed.fused_update
) -> torch.optim.Optimizer:
    """The optimizer of the query encoder; a fused one takes the key encoder's EMA over from the step.

    Call it after `MoCo.to`: the fused form remembers where tensors lie. Raises UserError where the fused
    update is demanded and cannot be had.
    """
    common: dict[str, Any] = {
        "lr": optim.lr,
        "momentum": optim.sgd_momentum,
        "weight_decay": optim.weight_decay,
    }
    device = moco.query_params[0].device.type
    # Without a key encoder of its own there is no EMA to fuse.
    fits = device == "cuda" and moco.dictionary.has_key_encoder
    if fused_update == "on" and not (fits and optim.optimizer == "sgd"):
        raise UserError(
            f"fused_update=on is SGD's on a GPU with a key encoder; here optimizer={optim.optimizer} runs on "
            f"{device} with a {type(moco.dictionary).__name__}: leave it at auto"
        )
    if optim.optimizer == "lars":
        return Lars(moco.query_params, **common, trust_coefficient=optim.trust_coefficient)
    if fused_update == "off" or not fits:
        # foreach is what SGD takes by itself on a GPU; on a CPU it would loop.
        return torch.optim.SGD(moco.query_params, **common, foreach=True)
    moco.ema_in_optimizer = True
    return FusedSgd(moco.query_params, moco.key_params, ema_momentum=lambda: moco.ema_momentum, **common)


class FusedSgd(torch.optim.SGD):
    """torch's SGD, whose step also moves the key encoder; one Triton launch on a GPU, foreach elsewhere.

    Its state is that of torch.optim.SGD, so a checkpoint goes on under either.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        key_params: Iterable[Tensor],
        *,
        ema_momentum: Callable[[], float],
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        """key_params: in the order of params; ema_momentum: m, asked for at each step."""
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=True)
        self._key_params, self._ema_momentum = list(key_params), ema_momentum
        self._update: Any = None
        self._buffers: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """SGD, then theta_k <- m theta_k + (1 - m) theta_q with the new theta_q."""
        assert closure is None, "a step of MoCo evaluates its loss once"
        params = self.param_groups[0]["params"]
        return on_kernels(
            "sgd_ema", params[0].device, self.run_kernel, otherwise=lambda: self._step_foreach(params)
        )

    def run_kernel(self, kernels: Any) -> None:
        """The step in one launch of the module kernels/sgd_ema."""
        group = self.param_groups[0]
        params = group["params"]
        if any(param.grad is None for param in params):
            return self._step_foreach(params)
        buffers = [self._buffer(param) for param in params]
        # A restored checkpoint brings buffers of its own.
        if self._update is None or any(a is not b for a, b in zip(buffers, self._buffers, strict=True)):
            self._update, self._buffers = kernels.SgdEma(params, buffers, self._key_params), buffers
        self._update.step(
            [param.grad for param in params],
            lr=group["lr"],
            sgd_momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            ema_momentum=self._ema_momentum(),
        )

    def _step_foreach(self, params: list[Tensor]) -> None:
        super().step()
        ema_update(self._key_params, params, ema_momentum=self._ema_momentum())

    def _buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        # The first step of SGD takes the gradient as it is, which is what momentum x 0 + gradient gives.
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer: Tensor = state["momentum_buffer"]
        if buffer.stride() != param.stride():
            buffer = state["momentum_buffer"] = torch.empty_like(param).copy_(buffer)
        return buffer


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose gradients are first scaled to the size of their weights, tensor by tensor.

    g <- g + wd w;  g <- g x trust_coefficient |w| / |g|, where both norms are above 0;  v <- mu v + g;
    w <- w - lr v. BN's parameters and biases (one dimension) get neither decay nor scaling. No host sync.
    Source: You et al., "Large Batch Training of Convolutional Networks"; the exceptions are MoCo v3's.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
            },
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of all parameters that have a gradient."""
        assert closure is None, "a step of MoCo evaluates its loss once"
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            updates = [param.grad for param in params]
            scaled = [place for place, param in enumerate(params) if param.ndim > 1]
            if scaled:
                found = _scaled([params[i] for i in scaled], [updates[i] for i in scaled], group)
                for place, update in zip(scaled, found, strict=True):
                    updates[place] = update
            buffers = [self._buffer(param) for param in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])

    def _buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _scaled(params: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The gradients with weight decay, each as long as trust_coefficient times its weight."""
    updates = torch._foreach_add(gradients, params, alpha=group["weight_decay"])
    weight_norms = torch.stack(torch._foreach_norm(params))
    update_norms = torch.stack(torch._foreach_norm(updates))
    trust = group["trust_coefficient"] * weight_norms / update_norms
    trust = torch.where((weight_norms > 0) & (update_norms > 0), trust, 1.0)
    torch._foreach_mul_(updates, list(trust.unbind()))
    return list(updates)
