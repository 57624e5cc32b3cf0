"""Batch normalisation whose statistics are the mean over the ranks', as detectron2's naiveSyncBN.

torch's SyncBatchNorm runs on a GPU alone and weighs ranks by their pixels; the paper's runs used this kind.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _MeanOverRanks(torch.autograd.Function):
    """The mean over the ranks, whose gradient is the mean of theirs."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return _mean_over_ranks(local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _mean_over_ranks(grads[0])


def _mean_over_ranks(local: Tensor) -> Tensor:
    total = local.contiguous().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """forward: (N, C, H, W) -> the same; in training every rank must call it, with as many images or not."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        moments = torch.cat([input.mean((0, 2, 3)), (input * input).mean((0, 2, 3))])
        mean, mean_square = _MeanOverRanks.apply(moments).chunk(2)
        var = mean_square - mean * mean
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            # None is torch's word for the plain mean over all batches.
            share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(var, share)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return torch.addcmul(shift.view(1, -1, 1, 1), input, scale.view(1, -1, 1, 1))


def sync_batch_norms(module: nn.Module) -> None:
    """Make every BatchNorm2d in it a synchronised one, in place; weights and buffers stay."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SyncedBatchNorm2d
