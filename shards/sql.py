"""The shards' indexes as tables of DuckDB, which can read nothing else and write nothing at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from linerate.shards.catalog import REJECTED_NAME, Catalog
from linerate.shards.errors import UserError

# What `samples` has besides the columns of the .parquet files.
ADDED = ("shard", "position", "class_name")
_FILE = "__linerate_file"
BATCH_ROWS = 1024


@contextlib.contextmanager
def open_tables(catalog: Catalog) -> Iterator[Any]:
    """A DuckDB connection with the tables `samples`, `shards` and `rejected` of these shards.

    samples: every row of every .parquet, and its shard, its position (0..N-1) and the name of its class.
    A metadata column that is called as one of these three has a trailing underscore.
    Raises UserError where one of the files is missing or damaged, also while they are being read.
    """
    with tempfile.TemporaryDirectory(prefix="linerate-sql-") as spill:
        config: dict[str, str | bool | int | float | list[str]] = {
            "temp_directory": os.path.join(spill, "spill"),  # noqa: PTH118
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        }
        with duckdb.connect(config=config) as db:
            db.execute("SET enable_progress_bar = false")
            try:
                _make_tables(db, catalog)
                yield db
            except (duckdb.Error, pa.ArrowException) as error:
                raise UserError(
                    f"an index of {catalog.root} cannot be read ({one_line(error)}); "
                    f"`linerate shard verify {catalog.root}` lists what is wrong"
                ) from None


@dataclass(frozen=True)
class Answer:
    """What a SELECT found: names of its columns and an iterator that fetches its rows."""

    columns: list[str]
    rows: Iterator[tuple[Any, ...]]


@contextlib.contextmanager
def run_select(catalog: Catalog, query: str) -> Iterator[Answer]:
    """The answer to one SELECT over the tables of open_tables; its rows are fetched while it is open.

    Raises UserError for a query that is wrong, or is anything but one SELECT.
    """
    with open_tables(catalog) as db:
        try:
            _require_select(db.extract_statements(query))
            found = db.execute(query)
            yield Answer([column[0] for column in found.description], _fetched(found))
        except duckdb.Error as error:
            raise UserError(f"--sql: {one_line(error)}") from None


def _require_select(statements: list[Any]) -> None:
    kinds = [statement.type.name for statement in statements]
    if kinds != ["SELECT"]:
        raise UserError(
            f"--sql holds {' and '.join(kinds) or 'no statement'}; it takes one SELECT over samples, shards "
            f"and rejected, which changes nothing"
        )


def _fetched(found: Any) -> Iterator[tuple[Any, ...]]:
    while rows := found.fetchmany(BATCH_ROWS):
        yield from rows


def _make_tables(db: Any, catalog: Catalog) -> None:
    # Nothing of the folder's way is resolved: DuckDB compares the names that it was given.
    root = os.path.abspath(catalog.root)  # noqa: PTH100
    stems = [os.path.splitext(name)[0] for name in catalog.files]  # noqa: PTH122
    files = [os.path.join(root, f"{stem}.parquet") for stem in stems]  # noqa: PTH118
    rejected = os.path.join(root, REJECTED_NAME)  # noqa: PTH118
    shards = pa.table(
        {
            "shard": pa.array(range(catalog.num_shards), pa.int32()),
            "file": pa.array(catalog.files, pa.string()),
            "samples": catalog.shard_sizes,
            "bytes": catalog.shard_bytes,
            "xxh3": catalog.shard_xxh3,
            "first_position": catalog.starts[:-1],
        }
    )
    classes = pa.table(
        {
            "label": pa.array(range(len(catalog.class_names)), pa.int32()),
            "class_name": pa.array(catalog.class_names, pa.string()),
        }
    )
    paths = shards.select(["shard", "first_position"]).append_column(_FILE, pa.array(files, pa.string()))
    db.execute("CREATE SCHEMA linerate")
    for name, table in (("shards", shards), ("linerate.classes", classes), ("linerate.paths", paths)):
        db.register("given", table)
        db.execute(f"CREATE TABLE {name} AS SELECT * FROM given")
        db.unregister("given")
    db.execute(
        f"CREATE VIEW linerate.index AS SELECT * FROM "
        f"read_parquet({_listed(files)}, union_by_name = true, file_row_number = true, filename = '{_FILE}')"
    )
    db.execute(f"CREATE VIEW rejected AS SELECT * FROM read_parquet({_listed([rejected])})")
    db.execute(f"CREATE VIEW samples AS {_samples(db)}")
    db.execute(f"SET allowed_paths = {_listed([*files, rejected])}")
    db.execute("SET enable_external_access = false")
    db.execute("SET lock_configuration = true")


def _samples(db: Any) -> str:
    names = [row[0] for row in db.execute("DESCRIBE linerate.index").fetchall()]
    stored = [name for name in names if name not in (_FILE, "file_row_number")]
    taken = {*ADDED, *(name.lower() for name in stored)}
    columns = [
        f"i.{quoted(name)}" + (f" AS {quoted(_free_name(name, taken))}" if name.lower() in ADDED else "")
        for name in stored
    ]
    return (
        f"SELECT {', '.join(columns)}, p.shard, p.first_position + i.file_row_number AS position, "
        f"c.class_name FROM linerate.index i JOIN linerate.paths p USING ({_FILE}) "
        f"LEFT JOIN linerate.classes c USING (label)"
    )


def _free_name(name: str, taken: set[str]) -> str:
    while name.lower() in taken:  # DuckDB takes `Shard` for `shard`
        name += "_"
    return name


def _listed(paths: list[str]) -> str:
    return "[" + ", ".join("'" + path.replace("'", "''") + "'" for path in paths) + "]"


def quoted(name: str) -> str:
    """A column's name as SQL takes any name."""
    return '"' + name.replace('"', '""') + '"'


def one_line(error: BaseException) -> str:
    """What DuckDB says, without the picture of the query below it."""
    said = str(error).split("\nLINE ")[0]
    return " ".join(said.split())[:300]
