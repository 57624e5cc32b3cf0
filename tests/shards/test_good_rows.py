"""Rows that can be samples, found in batches: the same as SQL says, whatever a quick look clears."""

import itertools

import duckdb
import pyarrow as pa
import pytest

from linerate.shards.good_rows import GoodRows
from linerate.shards.manifest_sql import good_sql

PLAIN = ["a.jpg", "x" * 4000, "d/e f.jpg", "\u00e9.jpg"]
ODD = [None, "", "x" * 4001, "nul\0.jpg", "https:///", "ftp://h/a", "http://h/a", "c:d.jpg", "/abs.jpg"]


@pytest.mark.parametrize("odd", [*ODD, None])
@pytest.mark.parametrize("size", [None, 1, 2**30, 2**30 + 1])
def test_the_rows_kept_are_those_of_which_the_condition_is_true(odd: str | None, size: int | None) -> None:
    paths = [*PLAIN, odd, *PLAIN]
    columns = {"key": pa.array(paths, pa.string())}
    if size is not None:
        columns["size"] = pa.array([size, *[-1] * 8], pa.int64())
    table = pa.table(columns)
    condition = good_sql("key", "key", "size" if size is not None else None)
    with duckdb.connect() as db:
        rows = GoodRows(db, condition)
        # A part of a table, too: its texts begin in the middle of a buffer.
        batches = itertools.chain(table.to_batches(), table.slice(3).to_batches())
        found = pa.concat_tables([pa.Table.from_batches([rows.of(batch)]) for batch in batches])
        expected = pa.concat_tables([table, table.slice(3)])
        wanted = db.execute(f"SELECT * FROM expected WHERE {condition}").fetchall()
    assert [tuple(row.values()) for row in found.to_pylist()] == wanted
    assert rows.num_bad == len(expected) - len(wanted)


@pytest.mark.parametrize(
    ("path", "elsewhere"), [("a.jpg", False), ("a/b.jpg", False), ("/a.jpg", True), ("s3://b/a", True)]
)
def test_rows_that_name_a_file_elsewhere_are_noticed(path: str, elsewhere: bool) -> None:
    with duckdb.connect() as db:
        rows = GoodRows(db, good_sql("path", "key", None))
        batch = pa.RecordBatch.from_pydict({"key": ["k:1", "/k"], "path": [path, "b.jpg"]})
        assert rows.of(batch).num_rows == 2
        assert rows.any_elsewhere is elsewhere


def test_keys_of_their_own_must_be_there_and_of_bounded_length() -> None:
    with duckdb.connect() as db:
        rows = GoodRows(db, good_sql("path", "key", None))
        batch = pa.RecordBatch.from_pydict({"key": ["k", "", None, "x" * 4001], "path": ["a", "b", "c", "d"]})
        assert rows.of(batch).column("path").to_pylist() == ["a"]


def test_a_batch_without_rows_is_one() -> None:
    with duckdb.connect() as db:
        batch = pa.RecordBatch.from_pydict({"key": pa.array([], pa.string())})
        assert GoodRows(db, good_sql("key", "key", None)).of(batch).num_rows == 0
