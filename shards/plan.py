"""Which sample goes where: the source's list, shuffled by a keyed hash and cut into one task per shard."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from linerate.shards.errors import UserError
from linerate.shards.options import Sizing
from linerate.shards.sources import Source, SourceReject, SourceRow

PLAN_NAME = "plan.parquet"
HEADER_NAME = "plan.json"
REJECTS_NAME = "source_rejects.parquet"
BATCH_ROWS = 65_536
# Up to so many samples Python sorts them before DuckDB has started, into the same order.
SORTED_HERE = 100_000

_SCAN_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("path", pa.binary()),
        ("container", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int32()),
        ("extra_json", pa.binary()),
    ]
)
REJECT_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),  # null where the sample was given no place
        ("key", pa.string()),
        ("size", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


def shard_bounds(samples: int, num_shards: int) -> list[int]:
    """num_shards + 1 places: shard s holds the planned samples [bounds[s], bounds[s + 1])."""
    return [shard * samples // num_shards for shard in range(num_shards + 1)]


@dataclass(frozen=True)
class Plan:
    """A stored plan: row group s of plan.parquet is the task list of shard s, in order of sample_id."""

    folder: Path
    plan_id: str
    num_samples: int
    total_bytes: int
    num_shards: int
    num_source_rejects: int
    class_names: list[str]
    containers: list[str]

    @classmethod
    def load(cls, folder: Path) -> Plan:
        document = json.loads((folder / HEADER_NAME).read_text(encoding="utf-8"))
        return cls(folder=folder, **document["plan"])

    def first_sample_id(self, shard: int) -> int:
        return shard * self.num_samples // self.num_shards

    def load_rows(self, shard: int) -> Any:
        """Arrow table of this shard's rows (the scan's columns), in order of sample_id."""
        with pq.ParquetFile(self.folder / PLAN_NAME) as file:
            return file.read_row_group(shard)


def load_options(folder: Path) -> dict[str, Any]:
    """The options of the plan stored in this folder."""
    return dict(json.loads((folder / HEADER_NAME).read_text(encoding="utf-8"))["options"])


def make_plan(
    source: Source,
    folder: Path,
    *,
    seed: int,
    sizing: Sizing,
    options: dict[str, Any],
    on_rows: Callable[[float], None] = lambda rows: None,
    class_names: Sequence[str] = (),
    drop_known: Callable[[Path], tuple[int, int]] | None = None,
) -> Plan:
    """List the source, shuffle it globally, cut it into shards and store that in `folder`.

    The order is that of md5(seed, key), which is the same on any machine for all time. Memory stays
    bounded: the list goes through Parquet, and DuckDB's sort of a long one spills into the folder.
    class_names: classes that have their numbers already; new ones come after them. drop_known: takes rows
    out of the stored list and returns (samples, bytes) of what is left.
    Raises UserError when the source holds nothing that could be an image.
    """
    scan = _scan(source, folder, on_rows=on_rows, known_classes=class_names)
    if not scan.num_samples:
        raise UserError(_nothing_found(source, scan))
    if drop_known:
        scan.num_samples, scan.total_bytes = drop_known(folder / _SCAN_NAME)
    num_shards = sizing.num_shards(samples=scan.num_samples, total_bytes=scan.total_bytes)
    digest = xxhash.xxh3_128(json.dumps([options, scan.class_names, num_shards]).encode())
    bounds = shard_bounds(scan.num_samples, num_shards)
    temp = folder / f".{PLAN_NAME}.tmp"
    with pq.ParquetWriter(temp, _SCAN_SCHEMA, compression="zstd", compression_level=1) as writer:
        for shard in _cut(
            _shuffled(folder, num_samples=scan.num_samples, seed=seed),
            [b - a for a, b in itertools.pairwise(bounds)],
        ):
            shard = _with_labels(shard, scan.label_of)
            writer.write_table(shard, row_group_size=len(shard))
            _digest_rows(digest, shard)
    temp.replace(folder / PLAN_NAME)
    (folder / _SCAN_NAME).unlink()
    plan = Plan(
        folder=folder,
        plan_id=digest.hexdigest(),
        num_samples=scan.num_samples,
        total_bytes=scan.total_bytes,
        num_shards=num_shards,
        num_source_rejects=sum(scan.reasons.values()),
        class_names=scan.class_names,
        containers=[os.fspath(path.absolute()) for path in source.containers],
    )
    document = {"options": options, "plan": {k: v for k, v in vars(plan).items() if k != "folder"}}
    temp = folder / f".{HEADER_NAME}.tmp"
    temp.write_text(json.dumps(document), encoding="utf-8")
    temp.replace(folder / HEADER_NAME)
    return plan


@dataclass
class _Scan:
    num_samples: int = 0
    total_bytes: int = 0
    class_names: list[str] = dataclasses.field(default_factory=list)
    label_of: Any = None  # provisional class number -> final one; None where the numbers are final
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)


_SCAN_NAME = "scan.parquet"


def _scan(
    source: Source, folder: Path, *, on_rows: Callable[[float], None], known_classes: Sequence[str] = ()
) -> _Scan:
    """Write scan.parquet and source_rejects.parquet."""
    scan = _Scan()
    found: dict[str, int] = {}  # class name -> provisional number, in order of appearance
    highest = -1
    with (
        pq.ParquetWriter(
            folder / _SCAN_NAME, _SCAN_SCHEMA, compression="zstd", compression_level=1
        ) as writer,
        pq.ParquetWriter(folder / REJECTS_NAME, REJECT_SCHEMA) as reject_writer,
    ):
        rows: list[tuple[Any, ...]] = []
        rejects: list[tuple[Any, ...]] = []
        for item in source.rows():
            if isinstance(item, SourceReject):
                scan.reasons[f"{item.reason} ({item.detail})"] += 1
                rejects.append((None, item.key, item.size, item.reason, item.detail))
                _write_full(reject_writer, REJECT_SCHEMA, rejects)
                continue
            scan.num_samples += 1
            scan.total_bytes += item.size
            highest = max(highest, item.label)
            rows.append(_scan_row(item, found))
            if _write_full(writer, _SCAN_SCHEMA, rows):
                on_rows(BATCH_ROWS)
        _write(writer, _SCAN_SCHEMA, rows)
        _write(reject_writer, REJECT_SCHEMA, rejects)
        on_rows(len(rows))
    if found and highest >= 0:
        raise UserError(
            f"the source labels some samples by number (up to {highest}) and others by name "
            f"({', '.join(sorted(found)[:3])}); pack the two apart"
        )
    scan.class_names = list(known_classes)
    if found:
        scan.class_names += sorted(found.keys() - set(known_classes))
    else:
        scan.class_names += [str(label) for label in range(len(known_classes), highest + 1)]
    if found:
        final = {name: number for number, name in enumerate(scan.class_names)}
        scan.label_of = np.array([final[name] for name in found] + [-1], np.int32)
    return scan


def _scan_row(row: SourceRow, found: dict[str, int]) -> tuple[Any, ...]:
    label = row.label
    if row.label_name is not None:
        label = found.setdefault(row.label_name, len(found))
    return row.key, row.path, row.container, row.offset, row.size, label, row.extra_json


def _write_full(writer: Any, schema: Any, rows: list[tuple[Any, ...]]) -> bool:
    if len(rows) < BATCH_ROWS:
        return False
    _write(writer, schema, rows)
    rows.clear()
    return True


def _write(writer: Any, schema: Any, rows: list[tuple[Any, ...]]) -> None:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _shuffled(folder: Path, *, num_samples: int, seed: int) -> Iterator[Any]:
    """Arrow batches of the scan in order of the keyed hash."""
    if num_samples <= SORTED_HERE:
        return _shuffled_here(folder, seed=seed)
    return _shuffled_by_duckdb(folder, seed=seed)


def _shuffled_here(folder: Path, *, seed: int) -> Iterator[Any]:
    table = pq.read_table(folder / _SCAN_NAME)
    keys, paths = (table.column(name).to_pylist() for name in ("key", "path"))
    prefix = f"{seed}:".encode()
    # What md5_number_lower means in DuckDB: the last 8 bytes, the least significant one first.
    places = [int.from_bytes(hashlib.md5(prefix + key.encode()).digest()[8:], "little") for key in keys]
    order = sorted(range(len(keys)), key=lambda row: (places[row], keys[row], paths[row]))
    yield from table.take(pa.array(order, pa.int64())).to_batches()


def _shuffled_by_duckdb(folder: Path, *, seed: int) -> Iterator[Any]:
    import duckdb  # here, because every packing process loads plans and none but the first makes one

    with duckdb.connect(config={"temp_directory": os.fspath(folder / "spill")}) as db:
        db.execute("SET enable_progress_bar = false")
        shuffled: Any = db.sql(
            "SELECT * FROM read_parquet($file) ORDER BY md5_number_lower(concat($seed, ':', key)), key, path",
            params={"file": os.fspath(folder / _SCAN_NAME), "seed": str(seed)},
        )
        # The name of the same method differs between DuckDB 1 and 2.
        reader = getattr(shuffled, "to_arrow_reader", None) or shuffled.fetch_arrow_reader
        yield from reader(BATCH_ROWS)


def _cut(batches: Iterator[Any], counts: list[int]) -> Iterator[Any]:
    """Tables of these many rows each from a stream of batches."""
    held: list[Any] = []
    num_held = 0
    for count in counts:
        while num_held < count:
            held.append(next(batches))
            num_held += held[-1].num_rows
        table = pa.Table.from_batches(held, held[0].schema)
        yield table.slice(0, count).cast(_SCAN_SCHEMA)
        held = table.slice(count).to_batches()
        num_held -= count


def _with_labels(table: Any, label_of: Any) -> Any:
    if label_of is None:
        return table
    labels = label_of[table.column("label").to_numpy()]
    return table.set_column(
        table.schema.get_field_index("label"), _SCAN_SCHEMA.field("label"), pa.array(labels)
    )


def _digest_rows(digest: Any, table: Any) -> None:
    for name in ("container", "offset", "size", "label"):
        digest.update(np.ascontiguousarray(table.column(name).to_numpy()))
    for name in ("key", "extra_json"):
        values = table.column(name).cast(pa.binary())
        # The lengths keep neighbours apart; -1 tells what is missing from what is empty.
        digest.update(np.ascontiguousarray(pc.fill_null(pc.binary_length(values), -1).to_numpy()))
        digest.update(b"".join(pc.drop_null(values).to_pylist()))


def _nothing_found(source: Source, scan: _Scan) -> str:
    where = ", ".join(os.fspath(path) for path in source.containers[:3])
    if not scan.reasons:
        return f"the source {where} holds no files; give a folder of images or a tar of one"
    seen = "; ".join(f"{count} {reason}" for reason, count in scan.reasons.most_common(4))
    return f"the source {where} holds no images: {seen}"
