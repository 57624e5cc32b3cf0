"""One shard's index rebuilt from its tar, whose bytes stay as they are; what is damaged in it is left out."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from linerate.shards.inspect_image import RejectedError, check_full_decode, check_header
from linerate.shards.pack_shard import ShardMark, write_mark
from linerate.shards.tar_reader import Member
from linerate.shards.verify_shard import NO_LIMIT, Decode, group_members, list_members, load_mark_fields
from linerate.shards.write_samples import INDEX_SCHEMA

DAMAGED = "damaged in the shard"
BROKEN_SUFFIX = ".tar.broken"  # of a tar that holds nothing sound, so that no reader takes it for a shard
Reject = tuple[int, str, int, str, str]


@dataclass(frozen=True, kw_only=True)
class RepairTask:
    """One shard to repair."""

    tar: str
    shard: int
    plan_id: str
    decode: Decode
    rejects: tuple[Reject, ...] = ()
    """Of the old rejected.parquet, what no whole shard's mark lists."""


@dataclass(frozen=True)
class Repaired:
    """The shard's new mark, and what was left out now."""

    mark: ShardMark
    left_out: list[Reject]


@dataclass(frozen=True)
class _Remains:
    """What is left of a shard."""

    data: memoryview
    samples: dict[Any, dict[str, Member]]
    rows: dict[int, dict[str, Any]]
    """sample_id -> row of the old .parquet."""
    lines: dict[int, str]
    """Offset of an image -> its line in the old .idx."""
    rejects: dict[int, Reject]


def run_task(task: RepairTask, report: Callable[[int], None]) -> Repaired:
    """Write the shard's .idx and .parquet anew from all that agrees with itself.

    An image stays where its bytes have the old .parquet's checksum; without a .parquet, where its header is
    sound. What is lost with a .parquet are keys (the sample's number instead) and metadata columns.
    """
    tar = Path(task.tar)
    table = _old_table(tar.with_suffix(".parquet"))
    with _mapped(tar) as data:
        members, damage = list_members(tar) if len(data) else ([], f"{tar.name} is missing or empty")
        remains = _Remains(
            data=data,
            samples=group_members(members),
            rows={row["sample_id"]: row for row in table.to_pylist()} if table is not None else {},
            lines=_old_lines(tar.with_suffix(".idx")),
            rejects={reject[0]: tuple(reject) for reject in load_mark_fields(table).get("rejects", [])}
            if table is not None
            else {reject[0]: reject for reject in task.rejects},
        )
        rows, left_out = _sort_out(remains, task.decode)
        lines = [_index_line(row, remains) for row in rows]
        mark = ShardMark(
            plan_id=task.plan_id,
            shard=task.shard,
            samples=len(rows),
            tar_bytes=len(data),
            tar_xxh3=xxhash.xxh3_64_intdigest(data),
            max_height=max((row["height"] for row in rows), default=0),
            max_width=max((row["width"] for row in rows), default=0),
            max_sample_bytes=max((row["size"] for row in rows), default=0),
            rejects=[*(remains.rejects.values() if table is not None else _held(remains)), *left_out],
            damage=damage.replace(os.fspath(tar), tar.name),
        )
    schema = INDEX_SCHEMA if table is None else table.schema.remove_metadata()
    _write(tar, mark, pa.Table.from_pylist(rows, schema=schema), lines)
    report(len(rows))
    return Repaired(mark, left_out)


def _held(remains: _Remains) -> list[Reject]:
    """The rejects that this tar nevertheless holds: they were left out of its index before."""
    return [remains.rejects[sample_id] for sample_id in remains.samples if sample_id in remains.rejects]


def _sort_out(remains: _Remains, decode: Decode) -> tuple[list[dict[str, Any]], list[Reject]]:
    """(rows of what is sound, rejects for what is not)."""
    rows, left_out = [], []
    found = {sample_id for sample_id in remains.samples if isinstance(sample_id, int)}
    for sample_id in sorted((found | remains.rows.keys()) - remains.rejects.keys()):
        old, fields = remains.rows.get(sample_id), remains.samples.get(sample_id, {})
        try:
            rows.append(_sound_row(sample_id, old, fields, remains.data, decode))
        except RejectedError as reject:
            key, size = (old["key"], old["size"]) if old else (f"{sample_id:012d}", 0)
            what = reject.detail if reject.reason == DAMAGED else str(reject)
            left_out.append((sample_id, key, size, DAMAGED, what))
    return rows, left_out


def _sound_row(
    sample_id: int,
    old: dict[str, Any] | None,
    fields: dict[str, Member],
    data: memoryview,
    decode: Decode,
) -> dict[str, Any]:
    places = [(old["offset"], old["size"])] if old else []
    if "jpg" in fields:
        places.append((fields["jpg"].offset, fields["jpg"].size))
    for offset, size in places:
        with data[offset : offset + size] as jpeg:
            digest = xxhash.xxh3_64_intdigest(jpeg)
            if old and (digest != old["xxh3_64"] or len(jpeg) != size):
                continue
            header = check_header(jpeg, max_pixels=NO_LIMIT)
            if decode == "full":
                check_full_decode(jpeg, header)
        seen = {"offset": offset, "size": size, "height": header.height, "width": header.width}
        start = old or {"key": f"{sample_id:012d}", "flags": header.flags, "label": -1}
        return {
            **start,
            **seen,
            "sample_id": sample_id,
            "xxh3_64": digest,
            "label": _label(fields.get("cls"), data, start["label"]),
        }
    if not len(data):
        raise RejectedError(DAMAGED, "the tar is missing or empty")
    what = "its bytes differ from the checksum in the .parquet" if places else "the tar holds no image of it"
    raise RejectedError(DAMAGED, what)


def _label(member: Member | None, data: memoryview, otherwise: int) -> int:
    if member is None:
        return otherwise
    text = bytes(data[member.offset : member.offset + member.size])
    return int(text) if text.isdigit() and len(text) < 10 else otherwise


def _index_line(row: dict[str, Any], remains: _Remains) -> str:
    fields = remains.samples.get(row["sample_id"], {})
    if "jpg" in fields and fields["jpg"].offset == row["offset"]:
        return " ".join(f"{name} {m.offset} {m.size} {m.name.decode()}" for name, m in fields.items())
    # The tar's headers are damaged before it: what the index said, else the image alone.
    alone = f"jpg {row['offset']} {row['size']} {row['sample_id']:012d}.jpg"
    said = remains.lines.get(row["offset"], "")
    return said if said.startswith(alone) else alone


def _write(tar: Path, mark: ShardMark, table: Any, lines: list[str]) -> None:
    index = tar.with_suffix(".idx")
    if mark.samples:
        temp = index.with_name(f".{index.name}.{os.getpid()}.tmp")
        temp.write_text("\n".join([f"v1.2 {len(lines)}", *lines, ""]), encoding="utf-8")
        temp.replace(index)
    else:
        index.unlink(missing_ok=True)
        if tar.exists():
            tar.replace(tar.with_suffix(BROKEN_SUFFIX))
    write_mark(tar.with_suffix(".parquet"), table, mark)


def _old_table(path: Path) -> Any:
    """The old index; None where it is lost or of another make."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException):
        return None
    return table if set(INDEX_SCHEMA.names) <= set(table.column_names) else None


def _old_lines(path: Path) -> dict[int, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
    except (OSError, ValueError):
        return {}
    parts = ((line.split(" ", 2), line) for line in lines)
    return {int(words[1]): line for words, line in parts if words[0] == "jpg" and words[1].isdigit()}


@contextmanager
def _mapped(tar: Path) -> Iterator[memoryview]:
    if not tar.exists() or not tar.stat().st_size:
        yield memoryview(b"")
        return
    with (
        tar.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        yield view
