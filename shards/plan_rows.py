"""Sorted rows on their way into a plan: one row a key, cut into shards, written as row groups, digested.

Tables stream through; what is held is one batch, one shard and the rows of one key.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from linerate.shards.scan import SCAN_SCHEMA
from linerate.shards.shuffle import PLACE, STREAM_ROWS
from linerate.shards.sources import MAX_JSON_BYTES

DUPLICATE_KEY = "duplicate key"
DUPLICATE_BYTES = "duplicate"
# An image whose bytes nobody knows before it is fetched counts as so many: ImageNet's mean.
ASSUMED_BYTES = 110_000
# A Parquet file of 100,000 row groups takes each of its readers 2 s and 200 MB before the first row.
SHARDS_PER_FILE = 1000

Drop = Callable[[list[tuple[str, int, str, str]]], None]
"""Told of rows that are no samples: (key, size, reason, detail)."""


@dataclass(frozen=True)
class Counts:
    """How many rows there are, or should be."""

    filtered: dict[str, int]
    """Rows that each filter left out, in the order in which they are asked."""
    num_rows: int
    num_known: int
    """Rows whose bytes are known."""
    num_bytes: int
    """Of those."""

    @property
    def estimated_bytes(self) -> int:
        """Of all rows: those without a known size count as the others do on average."""
        if self.num_known == self.num_rows:
            return self.num_bytes
        mean = self.num_bytes / self.num_known if self.num_known else ASSUMED_BYTES
        return self.num_bytes + int(mean * (self.num_rows - self.num_known))

    def first(self, limit: int | None) -> Counts:
        """About the counts of so many of the rows."""
        if limit is None or limit >= self.num_rows:
            return self
        share = limit / self.num_rows
        return Counts(self.filtered, limit, int(share * self.num_known), int(share * self.num_bytes))


def rows_path(folder: Path, shard: int) -> Path:
    """The file that holds this shard's row group: plan.parquet, plan-1.parquet, ..."""
    number = shard // SHARDS_PER_FILE
    return folder / (f"plan-{number}.parquet" if number else "plan.parquet")


def shard_bounds(samples: int, num_shards: int) -> list[int]:
    """num_shards + 1 places: shard s holds the planned samples [bounds[s], bounds[s + 1])."""
    return [shard * samples // num_shards for shard in range(num_shards + 1)]


def settle(tables: Iterator[Any], *, drop: Drop) -> Iterator[Any]:
    """The rows of tables sorted by PLACE alone, in order of (PLACE, key, path), one a key, without PLACE.

    Equal keys have equal places, so they meet here; the first by (path, container, offset) stays. Two keys
    share a place about once in 2^64 / n^2 plans. Rows with more metadata than a shard takes are dropped too.
    """
    held: Any = None
    for table in tables:
        if held is not None:
            table = pa.concat_tables([held, table])
        if not len(table):
            continue
        table = _one_a_key(table, drop)
        # The last place may go on in the next table.
        places = table.column(PLACE).to_numpy()
        split = int(np.searchsorted(places, places[-1]))
        held = table.slice(split)
        if split:
            yield _without_large(table.slice(0, split).drop_columns([PLACE]), drop)
    if held is not None:
        yield _without_large(held.drop_columns([PLACE]), drop)


def _one_a_key(table: Any, drop: Drop) -> Any:
    """The rows with those of one place in order of key, and the first of each key only."""
    places = table.column(PLACE).to_numpy()
    same = places[1:] == places[:-1]
    if not same.any():
        return table
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    run = table.take(pa.array(tied))
    # By all there is: the order of rows that differ in anything must not be left to chance.
    names = [name for name in SCAN_SCHEMA.names if name in run.column_names]
    ranks = run.select([PLACE, *names])
    if "extra_json" in names:
        extra = pc.fill_null(ranks.column("extra_json"), b"")
        ranks = ranks.set_column(ranks.schema.get_field_index("extra_json"), "extra_json", extra)
    order = pc.sort_indices(ranks, sort_keys=[(name, "ascending") for name in ranks.column_names])
    run = run.take(order)
    keys = run.column("key").combine_chunks()
    again = np.append(False, pc.equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False))
    rows = np.arange(len(table))
    rows[tied] = tied[order.to_numpy()]
    if again.any():
        left_out = run.filter(pa.array(again)).select(["key", "size"])
        drop(
            [
                (key, size, DUPLICATE_KEY, "another row of the source has its name")
                for key, size in zip(*(column.to_pylist() for column in left_out.columns), strict=True)
            ]
        )
        rows = np.delete(rows, tied[again])
    return table.take(pa.array(rows))


def _without_large(table: Any, drop: Drop) -> Any:
    lengths = pc.fill_null(pc.binary_length(table.column("extra_json")), 0)
    most = pc.max(lengths).as_py() or 0
    if most <= MAX_JSON_BYTES:
        return table
    large = pc.greater(lengths, MAX_JSON_BYTES)
    bad = table.filter(large)
    drop(
        [
            (key, size, "too much metadata", f"{length} bytes exceed {MAX_JSON_BYTES}")
            for key, size, length in zip(
                bad.column("key").to_pylist(),
                bad.column("size").to_pylist(),
                lengths.filter(large).to_pylist(),
                strict=True,
            )
        ]
    )
    return table.filter(pc.invert(large))


def first_rows(tables: Iterator[Any], limit: int | None) -> Iterator[Any]:
    """As many rows, or all."""
    left = limit
    for table in tables:
        if left is not None:
            table = table.slice(0, left)
            left -= len(table)
        yield table
        if left == 0:
            return


def write_plan_rows(
    tables: Iterator[Any], folder: Path, *, bounds: list[int], digest: Any, digest_paths: bool
) -> tuple[int, int, int]:
    """Write one row group a shard as `bounds` cuts them, fewer where the rows end before.

    Returns the numbers of rows, of rows whose bytes are known, and of those bytes, as Counts has them.
    """
    counts = [b - a for a, b in itertools.pairwise(bounds)]
    num_rows = num_known = num_bytes = 0
    writer: Any = None
    try:
        for shard, table in enumerate(_cut(tables, counts)):
            if shard % SHARDS_PER_FILE == 0:
                if writer:
                    writer.close()
                writer = _open_writer(rows_path(folder, shard), table.schema)
            writer.write_table(table, row_group_size=len(table))
            sizes = table.column("size").to_numpy()
            num_rows += len(table)
            num_known += int(np.count_nonzero(sizes >= 0))
            num_bytes += int(sizes[sizes >= 0].sum())
            digest_rows(digest, table, paths=digest_paths)
    finally:
        if writer:
            writer.close()
    return num_rows, num_known, num_bytes


def load_plan_rows(folder: Path, columns: list[str] | None = None) -> Iterator[Any]:
    """The rows of a folder's plan, shard by shard; of all columns, or of these."""
    for first in itertools.count(step=SHARDS_PER_FILE):
        path = rows_path(folder, first)
        if not path.exists():
            return
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns)


def _open_writer(path: Path, schema: Any) -> Any:
    # Names hardly repeat, so a dictionary of them is made in vain, and their statistics are read by nobody.
    # A plan is read once or twice: on names of 60 bytes snappy took 0.12 us a row and saved 23 bytes.
    names = {"key", "path"} & set(schema.names)
    return pq.ParquetWriter(
        path,
        schema,
        compression={n: "none" if n in (*names, "size") else "snappy" for n in schema.names},
        write_statistics=False,
        use_dictionary=[name for name in schema.names if name not in (*names, "extra_json", "size")],
        column_encoding={"size": "DELTA_BINARY_PACKED"},
        write_batch_size=STREAM_ROWS,
    )


def _cut(tables: Iterator[Any], counts: list[int]) -> Iterator[Any]:
    """Tables of these many rows each from a stream of them; it ends with the stream."""
    held: list[Any] = []
    num_held = 0
    for count in counts:
        while num_held < count and (table := next(tables, None)) is not None:
            held.append(table)
            num_held += len(table)
        if not num_held:
            return
        table = pa.concat_tables(held)
        yield plan_types(table.slice(0, count)).combine_chunks()
        held = [table.slice(count)]
        num_held = len(held[0])


def with_paths(table: Any) -> Any:
    """The rows with the column `path`, which is not stored where the keys are the paths."""
    if "path" in table.column_names:
        return table
    keys = table.column("key")
    # Relative to their container: `/` is one, and the only one under which keys begin with it.
    paths = pc.if_else(pc.starts_with(keys, "/"), pc.utf8_slice_codeunits(keys, 1), keys)
    return table.add_column(1, SCAN_SCHEMA.field("path"), paths.cast(pa.binary()))


def plan_types(table: Any) -> Any:
    """The table with the plan's columns in their types and order; metadata behind them as it is."""
    others = [one for one in table.schema if one.name not in SCAN_SCHEMA.names]
    own = [one for one in SCAN_SCHEMA if one.name in table.schema.names]
    schema = pa.schema([*own, *(pa.field(one.name, one.type) for one in others)])
    return table.select(schema.names).cast(schema)


def digest_rows(digest: Any, table: Any, *, paths: bool) -> None:
    """Feed what decides the bytes of a shard to an xxhash."""
    for name in ("container", "offset", "size", "label"):
        digest.update(np.ascontiguousarray(table.column(name).to_numpy()))
    for name in ("key", "extra_json", *(["path"] if paths else [])):
        values = table.column(name).cast(pa.binary())
        # The lengths keep neighbours apart; -1 tells what is missing from what is empty.
        digest.update(np.ascontiguousarray(pc.fill_null(pc.binary_length(values), -1).to_numpy()))
        for chunk in pc.drop_null(values).chunks:
            digest.update(_bytes_of(chunk))


def _bytes_of(values: Any) -> Any:
    """The bytes of a binary array's values, one after the other, without a copy."""
    _, offsets, data = values.buffers()
    if data is None or not len(values):
        return b""
    ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    return memoryview(data)[ends[0] : ends[-1]]
