"""Reading an epoch of encoded samples from local shards, on one core; inputs in the scratch folder."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from linerate.bench.contest import Bar, Ceiling, Contest, Setting
from linerate.bench.peers import missing_peer
from linerate.bench.suites.shard_peers import batched, iterate_webdataset, pread_all, require_same_samples
from linerate.bench.suites.shards import scratch_images
from linerate.bench.suites.stream_peers import against_readers
from linerate.bench.timing import Side, one_core
from linerate.pipeline.order import EpochOrder, default_num_lanes
from linerate.pipeline.reader import ShardReader
from linerate.shards.pack import pack


def bench_read(setting: Setting) -> Iterator[Contest]:
    """An epoch of encoded samples in shuffled order, bytes copied into the batch; no decode."""
    num_images, batch = setting.pick(tiny=(40, 8), quick=(512, 64), full=(4096, 256))
    images = scratch_images(setting, num_images, multiple_of=batch)
    catalog = pack(images.root, setting.scratch / "shards", num_workers=0)
    order = EpochOrder(
        catalog.shard_sizes, seed=0, epoch=0, global_batch=batch, num_lanes=default_num_lanes(batch)
    )
    reader = ShardReader(catalog)
    num_samples = order.num_steps * batch
    urls = [os.fspath(catalog.shard_path(shard)) for shard in range(catalog.num_shards)]
    missing = missing_peer("webdataset")

    def read_ours() -> None:
        for step in range(order.num_steps):
            reader.read(order.positions(step))

    def read_theirs() -> None:
        for samples in batched(iterate_webdataset(urls), batch):
            np.frombuffer(b"".join(jpeg for jpeg, _ in samples), dtype=np.uint8)

    def our_samples() -> list[tuple[bytes, int]]:
        batches = (reader.read(order.positions(step)) for step in range(order.num_steps))
        return [(one.jpegs[i].tobytes(), int(one.label[i])) for one in batches for i in range(len(one.jpegs))]

    def agree() -> str:
        theirs = list(iterate_webdataset(urls))
        return require_same_samples(our_samples(), theirs, may_leave_out=order.num_dropped)

    where = [
        (catalog.shard_path(shard), index.offset.tolist(), index.size.tolist())
        for shard in range(catalog.num_shards)
        for index in [catalog.shard_index(shard)]
    ]
    ours = Side(run=read_ours)
    about: dict[str, Any] = {
        "work": f"{num_samples:,} JPEGs of {images.mean_kb} KB from {catalog.num_shards} shards, "
        f"batches of {batch}, one core",
        "unit": "images/s",
        "amount": num_samples,
        "ceiling": Ceiling(
            name="bare pread", side=Side(run=lambda: pread_all(where)), amount=catalog.num_samples
        ),
    }
    with one_core():
        yield Contest(
            peer="webdataset, shardshuffle + shuffle(1000)",
            ours=ours,
            theirs=None if missing else Side(run=read_theirs),
            missing=missing,
            agree=agree,
            bar=Bar(3.0, full_size=setting.size == "full"),
            **about,
        )
        yield from against_readers(
            images,
            setting.scratch,
            batch=batch,
            ours=ours,
            our_samples=our_samples,
            may_leave_out=order.num_dropped,
            **about,
        )
    reader.close()
