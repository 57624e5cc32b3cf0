"""One task: the samples of one shard -> NAME-000042.tar + .idx + .parquet. Same task, same bytes."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from linerate.shards.careful import careful_judge
from linerate.shards.fetch import SampleReader, hide_userinfo
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.image_policy import Judge, make_judge
from linerate.shards.options import ImagePolicy
from linerate.shards.plan import Plan
from linerate.shards.spill import spilled_rows
from linerate.shards.tar_writer import TarWriter
from linerate.shards.upload import send_shard
from linerate.shards.write_samples import index_table, write_samples

MARK_KEY = b"linerate"


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """All that a process needs to write one shard; picklable and small."""

    plan_folder: str
    shard: int
    out: str
    name: str
    policy: ImagePolicy
    first_shard: int = 0
    """Number of the plan's first shard among the files: others lie before it where this is an append."""
    first_sample_id: int = 0
    """Of the plan's first sample, likewise."""
    fetch: FetchOptions = field(default_factory=FetchOptions)
    upload_to: str = ""
    """URL that the whole shard is sent to; `out` is a staging folder then."""

    @property
    def number(self) -> int:
        """Of the shard's files."""
        return self.first_shard + self.shard

    @property
    def stem(self) -> Path:
        """The shard's path without a suffix."""
        return Path(self.out) / f"{self.name}-{self.number:06d}"


@dataclass(frozen=True, kw_only=True)
class ShardMark:
    """What the .parquet of a whole shard says about it; written last, so it is the proof."""

    plan_id: str
    shard: int
    samples: int
    tar_bytes: int
    tar_xxh3: int
    max_height: int
    max_width: int
    max_sample_bytes: int
    rejects: list[tuple[int, str, int, str, str]]
    """(sample_id, key, size, reason, detail) of the places that stay empty."""
    damage: str = ""
    """What `verify --repair` found wrong with the tar beyond the samples that it left out."""


@dataclass(frozen=True)
class PackedShard:
    """A shard whose tar lies complete under a temporary name; finish_shard makes it durable and visible."""

    task: ShardTask
    fd: int
    temp_tar: Path
    text_index: bytes
    table: Any
    mark: ShardMark


def run_task(task: ShardTask, report: Callable[[int], None]) -> Callable[[], ShardMark]:
    """The shard's tar now, its sync and its mark in the callable that comes back."""
    return functools.partial(finish_shard, pack_shard(task, report))


def pack_shard(task: ShardTask, report: Callable[[int], None] = lambda samples: None) -> PackedShard:
    """Write the tar of one shard under a temporary name in its folder. finish_shard does the rest.

    Raises OSError when the folder takes no more, or when the source fails as a whole.
    """
    plan = Plan.load(Path(task.plan_folder))
    rows, containers = spilled_rows(plan, plan.load_rows(task.shard), task.shard)
    rows = hide_userinfo(rows, containers)
    first_sample_id = task.first_sample_id + plan.first_sample_id(task.shard)
    temp_tar = _temp_name(task, ".tar")
    fd = os.open(temp_tar, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        writer = TarWriter(fd)
        columns = write_samples(
            writer,
            SampleReader(rows, containers, max_bytes=task.policy.max_image_bytes, options=task.fetch),
            rows,
            first_sample_id=first_sample_id,
            judge=_judge_for(task),
            report=report,
        )
        tar_bytes, tar_xxh3 = writer.finish()
    except BaseException:
        os.close(fd)
        temp_tar.unlink(missing_ok=True)
        raise
    table = index_table(rows, columns, first_sample_id=first_sample_id)
    mark = ShardMark(
        plan_id=plan.plan_id,
        shard=task.number,
        samples=len(table),
        tar_bytes=tar_bytes,
        tar_xxh3=tar_xxh3,
        max_height=_highest(table, "height"),
        max_width=_highest(table, "width"),
        max_sample_bytes=_highest(table, "size"),
        rejects=columns.rejects,
    )
    text_index = b"\n".join([b"v1.2 %d" % len(table), *columns.index_lines, b""])
    return PackedShard(task, fd, temp_tar, text_index, table, mark)


def finish_shard(packed: PackedShard) -> ShardMark:
    """Sync the tar, give it its name, then the .idx, and the .parquet as the last: the shard is whole.

    Meant for a background thread: the sync costs up to half of the wall time and holds no lock.
    """
    task, stem = packed.task, packed.task.stem
    try:
        try:
            getattr(os, "fdatasync", os.fsync)(packed.fd)
        finally:
            os.close(packed.fd)
        if packed.mark.samples:
            packed.temp_tar.replace(stem.with_suffix(".tar"))
            temp = _temp_name(task, ".idx")
            temp.write_bytes(packed.text_index)
            temp.replace(stem.with_suffix(".idx"))
        else:  # readers refuse an empty tar, so of a shard without samples only the mark remains
            packed.temp_tar.unlink()
        write_mark(stem.with_suffix(".parquet"), packed.table, packed.mark)
    except BaseException:
        remove_temps(task)
        raise
    if task.upload_to:
        send_shard(task, packed.mark)
    return packed.mark


def write_mark(path: Path, table: Any, mark: ShardMark) -> None:
    """Write a shard's index with its mark, and make it durable and visible at once."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    table = table.replace_schema_metadata({MARK_KEY: json.dumps(vars(mark))})
    pq.write_table(table, temp, compression="zstd", row_group_size=max(1, len(table)))
    with temp.open("rb") as file:
        os.fsync(file.fileno())
    temp.replace(path)


def load_mark(task: ShardTask, *, plan_id: str) -> ShardMark | None:
    """The mark of a whole shard of this plan; None when the shard has yet to be written."""
    stem = task.stem
    try:
        metadata = pq.read_schema(stem.with_suffix(".parquet")).metadata or {}
        mark = ShardMark(**json.loads(metadata[MARK_KEY]))
        agrees = mark.plan_id == plan_id and mark.shard == task.number
        whole = not mark.samples or (
            stem.with_suffix(".tar").stat().st_size == mark.tar_bytes and stem.with_suffix(".idx").exists()
        )
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        return None
    return mark if agrees and whole else None


def load_plan_id(path: Path) -> str | None:
    """The plan that the mark in this .parquet belongs to; None where there is no mark."""
    try:
        return str(json.loads((pq.read_schema(path).metadata or {})[MARK_KEY])["plan_id"])
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        return None


def remove_temps(task: ShardTask) -> None:
    """Remove what this process left of an unfinished shard."""
    for suffix in (".tar", ".idx", ".parquet"):
        _temp_name(task, suffix).unlink(missing_ok=True)


def _judge_for(task: ShardTask) -> Judge:
    """In this process; in one of its own where a worker died on this shard before and left its file."""
    if task.policy.may_crash:
        others = task.stem.parent.glob(f".{task.stem.name}.tar.*.tmp")
        if any(path != _temp_name(task, ".tar") for path in others):
            return careful_judge(task.policy)
    return make_judge(task.policy)


def _highest(table: Any, name: str) -> int:
    return int(table.column(name).to_numpy().max(initial=0))


def _temp_name(task: ShardTask, suffix: str) -> Path:
    # Host and process keep two writers of one shard apart; the leading dot hides it from every `*.tar`.
    # Process numbers alone do not: in containers they are small and the same everywhere.
    return task.stem.with_name(f".{task.stem.name}{suffix}.{_host()}-{os.getpid()}.tmp")


@functools.cache
def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())[:64]
