"""Memory for the views that compiled kernels make, used again by one batch after another."""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixels = npt.NDArray[np.uint8]


class ViewMemory:
    """Lends arrays; what was lent is lent again when neither the array nor a tensor of it is left.

    Views in DALI's own memory would lie between its decoded images and outlive them, and the next batch of
    large images would find no room there. Memory of malloc's would be new pages for every batch.
    """

    def __init__(self, *, batch: int, size: int, num_kept: int) -> None:
        """batch: the most views in an array. num_kept: how many arrays it keeps that nobody has."""
        self._shape, self._num_kept = (batch, size, size, 3), num_kept
        self._free: list[Pixels] = []

    def lend(self, num: int) -> Pixels:
        """(num, S, S, 3) uint8, undefined; hand it on as `as_tensor` only: an array of it is not counted."""
        block = self._free.pop() if self._free else np.empty(self._shape, dtype=np.uint8)
        lent = block[:num]
        weakref.finalize(lent, self._take_back, block).atexit = False
        return lent

    def _take_back(self, block: Pixels) -> None:
        if len(self._free) < self._num_kept:
            self._free.append(block)

    def clear(self) -> None:
        """Give back what nobody has."""
        self._free.clear()


def as_tensor(lent: Pixels) -> Tensor:
    """(N, 3, S, S) with channels_last strides, in the same memory, which it keeps lent."""
    return torch.from_numpy(lent).permute(0, 3, 1, 2)


def places(views: Pixels) -> npt.NDArray[np.int64]:
    """(N, 2) int64 of (N, S, S, 3): each view's address and S, as `cpu_kernels.view_of_sample` wants them."""
    num, size = views.shape[:2]
    address = views.ctypes.data + np.arange(num) * views.strides[0]
    return np.stack([address, np.full(num, size)], axis=1)
