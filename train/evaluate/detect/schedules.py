"""The paper's schedules, for 16 images a batch; another batch sees as many images.

Source: MoCo 4.2 and A.1; detectron2 for the warm-up of COCO (its default) and the steps of 6x.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from linerate.shards.errors import UserError

ScheduleName = Literal["1x", "2x", "6x", "24k", "9k", "30k"]
PAPER_BATCH = 16
_WARMUP_FACTOR = 1e-3


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """A constant rate after a linear warm-up, times 0.1 at each step."""

    iterations: int
    steps: tuple[int, ...]
    """Iterations at which the rate falls."""
    warmup: int
    """Iterations over which the rate rises from a thousandth."""
    lr: float

    def lr_at(self, iteration: int) -> float:
        """The rate that this iteration, counted from 0, uses."""
        lr = self.lr * 0.1 ** sum(iteration >= step for step in self.steps)
        if iteration < self.warmup:
            share = iteration / self.warmup
            lr *= _WARMUP_FACTOR * (1 - share) + share
        return lr


def _schedule(iterations: int, steps: tuple[int, ...], warmup: int, lr: float = 0.02) -> StepSchedule:
    return StepSchedule(iterations=iterations, steps=steps, warmup=warmup, lr=lr)


SCHEDULES: dict[ScheduleName, StepSchedule] = {
    "1x": _schedule(90_000, (60_000, 80_000), 1000),
    "2x": _schedule(180_000, (120_000, 160_000), 1000),
    "6x": _schedule(540_000, (480_000, 520_000), 1000),
    "24k": _schedule(24_000, (18_000, 22_000), 100),
    # The paper gives the length alone; the steps lie where those of 24k do.
    "9k": _schedule(9_000, (6_750, 8_250), 100),
    # FCN-16s on VOC.
    "30k": _schedule(30_000, (21_000, 27_000), 0, 0.003),
}


def scale_schedule(
    name: ScheduleName, *, batch: int, iterations: int | None = None, lr: float | None = None
) -> StepSchedule:
    """The schedule for a batch: iterations times 16 / batch, lr times batch / 16.

    iterations: for trials, the whole length, steps and warm-up at the same shares of it. lr: instead of the
    scaled one. Raises UserError for values below 1, or a rate that is not positive.
    """
    if batch < 1 or (iterations is not None and iterations < 1):
        raise UserError(f"--batch {batch} and --iterations {iterations} must be at least 1")
    if lr is not None and not lr > 0:
        raise UserError(f"--lr {lr:g} must be above 0; the paper's is {SCHEDULES[name].lr:g} for 16 images")
    base = SCHEDULES[name]
    length = iterations if iterations is not None else round(base.iterations * PAPER_BATCH / batch)
    share = length / base.iterations
    return dataclasses.replace(
        base,
        iterations=length,
        steps=tuple(round(step * share) for step in base.steps),
        warmup=round(base.warmup * share) if iterations is None else min(base.warmup, length // 10),
        lr=lr if lr is not None else base.lr * batch / PAPER_BATCH,
    )
