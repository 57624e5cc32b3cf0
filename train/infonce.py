"""InfoNCE, the (K+1)-way softmax cross-entropy whose positive is class 0.

Two forms that agree to rounding: `infonce_plain` keeps the N x (K + 1) logits, `infonce` streams over the
negatives and holds a few per cent of them. The negatives have no gradient, so one pass gives the loss, the
gradient to the queries and the ranks of the positives. On one core at N=256, K=65536, C=128 in float32 it
takes little more than its two matrix products. On a GPU kernels/infonce.py does the same in two launches.
Legend: N queries, K negatives, C dimensions, M negatives in a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from linerate.train.kernels import on_kernels


class InfoNce(NamedTuple):
    """The loss, and how often a query found its key; 0-d, on the device."""

    loss: Tensor
    """Mean over the queries, in nats; ln(K + 1) at chance."""
    top1: Tensor
    """Share of queries whose positive is beaten by no negative; no gradient."""
    top5: Tensor
    """Share of queries whose positive is beaten by at most four negatives; no gradient."""


def infonce_plain(query: Tensor, key: Tensor, negatives: Tensor, *, temperature: float) -> InfoNce:
    """InfoNCE as the paper writes it, with the N x (K + 1) logits in memory: the truth for the other form.

    query, key: (N, C) unit rows, a row's key is its positive; negatives: (K, C). Source: MoCo, equation 1.
    """
    positive = (query * key).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ negatives.T], dim=1) / temperature
    labels = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    beaten_by = (logits[:, 1:] > logits[:, :1]).sum(1)
    loss = cross_entropy(logits, labels)
    return InfoNce(loss, *_shares(beaten_by, logits.dtype))


def infonce(query: Tensor, key: Tensor, negatives: Tensor, *, temperature: float) -> InfoNce:
    """InfoNCE without the logits in memory; gradient to the queries only.

    query, key: (N, C) float32 or float64 unit rows; negatives: (K, C), may be bfloat16 (widened chunk by
    chunk). Raises ValueError where key or negatives wait for a gradient that they would not get.
    """
    if torch.is_grad_enabled() and (key.requires_grad or negatives.requires_grad):
        raise ValueError(
            "the streamed InfoNCE gives no gradient to keys and negatives; detach them, or take infonce_plain"
        )
    loss, _, top1, top5 = _streamed(query, key, negatives, temperature)
    return InfoNce(loss, top1.detach(), top5.detach())


def infonce_pass(
    query: Tensor, key: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, its gradient to the queries (N, C), top1 and top5 from one pass over the negatives."""
    query = query / temperature
    positive = (query * key).sum(1, keepdim=True)
    swept = None
    # Reading whether the sums are in range would make the host wait for a GPU.
    if query.device.type == "cpu":
        swept = _sweep_uncentred(query, positive, negatives)
    if swept is None:
        swept = _sweep_online(query, positive, negatives)
    centre, total, weighted, beaten_by = swept
    loss = (centre - positive + total.log()).mean()
    own = (positive - centre).exp_() / total
    gradient = (weighted / total + (own - 1.0) * key).div_(temperature * len(query))
    return loss, gradient, *_shares(beaten_by.squeeze(1), query.dtype)


class _Swept(NamedTuple):
    """The softmax's sums over the positive and all negatives; (N, 1) but for weighted."""

    centre: Tensor
    """What was subtracted from the logits before the exponential."""
    total: Tensor
    """Sum of the exponentials, the positive's included."""
    weighted: Tensor
    """(N, C): the negatives' sum, each by its exponential."""
    beaten_by: Tensor
    """Negatives above the positive."""


def _sweep_uncentred(query: Tensor, positive: Tensor, negatives: Tensor) -> _Swept | None:
    """Exponentials of the logits as they are; None where a sum leaves the range in which that is exact.

    Unit rows stay inside down to a temperature of 0.0145. Three passes over a chunk less than online.
    """
    total, weighted, beaten_by = positive.exp(), torch.zeros_like(query), torch.zeros_like(positive)
    for part, logits, beats in _chunks(query, negatives):
        torch.mm(query, part.T, out=logits)
        beaten_by += torch.gt(logits, positive, out=beats).sum(1, keepdim=True)
        weights = logits.exp_()
        total += weights.sum(1, keepdim=True)
        weighted.addmm_(weights, part)
    # float32 ends at 1e+-38: what underflowed is less than 1e-12 of the sum, with millions of keys too.
    exact = (total > 1e-20) & (total < 1e30)
    return _Swept(torch.zeros_like(positive), total, weighted, beaten_by) if bool(exact.all()) else None


def _sweep_online(query: Tensor, positive: Tensor, negatives: Tensor) -> _Swept:
    """Online softmax, for logits of any size: centred on the largest that has been seen."""
    maximum, total = positive.clone(), torch.ones_like(positive)
    weighted, beaten_by = torch.zeros_like(query), torch.zeros_like(positive)
    for part, logits, beats in _chunks(query, negatives):
        torch.mm(query, part.T, out=logits)
        beaten_by += torch.gt(logits, positive, out=beats).sum(1, keepdim=True)
        higher = torch.maximum(maximum, logits.amax(1, keepdim=True))
        shrink = (maximum - higher).exp_()
        maximum = higher
        weights = logits.sub_(maximum).exp_()
        total = total * shrink + weights.sum(1, keepdim=True)
        weighted.mul_(shrink).addmm_(weights, part)
    return _Swept(maximum, total, weighted, beaten_by)


def _chunks(query: Tensor, negatives: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The negatives M by M in the queries' dtype, with two (N, M) buffers that are used again."""
    chunk = chunk_size(len(query), len(negatives), device_type=query.device.type)
    logits, beats = query.new_empty(2, len(query), chunk).unbind()
    for part in torch.split(negatives, chunk):
        yield part.to(query.dtype), logits[:, : len(part)], beats[:, : len(part)]


# One operator to autograd, torch.compile and CUDA graphs, whatever runs inside.
@torch.library.custom_op("linerate::infonce", mutates_args=())
def _streamed(
    query: Tensor, key: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (query, key, negatives, temperature)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = on_kernels(
        "infonce",
        query.device,
        lambda module: module.infonce_kernels(*rows),
        otherwise=lambda: infonce_pass(*rows),
    )
    return found


@_streamed.register_fake
def _(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, ...]:
    return query.new_empty(()), torch.empty_like(query), query.new_empty(()), query.new_empty(())


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])


def _scale_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
    (gradient,) = ctx.saved_tensors
    return grads[0] * gradient, None, None, None


_streamed.register_autograd(_scale_gradient, setup_context=_save_gradient)


def chunk_size(num_queries: int, num_negatives: int, *, device_type: str) -> int:
    """M: two buffers of N x M that stay in a CPU core's cache, or are large enough for a GPU's launches."""
    elements = 2**18 if device_type == "cpu" else 2**21
    fitting = max(256, elements // max(1, num_queries))
    # Both buffers together hold at most 1/16 of the logits, unless there are few negatives.
    return min(fitting, max(256, num_negatives // 32))


def _shares(beaten_by: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (beaten_by < 1).to(dtype).mean(), (beaten_by < 5).to(dtype).mean()
