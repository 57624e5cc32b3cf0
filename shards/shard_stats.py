"""What packing each shard cost: kept beside the shards, outside of the bytes that the input decides."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from linerate.shards import pack_shard
from linerate.shards.pack_shard import ShardMark, ShardTask
from linerate.shards.plan import Plan
from linerate.shards.plan_rows import SHARDS_PER_FILE, rows_path
from linerate.shards.remote_url import without_userinfo
from linerate.shards.worker import TaskFailure

STATS_NAME = "pack_stats.parquet"
_SOURCES_KEY = b"linerate sources"


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """One row of pack_stats.parquet."""

    shard: int
    samples: int
    rejects: int
    bytes_read: int
    """Of the source, as far as the plan knew the sizes."""
    bytes_written: int
    seconds: float
    """Reading, judging and writing."""
    sync_seconds: float
    """Until the disk had it; this runs beside the next shard's work."""
    peak_rss_mib: float
    """Of the worker process so far."""
    images_per_s: float
    """(samples + rejects) / seconds."""
    retries: int = 0
    """Attempts that failed before this one, in the same run."""
    host: str = ""
    finished_at: float = 0.0
    """Seconds since 1970."""


SCHEMA = pa.schema(
    [
        (name, {"int": pa.int64(), "float": pa.float64(), "str": pa.string()}[str(of.type)])
        for name, of in ShardStats.__dataclass_fields__.items()
    ]
)


def run_task(task: ShardTask, report: Callable[[int], None]) -> Callable[[], tuple[ShardMark, ShardStats]]:
    """pack_shard.run_task, timed."""
    started = time.perf_counter()
    rest = pack_shard.run_task(task, report)
    packed = time.perf_counter()

    def finish() -> tuple[ShardMark, ShardStats]:
        waited = time.perf_counter()
        mark = rest()
        seen = mark.samples + len(mark.rejects)
        return mark, ShardStats(
            shard=mark.shard,
            samples=mark.samples,
            rejects=len(mark.rejects),
            bytes_read=_planned_bytes(task),
            bytes_written=mark.tar_bytes if mark.samples else 0,
            seconds=packed - started,
            sync_seconds=time.perf_counter() - waited,
            peak_rss_mib=_peak_rss_mib(),
            images_per_s=seen / max(packed - started, 1e-9),
            host=socket.gethostname(),
            finished_at=time.time(),
        )

    return finish


def _planned_bytes(task: ShardTask) -> int:
    with pq.ParquetFile(rows_path(Path(task.plan_folder), task.shard)) as file:
        sizes = file.read_row_group(task.shard % SHARDS_PER_FILE, columns=["size"]).column("size")
    return int(pc.sum(pc.max_element_wise(sizes, 0)).as_py() or 0)


def _peak_rss_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


@dataclass
class StatsLog:
    """A line for each finished shard, on disk at once: what a killed run measured is not lost.

    path: `stats*.jsonl` in the work folder; no two processes write one.
    """

    path: Path
    _retries: Counter[int] = field(default_factory=Counter)

    def retried(self, index: int, failure: TaskFailure) -> None:
        """For run_tasks: the task at this index will be tried again."""
        self._retries[index] += 1

    def add(self, index: int, stats: ShardStats) -> None:
        line = json.dumps(asdict(replace(stats, retries=self._retries[index]))) + "\n"
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)


def write_stats(out: Path, work: Path) -> None:
    """OUT/pack_stats.parquet: the logs in `work` over what it held before, one row a shard, by number."""
    rows: dict[int, dict[str, Any]] = {}
    # Where there was none, or a damaged one: it is for the eye, and new rows are worth more.
    with contextlib.suppress(OSError, ValueError, TypeError, pa.ArrowException):
        rows = {stats.shard: asdict(stats) for stats in load_stats(out)}
    for log in sorted(work.glob("stats*.jsonl")):
        for line in log.read_bytes().splitlines():
            try:
                stats = ShardStats(**json.loads(line))
            except (ValueError, TypeError):  # the last line of a killed run may be cut short
                continue
            rows[stats.shard] = asdict(stats)
    if not rows:
        return
    sources = load_sources(out)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        now = [without_userinfo(path) for path in Plan.load(work).sources]
        sources = [*(one for one in sources if one != now), now]
    table = pa.Table.from_pylist([rows[shard] for shard in sorted(rows)], schema=SCHEMA)
    temp = out / f".{STATS_NAME}.tmp"
    pq.write_table(table.replace_schema_metadata({_SOURCES_KEY: json.dumps(sources)}), temp)
    temp.replace(out / STATS_NAME)


def load_sources(out: Path) -> list[list[str]]:
    """What each `pack` into OUT was given to read, absolute, the last one last; empty where nothing says."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        stored = json.loads((pq.read_schema(out / STATS_NAME).metadata or {})[_SOURCES_KEY])
        return [[str(path) for path in paths] for paths in stored]
    return []


def load_stats(out: Path) -> list[ShardStats]:
    """One for each shard that was timed, by number; empty where pack_stats.parquet is missing."""
    if not (out / STATS_NAME).exists():
        return []
    return [ShardStats(**row) for row in pq.read_table(out / STATS_NAME, schema=SCHEMA).to_pylist()]
