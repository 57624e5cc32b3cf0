"""What a run would be, told before it starts: steps, learning rates, what is dropped, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linerate.shards.errors import UserError
from linerate.train.config import TrainConfig
from linerate.train.schedules import lr_at, lr_boundaries, total_steps


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The plan of a run over `num_images` images on `world_size` ranks."""

    num_images: int
    """Images in the shards, or in the data set that the recipe was written for."""
    world_size: int
    rank_batch: int
    """Images of one step on one rank."""
    steps_per_epoch: int
    num_dropped: int
    """Images that each epoch leaves out, others every time."""
    total_steps: int
    total_images: int
    epochs: float
    """Length in epochs; of a run counted in iterations, too."""
    lr_last: float
    """The learning rate of the last step."""
    lr_boundaries: list[tuple[int, float]]
    """Each step at which the learning rate changes, with its new value."""


def require_one_batch(global_batch: int, *, num_images: int) -> None:
    """Raise UserError where the images do not fill one batch."""
    if num_images < global_batch:
        raise UserError(
            f"{num_images:,} images do not fill one global_batch={global_batch}; give a --global-batch of at "
            f"most {num_images:,} (with --scale-lr or --lr), or pack more images"
        )


def plan_run(config: TrainConfig, *, num_images: int, world_size: int) -> RunPlan:
    """The plan. Raises UserError where the images do not fill one batch, or the ranks do not fit."""
    batch, optim = config.optim.global_batch, config.optim
    require_one_batch(batch, num_images=num_images)
    steps_per_epoch = num_images // batch
    total = total_steps(config.schedule, steps_per_epoch=steps_per_epoch)
    return RunPlan(
        num_images=num_images,
        world_size=world_size,
        rank_batch=config.rank_batch(world_size),
        steps_per_epoch=steps_per_epoch,
        num_dropped=num_images - steps_per_epoch * batch,
        total_steps=total,
        total_images=total * batch,
        epochs=total / steps_per_epoch,
        lr_last=lr_at(config.schedule, lr=optim.lr, step=total - 1, steps_per_epoch=steps_per_epoch),
        lr_boundaries=lr_boundaries(config.schedule, lr=optim.lr, steps_per_epoch=steps_per_epoch),
    )


def show_boundaries(boundaries: list[tuple[int, float]], *, limit: int = 8) -> str:
    """The boundaries as text; of many, the first and the last."""
    told = [f"{step:,}: {lr:.4g}" for step, lr in boundaries]
    if len(told) > limit:
        told = [*told[: limit // 2], f"... {len(told) - limit} more ...", *told[-limit // 2 :]]
    return "\n".join(told)


def plan_rows(plan: RunPlan, memory: dict[str, int]) -> list[tuple[str, Any]]:
    """The plan and its memory as rows of a table."""
    return [
        ("images", f"{plan.num_images:,}"),
        ("ranks x batch", f"{plan.world_size} x {plan.rank_batch:,}"),
        ("steps an epoch", f"{plan.steps_per_epoch:,}"),
        ("dropped an epoch", f"{plan.num_dropped:,}"),
        ("steps", f"{plan.total_steps:,}"),
        ("epochs", f"{plan.epochs:,.2f}"),
        ("images seen", f"{plan.total_images:,}"),
        ("lr from step", show_boundaries(plan.lr_boundaries)),
        *((f"memory: {name}", f"{size / 2**20:,.0f} MiB") for name, size in memory.items()),
    ]
