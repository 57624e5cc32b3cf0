"""How far the order of an epoch is from a uniform permutation, as a batch sees it."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, lgamma

import numpy as np
from numpy.typing import NDArray

from linerate.pipeline.order import EpochOrder

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ShuffleQuality:
    """Means over the global batches measured; beside each what a uniform permutation would give."""

    num_steps_measured: int
    shards_per_batch: float
    """Different shards in one global batch."""
    shards_per_batch_uniform: float
    same_shard_pairs: float
    """Share of the pairs of a global batch that come from one shard."""
    same_shard_pairs_uniform: float
    class_run: float | None
    """Mean length of the runs of one class in a global batch; None without labels."""
    class_run_uniform: float | None


def measured_steps(order: EpochOrder, *, num_steps: int) -> Ints:
    """(at most num_steps,) steps, evenly over the epoch."""
    return np.unique(np.linspace(0, order.num_steps - 1, num_steps).astype(np.int64))


def shuffle_quality(batches: Ints, *, shard_sizes: Ints, labels: Ints | None) -> ShuffleQuality:
    """batches: (T, B) positions of T global batches; labels: (T, B) or None."""
    num_steps, size = batches.shape
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    shards = np.searchsorted(starts, batches, side="right") - 1
    counts = [np.unique(row, return_counts=True)[1] for row in shards]
    total = int(starts[-1])
    pairs = [_share_of_pairs(c) for c in counts]
    runs = runs_uniform = None
    if labels is not None:
        new_run = labels[:, 1:] != labels[:, :-1]
        runs = size / (1 + float(new_run.sum(axis=1).mean()))
        same = _share_of_pairs(np.unique(labels, return_counts=True)[1])
        runs_uniform = size / (1 + (size - 1) * (1 - same))
    return ShuffleQuality(
        num_steps_measured=num_steps,
        shards_per_batch=float(np.mean([len(c) for c in counts])),
        shards_per_batch_uniform=_shards_hit(shard_sizes, total, size),
        same_shard_pairs=float(np.mean(pairs)),
        same_shard_pairs_uniform=sum(comb(int(n), 2) for n in shard_sizes) / max(comb(total, 2), 1),
        class_run=runs,
        class_run_uniform=runs_uniform,
    )


def _share_of_pairs(counts: Ints) -> float:
    total = int(counts.sum())
    return float((counts * (counts - 1)).sum()) / max(total * (total - 1), 1)


def _shards_hit(sizes: Ints, total: int, drawn: int) -> float:
    """How many shards a batch hits that is drawn without replacement (hypergeometric)."""
    different, times = np.unique(sizes, return_counts=True)
    missed = [
        np.exp(_log_comb(total - int(n), drawn) - _log_comb(total, drawn)) if n <= total - drawn else 0.0
        for n in different
    ]
    return float((times * (1 - np.array(missed))).sum())


def _log_comb(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
