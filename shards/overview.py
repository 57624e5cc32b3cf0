"""What is in a set of shards, asked of the .parquet files by DuckDB: sizes, formats, classes, rejects."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import duckdb
import pyarrow as pa

from linerate.shards.catalog import REJECTED_NAME, Catalog
from linerate.shards.errors import UserError
from linerate.shards.inspect_image import FLAG_NAMES

# Upper ends of the size histogram's bins, bytes; powers of two around a photo's size.
_BIN_BYTES = [1 << shift for shift in range(10, 25)]


@dataclass(frozen=True, kw_only=True)
class Overview:
    """Totals and distributions of a set of shards."""

    root: str
    num_shards: int
    num_samples: int
    num_planned: int
    num_rejected: int
    num_bytes: int
    """Of the tars."""
    jpeg_bytes: int
    sample_bytes: dict[str, float]
    """Quantiles of a JPEG's bytes: min, p10, p50, p90, max, mean."""
    height: dict[str, float]
    width: dict[str, float]
    size_histogram: list[tuple[int, int]]
    """(upper end in bytes, samples); the bin reaches down to the one before it."""
    formats: dict[str, int]
    """Samples by property; one sample can have several."""
    classes: dict[str, int]
    """Samples by class, the largest first; unlabelled ones as `(none)`."""
    rejects: dict[str, int]
    """Left-out files by reason, the most frequent first."""
    smallest_shard: int
    largest_shard: int
    options: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(catalog: Catalog) -> Overview:
    """Read all of the catalog's .parquet files. Raises UserError when one is missing or damaged."""
    files = [str(catalog.shard_path(shard).with_suffix(".parquet")) for shard in range(catalog.num_shards)]
    with duckdb.connect() as db:
        db.execute("SET enable_progress_bar = false")
        try:
            db.execute(
                "CREATE VIEW samples AS SELECT * FROM read_parquet($files)".replace("$files", _sql(files))
            )
            rejected = str(catalog.root / REJECTED_NAME)
            db.execute(f"CREATE VIEW rejected AS SELECT * FROM read_parquet({_sql([rejected])})")
            return Overview(
                root=str(catalog.root),
                num_shards=catalog.num_shards,
                num_samples=catalog.num_samples,
                num_planned=catalog.num_planned,
                num_rejected=catalog.num_rejected,
                num_bytes=int(catalog.shard_bytes.sum()),
                jpeg_bytes=int(_rows(db, "SELECT sum(size) FROM samples")[0][0]),
                sample_bytes=_quantiles(db, "size"),
                height=_quantiles(db, "height"),
                width=_quantiles(db, "width"),
                size_histogram=_histogram(db),
                formats=_formats(db),
                classes=_classes(db, catalog),
                rejects=_rejects(db),
                smallest_shard=int(catalog.shard_sizes.min()),
                largest_shard=int(catalog.shard_sizes.max()),
                options=catalog.options,
            )
        except (duckdb.Error, pa.ArrowException) as error:
            raise UserError(
                f"an index of {catalog.root} cannot be read ({str(error).splitlines()[0][:200]}); "
                f"`linerate shard verify {catalog.root}` lists what is wrong"
            ) from None


def _sql(paths: list[str]) -> str:
    return "[" + ", ".join("'" + path.replace("'", "''") + "'" for path in paths) + "]"


def _rows(db: Any, query: str) -> list[tuple[Any, ...]]:
    return list(db.execute(query).fetchall())


def _quantiles(db: Any, column: str) -> dict[str, float]:
    names = ("min", "p10", "p50", "p90", "max", "mean")
    row = _rows(
        db,
        f"SELECT min({column}), quantile_disc({column}, 0.1), quantile_disc({column}, 0.5), "
        f"quantile_disc({column}, 0.9), max({column}), avg({column}) FROM samples",
    )[0]
    return dict(zip(names, (round(float(value), 1) for value in row), strict=True))


def _histogram(db: Any) -> list[tuple[int, int]]:
    counts = _rows(
        db,
        f"SELECT list_count(list_filter({_BIN_BYTES}, lambda b: b < size)) AS bin, count(*) FROM samples "
        f"GROUP BY bin ORDER BY bin",
    )
    ends = [*_BIN_BYTES, 1 << 62]
    found = dict(counts)
    return [(ends[i], found.get(i, 0)) for i in range(min(found), max(found) + 1)]


def _formats(db: Any) -> dict[str, int]:
    columns = ", ".join(f"count(*) FILTER (flags & {bit} != 0)" for bit in FLAG_NAMES)
    counts = _rows(db, f"SELECT {columns} FROM samples")[0]
    found = dict(zip(FLAG_NAMES.values(), counts, strict=True))
    return {name: count for name, count in found.items() if count}


def _classes(db: Any, catalog: Catalog) -> dict[str, int]:
    counts = _rows(db, "SELECT label, count(*) AS n FROM samples GROUP BY label ORDER BY n DESC, label")
    names = catalog.class_names
    return {names[label] if 0 <= label < len(names) else "(none)": count for label, count in counts}


def _rejects(db: Any) -> dict[str, int]:
    return dict(
        _rows(
            db,
            "SELECT reason || CASE WHEN reason IN ('not a JPEG', 'not an image') AND detail != '' "
            "THEN ' (' || detail || ')' ELSE '' END AS why, count(*) AS n FROM rejected GROUP BY why "
            "ORDER BY n DESC, why",
        )
    )
