"""The collectives of a step: what the ranks exchange besides gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Rows of a bank that travel at once when it is collected: 32 MiB at 128 dimensions in float32.
_COLLECT_ROWS = 65_536


def gather_rows(rows: Tensor, *, world_size: int) -> Tensor:
    """(N, ...) of each rank -> (world_size x N, ...) in rank order, the same bytes on every rank.

    A gradient comes back summed over the ranks, each of which may have used every row.
    """
    if world_size == 1:
        return rows
    if torch.is_grad_enabled() and rows.requires_grad:
        gathered: Tensor = _GatherRows.apply(rows, world_size)
        return gathered
    return _all_gather(rows, world_size)


def _all_gather(rows: Tensor, world_size: int) -> Tensor:
    gathered = rows.new_empty((world_size * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, world_size: int) -> Tensor:
        ctx.world_size = world_size
        return _all_gather(rows, world_size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Of (B, C) features only; an all-reduce is there on every backend, a reduce-scatter is not.
        total = sum_over_ranks(grads[0].contiguous().clone(), world_size=ctx.world_size)
        return total.chunk(ctx.world_size)[dist.get_rank()], None


def sum_over_ranks(tensor: Tensor, *, world_size: int) -> Tensor:
    """The sum of each rank's tensor of one shape, in place."""
    if world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def collect_rows(rows: Tensor, runs: list[int], *, rank: int) -> Tensor:
    """On rank 0 the (sum(runs), ...) rows of all ranks, on the CPU; the rows as they are elsewhere, or alone.

    rows: contiguous (runs[rank], ...). Sent piece by piece: no device has to hold the rows of another one.
    """
    if len(runs) == 1:
        return rows
    if rank:
        for piece in torch.split(rows, _COLLECT_ROWS):
            dist.send(piece, dst=0)
        return rows
    pieces = [rows.cpu()]
    for source, num in enumerate(runs[1:], start=1):
        for begin in range(0, num, _COLLECT_ROWS):
            piece = rows.new_empty((min(_COLLECT_ROWS, num - begin), *rows.shape[1:]))
            dist.recv(piece, src=source)
            pieces.append(piece.cpu())
    return torch.cat(pieces)


def exchange_rows(rows: Tensor, *, send: list[int], receive: list[int]) -> Tensor:
    """Send `send[r]` rows to rank r, in order, and get `receive[r]` rows from it; every row travels once.

    rows: contiguous (sum(send), ...). Rows for the own rank are copied without the network.
    """
    received = torch.empty((sum(receive), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    dist.all_to_all_single(received, rows.contiguous(), receive, send)
    return received
