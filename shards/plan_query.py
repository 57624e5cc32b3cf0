"""The part of planning that DuckDB does: filters, counts and the columns of a plan, within bounded memory."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from linerate.shards.engines import default_num_workers
from linerate.shards.errors import UserError
from linerate.shards.good_rows import GoodRows
from linerate.shards.manifest_sql import list_as_tags, literal, quoted, text_as_tags
from linerate.shards.options import Selection
from linerate.shards.scan import SCAN_NAME, SCAN_SCHEMA, Listing
from linerate.shards.shuffle import PLACE, STREAM_ROWS, parse_memory

# What Python, Arrow and the Parquet writer take beside DuckDB, whose own limit is the rest.
_BESIDE_BYTES = 400_000_000


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

    def __init__(self, db: Any, listing: Listing, selection: Selection) -> None:
        self._db, self.listing, self._selection = db, listing, selection
        self._filters: dict[str, str] = {}  # name -> SQL that is true or false, never null
        if selection.where is not None:
            # The line feed ends a comment in the condition.
            self._filters["where"] = f"coalesce(({selection.where}\n)::BOOLEAN, false)"
        if selection.hashtags is not None:
            self._add_tags(selection.hashtags)

    def _add_tags(self, path: str) -> None:
        if self.listing.tags is None:
            raise UserError(
                f"--hashtags {path}: {self.listing.where_from} has no column of tags; name it by --tag-column"
            )
        escaped = "|".join(re.escape(tag) for tag in load_tags(path))
        # One automaton for all tags: 1.4 us a row of 8 tags with 1500 wanted; list_has_any took 41.
        wanted = literal(f"\n *#?(?:{escaped}) *\n")
        self._filters["hashtags"] = f"coalesce(regexp_matches(lower({self.listing.tags}), {wanted}), false)"

    def count_filtered(self) -> dict[str, int]:
        """What each filter leaves out; one pass over the columns that they name."""
        conditions = list(self._filters.values())
        if not conditions:
            return {}
        upto = [" AND ".join(conditions[: n + 1]) for n in range(len(conditions))]
        parts = ["count(*)", *(f"count(*) FILTER ({condition})" for condition in upto)]
        query = f"SELECT {', '.join(parts)} FROM {self.listing.relation}"
        with self._where_errors():
            left = self._db.execute(query).fetchall()[0]
        return {name: left[n] - left[n + 1] for n, name in enumerate(self._filters)}

    def batches(self) -> Iterator[Any]:
        """Arrow batches of what the filters leave, with the columns that a shuffle must carry.

        Rows among it that cannot be samples are rejects once the batches end.
        """
        inner = ", ".join(f"{sql} AS {quoted(name)}" for name, sql in self.listing.fields.items())
        wanted = " AND ".join(self._filters.values()) or "true"
        # No parameters: with them the whole result is made before the first row is given out.
        found = _batches(self._db.sql(f"SELECT {inner} FROM {self.listing.relation} WHERE {wanted}"))
        if self.listing.good is None:
            yield from found
            return
        rows = GoodRows(self._db, self.listing.good)
        yield from map(rows.of, found)
        if rows.num_bad:
            self.listing.reject(wanted)
        if rows.any_elsewhere:
            self.listing.after |= self.listing.elsewhere
            for name in self.listing.elsewhere:
                self.listing.constants.pop(name)

    def finish(self, shuffled: Iterator[Any]) -> Iterator[Any]:
        """The plan's columns and PLACE, of shuffled tables of what `batches` gave, in their order."""
        for table in self._with_after(shuffled) if self.listing.after else shuffled:
            for name, value in self.listing.constants.items():
                column = pa.repeat(pa.scalar(value, SCAN_SCHEMA.field(name).type), len(table))
                table = table.append_column(name, column)
            names = [name for name in SCAN_SCHEMA.names if name in table.column_names]
            yield table.select([*names, *self.listing.metadata, PLACE])

    def _with_after(self, shuffled: Iterator[Any]) -> Iterator[Any]:
        first = next(shuffled, None)
        if first is None:
            return
        known = dict.fromkeys(self.listing.fields) | self.listing.after
        columns = ", ".join(
            quoted(name) if sql is None else f"{sql} AS {quoted(name)}" for name, sql in known.items()
        )
        batches = (batch for table in itertools.chain([first], shuffled) for batch in table.to_batches())
        self._db.register("shuffled", pa.RecordBatchReader.from_batches(first.schema, batches))
        for batch in _batches(self._db.sql(f"SELECT {columns}, {PLACE} FROM shuffled")):
            yield pa.Table.from_batches([batch])

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
            columns = self._db.execute(f"SELECT * FROM {self.listing.relation} LIMIT 0").description
            names = [name for name, *_ in columns if not name.startswith("linerate ")]
            raise UserError(
                f"--where {self._selection.where!r} does not work: {first_line(error)}; the columns are "
                f"{', '.join(names)}"
            ) from None


def _batches(relation: Any) -> Iterator[Any]:
    # The name of the same method differs between DuckDB 1 and 2.
    yield from (getattr(relation, "to_arrow_reader", None) or relation.fetch_arrow_reader)(STREAM_ROWS)


def first_line(error: BaseException) -> str:
    """What DuckDB says, as one short line."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return " ".join(line.split())[:200]
