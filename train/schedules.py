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
    """The learning rate that step uses.

    Source: MoCo 4, and its reference for the cosine per epoch; MoCo v3 for the warm-up and what follows it.
    """
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return lr * step / warmup
    if schedule.decay == "exponential":
        return lr * schedule.factor ** (step // schedule.decay_steps)
    epoch = step // steps_per_epoch
    if schedule.decay == "step":
        return lr * schedule.factor ** sum(epoch >= milestone for milestone in schedule.milestones)
    total = total_steps(schedule, steps_per_epoch=steps_per_epoch)
    if schedule.cosine_per == "step":
        return lr * _half_cosine(step - warmup, total - warmup)
    warmed = schedule.warmup_epochs
    return lr * _half_cosine(epoch - warmed, math.ceil(total / steps_per_epoch) - warmed)


def ema_momentum_at(schedule: Schedule, *, ema_momentum: float, step: int, steps_per_epoch: int) -> float:
    """m of that step. Source: MoCo v3, whose m rises to 1 by a half cosine over the whole run."""
    if schedule.ema_ramp == "none":
        return ema_momentum
    total = total_steps(schedule, steps_per_epoch=steps_per_epoch)
    return 1.0 - (1.0 - ema_momentum) * _half_cosine(step, total)


def _half_cosine(place: int, length: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * place / length))


def lr_boundaries(schedule: Schedule, *, lr: float, steps_per_epoch: int) -> list[tuple[int, float]]:
    """Each step at which the learning rate changes, with its new value; step 0 first.

    A cosine per iteration and a warm-up change at every step: they are told at the start of each epoch, and
    the cosine at the last step.
    """
    total = total_steps(schedule, steps_per_epoch=steps_per_epoch)
    warmup = schedule.warmup_epochs * steps_per_epoch
    if schedule.decay == "exponential":
        steps = list(range(0, total, schedule.decay_steps))
    elif schedule.decay == "step":
        steps = [0, *(milestone * steps_per_epoch for milestone in schedule.milestones)]
    else:
        steps = list(range(0, total, steps_per_epoch))
        if schedule.cosine_per == "step" and steps[-1] != total - 1:
            steps.append(total - 1)
    if warmup:
        # The rise is told at the start of each epoch, as a cosine per iteration is.
        rising = range(0, warmup + 1, steps_per_epoch)
        steps = [*rising, *(step for step in steps if step > warmup)]
    return [
        (step, lr_at(schedule, lr=lr, step=step, steps_per_epoch=steps_per_epoch))
        for step in steps
        if step < total
    ]
