"""The collectives of a step: what the ranks exchange besides gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor, *, world_size: int) -> Tensor:
    """(N, ...) of each rank -> (world_size x N, ...) in rank order, the same bytes on every rank."""
    if world_size == 1:
        return rows
    gathered = rows.new_empty((world_size * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def exchange_rows(rows: Tensor, *, send: list[int], receive: list[int]) -> Tensor:
    """Send `send[r]` rows to rank r, in order, and get `receive[r]` rows from it; every row travels once.

    rows: contiguous (sum(send), ...). Rows for the own rank are copied without the network.
    """
    received = torch.empty((sum(receive), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    dist.all_to_all_single(received, rows.contiguous(), receive, send)
    return received
