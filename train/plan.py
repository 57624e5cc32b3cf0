"""What a run would be, told before it starts: steps, learning rates, what is dropped, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linerate.pipeline.host_memory import PHOTO, SampleSize
from linerate.pipeline.order import EpochOrder
from linerate.pipeline.order_report import RankShares, rank_shares, share_rows
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError, show_bytes
from linerate.shards.options import Sizing
from linerate.train.config import TrainConfig
from linerate.train.schedules import lr_at, lr_boundaries, total_steps

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ShardTable:
    """What the plan knows of the shards, which need not exist yet."""

    sizes: Ints
    """(S,) samples."""
    num_bytes: Ints
    """(S,)"""

    @classmethod
    def of(cls, catalog: Catalog) -> ShardTable:
        return cls(catalog.shard_sizes, catalog.shard_bytes)

    @classmethod
    def nominal(cls, num_images: int, sample: SampleSize = PHOTO) -> ShardTable:
        """As `linerate shard pack` would cut so many images of that size."""
        num = Sizing().num_shards(samples=num_images, total_bytes=num_images * sample.num_bytes)
        sizes = np.diff(np.arange(num + 1) * num_images // num)
        return cls(sizes, sizes * sample.num_bytes)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The plan of a run over `num_images` images on `world_size` ranks."""

    num_images: int
    """Images in the shards, or in the data set that the recipe was written for."""
    world_size: int
    rank_batch: int
    """Images of one step on one rank."""
    num_shards: int
    num_lanes: int
    steps_per_epoch: int
    """By the order, as all below."""
    num_dropped: int
    """Images that each epoch leaves out, others every time: less than one global batch."""
    shares: RankShares
    """What each rank reads in the first epoch; in the others it is as much."""
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
            f"most {num_images:,} (with --scale-lr or --lr, and a --bn-group that divides it twice), or pack "
            "more images"
        )


def plan_run(config: TrainConfig, shards: ShardTable, *, world_size: int) -> RunPlan:
    """The plan. Raises UserError where the images do not fill one batch, or the ranks do not fit."""
    batch, optim = config.optim.global_batch, config.optim
    require_one_batch(batch, num_images=int(shards.sizes.sum()))
    rank_batch = config.rank_batch(world_size)
    order = EpochOrder(shards.sizes, seed=config.seed, epoch=0, global_batch=batch, num_lanes=config.lanes)
    total = total_steps(config.schedule, steps_per_epoch=order.num_steps)
    return RunPlan(
        num_images=order.num_samples,
        world_size=world_size,
        rank_batch=rank_batch,
        num_shards=len(shards.sizes),
        num_lanes=order.num_lanes,
        steps_per_epoch=order.num_steps,
        num_dropped=order.num_dropped,
        shares=rank_shares(
            order, shard_sizes=shards.sizes, shard_bytes=shards.num_bytes, world_size=world_size
        ),
        total_steps=total,
        total_images=total * batch,
        epochs=total / order.num_steps,
        lr_last=lr_at(config.schedule, lr=optim.lr, step=total - 1, steps_per_epoch=order.num_steps),
        lr_boundaries=lr_boundaries(config.schedule, lr=optim.lr, steps_per_epoch=order.num_steps),
    )


def show_boundaries(boundaries: list[tuple[int, float]], *, limit: int = 8) -> str:
    """The boundaries as text; of many, the first and the last."""
    told = [f"{step:,}: {lr:.4g}" for step, lr in boundaries]
    if len(told) > limit:
        told = [*told[: limit // 2], f"... {len(told) - limit} more ...", *told[-limit // 2 :]]
    return "\n".join(told)


def plan_rows(plan: RunPlan) -> list[tuple[str, Any]]:
    """The plan as rows of a table."""
    return [
        ("images", f"{plan.num_images:,} in {plan.num_shards:,} shards"),
        ("ranks x batch", f"{plan.world_size} x {plan.rank_batch:,}"),
        *share_rows(plan.shares),
        ("steps an epoch", f"{plan.steps_per_epoch:,}"),
        ("dropped an epoch", f"{plan.num_dropped:,}, others every epoch"),
        ("steps", f"{plan.total_steps:,}"),
        ("epochs", f"{plan.epochs:,.2f}"),
        ("images seen", f"{plan.total_images:,}"),
        ("lr from step", show_boundaries(plan.lr_boundaries)),
    ]


def memory_rows(memory: dict[str, int], *, of: str) -> list[tuple[str, str]]:
    """The parts and their total as rows of a table. of: whose memory, as `device`."""
    return [(f"{of}: {name}", show_bytes(size)) for name, size in memory.items()]
