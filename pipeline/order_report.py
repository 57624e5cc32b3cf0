"""What an epoch's order means: steps, what is dropped, each rank's share, how well it is shuffled."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from linerate.pipeline.order import EpochOrder, Ints
from linerate.pipeline.reader import ShardReader
from linerate.pipeline.shuffle_quality import measured_steps, shuffle_quality
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError, show_bytes


@dataclass(frozen=True)
class RankShare:
    """What one rank reads in an epoch."""

    num_shards: int
    num_samples: int
    num_bytes: int
    """By the mean size of a shard's samples: the exact bytes would cost the index of every shard."""


@dataclass(frozen=True)
class RankShares:
    """What the ranks read in an epoch."""

    ranks: list[RankShare]
    num_shared: int
    """Shards of which more than one rank reads a part."""


def rank_shares(order: EpochOrder, *, shard_sizes: Ints, shard_bytes: Ints, world_size: int) -> RankShares:
    """The share of every rank; loads no index. Raises UserError where the ranks do not share the lanes.

    shard_sizes, shard_bytes: (S,) samples and bytes of each shard.
    """
    if world_size < 1:
        raise UserError(f"world_size={world_size} must be 1 or more")
    shares = []
    num_readers = np.zeros(len(shard_sizes), dtype=np.int64)
    for rank in range(world_size):
        shard, _, rows = order.pieces(rank=rank, world_size=world_size)
        share = rows / np.maximum(shard_sizes[shard], 1)
        own = np.unique(shard)
        num_readers[own] += 1
        shares.append(
            RankShare(
                num_shards=len(own),
                num_samples=int(rows.sum()),
                num_bytes=int((shard_bytes[shard] * share).sum()),
            )
        )
    return RankShares(shares, int((num_readers > 1).sum()))


def share_rows(shares: RankShares) -> list[tuple[str, str]]:
    """The shares as rows of a table."""
    shards, num_bytes = ([getattr(one, name) for one in shares.ranks] for name in ("num_shards", "num_bytes"))
    shared = f"{shares.num_shared:,} read by more than one rank" if shares.num_shared else "each read by one"
    return [
        ("shards per rank", f"{min(shards):,} to {max(shards):,}, world size {len(shares.ranks)}; {shared}"),
        ("bytes per rank", f"{show_bytes(min(num_bytes))} to {show_bytes(max(num_bytes))}, about"),
    ]


def report_order(order: EpochOrder, catalog: Catalog, *, world_size: int) -> dict[str, Any]:
    """All that is worth knowing about the order of one epoch; the shuffle is measured on 32 of its steps."""
    batches = np.array([order.positions(int(step)) for step in measured_steps(order, num_steps=32)])
    reader = ShardReader(catalog, num_shards_at_hand=16)
    labels = reader.index_rows(batches.ravel())["label"].reshape(batches.shape)
    quality = shuffle_quality(
        batches, shard_sizes=catalog.shard_sizes, labels=labels if (labels >= 0).any() else None
    )
    shares = rank_shares(
        order, shard_sizes=catalog.shard_sizes, shard_bytes=catalog.shard_bytes, world_size=world_size
    )
    return {
        "num_samples": order.num_samples,
        "num_shards": catalog.num_shards,
        "global_batch": order.global_batch,
        "world_size": world_size,
        "num_lanes": order.num_lanes,
        "window_shards": order.window_shards,
        "epoch": order.epoch,
        "seed": order.seed,
        "steps_per_epoch": order.num_steps,
        "num_dropped": order.num_dropped,
        **asdict(shares),
        "shuffle": asdict(quality),
    }


def order_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as rows of a table."""
    return [
        ("samples", f"{report['num_samples']:,} in {report['num_shards']:,} shards"),
        ("steps per epoch", f"{report['steps_per_epoch']:,} of {report['global_batch']:,} samples"),
        ("dropped per epoch", f"{report['num_dropped']:,}, others every epoch"),
        ("lanes", f"{report['num_lanes']}, each shuffling {report['window_shards']} shards at a time"),
        *share_rows(RankShares([RankShare(**rank) for rank in report["ranks"]], report["num_shared"])),
        *_quality_rows(report["shuffle"]),
    ]


def _quality_rows(quality: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("shards per batch", "shards_per_batch", "{:.1f}"),
        ("pairs of one shard", "same_shard_pairs", "{:.2%}"),
        ("length of class runs", "class_run", "{:.3f}"),
    ]
    return [
        (title, f"{form.format(quality[key])}; uniform {form.format(quality[key + '_uniform'])}")
        for title, key, form in rows
        if quality[key] is not None
    ]
