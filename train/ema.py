"""The key encoder follows the query encoder: theta_k <- m theta_k + (1 - m) theta_q."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

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


class FlatEma:
    """The EMA of two lists of parameters, each in one run of memory: one lerp instead of one per tensor.

    The parameters stay the same objects with the same shapes, strides and values; only their storage moves,
    so an optimizer or a wrapper may hold them already. Where one has been moved away since, or the lists
    cannot lie flat (several dtypes or devices, gaps, unlike strides), the update is that of `ema_update`.
    """

    def __init__(self, key_params: list[Tensor], query_params: list[Tensor]) -> None:
        self._key_params, self._query_params = key_params, query_params
        # Strides too: two runs are added number by number.
        alike = [(p.shape, p.stride()) for p in key_params] == [(p.shape, p.stride()) for p in query_params]
        self._key_run = _lay_flat(key_params) if alike else None
        self._query_run = _lay_flat(query_params) if alike else None

    @torch.no_grad()
    def update(self, *, ema_momentum: float) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q."""
        key_run, query_run = self._key_run, self._query_run
        if (
            key_run is not None
            and query_run is not None
            and _lies_in(self._key_params, key_run)
            and _lies_in(self._query_params, query_run)
        ):
            key_run.lerp_(query_run, 1.0 - ema_momentum)
        else:
            ema_update(self._key_params, self._query_params, ema_momentum=ema_momentum)


@torch.no_grad()
def _lay_flat(params: list[Tensor]) -> Tensor | None:
    """One tensor whose storage the parameters now share, each aligned to 64 bytes; None: they cannot."""
    if len({(p.dtype, p.device) for p in params}) != 1 or not all(_is_dense(p) for p in params):
        return None
    align = 64 // params[0].element_size()
    starts = list(accumulate((-(-p.numel() // align) * align for p in params), initial=0))
    run = params[0].new_zeros(starts[-1])
    for param, start in zip(params, starts, strict=False):
        place = torch.as_strided(run, param.shape, param.stride(), start)
        place.copy_(param)
        param.data = place
    return run


def _is_dense(param: Tensor) -> bool:
    return param.is_contiguous() or param.is_contiguous(memory_format=torch.channels_last)


def _lies_in(params: list[Tensor], run: Tensor) -> bool:
    # Whatever moves a module moves all of its parameters, so the first and the last one tell.
    storage = run.untyped_storage().data_ptr()
    return all(param.untyped_storage().data_ptr() == storage for param in (params[0], params[-1]))


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
