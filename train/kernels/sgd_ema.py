"""SGD with momentum and weight decay, and the key encoder's EMA, over all tensors in one launch.

One pass reads the weight, its gradient, its momentum buffer and the key's weight, and writes the last three
back; eager torch reads and writes each of them several times. A table on the device holds the tensors'
addresses, a second one says which block of which tensor a program works on.
Legend: P tensors, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _update(  # type: ignore[no-untyped-def]
    addresses,
    sizes,
    blocks,
    num_tensors,
    lr,
    sgd_momentum,
    weight_decay,
    ema_weight,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.load(blocks + 2 * tl.program_id(0))
    start = tl.load(blocks + 2 * tl.program_id(0) + 1)
    at = start.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < tl.load(sizes + tensor)
    weight = tl.load(addresses + tensor).to(tl.pointer_type(tl.float32)) + at
    gradient = tl.load(addresses + num_tensors + tensor).to(tl.pointer_type(tl.float32)) + at
    buffer = tl.load(addresses + 2 * num_tensors + tensor).to(tl.pointer_type(tl.float32)) + at
    key = tl.load(addresses + 3 * num_tensors + tensor).to(tl.pointer_type(tl.float32)) + at
    w = tl.load(weight, mask=valid, other=0.0)
    k = tl.load(key, mask=valid, other=0.0)
    slope = tl.load(gradient, mask=valid, other=0.0) + weight_decay * w
    moved = tl.load(buffer, mask=valid, other=0.0) * sgd_momentum + slope
    w -= lr * moved
    k += ema_weight * (w - k)
    tl.store(buffer, moved, mask=valid)
    tl.store(weight, w, mask=valid)
    tl.store(key, k, mask=valid)
    if COPIES:
        copy = tl.load(addresses + 4 * num_tensors + tensor).to(tl.pointer_type(tl.bfloat16)) + at
        key_copy = tl.load(addresses + 5 * num_tensors + tensor).to(tl.pointer_type(tl.bfloat16)) + at
        tl.store(copy, w.to(tl.bfloat16), mask=valid)
        tl.store(key_copy, k.to(tl.bfloat16), mask=valid)


class SgdEma:
    """The update of these tensors; their addresses go to the device when they change, and then only.

    weights, buffers, keys: P float32 tensors each, alike in shape and strides and dense in memory, so that
    any memory format is one run of numbers. copies: bfloat16 twins of weights and keys, or None, as in the
    trainer: autocast casts the weights in every forward, and whether one that reads copies is faster has not
    been measured. `linerate bench run sgd-ema` has both forms.
    Raises ValueError where two that belong together lie differently in memory.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        buffers: Sequence[Tensor],
        keys: Sequence[Tensor],
        *,
        copies: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        self._weights, self._copies = list(weights), copies
        self._others = [list(buffers), list(keys), *(list(part) for part in copies or ())]
        for others in self._others:
            _require_alike(self._weights, others)
        device = weights[0].device
        sizes = [weight.numel() for weight in weights]
        blocks = [(i, b) for i, size in enumerate(sizes) for b in range(triton.cdiv(size, _BLOCK))]
        self._sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self._blocks = torch.tensor(blocks, dtype=torch.int32, device=device)
        self._sent: list[int] = []
        self._addresses = torch.empty(0, dtype=torch.int64, device=device)

    @torch.no_grad()
    def step(
        self,
        gradients: Sequence[Tensor],
        *,
        lr: float,
        sgd_momentum: float,
        weight_decay: float,
        ema_momentum: float,
    ) -> None:
        """One launch. A gradient that lies otherwise in memory than its weight is copied first."""
        gradients = [_like(g, w) for g, w in zip(gradients, self._weights, strict=True)]
        columns = [self._weights, gradients, *self._others]
        self._send([tensor.data_ptr() for column in columns for tensor in column])
        _update[(len(self._blocks),)](
            self._addresses,
            self._sizes,
            self._blocks,
            len(self._weights),
            lr,
            sgd_momentum,
            weight_decay,
            1.0 - ema_momentum,
            COPIES=self._copies is not None,
            BLOCK=_BLOCK,
            num_warps=8,
        )

    def _send(self, addresses: list[int]) -> None:
        if addresses == self._sent:
            return
        table = torch.tensor(addresses, dtype=torch.int64)
        on_gpu = self._sizes.device.type == "cuda"
        # From pinned memory, so that the host need not wait.
        self._addresses = table.pin_memory().to(self._sizes.device, non_blocking=True) if on_gpu else table
        self._sent = addresses


def _like(gradient: Tensor, weight: Tensor) -> Tensor:
    if gradient.stride() == weight.stride() and gradient.dtype == weight.dtype:
        return gradient
    return torch.empty_like(weight).copy_(gradient)


def _require_alike(weights: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for weight, other in zip(weights, others, strict=True):
        dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
        if not dense or weight.shape != other.shape or weight.stride() != other.stride():
            raise ValueError(
                f"a weight of {tuple(weight.shape)} with strides {weight.stride()} and its twin of "
                f"{tuple(other.shape)} with strides {other.stride()} must be dense and lie alike in memory; "
                "move both encoders in one memory format"
            )
