"""BatchNorm over the global batch: one set of statistics for all ranks' images, on any backend.

It changes results, so it is no speed switch. torch's SyncBatchNorm runs on CUDA alone, this over gloo, too.
Each layer costs an all-gather of 2 C numbers forward and an all-reduce of 2 C backward. Under autocast the
statistics are float32. Legend: N images on each of W ranks, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linerate.train.collectives import gather_rows, sum_over_ranks


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    share: float,
    eps: float,
    world_size: int,
) -> Tensor:
    """(N, C, ...) normalised by the mean and variance of all ranks' images; N is the same on every rank.

    share: how far the running statistics move towards them, in place, the same on every rank.
    """
    mean, var = _global_moments(input, world_size)
    if running_mean is not None and running_var is not None:
        num = world_size * input.numel() // input.shape[1]
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), share)
            # The running variance is the unbiased one, as torch keeps it.
            running_var.lerp_((var * (num / max(1, num - 1))).to(running_var.dtype), share)
    normal: Tensor = _Normalise.apply(input, mean, torch.rsqrt(var + eps), world_size)
    if weight is not None and bias is not None:
        normal = normal * weight.view(_per_channel(input)) + bias.view(_per_channel(input))
    return normal.to(input.dtype)


@torch.no_grad()
def _global_moments(input: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    """(C,) mean and biased variance over all ranks."""
    # Not by sums of squares, which cancel where the mean is large.
    var, mean = torch.var_mean(_wide(input), _other_axes(input), correction=0)
    every = gather_rows(torch.stack((mean, var))[None], world_size=world_size)
    between, mean = torch.var_mean(every[:, 0], 0, correction=0)
    return mean, every[:, 1].mean(0) + between


class _Normalise(torch.autograd.Function):
    """(x - mean) / std, where mean and std follow from every rank's x."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, mean: Tensor, invstd: Tensor, world_size: int) -> Tensor:
        shape = _per_channel(input)
        normal = (_wide(input) - mean.view(shape)) * invstd.view(shape)
        ctx.save_for_backward(normal, invstd)
        ctx.dtype, ctx.world_size = input.dtype, world_size
        return normal

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        normal, invstd = ctx.saved_tensors
        (grad,), axes, shape = grads, _other_axes(normal), _per_channel(normal)
        own = torch.stack((grad.mean(axes), (grad * normal).mean(axes)))
        of_mean, along = (sum_over_ranks(own, world_size=ctx.world_size) / ctx.world_size).unbind()
        through = (grad - of_mean.view(shape) - normal * along.view(shape)) * invstd.view(shape)
        return through.to(ctx.dtype), None, None, None


def _wide(input: Tensor) -> Tensor:
    return input.to(torch.promote_types(input.dtype, torch.float32))


def _other_axes(input: Tensor) -> list[int]:
    return [axis for axis in range(input.ndim) if axis != 1]


def _per_channel(input: Tensor) -> list[int]:
    return [-1 if axis == 1 else 1 for axis in range(input.ndim)]
