"""The samples of one task: read, judged, written into the tar, 256 at a time, and the index of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from linerate.shards.fetch import SampleReader
from linerate.shards.image_policy import Judge
from linerate.shards.inspect_image import Buffer, RejectedError
from linerate.shards.scan import SCAN_SCHEMA
from linerate.shards.tar_writer import (
    BLOCK,
    MAX_MEMBER_BYTES,
    TarWriter,
    padded,
    ustar_header,
    ustar_headers,
)

INDEX_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("label", pa.int32()),
        ("xxh3_64", pa.uint64()),
        ("flags", pa.int32()),
    ]
)
REPORT_EVERY = 256


@dataclass
class Columns:
    """The index of the shard being written."""

    samples: list[Any] = field(default_factory=list)
    """(7, n) uint64 arrays: row, offset, size, height, width, flags, xxh3_64."""
    index_lines: list[bytes] = field(default_factory=list)
    rejects: list[tuple[int, str, int, str, str]] = field(default_factory=list)


def write_samples(
    writer: TarWriter,
    source: SampleReader,
    rows: Any,
    *,
    first_sample_id: int,
    judge: Judge,
    report: Callable[[int], None] = lambda samples: None,
) -> Columns:
    """Read, judge and write every row of a task. Nothing but RejectedError leaves a sample out."""
    columns = Columns()
    with source as reader:
        for start in range(0, len(rows), REPORT_EVERY):
            some = rows.slice(start, REPORT_EVERY)
            _write_some(writer, reader, some, first_sample_id + start, start, judge, columns)
            report(len(some))
    return columns


def _write_some(
    writer: TarWriter,
    reader: SampleReader,
    rows: Any,
    first_sample_id: int,
    first_row: int,
    judge: Judge,
    columns: Columns,
) -> None:
    """Some rows of a task. What can be known before an image is read is made for all of them at once."""
    planned: list[int] = rows.column("size").to_pylist()
    extras: list[bytes | None] = rows.column("extra_json").to_pylist()
    names = sample_names(first_sample_id, len(rows))
    texts = [b"%d" % label if label >= 0 else b"" for label in rows.column("label").to_pylist()]
    headers, label_members = _headers(names, rows, texts)
    room, data_of, commit, hash_of = writer.room, writer.data, writer.commit, xxhash.xxh3_64_intdigest
    read_next = reader.read_next
    found: list[tuple[int, ...]] = []
    extra_at: dict[int, int] = {}
    for row, size in enumerate(planned):
        try:
            size = read_next(room)
            data = data_of(size)
            taken = judge(data)
        except RejectedError as reject:
            key = rows.column("key")[row].as_py()
            columns.rejects.append((first_sample_id + row, key, max(size, 0), reject.reason, reject.detail))
            continue
        if taken.jpeg is not None:
            size = len(taken.jpeg)
            data = room(size)[:size]
            data[:] = taken.jpeg
        if size == planned[row]:
            header: Buffer = headers[row * BLOCK : (row + 1) * BLOCK]
        else:
            header = ustar_header(names[row].tobytes() + b".jpg", size)
        digest = hash_of(data)
        offset = commit(header, size, label_members[row])
        if (extra := extras[row]) is not None:
            extra_at[row] = writer.add(names[row].tobytes() + b".json", extra)
        height, width, flags = taken.header
        found.append((row, offset, size, height, width, flags, digest))
    if not found:
        return
    samples = np.array(found, np.uint64).T
    columns.index_lines += _index_lines(samples, names, texts, extra_at, extras)
    samples[0] += np.uint64(first_row)
    columns.samples.append(samples)


def sample_names(first_sample_id: int, count: int) -> npt.NDArray[np.uint8]:
    """(count, 12) uint8: the digits of consecutive sample_ids, which the members' names begin with."""
    numbers = np.arange(first_sample_id, first_sample_id + count)[:, None]
    return (numbers // 10 ** np.arange(11, -1, -1) % 10 + ord("0")).astype(np.uint8)


def _headers(names: npt.NDArray[np.uint8], rows: Any, texts: list[bytes]) -> tuple[memoryview, list[bytes]]:
    """The headers of the images as planned, one after the other, and the whole .cls members, or empty."""
    sizes = np.maximum(rows.column("size").to_numpy(), 0)
    headers = ustar_headers(_suffixed(names, b".jpg"), np.minimum(sizes, MAX_MEMBER_BYTES))
    lengths = np.array([len(text) for text in texts], np.int64)
    payloads = np.array(texts, f"S{BLOCK}").view(np.uint8).reshape(len(texts), BLOCK)
    members = np.hstack([ustar_headers(_suffixed(names, b".cls"), lengths), payloads])
    joined = members.tobytes()
    label_members = [
        joined[row * 2 * BLOCK : (row + 1) * 2 * BLOCK] if text else b"" for row, text in enumerate(texts)
    ]
    return memoryview(headers.tobytes()), label_members


def _suffixed(names: npt.NDArray[np.uint8], suffix: bytes) -> npt.NDArray[np.uint8]:
    return np.hstack([names, np.tile(np.frombuffer(suffix, np.uint8), (len(names), 1))])


def _index_lines(
    samples: Any,
    names: npt.NDArray[np.uint8],
    texts: list[bytes],
    extra_at: dict[int, int],
    extras: list[bytes | None],
) -> Iterator[bytes]:
    """DALI's lines of some samples: kind, offset, size and name of each member."""
    shown = names.tobytes()
    for row, offset, size in samples[:3].T.tolist():
        name = shown[row * 12 : row * 12 + 12]
        if text := texts[row]:
            label_at = offset + padded(size) + BLOCK
            line = b"jpg %d %d %b.jpg cls %d %d %b.cls" % (offset, size, name, label_at, len(text), name)
        else:
            line = b"jpg %d %d %b.jpg" % (offset, size, name)
        if (extra := extras[row]) is not None:
            line += b" json %d %d %b.json" % (extra_at[row], len(extra), name)
        yield line


def index_table(rows: Any, columns: Columns, *, first_sample_id: int) -> Any:
    samples = np.hstack([np.empty((7, 0), np.uint64), *columns.samples])
    taken = samples[0].astype(np.int64)
    kept = rows.select(["key", "label"]).take(pa.array(taken))
    facts = dict(zip(("offset", "size", "height", "width", "flags", "xxh3_64"), samples[1:], strict=True))
    arrays = {
        **{name: pa.array(values).cast(INDEX_SCHEMA.field(name).type) for name, values in facts.items()},
        "sample_id": pa.array(taken + first_sample_id),
        "key": kept.column("key"),
        "label": kept.column("label"),
    }
    index = pa.table([arrays[name] for name in INDEX_SCHEMA.names], schema=INDEX_SCHEMA)
    metadata = [name for name in rows.column_names if name not in SCAN_SCHEMA.names]
    for name, column in zip(metadata, rows.select(metadata).take(pa.array(taken)).columns, strict=True):
        index = index.append_column(name, column)
    return index.combine_chunks()
