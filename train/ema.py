"""The key encoder follows the query encoder: theta_k <- m theta_k + (1 - m) theta_q."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(key_params: list[Tensor], query_params: list[Tensor], *, ema_momentum: float) -> None:
    """Move every key parameter towards its query parameter, in place.

    Both lists are in the same order, in the dtype of the master weights (float32: in bf16 a step of 0.001
    of the difference vanishes). Collect the lists once, by `parameter_list`: walking the modules each step
    costs as much as the update of a small encoder. Parameters only: BN buffers are each encoder's own.
    Source: MoCo, equation 2.
    """
    torch._foreach_lerp_(key_params, query_params, 1.0 - ema_momentum)


def parameter_list(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parameters as a list, refused with ValueError where one is not a float master weight."""
    listed = list(parameters)
    narrow = {p.dtype for p in listed if p.dtype not in (torch.float32, torch.float64)}
    if narrow:
        raise ValueError(
            f"EMA over parameters in {', '.join(sorted(map(str, narrow)))} would lose steps of 0.001; keep "
            "the encoders in float32 and let autocast choose the arithmetic"
        )
    return listed
