"""What is in a set of shards, asked of its indexes by DuckDB: sizes, formats, classes, hashtags, rejects."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.inspect_image import FLAG_NAMES
from linerate.shards.shard_stats import STATS_NAME
from linerate.shards.sql import open_tables, quoted

NO_CLASS = "(none)"
TOP_HASHTAGS = 20
EXAMPLES = 3
# Upper ends of the size histogram's bins, bytes; powers of two around a photo's size.
BIN_BYTES = [1 << shift for shift in range(10, 25)]
LARGEST_BIN = 1 << 62
_BY_DETAIL = "(reason IN ('not a JPEG', 'not an image') AND detail != '')"
_QUANTILES = {"p1": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, kw_only=True)
class Hashtags:
    """How the metadata column `hashtags` is filled; case and the sign # make no difference."""

    num_tags: int
    """Different ones."""
    num_untagged: int
    """Samples without any."""
    top: dict[str, int]
    """Samples by tag, the most frequent first; one sample can have several."""


@dataclass(frozen=True, kw_only=True)
class PackRates:
    """How fast the shards were written, where packing left its statistics."""

    num_shards: int
    """Shards that there are statistics of."""
    seconds: float
    """Of all shards together, as if they had been written one after the other."""
    samples_per_s: dict[str, float]
    """Quantiles over shards."""
    bytes_per_s: dict[str, float]
    num_hosts: int
    peak_rss_bytes: int
    """Of the worker process that took most."""
    slowest: list[tuple[int, float, float]]
    """(shard, seconds, samples/s) of the slowest per sample, the worst first."""


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
    """Quantiles of a JPEG's bytes: min, p1, p10, p50, p90, p99, max, mean."""
    height: dict[str, float]
    width: dict[str, float]
    size_histogram: list[tuple[int, int]]
    """(upper end in bytes, samples); the bin reaches down to the one before it."""
    formats: dict[str, int]
    """Samples by property; one sample can have several."""
    classes: dict[str, int]
    """Samples by class, the largest first; unlabelled ones as `(none)`."""
    hashtags: Hashtags | None
    """None where the samples have no such column."""
    metadata: list[str]
    """Names of all columns that came from the source."""
    rejects: dict[str, int]
    """Left-out files by reason, the most frequent first."""
    reject_examples: dict[str, list[str]]
    """The first few keys of each reason."""
    smallest_shard: int
    largest_shard: int
    near_empty_shards: dict[str, int]
    """Samples of the shards that hold fewer than half of the median."""
    rates: PackRates | None
    """None where packing left no statistics."""
    options: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(catalog: Catalog) -> Overview:
    """Read all of the catalog's .parquet files. Raises UserError when one is missing or damaged."""
    with open_tables(catalog) as db:
        size, height, width = (_distribution(db, name) for name in ("size", "height", "width"))
        rejects, examples = _rejects(db)
        return Overview(
            root=str(catalog.root),
            num_shards=catalog.num_shards,
            num_samples=catalog.num_samples,
            num_planned=catalog.num_planned,
            num_rejected=catalog.num_rejected,
            num_bytes=int(catalog.shard_bytes.sum()),
            jpeg_bytes=size.total,
            sample_bytes=size.quantiles(),
            height=height.quantiles(),
            width=width.quantiles(),
            size_histogram=size.histogram(),
            formats=_formats(db),
            classes=_classes(db, catalog),
            hashtags=_hashtags(db),
            metadata=metadata_columns(db),
            rejects=rejects,
            reject_examples=examples,
            smallest_shard=int(catalog.shard_sizes.min()),
            largest_shard=int(catalog.shard_sizes.max()),
            near_empty_shards=_near_empty(catalog),
            rates=_load_rates(catalog),
            options=catalog.options,
        )


def metadata_columns(db: Any) -> list[str]:
    """The columns of `samples` that came from the source, in their order. db: of open_tables."""
    names = [row[0] for row in db.execute("DESCRIBE samples").fetchall()]
    # What we know of every sample begins with its id and ends with its flags, the added columns come last.
    return names[names.index("flags") + 1 : names.index("shard")]


def tags_of_sample(db: Any) -> str | None:
    """SQL for the list of a sample's different hashtags; None where `samples` has no such column.

    The column may be a list of texts, or one text with anything between the tags that can be in none.
    """
    types = {row[0].lower(): (row[0], row[1]) for row in db.execute("DESCRIBE samples").fetchall()}
    name, kind = types.get("hashtags", ("", ""))
    if kind not in ("VARCHAR", "VARCHAR[]"):
        return None
    text = quoted(name) if kind == "VARCHAR" else f"array_to_string({quoted(name)}, ' ')"
    return rf"list_distinct(regexp_extract_all(lower({text}), '[^\s,;#|\[\]{{}}()\"'']+'))"


@dataclass(frozen=True)
class _Distribution:
    """How often every value occurs: exact, and in memory that does not grow with the samples."""

    values: Any
    """(n,) int64, ascending."""
    counts: Any
    """(n,) int64."""

    @property
    def total(self) -> int:
        return int((self.values * self.counts).sum())

    def quantiles(self) -> dict[str, float]:
        reached = np.cumsum(self.counts)
        num = int(reached[-1])
        places = {name: np.searchsorted(reached, math.ceil(q * num)) for name, q in _QUANTILES.items()}
        return {
            "min": float(self.values[0]),
            **{name: float(self.values[place]) for name, place in places.items()},
            "max": float(self.values[-1]),
            "mean": round(self.total / num, 1),
        }

    def histogram(self) -> list[tuple[int, int]]:
        bins = np.searchsorted(BIN_BYTES, self.values)
        found = np.bincount(bins, weights=self.counts).astype(int)
        ends = [*BIN_BYTES, LARGEST_BIN]
        return [(ends[i], int(found[i])) for i in range(int(bins[0]), int(bins[-1]) + 1)]


def _distribution(db: Any, column: str) -> _Distribution:
    found = db.execute(
        f"SELECT {column} AS value, count(*) AS n FROM linerate.index GROUP BY value ORDER BY value"
    ).fetchnumpy()
    return _Distribution(found["value"].astype(np.int64), found["n"].astype(np.int64))


def _rows(db: Any, query: str) -> list[tuple[Any, ...]]:
    return list(db.execute(query).fetchall())


def _formats(db: Any) -> dict[str, int]:
    columns = ", ".join(f"count(*) FILTER (flags & {bit} != 0)" for bit in FLAG_NAMES)
    counts = _rows(db, f"SELECT {columns} FROM linerate.index")[0]
    found = dict(zip(FLAG_NAMES.values(), counts, strict=True))
    return {name: count for name, count in found.items() if count}


def _classes(db: Any, catalog: Catalog) -> dict[str, int]:
    counts = _rows(
        db, "SELECT label, count(*) AS n FROM linerate.index GROUP BY label ORDER BY n DESC, label"
    )
    names = catalog.class_names
    return {names[label] if 0 <= label < len(names) else NO_CLASS: count for label, count in counts}


def _hashtags(db: Any) -> Hashtags | None:
    tags = tags_of_sample(db)
    if tags is None:
        return None
    counts = _rows(
        db,
        f"SELECT tag, count(*) AS n, count(*) OVER () FROM (SELECT unnest({tags}) AS tag FROM samples) "
        f"GROUP BY tag ORDER BY n DESC, tag LIMIT {TOP_HASHTAGS}",
    )
    untagged = _rows(db, f"SELECT count(*) FILTER (coalesce(len({tags}), 0) = 0) FROM samples")
    return Hashtags(
        num_tags=counts[0][2] if counts else 0,
        num_untagged=untagged[0][0],
        top={tag: count for tag, count, _ in counts},
    )


def _rejects(db: Any) -> tuple[dict[str, int], dict[str, list[str]]]:
    found = _rows(
        db,
        f"SELECT {reject_reason()} AS why, count(*) AS n, min({reject_example()}, {EXAMPLES}) "
        f"FROM rejected GROUP BY why ORDER BY n DESC, why",
    )
    return {why: n for why, n, _ in found}, {why: keys for why, _, keys in found}


def reject_reason() -> str:
    """SQL for a reject's reason, with the detail where that takes few values."""
    return f"reason || CASE WHEN {_BY_DETAIL} THEN ' (' || detail || ')' ELSE '' END"


def reject_example() -> str:
    """SQL for a reject's key, with the detail that its reason leaves out."""
    return f"key || CASE WHEN detail = '' OR {_BY_DETAIL} THEN '' ELSE ': ' || detail END"


def _near_empty(catalog: Catalog) -> dict[str, int]:
    least = np.median(catalog.shard_sizes) / 2
    return {
        catalog.files[i]: int(catalog.shard_sizes[i]) for i in np.flatnonzero(catalog.shard_sizes < least)
    }


def _load_rates(catalog: Catalog) -> PackRates | None:
    path = catalog.root / STATS_NAME
    try:
        table = pq.read_table(path)
        shard, host = (table.column(name).to_numpy() for name in ("shard", "host"))
        samples, seconds, num_bytes, rss_mib = (
            table.column(name).to_numpy().astype(np.float64)
            for name in ("samples", "seconds", "bytes_written", "peak_rss_mib")
        )
    except FileNotFoundError:
        return None
    except (KeyError, ValueError, pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}); it only tells how fast packing was: remove it"
        ) from None
    if not len(shard):
        return None
    took = np.maximum(seconds, 1e-9)
    order = np.argsort(samples / took, kind="stable")[:EXAMPLES]
    return PackRates(
        num_shards=len(shard),
        seconds=float(seconds.sum()),
        samples_per_s=_quantiles_of(samples / took),
        bytes_per_s=_quantiles_of(num_bytes / took),
        num_hosts=len(set(host.tolist())),
        peak_rss_bytes=int(rss_mib.max() * (1 << 20)),
        slowest=[(int(shard[i]), float(seconds[i]), float(samples[i] / took[i])) for i in order],
    )


def _quantiles_of(values: Any) -> dict[str, float]:
    p10, p50, p90 = np.quantile(values, [0.1, 0.5, 0.9])
    found = {"min": values.min(), "p10": p10, "p50": p50, "p90": p90, "max": values.max()}
    return {name: round(float(value), 1) for name, value in found.items()}
