"""Tars are read front to back, once: their samples go into buckets on disk, which are shuffled one by one.

The plan's order is random, so packing a large tar from where it lies costs one ranged read per image. Here
pieces of the tars are read in their order, and every sample is appended to the bucket of its shard. A bucket
is a run of shards that fits into memory: the random order is met there. Tars that fit into memory as a whole
are read ahead instead, and nothing is written.

`OUT/.pack/spill/layout.json` says how the plan was cut; `spill/0007/0003` is what piece 3 has for bucket 7:
the samples' bytes, then (row of the plan, offset) of each in order of the rows, then how many those are. A
part gets its name when it is whole and synced; a bucket is removed when all its shards are whole. A row that
is in no part is read from its tar, so the shards' bytes do not depend on any of this.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from linerate.shards.engines import run_tasks
from linerate.shards.errors import UserError, show_bytes
from linerate.shards.out_folder import TARS_NAME
from linerate.shards.plan import Plan
from linerate.shards.remote_tars import TarBuckets, find_in_tars
from linerate.shards.spill_layout import (
    LAYOUT_NAME,
    SPILL_NAME,
    Layout,
    make_layout,
    part_path,
    read_ahead,
)
from linerate.shards.spill_task import SpillTask, load_index

# Tars of so many bytes are read ahead on any machine, and up to this share of the free memory on larger ones.
READ_WHOLE_BYTES = 256 << 20
READ_WHOLE_SHARE = 0.25
CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass
class Spill:
    """What was spilled for a run; tell it which shards are whole, and it frees their disk space."""

    folder: Path
    bucket_of: dict[int, int] = field(default_factory=dict)  # shards that are not whole yet
    tars: TarBuckets | None = None
    """Those of tars at URLs."""

    def shard_is_whole(self, shard: int) -> None:
        if self.tars:
            self.tars.shard_is_whole(shard)
        bucket = self.bucket_of.pop(shard, None)
        if bucket is not None and bucket not in self.bucket_of.values():
            shutil.rmtree(self.folder / f"{bucket:04d}", ignore_errors=True)


def prepare_tasks(
    plan: Plan,
    shards: Collection[int],
    *,
    num_workers: int,
    on_progress: Callable[[str, float], None] = lambda stage, amount: None,
) -> Spill:
    """Bring the samples of these shards, as far as they lie in tars, to where they are read fast.

    on_progress: ("to spill", about how many samples), then ("spill", samples done since).
    Raises UserError when the disk has no room, StoppedError when writing there cannot succeed.
    """
    folder = plan.folder / SPILL_NAME
    layout = make_layout(plan) if shards else None
    if layout is None or layout.total <= whole_bytes():
        shutil.rmtree(folder, ignore_errors=True)
        if layout:
            _read_whole(plan, layout, on_progress)
        return Spill(folder, tars=TarBuckets(plan, shards))
    if Layout.load(plan) != layout:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        temp = folder / f".{LAYOUT_NAME}.tmp"
        temp.write_text(json.dumps(vars(layout)), encoding="utf-8")
        temp.replace(folder / LAYOUT_NAME)
    spill = Spill(folder, {shard: layout.bucket_of(shard, plan.num_shards) for shard in shards})
    buckets = sorted(set(spill.bucket_of.values()))
    _tidy(folder, keep=buckets)
    tasks = [task for piece in range(layout.num_pieces) if (task := _missing(plan, folder, piece, buckets))]
    share = sum(len(task.buckets) for task in tasks) / (layout.num_pieces * layout.num_buckets)
    _require_space(folder, layout, num_bytes=int(layout.row_bytes * share))
    if tasks:
        on_progress("to spill", int(layout.rows * share))
        # What fails three times stays where it is: its shards read it from the tar, and may fail alone.
        run_tasks(
            "linerate.shards.spill_task:run_task",
            tasks,
            num_workers=min(num_workers, 4),
            on_done=lambda index, result: None,
            on_progress=lambda samples: on_progress("spill", samples),
        )
    return spill


def whole_bytes() -> int:
    """How much of tars may be read into memory and will stay there until it is packed."""
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container, versions 2 and 1
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((CONTROL_GROUP / name).read_text(encoding="ascii")))
    return max(READ_WHOLE_BYTES, int(READ_WHOLE_SHARE * min(limits, default=0)))


def _read_whole(plan: Plan, layout: Layout, on_progress: Callable[[str, float], None]) -> None:
    on_progress("to spill", layout.rows)
    bounds = [start for start in layout.starts if start >= 0] + [layout.total]
    tars = [path for path, start in zip(plan.containers, layout.starts, strict=True) if start >= 0]
    for path, (begin, end) in zip(tars, itertools.pairwise(bounds), strict=True):
        for at in range(0, end - begin, READ_WHOLE_BYTES):
            size = min(READ_WHOLE_BYTES, end - begin - at)
            read_ahead(Path(path), at, size)
            on_progress("spill", layout.rows * size / layout.total)


def spilled_bytes(plan: Plan) -> int:
    """Disk space that a spill takes now and that packing will free."""
    folders = (plan.folder / name for name in (SPILL_NAME, TARS_NAME))
    return sum(part.stat().st_size for folder in folders for part in folder.glob("[0-9]*/[0-9]*"))


def spilled_rows(plan: Plan, rows: Any, shard: int) -> tuple[Any, list[str]]:
    """(the rows of a shard, the containers that they count) with what was spilled read from there."""
    container, offset = (rows.column(name).to_numpy().copy() for name in ("container", "offset"))
    containers = list(plan.containers)
    for part, places, offsets in (*_find_spilled(plan, shard, len(rows)), *find_in_tars(plan, rows)):
        read_ahead(part, 0, part.stat().st_size)
        container[places] = len(containers)
        offset[places] = offsets
        containers.append(os.fspath(part))
    if len(containers) == len(plan.containers):
        return rows, containers
    for name, values in (("container", container), ("offset", offset)):
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(name), pa.array(values))
    return rows, containers


def _find_spilled(plan: Plan, shard: int, num_rows: int) -> Iterator[tuple[Path, Any, Any]]:
    """(part, rows of the shard that lie in it, their offsets there)."""
    layout = Layout.load(plan)
    if layout is None:
        return
    first = plan.first_sample_id(shard)
    bucket = layout.bucket_of(shard, plan.num_shards)
    for piece in range(layout.num_pieces):
        part = part_path(plan.folder / SPILL_NAME, bucket, piece)
        index = load_index(part)
        if index is None:
            continue
        begin, end = np.searchsorted(index[:, 0], (first, first + num_rows))
        if begin < end:
            yield part, index[begin:end, 0] - first, index[begin:end, 1]


def _missing(plan: Plan, folder: Path, piece: int, buckets: list[int]) -> SpillTask | None:
    missing = tuple(bucket for bucket in buckets if not part_path(folder, bucket, piece).exists())
    return SpillTask(plan_folder=os.fspath(plan.folder), piece=piece, buckets=missing) if missing else None


def _tidy(folder: Path, *, keep: list[int]) -> None:
    """Remove buckets whose shards are whole, and what dead processes of this machine left behind."""
    for path in folder.glob("[0-9]*"):
        if int(path.name) not in keep:
            shutil.rmtree(path, ignore_errors=True)
    for temp in folder.glob(f"*/.*.{socket.gethostname()}.*.tmp"):
        if not Path(f"/proc/{temp.name.split('.')[-2]}").exists():
            temp.unlink(missing_ok=True)


def _require_space(folder: Path, layout: Layout, *, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    # While a bucket is packed both it and its shards are there.
    needed = num_bytes + layout.row_bytes // layout.num_buckets
    if needed > free:
        raise UserError(
            f"to shuffle tars takes a copy of their samples until the shards are whole, which needs about "
            f"{show_bytes(needed)}, the disk of {folder.parent.parent} has {show_bytes(free)} free; free "
            f"some, or give an OUT (where that is a URL, a --staging) on another disk"
        )
