"""What a source lists, as one table that DuckDB and Arrow read: scan.parquet, and what cannot be a sample."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from linerate.shards.errors import UserError
from linerate.shards.remote_url import without_userinfo
from linerate.shards.sources import Source, SourceReject, SourceRow, container_name

SCAN_NAME = "scan.parquet"
REJECTS_NAME = "source_rejects.parquet"
BATCH_ROWS = 65_536
# Their names are held in memory and stand in catalog.json.
MAX_CLASSES = 1_000_000

SCAN_SCHEMA = pa.schema(
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


@dataclass(kw_only=True)
class Listing:
    """The samples of a source as SQL: what a filter may name, and what becomes a row of the plan."""

    relation: str
    """What stands behind FROM; its columns are those that --where may name."""
    good: str = "true"
    """Which of its rows can be samples."""
    fields: dict[str, str] = field(default_factory=lambda: {n: f'"{n}"' for n in SCAN_SCHEMA.names})
    """The plan's columns before the sort: name -> SQL over the relation. `key` is among them."""
    after: dict[str, str] = field(default_factory=dict)
    """Columns that the sort need not carry: name -> SQL over `fields`."""
    tags: str | None = None
    """SQL over the relation: its tags as text, each with a line feed before and behind."""
    containers: list[str]
    class_names: list[str]
    numbered: bool = False
    """Does the source state classes by their numbers?"""
    num_rows: int | None = None
    """Where it is known; `good` is true of all of them."""
    num_known: int = 0
    """Rows whose bytes are known, and those bytes."""
    known_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejects of source_rejects.parquet by reason."""
    own_keys: bool = False
    """Are keys something else than the paths?"""
    where_from: str
    """The source, as errors call it."""

    @property
    def metadata(self) -> list[str]:
        """Names of the columns behind the plan's own."""
        return [name for name in {**self.fields, **self.after} if name not in SCAN_SCHEMA.names]


@dataclass
class RejectWriter:
    """source_rejects.parquet, grown by rows."""

    folder: Path
    reasons: Counter[str]
    _writer: Any = None

    def __enter__(self) -> RejectWriter:
        self._writer = pq.ParquetWriter(self.folder / REJECTS_NAME, REJECT_SCHEMA)
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def add(self, rows: list[tuple[str, int, str, str]]) -> None:
        """rows: (key, size, reason, detail)."""
        self.reasons.update(f"{reason} ({detail})" if detail else reason for _, _, reason, detail in rows)
        write_rows(self._writer, REJECT_SCHEMA, [(None, without_userinfo(key), *row) for key, *row in rows])


def scan_rows(
    source: Source, folder: Path, rejects: RejectWriter, *, on_rows: Callable[[float], None]
) -> tuple[Listing, Any]:
    """Write scan.parquet; returns what it lists, and its (provisional, final class number, name) table.

    Labels in it are provisional where classes have names. Raises UserError where some have numbers too.
    """
    found: dict[str, int] = {}  # class name -> provisional number, in order of appearance
    highest, num_rows, num_known, num_bytes = -1, 0, 0, 0
    with pq.ParquetWriter(folder / SCAN_NAME, SCAN_SCHEMA, compression="zstd", compression_level=1) as writer:
        rows: list[tuple[Any, ...]] = []
        bad: list[tuple[str, int, str, str]] = []
        for item in source.rows():
            if isinstance(item, SourceReject):
                bad.append((item.key, item.size, item.reason, item.detail))
                if len(bad) == BATCH_ROWS:
                    rejects.add(bad)
                    bad = []
                continue
            num_rows += 1
            num_known += item.size >= 0
            num_bytes += max(item.size, 0)
            highest = max(highest, item.label)
            rows.append(_scan_row(item, found))
            if len(rows) == BATCH_ROWS:
                _require_classes(source, highest + 1, len(found))
                write_rows(writer, SCAN_SCHEMA, rows)
                on_rows(BATCH_ROWS)
                rows = []
        _require_classes(source, highest + 1, len(found))
        write_rows(writer, SCAN_SCHEMA, rows)
        rejects.add(bad)
        on_rows(len(rows))
    if found and highest >= 0:
        raise UserError(mixed_labels(highest, sorted(found)))
    class_names = sorted(found) if found else [str(label) for label in range(highest + 1)]
    final = {name: number for number, name in enumerate(class_names)}
    classes = pa.table(
        {
            "provisional": pa.array(range(len(found)), pa.int32()),
            "label": pa.array([final[name] for name in found], pa.int32()),
            "label_name": pa.array(list(found), pa.string()),
        }
    )
    listing = Listing(
        relation="",  # of scan.parquet and the classes, see plan_query.open_scan
        containers=[container_name(path) for path in source.containers],
        class_names=class_names,
        numbered=not found,
        num_rows=num_rows,
        num_known=num_known,
        known_bytes=num_bytes,
        reasons=rejects.reasons,
        where_from=", ".join(os.fspath(path) for path in source.containers[:3]),
    )
    return listing, classes


def _require_classes(source: Source, *counts: int) -> None:
    """Raise UserError where classes, by number or by name, are too many."""
    if max(counts) > MAX_CLASSES:
        raise UserError(
            f"{', '.join(os.fspath(path) for path in source.containers[:3])} has {max(counts):,} classes; at "
            f"most {MAX_CLASSES:,} are taken, numbered from 0: give a source that has fewer, or no labels"
        )


def with_final_labels(table: Any, classes: Any) -> Any:
    """The scan's rows with class numbers in the order of the names."""
    if not len(classes):
        return table
    label_of = np.append(classes.column("label").to_numpy(), np.int32(-1))
    labels = label_of[table.column("label").to_numpy()]
    place = table.schema.get_field_index("label")
    return table.set_column(place, SCAN_SCHEMA.field("label"), pa.array(labels, pa.int32()))


def mixed_labels(highest: int, names: list[str]) -> str:
    """The error for classes of which some have numbers and others names."""
    return (
        f"the source labels some samples by number (up to {highest}) and others by name "
        f"({', '.join(names[:3])}); pack the two apart"
    )


def write_rows(writer: Any, schema: Any, rows: list[tuple[Any, ...]]) -> None:
    """Append tuples in the schema's order to a Parquet file."""
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, one.type) for column, one in zip(columns, schema, strict=True)]
    writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _scan_row(row: SourceRow, found: dict[str, int]) -> tuple[Any, ...]:
    label = row.label
    if row.label_name is not None:
        label = found.setdefault(row.label_name, len(found))
    return row.key, row.path, row.container, row.offset, row.size, label, row.extra_json
