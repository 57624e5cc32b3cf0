"""How a plan's rows in tars are cut: into pieces by where they lie, into buckets by where they go."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from linerate.shards.plan import Plan
from linerate.shards.plan_rows import load_plan_rows

SPILL_NAME = "spill"
LAYOUT_NAME = "layout.json"
BUCKET_BYTES = 1_500_000_000
PIECE_BYTES = 2_000_000_000
# A piece holds a file open for every bucket, and a shard one for every piece; 1024 are allowed as a rule.
MAX_BUCKETS = MAX_PIECES = 256
_ADVISED_BYTES = 128 << 10  # the kernel takes no more into its memory at one call


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a plan's rows are cut: by where they lie into pieces, by where they go into buckets."""

    plan_id: str
    num_pieces: int
    num_buckets: int
    starts: list[int]
    """Per container: where a tar begins when all are laid end to end; -1 for what is no tar."""
    total: int
    """Bytes of all tars."""
    rows: int
    """Rows of the plan that lie in tars, and their bytes."""
    row_bytes: int

    @classmethod
    def load(cls, plan: Plan) -> Layout | None:
        """The stored one of this plan, if there is a spill."""
        try:
            document = json.loads((plan.folder / SPILL_NAME / LAYOUT_NAME).read_text(encoding="utf-8"))
            layout = cls(**document)
        except (OSError, ValueError, TypeError):
            return None
        return layout if layout.plan_id == plan.plan_id else None

    def bucket_of(self, shard: int, num_shards: int) -> int:
        return shard * self.num_buckets // num_shards

    def piece_bounds(self, piece: int) -> tuple[int, int]:
        """Of the tars laid end to end: a row belongs where its first byte is."""
        return piece * self.total // self.num_pieces, (piece + 1) * self.total // self.num_pieces


def make_layout(plan: Plan) -> Layout | None:
    """None where no row of the plan lies in a tar."""
    starts, total = [], 0
    for path in map(Path, plan.containers):
        inside = path.is_file()
        starts.append(total if inside else -1)
        total += path.stat().st_size if inside else 0
    if not total:
        return None
    num_rows = num_bytes = 0
    for _, table in plan_columns(plan):
        inside = np.asarray(starts)[table["container"]] >= 0
        num_rows += int(inside.sum())
        num_bytes += int(table["size"][inside].sum())
    return Layout(
        plan_id=plan.plan_id,
        num_pieces=min(MAX_PIECES, -(-total // PIECE_BYTES)),
        num_buckets=min(MAX_BUCKETS, plan.num_shards, max(1, -(-num_bytes // BUCKET_BYTES))),
        starts=starts,
        total=total,
        rows=num_rows,
        row_bytes=num_bytes,
    )


def plan_columns(plan: Plan) -> Iterator[tuple[int, dict[str, Any]]]:
    """(first row, container, offset and size as arrays) of each shard's task list."""
    begin = 0
    for table in load_plan_rows(plan.folder):
        yield begin, {name: table.column(name).to_numpy() for name in ("container", "offset", "size")}
        begin += len(table)


def part_path(folder: Path, bucket: int, piece: int) -> Path:
    return folder / f"{bucket:04d}" / f"{piece:04d}"


def read_ahead(path: Path, start: int, size: int) -> None:
    """Ask for a stretch of a file in its order; the kernel reads it while the caller goes on."""
    with path.open("rb") as file:
        advise(file.fileno(), start, start + size, "WILLNEED")


def advise(fd: int, start: int, end: int, what: str) -> None:
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    advice = getattr(os, f"POSIX_FADV_{what}")
    step = _ADVISED_BYTES if what == "WILLNEED" else max(1, end - start)
    for at in range(start, end, step):
        os.posix_fadvise(fd, at, min(step, end - at), advice)
