"""One task of the spill: a piece of the tars, read front to back, into one part for every bucket."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from linerate.shards.plan import Plan
from linerate.shards.spill_layout import SPILL_NAME, Layout, advise, part_path, plan_columns

BLOCK_BYTES = 32 << 20
# More than this between two samples is stepped over: nobody wants what lies there.
GAP_BYTES = 1 << 20
_MAX_VIEWS = 1000  # of one writev


@dataclass(frozen=True, kw_only=True)
class SpillTask:
    """One piece, for these buckets."""

    plan_folder: str
    piece: int
    buckets: tuple[int, ...]


def run_task(task: SpillTask, report: Callable[[int], None]) -> Callable[[], None]:
    """Read one piece into its parts; their sync and their names in the callable that comes back."""
    plan = Plan.load(Path(task.plan_folder))
    layout = Layout.load(plan)
    if layout is None:  # another run has removed it: then it has no use for it either
        return lambda: None
    folder = plan.folder / SPILL_NAME
    rows = _rows_of_piece(plan, layout, task)
    with contextlib.ExitStack() as on_error:
        parts = {}
        for bucket in task.buckets:
            parts[bucket] = Part(part_path(folder, bucket, task.piece))
            on_error.callback(parts[bucket].discard)
        for block in _read_blocks(plan, rows):
            buckets = rows.bucket[block.rows]
            order = np.argsort(buckets, kind="stable")
            for chosen in np.split(order, np.flatnonzero(np.diff(buckets[order])) + 1):
                if len(chosen):
                    part = parts[int(buckets[chosen[0]])]
                    part.append(rows.row[block.rows[chosen]], [block.views[i] for i in chosen.tolist()])
            report(len(block.rows))
        on_error.pop_all()
    return lambda: finish_parts(list(parts.values()))


def finish_parts(parts: list[Part]) -> None:
    try:
        for part in parts:
            part.finish()
    finally:
        for part in parts:
            part.discard()


class Part:
    """A part being written under a temporary name."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self._path = path
        self._temp = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        self._fd: int | None = os.open(
            self._temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666
        )
        self._rows: list[Any] = []
        self._sizes: list[int] = []

    def append(self, rows: Any, views: list[memoryview]) -> None:
        self._rows.append(rows)
        self._sizes.extend(map(len, views))
        for first in range(0, len(views), _MAX_VIEWS):
            self._write(views[first : first + _MAX_VIEWS])

    def append_chunks(self, row: int, chunks: Iterator[memoryview]) -> None:
        """One sample that comes in chunks."""
        size = 0
        for chunk in chunks:
            self._write([chunk])
            size += len(chunk)
        self._rows.append([row])
        self._sizes.append(size)

    def finish(self) -> None:
        """Write the index, sync, and take the name."""
        assert self._fd is not None
        rows = np.concatenate([*self._rows, np.empty(0, np.int64)]).astype(np.int64)
        offsets = np.cumsum([0, *self._sizes], dtype=np.int64)[:-1]
        order = np.argsort(rows, kind="stable")
        index = np.stack([rows[order], offsets[order]], axis=1)
        self._write([memoryview(index.tobytes() + np.int64(len(rows)).tobytes())])
        getattr(os, "fdatasync", os.fsync)(self._fd)
        self._temp.replace(self._path)

    def discard(self) -> None:
        """Close it, and remove what has not taken its name."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self._temp.unlink(missing_ok=True)

    def _write(self, views: list[memoryview]) -> None:
        assert self._fd is not None
        done = os.writev(self._fd, views)
        if done < sum(map(len, views)):
            rest = memoryview(b"".join(views))[done:]
            while rest:
                rest = rest[os.write(self._fd, rest) :]


def load_index(part: Path) -> Any:
    """(n, 2) int64: rows of the plan in rising order, and their offsets; None where there is no such part."""
    try:
        size = part.stat().st_size
        with part.open("rb") as file:
            file.seek(size - 8)
            (num_rows,) = np.fromfile(file, np.int64, 1)
            file.seek(size - 8 - 16 * num_rows)
            return np.fromfile(file, np.int64, 2 * num_rows).reshape(num_rows, 2)
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class _Rows:
    """Rows of one piece in the order in which they lie, as arrays."""

    row: Any
    container: Any
    offset: Any
    size: Any
    bucket: Any


def _rows_of_piece(plan: Plan, layout: Layout, task: SpillTask) -> _Rows:
    starts = np.asarray(layout.starts, np.int64)
    first, last = layout.piece_bounds(task.piece)
    wanted = set(task.buckets)
    found = []
    for shard, (begin, table) in enumerate(plan_columns(plan)):
        bucket = layout.bucket_of(shard, plan.num_shards)
        if bucket not in wanted:
            continue
        start = starts[table["container"]]
        address = start + table["offset"]
        (inside,) = np.nonzero((start >= 0) & (address >= first) & (address < last))
        columns = [begin + inside, *(table[name][inside] for name in ("container", "offset", "size"))]
        found.append([*columns, np.full(len(inside), bucket)])
    columns = [np.concatenate(parts).astype(np.int64) for parts in zip(*found, strict=True)]
    order = np.lexsort((columns[2], columns[1]))
    return _Rows(*(column[order] for column in columns))


@dataclass(frozen=True)
class _Block:
    """Neighbours that were read at once; what is no longer whole in its tar is left out."""

    rows: Any
    views: list[memoryview]


def _read_blocks(plan: Plan, rows: _Rows) -> Iterator[_Block]:
    buffer = memoryview(bytearray(BLOCK_BYTES))
    spans = list(_spans(rows))
    with contextlib.ExitStack() as stack:
        opened, fd = -1, -1
        for number, (first, last, start, end) in enumerate(spans):
            container = int(rows.container[first])
            if container != opened:
                stack.close()
                fd = os.open(plan.containers[container], os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                opened = container
                advise(fd, start, end, "WILLNEED")
            if number + 1 < len(spans) and int(rows.container[spans[number + 1][0]]) == container:
                advise(fd, *spans[number + 1][2:], "WILLNEED")
            if end - start > len(buffer):
                buffer = memoryview(bytearray(end - start))
            got = _read_fully_at(fd, buffer[: end - start], start)
            advise(fd, start, end, "DONTNEED")
            begins = rows.offset[first:last] - start
            ends = begins + rows.size[first:last]
            (whole,) = np.nonzero(ends <= got)
            places = zip(begins[whole].tolist(), ends[whole].tolist(), strict=True)
            yield _Block(first + whole, [buffer[begin:stop] for begin, stop in places])


def _spans(rows: _Rows) -> Iterator[tuple[int, int, int, int]]:
    """(first row, behind the last, first byte, behind the last) of what is read at once."""
    container, offset = rows.container.tolist(), rows.offset.tolist()
    ends = (rows.offset + rows.size).tolist()
    first = 0
    for row in range(1, len(offset) + 1):
        if (
            row == len(offset)
            or container[row] != container[first]
            or ends[row] - offset[first] > BLOCK_BYTES
            or offset[row] - ends[row - 1] > GAP_BYTES
        ):
            yield first, row, offset[first], max(ends[first:row])
            first = row


def _read_fully_at(fd: int, view: memoryview, offset: int) -> int:
    done = 0
    while done < len(view) and (more := os.preadv(fd, [view[done:]], offset + done)):
        done += more
    return done
