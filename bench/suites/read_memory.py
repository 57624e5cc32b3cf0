"""Memory of one rank's order and reader over a set of a billion images, of which only the catalog is real.

Run as a module, with ROOT STEP... for arguments, it is the child whose memory is measured.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from linerate.bench.contest import Bar, Count, Setting
from linerate.pipeline.order import EpochOrder
from linerate.pipeline.reader import ShardReader
from linerate.shards.catalog import Catalog, write_catalog

SHARD_SAMPLES = 10_000
GLOBAL_BATCH = 1024
NUM_LANES = 64
WORLD_SIZE = 64
# DALI's native reader, on every rank for every sample of the whole list: the slope of its resident memory.
DALI_BYTES_PER_SAMPLE = 248


def bench_read_rss(setting: Setting) -> Iterator[Count]:
    """One rank of 64 at 940 M samples: the most memory that order and indexes take."""
    num_samples = setting.pick(tiny=2_000_000, quick=940_000_000, full=940_000_000)
    root = setting.scratch / "billion"
    root.mkdir()
    shard_sizes = np.full(num_samples // SHARD_SAMPLES, SHARD_SAMPLES, dtype=np.int64)
    steps = _write_set(root, shard_sizes)
    grown = _child_growth(root, steps)
    yield Count(
        peer="DALI's native reader, 248 B a sample",
        work=f"order + indexes of one rank of {WORLD_SIZE}, {num_samples:,} samples in "
        f"{len(shard_sizes):,} shards, {len(steps)} windows",
        unit="MiB",
        ours=grown,
        theirs=DALI_BYTES_PER_SAMPLE * num_samples / 2**20,
        bar=Bar(1024, of="ours", at_most=True, full_size=setting.size != "tiny"),
        note="ours: growth of the peak over the imports, in a process of its own; theirs: slope x samples",
    )


def open_order(shard_sizes: np.ndarray) -> EpochOrder:
    """The order of the first epoch."""
    return EpochOrder(shard_sizes, seed=0, epoch=0, global_batch=GLOBAL_BATCH, num_lanes=NUM_LANES)


def _write_set(root: Path, shard_sizes: np.ndarray) -> list[int]:
    """A catalog of all shards, and indexes of those that rank 0 meets at the returned steps."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = open_order(shard_sizes)
    # A window is 4 shards of a lane: two steps in the first, one in each of the next.
    window_steps = 4 * SHARD_SAMPLES * NUM_LANES // GLOBAL_BATCH
    steps = [step for step in (0, 1, window_steps, 2 * window_steps) if step < order.num_steps]
    num = SHARD_SAMPLES
    columns = {
        "sample_id": np.arange(num),
        "offset": np.arange(num) * 110_592 + 512,
        "size": np.full(num, 110_000),
        "height": np.full(num, 375, dtype=np.int32),
        "width": np.full(num, 500, dtype=np.int32),
        "label": np.zeros(num, dtype=np.int32),
        "xxh3_64": np.arange(num, dtype=np.uint64),
    }
    one = root / "one.parquet"
    pq.write_table(pa.table(columns), one)
    files = [f"shard-{shard:06d}.tar" for shard in range(len(shard_sizes))]
    for step in steps:
        for shard in np.unique(order.positions(step, rank=0, world_size=WORLD_SIZE) // num).tolist():
            link = (root / files[shard]).with_suffix(".parquet")
            if not link.exists():
                link.hardlink_to(one)
    shards = {
        "file": files,
        "samples": shard_sizes,
        "bytes": np.full(len(files), 1_106_000_000),
        "xxh3": np.arange(len(files), dtype=np.uint64),
    }
    total = int(shard_sizes.sum())
    header = {
        "name": "shard",
        "seed": 0,
        "plan_id": "synthetic",
        "options": {},
        "class_names": ["one"],
        "num_samples": total,
        "num_planned": total,
        "num_rejected": 0,
        "max_height": 375,
        "max_width": 500,
        "max_sample_bytes": 110_000,
    }
    write_catalog(root, header=header, shards=pa.table(shards))
    return steps


def _child_growth(root: Path, steps: list[int]) -> float:
    command = [sys.executable, "-m", __name__, os.fspath(root), *map(str, steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return float(json.loads(done.stdout)["grown_mib"])


def main(argv: list[str]) -> None:
    """The child: order and reader of rank 0, then the MiB by which its peak exceeds the imports."""
    before = _kib("VmRSS")
    # Forget the peak of the imports: it would hide as much of ours.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    catalog = Catalog.load(Path(argv[0]))
    order, reader = open_order(catalog.shard_sizes), ShardReader(catalog)
    for step in map(int, argv[1:]):
        rows = reader.index_rows(order.positions(step, rank=0, world_size=WORLD_SIZE))
        assert len(rows["offset"]) == GLOBAL_BATCH // WORLD_SIZE
    sys.stdout.write(json.dumps({"grown_mib": (_kib("VmHWM") - before) / 1024}))


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main(sys.argv[1:])
