"""What torch.compile works on: the encoders, or of the whole step what is worth it.

The step's backward pass is the compiler's, too: it is that of the compiled forwards. Shuffle, EMA and
enqueueing are one to six operations each and stay as they are.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from linerate.train.moco import MoCo
from linerate.train.optimizers import FusedSgd


def compile_step(
    moco: MoCo, optimizer: torch.optim.Optimizer, *, what: Literal["off", "encoders", "step"]
) -> None:
    """Put compiled forms where the step calls them; of the step, also the loss and the optimizer.

    An update that is one kernel already stays it. Call it after accelerate has wrapped the query encoder.
    """
    if what == "off":
        return
    moco.query_forward = torch.compile(moco.query_forward)
    moco.key_forward = torch.compile(moco.key_forward)
    if what == "encoders":
        return
    moco.compare = torch.compile(moco.compare)
    if not isinstance(optimizer, FusedSgd):
        optimizer.step = torch.compile(optimizer.step)  # type: ignore[assignment, method-assign]


def set_lr(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """The learning rate of every parameter; a number that changes would compile the update anew."""
    for group in optimizer.param_groups:
        group["lr"] = lr
