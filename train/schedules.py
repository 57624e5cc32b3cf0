"""The learning rate as a pure function of the step: nothing to save, nothing that could step twice.

Legend: steps and epochs count from 0; a run of E epochs with S steps each ends after step E * S - 1.
"""

from __future__ import annotations

import math

from linerate.train.config import Schedule


def total_steps(schedule: Schedule, *, steps_per_epoch: int) -> int:
    """Steps of the whole run."""
    if schedule.iterations is not None:
        return schedule.iterations
    assert schedule.epochs is not None, "Schedule checks that exactly one length is set"
    return schedule.epochs * steps_per_epoch


def lr_at(schedule: Schedule, *, lr: float, step: int, steps_per_epoch: int) -> float:
    """The learning rate that step uses. Source: MoCo 4, and its reference for the cosine per epoch."""
    if schedule.decay == "exponential":
        return lr * schedule.factor ** (step // schedule.decay_steps)
    epoch = step // steps_per_epoch
    if schedule.decay == "step":
        return lr * schedule.factor ** sum(epoch >= milestone for milestone in schedule.milestones)
    total = total_steps(schedule, steps_per_epoch=steps_per_epoch)
    if schedule.cosine_per == "step":
        return lr * 0.5 * (1 + math.cos(math.pi * step / total))
    return lr * 0.5 * (1 + math.cos(math.pi * epoch / math.ceil(total / steps_per_epoch)))


def lr_boundaries(schedule: Schedule, *, lr: float, steps_per_epoch: int) -> list[tuple[int, float]]:
    """Each step at which the learning rate changes, with its new value; step 0 first.

    A cosine per iteration changes at every step: it is told at the start of each epoch and at the last step.
    """
    total = total_steps(schedule, steps_per_epoch=steps_per_epoch)
    if schedule.decay == "exponential":
        steps = list(range(0, total, schedule.decay_steps))
    elif schedule.decay == "step":
        steps = [0, *(milestone * steps_per_epoch for milestone in schedule.milestones)]
    else:
        steps = list(range(0, total, steps_per_epoch))
        if schedule.cosine_per == "step" and steps[-1] != total - 1:
            steps.append(total - 1)
    return [
        (step, lr_at(schedule, lr=lr, step=step, steps_per_epoch=steps_per_epoch))
        for step in steps
        if step < total
    ]
