"""What a MoCo step must compute and move, counted on shapes alone: its time can fall below no ceiling of it.

Rules, per operation that torch runs: arithmetic is torch's own count (a multiply-add is two). Bytes are what
its kernels read and write once each, plus the second pass that some need: BatchNorm reads its input twice
(statistics, then values), its backward reads input and gradient twice, and a convolution's backward reads
the gradient twice (for the input, and for the weights). All BatchNorm is over the batch: groups of it move
no more. The fused floors leave out what no kernel would have to move:

- BN + ReLU: an activation rides on its neighbour; its backward costs BN's two passes a read of the mask.
- BN + ReLU + add: the residual sum rides too, for one read of the shortcut.
- conv + BN: statistics come out of the convolution that writes the values, and the next one normalises what
  it reads; only at a residual sum is a pass left.

Legend: N images, S pixels a side.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from linerate.bench.counting import OpCounter
from linerate.train.config import TrainConfig
from linerate.train.learner import build_moco
from linerate.train.optimizers import build_optimizer
from linerate.train.step import MoCo, train_step
from linerate.train.switches import resolve_precision

BN = {"native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"}
BN_BACKWARD = {"native_batch_norm_backward", "batch_norm_backward"}
# What is computed value by value, so that it can ride on the kernel before or behind it.
ACTIVATIONS = {"relu", "hardtanh", "hardswish", "silu", "gelu", "leaky_relu", "sigmoid", "elu"}
ACTIVATION_BACKWARDS = {"threshold_backward", *(f"{name}_backward" for name in ACTIVATIONS)}


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """One step's work, by the rules of this module."""

    pairs: int
    """images of the step, each in two views"""
    flops: int
    eager_bytes: int
    """every operation a kernel of its own"""
    bn_relu_bytes: int
    bn_relu_add_bytes: int
    conv_bn_bytes: int | None
    """None: the encoder has no BatchNorm"""

    def floors(self, *, gb_per_s: float, tflops: float) -> list[Floor]:
        """What each part of the work alone would take at these ceilings, the least work last."""
        rides = "activations" if self.conv_bn_bytes is None else "BN + ReLU"
        moved = {
            "eager bytes": self.eager_bytes,
            f"bytes, {rides} fused": self.bn_relu_bytes,
            f"bytes, {rides} + add fused": self.bn_relu_add_bytes,
            "bytes, conv + BN fused": self.conv_bn_bytes,
        }
        found = [
            Floor(name, amount, "MB", 1e6, amount / (1e9 * gb_per_s), self.pairs)
            for name, amount in moved.items()
            if amount is not None
        ]
        return [
            *found,
            Floor("arithmetic", self.flops, "GFLOP", 1e9, self.flops / (1e12 * tflops), self.pairs),
        ]


@dataclass(frozen=True)
class Floor:
    """A part of a step's work, and the time below which no step can fall that does it."""

    name: str
    amount: int
    unit: str
    per_unit: float
    """bytes or FLOPs in one unit"""
    seconds: float
    pairs: int

    @property
    def a_pair(self) -> float:
        """Units of work for one pair of views."""
        return self.amount / self.per_unit / self.pairs

    @property
    def pairs_per_s(self) -> float:
        return self.pairs / self.seconds


class PassCounter(OpCounter):
    """Bytes by the rules above. `backward` is to call while the backward pass runs."""

    def __init__(self) -> None:
        super().__init__()
        self.eager = self.bn_relu = self.bn_relu_add = self.conv_bn = 0
        self._in_backward = False

    def backward(self, loss: Tensor) -> None:
        """The backward pass of a loss, in which a sum is a gradient's and none of the network's."""
        self._in_backward = True
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            self._in_backward = False

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        before = self.num_bytes
        super()._note(func, args, kwargs, out)
        once = self.num_bytes - before
        if not once:
            return
        # In place or not, the same values are read and written.
        name = func.overloadpacket.__name__.rstrip("_")
        inputs = [tensor_bytes(leaf) for leaf in tree_iter(args) if isinstance(leaf, Tensor)]
        eager = once + _second_reads(name, inputs)
        bn_relu = bn_relu_add = conv_bn = eager
        if name in ACTIVATIONS:
            bn_relu = bn_relu_add = conv_bn = 0
        elif name in ACTIVATION_BACKWARDS:
            bn_relu = bn_relu_add = conv_bn = 2 * inputs[1]
        elif name in BN:
            conv_bn = 0
        elif name == "add" and not self._in_backward and _is_residual(args):
            bn_relu_add = inputs[1]
        self.eager += eager
        self.bn_relu += bn_relu
        self.bn_relu_add += bn_relu_add
        self.conv_bn += conv_bn


def _second_reads(name: str, inputs: list[int]) -> int:
    """Bytes that an operation's kernels read once more."""
    if name in BN:
        return inputs[0]
    if name in BN_BACKWARD:
        return inputs[0] + inputs[1]
    return inputs[0] if name == "convolution_backward" else 0


def _is_residual(args: Any) -> bool:
    """Whether two tensors of activations are added."""
    return len(args) > 1 and all(isinstance(one, Tensor) and one.ndim > 1 for one in args[:2])


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def forward_flops(encoder: nn.Module, *, size: int) -> int:
    """FLOPs of one image's forward pass. encoder: on the meta device."""
    with FlopCounterMode(display=False) as counter:
        encoder(torch.empty(1, 3, size, size, device="meta"))
    return int(counter.get_total_flops())


def count_config(config: TrainConfig, *, world_size: int = 1) -> StepWork:
    """The work of a recipe's step on one rank: its encoder, dictionary, optimizer and precision."""
    batch = config.rank_batch(world_size)
    alone = dataclasses.replace(
        config,
        bn=dataclasses.replace(config.bn, bn_group=batch, shuffle=False, sync_bn=False),
        optim=dataclasses.replace(config.optim, global_batch=batch),
        speed=dataclasses.replace(config.speed, micro_batch=None),
        num_lanes=None,
    )
    # A bank of any size does: a step touches the rows that it draws.
    moco = build_moco(alone, num_samples=batch + alone.dictionary.num_keys)
    moco.to("cpu", channels_last=config.speed.channels_last)
    optimizer = build_optimizer(alone.optim, moco, fused_update="off")
    narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolve_precision(config.speed))
    return count_step(moco, optimizer, batch=batch, size=config.views.size, narrow=narrow)


def count_step(
    moco: MoCo, optimizer: torch.optim.Optimizer, *, batch: int, size: int, narrow: torch.dtype | None
) -> StepWork:
    """The work of a step on `batch` images of `size` pixels; nothing is computed and nothing moves.

    moco: on the CPU, one BN group. narrow: what autocast casts to; None: float32 throughout.
    """

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast("cpu", narrow) if narrow else contextlib.nullcontext()

    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels = torch.empty(batch, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        position = torch.arange(batch)

        def step(number: int, **how: Any) -> None:
            train_step(
                moco, pixels, pixels, optimizer, step=number, position=position, autocast=autocast, **how
            )

        # In the first one the optimizer makes its state.
        step(0)
        arithmetic = FlopCounterMode(display=False, custom_mapping=_CUSTOM)
        moved = PassCounter()
        with arithmetic, moved:
            step(1, backward=moved.backward)
    return StepWork(
        pairs=batch,
        flops=int(arithmetic.get_total_flops()),
        eager_bytes=moved.eager,
        bn_relu_bytes=moved.bn_relu,
        bn_relu_add_bytes=moved.bn_relu_add,
        conv_bn_bytes=moved.conv_bn if any(name in BN for name in moved.ops) else None,
    )


def _infonce_flops(query: Any, key: Any, negatives: Any, *_: Any, **__: Any) -> int:
    """The logits, and the negatives' sum that the gradient is made of; shapes in."""
    num, dim = query
    return 2 * 2 * int(num) * int(dim) * int(negatives[0])


_CUSTOM: dict[Any, Callable[..., int]] = {torch.ops.linerate.infonce: _infonce_flops}
