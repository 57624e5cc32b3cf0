"""What a rank's loader takes of the host's memory at most, and where DALI takes it from.

Measured with DALI 2.4 on CPUs (`linerate bench run views-rss`): of decoded images there is one batch at a
time, since DALI's CPU operators run one after another; the second stands for the next, which may come before
the views of the first are made.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from linerate.pipeline.order import DEFAULT_WINDOW_SHARDS
from linerate.shards.catalog import Catalog

LIBRARY_BYTES = 700 * 2**20
"""torch, DALI, numba and Python, imported: 670 to 700 MiB resident."""
PIPELINE_BYTES = 170 * 2**20
"""A pipeline of DALI's that has made its first views of small images: 150 to 170 MiB."""
WORKER_BYTES = 400 * 2**20
"""A worker process of the torch backend."""
DECODED_BATCHES = 2
INDEX_ROW_BYTES, ORDER_ROW_BYTES, CATALOG_ROW_BYTES = 44, 32, 200
PHOTO_BYTES, PHOTO_PIXELS = 110_000, 456 * 395
"""The mean of ImageNet's, where nothing better is known."""


@dataclass(frozen=True)
class SampleSize:
    """A sample's place in memory."""

    num_bytes: int
    """Of the JPEG."""
    pixels: int

    @property
    def decoded_bytes(self) -> int:
        return 3 * self.pixels


PHOTO = SampleSize(PHOTO_BYTES, PHOTO_PIXELS)


def largest_sample(catalog: Catalog) -> SampleSize:
    """As large as the catalog's maxima allow, which need not be of one image."""
    return SampleSize(catalog.max_sample_bytes, catalog.max_height * catalog.max_width)


def predict_host_memory(
    sample: SampleSize,
    *,
    shard_sizes: np.ndarray,
    backend: str,
    on_gpu: bool,
    size: int,
    rank_batch: int,
    rank_lanes: int,
    num_threads: int,
    prefetch: int,
    window_shards: int = DEFAULT_WINDOW_SHARDS,
) -> dict[str, int] | None:
    """Bytes of one rank's loader by what they hold, with `total`, if every sample were of that size.

    With the largest sample of a catalog it is an upper bound. shard_sizes: (S,) samples per shard. size: S of
    the views. None for a backend with a pipeline of its own, whose memory nobody here can tell.
    """
    if backend not in ("dali", "torch", "synthetic"):
        return None
    shard_rows = int(np.max(shard_sizes))
    at_hand = min(len(shard_sizes), shards_at_hand(rank_lanes, window_shards=window_shards))
    order = rank_lanes * min(window_shards, len(shard_sizes)) * shard_rows * ORDER_ROW_BYTES
    parts = {
        "libraries": LIBRARY_BYTES,
        "order": order + CATALOG_ROW_BYTES * len(shard_sizes),
        "views": 2 * (prefetch + 2) * rank_batch * 3 * size**2,
    }
    if backend != "synthetic":
        # Every worker of the torch backend has an index of its own, and a batch that it decodes as a whole.
        workers = num_threads if backend == "torch" else 1
        parts["indexes"] = workers * at_hand * shard_rows * INDEX_ROW_BYTES
        batches = workers * 2 if backend == "torch" else 2 * max(1, prefetch) + 2
        parts["JPEG bytes"] = batches * rank_batch * sample.num_bytes
    if backend == "torch":
        parts["workers"] = num_threads * WORKER_BYTES
        parts["decoded images"] = num_threads * rank_batch * sample.decoded_bytes
    if backend == "dali":
        parts["pipeline"] = PIPELINE_BYTES
    if backend == "dali" and not on_gpu:
        parts["decoded images"] = DECODED_BATCHES * rank_batch * sample.decoded_bytes
        # A progressive JPEG's coefficients: two bytes where a decoded level has one.
        parts["decoders"] = num_threads * 2 * sample.decoded_bytes
    return {**parts, "total": sum(parts.values())}


def shards_at_hand(rank_lanes: int, *, window_shards: int) -> int:
    """Shards whose index a rank keeps: a lane holds one window, the reads ahead may stand in the next."""
    return rank_lanes * 2 * (window_shards + 1)


def pool_dali_memory() -> None:
    """Let DALI keep what it needs on the host in one pool of its own; it asks at its first allocation.

    By default decoded images of up to 32 MB come from glibc, which has a heap for every thread: one heap's
    holes do not serve the other threads, and the heaps grow from epoch to epoch. Peaks in MiB, 809 of them
    before the loader, of epochs of 15 batches of 8 images of up to 900 x 1200: 1090 in the first and 1161 in
    the eighth; from the pool 989 and 995, with half the page faults. What outlives a batch must not come from
    the pool (see `dali_graph.views_graph` and `view_memory`), or the next finds holes in it too: without, 958
    and 958. A mapping for each image (M_MMAP_THRESHOLD) is as flat, but a training step on the CPU takes 18 %
    more CPU time with it.
    A user's own setting stays.
    """
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "64k")
