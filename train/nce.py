"""Noise-contrastive estimation as InstDisc trains a memory bank: is a key the image's own, or noise?

Legend: n queries, N samples in the data set, K noise keys, C dimensions, Z the partition function.
Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", part 3.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from linerate.train.infonce import InfoNce, chunk_size


def nce(
    query: Tensor, key: Tensor, noise: Tensor, *, temperature: float, log_z: Tensor, num_samples: int
) -> InfoNce:
    """-log h(own key) - the sum over the noise of log(1 - h), mean over the queries; gradient to them only.

    h = P / (P + K / N), P = exp(q.k / T) / Z. query, key: (n, C), noise: (K, C), unit rows; log_z: 0-d.
    Streams over the noise: no n x K tensor. Where every P is 1 / N it
    is ln(1 + K) + K ln(1 + 1 / K).
    """
    return InfoNce(*_Nce.apply(query, key, noise, temperature, log_z, num_samples))


@torch.no_grad()
def exponential_sum(query: Tensor, key: Tensor, noise: Tensor, *, temperature: float) -> Tensor:
    """0-d float64: the sum of exp(q.k / T) over every query and its 1 + K keys; N times the mean is Z."""
    query = query / temperature
    total = (query * key).sum(1).double().exp().sum()
    for part in torch.split(noise, _chunk(query, noise)):
        total += (query @ part.T).double().exp_().sum()
    return total


class _Nce(torch.autograd.Function):
    """One pass over the noise gives the loss and its gradient to the queries, as in `infonce`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        noise: Tensor,
        temperature: float,
        log_z: Tensor,
        num_samples: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scaled = query / temperature
        # h is the sigmoid of q.k / T - offset.
        offset = (log_z + math.log(len(noise) / num_samples)).to(query.dtype)
        positive = (scaled * key).sum(1, keepdim=True)
        loss = softplus(offset - positive)
        gradient = -torch.sigmoid(offset - positive) * key
        beaten_by = torch.zeros_like(positive)
        for part in torch.split(noise, _chunk(query, noise)):
            logits = scaled @ part.T
            beaten_by += (logits > positive).sum(1, keepdim=True)
            logits -= offset
            loss += softplus(logits).sum(1, keepdim=True)
            gradient.addmm_(logits.sigmoid_(), part)
        ctx.save_for_backward(gradient.div_(temperature * len(query)))
        top1, top5 = ((beaten_by < most).to(query.dtype).mean() for most in (1, 5))
        ctx.mark_non_differentiable(top1, top5)
        return loss.mean(), top1, top5

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grads[0] * gradient, None, None, None, None, None


def _chunk(query: Tensor, noise: Tensor) -> int:
    return chunk_size(len(query), len(noise), device_type=query.device.type)
