"""The part of planning that DuckDB does: filters, counts and the global shuffle, within bounded memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from linerate.shards.engines import default_num_workers
from linerate.shards.errors import UserError
from linerate.shards.manifest_sql import list_as_tags, literal, quoted, text_as_tags
from linerate.shards.options import Selection
from linerate.shards.plan_rows import PLACE, Counts
from linerate.shards.scan import SCAN_NAME, SCAN_SCHEMA, Listing

STREAM_ROWS = 65_536
# What Python, Arrow and the Parquet writer take beside DuckDB, whose own limit is the rest.
_BESIDE_BYTES = 400_000_000
_LEAST_BYTES = 256_000_000


def parse_memory(text: str) -> int:
    """Bytes of `4GB`, `512MB`, `1.5GiB`. Raises UserError for anything else and for too little."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if not found:
        raise UserError(f"--memory is {text!r}; give a number with a unit, such as 4GB or 512MB")
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " "))
    if size < _LEAST_BYTES:
        raise UserError(f"--memory is {text}, a plan needs at least {_LEAST_BYTES // 10**6}MB")
    return size


@contextlib.contextmanager
def open_database(folder: Path, *, memory: str) -> Iterator[Any]:
    """A connection that stays below `memory` and spills into the folder.

    DuckDB's errors inside become UserErrors of one line.
    """
    num_bytes = parse_memory(memory)
    limit = num_bytes - _BESIDE_BYTES if num_bytes >= 3 * _BESIDE_BYTES else num_bytes * 2 // 3
    config: dict[str, str | bool | int | float | list[str]] = {
        "temp_directory": os.fspath(folder / "spill"),
        "memory_limit": f"{limit // 1000}KB",
        "threads": default_num_workers(),
    }
    try:
        with duckdb.connect(config=config) as db:
            db.execute("SET enable_progress_bar = false")
            yield db
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"the plan does not fit into --memory {memory} ({first_line(error)}); give it more, or run it "
            f"with fewer cores"
        ) from None
    except (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException):
        raise  # our own SQL, as the user's is tried before
    except duckdb.Error as error:
        raise UserError(f"the source cannot be listed: {first_line(error)}") from None


def open_scan(db: Any, folder: Path, listing: Listing, classes: Any) -> None:
    """Make scan.parquet the listing's relation, with the columns that filters may name."""
    db.register("classes", classes)
    names = pa.table(
        {"number": pa.array(range(len(listing.containers)), pa.int32()), "name": listing.containers}
    )
    db.register("containers", names)
    # A `.json` of a tar may be anything: what does not parse is null here, and travels as it is.
    db.execute(
        f"""CREATE VIEW scanned AS
        SELECT s.key, s.path, s.size, coalesce(c.label, s.label) AS label, c.label_name, n.name AS container,
            TRY_CAST(TRY(decode(s.extra_json)) AS JSON) AS extra, s.container AS "linerate container",
            s."offset" AS "linerate offset", s.extra_json AS "linerate extra"
        FROM read_parquet({literal(os.fspath(folder / SCAN_NAME))}) s
        LEFT JOIN classes c ON s.label = c.provisional LEFT JOIN containers n ON s.container = n.number"""
    )
    listing.relation = "scanned"
    listing.fields |= {
        "container": '"linerate container"',
        "offset": '"linerate offset"',
        "extra_json": '"linerate extra"',
    }
    tags = "coalesce(extra->'$.hashtags', extra->'$.tags')"
    in_list, in_text = list_as_tags(f"CAST({tags} AS VARCHAR[])"), text_as_tags(f"({tags}->>'$')")
    listing.tags = f"CASE json_type({tags}) WHEN 'ARRAY' THEN {in_list} ELSE {in_text} END"


def load_tags(path: str) -> list[str]:
    """The tags of a file, one a line, small letters, without `#`."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--hashtags {path} cannot be read ({getattr(error, 'strerror', None) or 'it is not UTF-8'}); "
            f"give a text file, one tag a line"
        ) from None
    tags = sorted({tag for line in lines if (tag := line.strip().lstrip("#").strip().lower())})
    if not tags:
        raise UserError(f"--hashtags {path} holds no tag; write one a line")
    return tags


class PlanQuery:
    """A selection of a listing, as SQL."""

    def __init__(self, db: Any, listing: Listing, selection: Selection, *, seed: int) -> None:
        self._db, self._listing, self._selection = db, listing, selection
        # md5_number_lower: the last 8 bytes, the least significant one first.
        self._place = f"md5_number_lower(concat('{seed}:', {listing.fields['key']}))"
        self._filters: dict[str, str] = {}  # name -> SQL that is true or false, never null
        if selection.where is not None:
            # The line feed ends a comment in the condition.
            self._filters["where"] = f"coalesce(({selection.where}\n)::BOOLEAN, false)"
        if selection.hashtags is not None:
            self._add_tags(selection.hashtags)
        if selection.sample is not None and selection.sample < 1:
            self._filters["sample"] = f"{self._place} < {int(selection.sample * 2**64)}::UBIGINT"

    def _add_tags(self, path: str) -> None:
        if self._listing.tags is None:
            raise UserError(
                f"--hashtags {path}: {self._listing.where_from} has no column of tags; name it by "
                f"--tag-column"
            )
        escaped = "|".join(re.escape(tag) for tag in load_tags(path))
        # One automaton for all tags: 1.4 us a row of 8 tags with 1500 wanted; list_has_any took 41.
        wanted = literal(f"\n *#?(?:{escaped}) *\n")
        self._filters["hashtags"] = f"coalesce(regexp_matches(lower({self._listing.tags}), {wanted}), false)"

    def count(self) -> Counts:
        """What each filter leaves out, and what stays; one pass over the columns that they name."""
        conditions = list(self._filters.values())
        upto = [" AND ".join(conditions[: n + 1]) for n in range(len(conditions))]
        kept = upto[-1] if upto else "true"
        size = self._listing.fields["size"]
        parts = [
            "count(*)",
            *(f"count(*) FILTER ({condition})" for condition in upto),
            f"count(*) FILTER ({kept} AND {size} >= 0)",
            f"coalesce(sum({size}) FILTER ({kept} AND {size} >= 0), 0)",
        ]
        query = f"SELECT {', '.join(parts)} FROM {self._listing.relation} WHERE {self._listing.good}"
        with self._where_errors():
            *left, num_known, num_bytes = map(int, self._db.execute(query).fetchall()[0])
        filtered = {name: left[n] - left[n + 1] for n, name in enumerate(self._filters)}
        return Counts(filtered, left[-1], num_known, num_bytes)

    def sorted_batches(self) -> Iterator[Any]:
        """Arrow batches of the plan's columns and PLACE, in order of PLACE."""
        fields = self._listing.fields
        inner = ", ".join(f"{sql} AS {quoted(name)}" for name, sql in fields.items())
        known = {**fields, **self._listing.after}
        names = [name for name in SCAN_SCHEMA.names if name in known]
        names += [*self._listing.metadata, PLACE]
        outer = ", ".join(
            f"{self._listing.after[name]} AS {quoted(name)}" if name in self._listing.after else quoted(name)
            for name in names
        )
        conditions = " AND ".join([self._listing.good, *self._filters.values()])
        # No parameters: with them the whole result is made before the first row is given out.
        shuffled = self._db.sql(
            f"SELECT {outer} FROM (SELECT {inner}, {self._place} AS {PLACE} FROM {self._listing.relation} "
            f"WHERE {conditions} ORDER BY {PLACE})"
        )
        # The name of the same method differs between DuckDB 1 and 2.
        reader = getattr(shuffled, "to_arrow_reader", None) or shuffled.fetch_arrow_reader
        yield from reader(STREAM_ROWS)

    @contextlib.contextmanager
    def _where_errors(self) -> Iterator[None]:
        try:
            yield
        except (
            duckdb.ParserException,
            duckdb.BinderException,
            duckdb.CatalogException,
            duckdb.ConversionException,
            duckdb.InvalidInputException,
            duckdb.NotImplementedException,
            duckdb.OutOfRangeException,
        ) as error:
            if self._selection.where is None:
                raise
            columns = self._db.execute(f"SELECT * FROM {self._listing.relation} LIMIT 0").description
            names = [name for name, *_ in columns if not name.startswith("linerate ")]
            raise UserError(
                f"--where {self._selection.where!r} does not work: {first_line(error)}; the columns are "
                f"{', '.join(names)}"
            ) from None


def first_line(error: BaseException) -> str:
    """What DuckDB says, as one short line."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return " ".join(line.split())[:200]
