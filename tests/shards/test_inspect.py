"""`linerate shard inspect`: what it counts, and what a SELECT can and cannot do."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linerate.__main__ import main
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.options import PackOptions
from linerate.shards.overview import STATS_NAME, summarize
from linerate.shards.pack import pack
from linerate.shards.sql import run_select
from linerate.shards.terminal import visible

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def copied(packed: Catalog, tmp_path: Path) -> Catalog:
    """The packed folder, free to be changed."""
    return Catalog.load(shutil.copytree(packed.root, tmp_path / "it's a copy"))


def add_column(catalog: Catalog, name: str, values: Callable[[int], Any], kind: Any = None) -> None:
    """A metadata column in every .parquet; values: position -> value."""
    for shard in range(catalog.num_shards):
        path = catalog.shard_path(shard).with_suffix(".parquet")
        table = pq.read_table(path)
        start = int(catalog.starts[shard])
        column = pa.array([values(start + row) for row in range(table.num_rows)], kind)
        pq.write_table(table.append_column(name, column), path)


def select(catalog: Catalog, query: str) -> list[tuple[Any, ...]]:
    with run_select(catalog, query) as answer:
        return list(answer.rows)


def shown(capsys: Capture, *argv: object) -> str:
    assert main(["shard", "inspect", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_quantiles_are_values_that_so_many_samples_do_not_exceed(packed: Catalog) -> None:
    sizes = sorted(int(size) for shard in range(5) for size in packed.shard_index(shard).size)
    found = summarize(packed).sample_bytes
    for name, share in (("p1", 0.01), ("p10", 0.1), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert found[name] == np.quantile(sizes, share, method="inverted_cdf")
    assert (found["min"], found["max"]) == (sizes[0], sizes[-1])
    assert found["mean"] == round(sum(sizes) / 40, 1)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (lambda i: ["#Cat", "dog", "cat"] if i < 30 else ["dog"] if i < 35 else [], pa.list_(pa.string())),
        (lambda i: "#Cat, dog cat" if i < 30 else '["DOG"]' if i < 35 else None, pa.string()),
    ],
)
def test_hashtags_are_counted_once_a_sample_as_a_list_or_as_text(
    copied: Catalog, value: Callable[[int], Any], kind: Any
) -> None:
    add_column(copied, "hashtags", value, kind)
    add_column(copied, "user", lambda i: i % 3)
    overview = summarize(copied)
    assert overview.hashtags is not None
    assert overview.hashtags.top == {"dog": 35, "cat": 30}
    assert (overview.hashtags.num_tags, overview.hashtags.num_untagged) == (2, 5)
    assert overview.metadata == ["hashtags", "user"]


def test_hashtags_of_numbers_are_no_hashtags(copied: Catalog, packed: Catalog) -> None:
    add_column(copied, "hashtags", lambda i: i)
    assert summarize(copied).hashtags is None
    assert summarize(packed).hashtags is None


def test_without_any_tag_there_are_no_tags(copied: Catalog) -> None:
    add_column(copied, "hashtags", lambda i: "", pa.string())
    tags = summarize(copied).hashtags
    assert tags is not None
    assert (tags.num_tags, tags.num_untagged, tags.top) == (0, 40, {})


def test_near_empty_shards_hold_fewer_than_half_of_the_median(
    tmp_path: Path, make_jpeg: Callable[..., bytes]
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / "in" / f"{i:02d}.jpg").write_bytes(make_jpeg(i))
    whole = pack(tmp_path / "in", tmp_path / "a", options=PackOptions(min_shards=4), num_workers=0)
    assert summarize(whole).near_empty_shards == {}
    for key in whole.keys(1)[:6]:
        (tmp_path / "in" / key).write_bytes(b"")
    (tmp_path / "in" / whole.keys(1)[6]).write_bytes(b"GIF89a")
    holed = pack(tmp_path / "in", tmp_path / "b", options=PackOptions(min_shards=4), num_workers=0)
    overview = summarize(holed)
    assert overview.near_empty_shards == {"shard-000001.tar": 3}
    assert overview.rejects == {"empty": 6, "not a JPEG (GIF)": 1}
    assert overview.reject_examples == {
        "empty": [f"{key}: 0 bytes" for key in sorted(whole.keys(1)[:6])[:3]],
        "not a JPEG (GIF)": [whole.keys(1)[6]],
    }


def stats(**changed: Any) -> Any:
    columns = {
        "shard": [0, 1, 2],
        "seconds": [1.0, 2.0, 4.0],
        "samples": [8, 8, 8],
        "rejects": [0, 0, 0],
        "bytes_written": [800, 800, 800],
        "host": ["a", "b", "a"],
        "peak_rss_mib": [5.0, 7.0, 6.0],
    }
    return pa.table({**columns, **changed})


def test_rates_come_from_the_statistics_that_packing_left(copied: Catalog, capsys: Capture) -> None:
    (copied.root / STATS_NAME).unlink()
    assert summarize(copied).rates is None
    pq.write_table(stats(), copied.root / STATS_NAME)
    rates = summarize(copied).rates
    assert rates is not None
    assert (rates.num_shards, rates.seconds, rates.num_hosts, rates.peak_rss_bytes) == (3, 7.0, 2, 7 << 20)
    assert (rates.samples_per_s["min"], rates.samples_per_s["p50"], rates.samples_per_s["max"]) == (2, 4, 8)
    assert rates.bytes_per_s["max"] == 800
    assert rates.slowest == [(2, 4.0, 2.0), (1, 2.0, 4.0), (0, 1.0, 8.0)]
    assert "3 shards in 7.0 s of work on 2 hosts" in shown(capsys, copied.root)
    pq.write_table(stats().slice(0, 0), copied.root / STATS_NAME)
    assert summarize(copied).rates is None


def test_damaged_statistics_are_said_to_be(copied: Catalog) -> None:
    for damage in (b"nonsense", None):
        if damage:
            (copied.root / STATS_NAME).write_bytes(damage)
        else:
            pq.write_table(stats().drop_columns(["seconds"]), copied.root / STATS_NAME)
        with pytest.raises(UserError, match=r"pack_stats\.parquet is damaged .* remove it"):
            summarize(copied)


def test_the_screen_shows_all_parts_and_no_control_character(copied: Catalog, capsys: Capture) -> None:
    add_column(copied, "hashtags", lambda i: ["\x1b[2Jcls", "[red]x[/]"], pa.list_(pa.string()))
    header = json.loads((copied.root / "catalog.json").read_text())
    header["class_names"][0] = "\x1b]0;owned\x07[blink]"
    (copied.root / "catalog.json").write_text(json.dumps(header))
    out = shown(capsys, copied.root, "--classes", 1)
    for part in (
        "40 samples",
        "size of a JPEG",
        "the largest 1 of 4",
        "the smallest 1",
        "hashtags, the first",
    ):
        assert part in out
    assert "options: check=header" in out
    assert r"\x1b]0;owned\x07[blink]" in out
    assert not {"\x1b", "\x07"} & set(out)


def test_visible_leaves_letters_and_spells_out_what_moves_the_cursor() -> None:
    assert visible("Käse 猫") == "Käse 猫"
    assert visible("a\x1b[0m\u202eb\n") == r"a\x1b[0m\u202eb\n"


def test_select_sees_every_sample_with_its_shard_position_and_class(packed: Catalog) -> None:
    found = select(
        packed, "SELECT position, shard, class_name, key, sample_id FROM samples ORDER BY position"
    )
    assert [row[0] for row in found] == list(range(40))
    for shard in range(5):
        rows = [row for row in found if row[1] == shard]
        assert [row[3] for row in rows] == packed.keys(shard)
        assert [row[4] for row in rows] == packed.shard_index(shard).sample_id.tolist()
    assert all(key.startswith(name + "/") for _, _, name, key, _ in found)
    assert select(packed, "SELECT sum(samples), max(first_position), count(*) FROM shards") == [(40, 32, 5)]
    assert select(packed, "SELECT count(*) FROM rejected") == [(0,)]


def test_a_sample_without_a_class_is_there_without_its_name(
    tmp_path: Path, make_jpeg: Callable[..., bytes]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(make_jpeg(0))
    catalog = pack(tmp_path / "in", tmp_path / "out", num_workers=0)
    assert select(catalog, "SELECT key, label, class_name FROM samples") == [("a.jpg", -1, None)]


def test_metadata_that_is_called_as_an_added_column_gets_an_underscore(copied: Catalog) -> None:
    add_column(copied, "Shard", lambda i: f"s{i}")
    add_column(copied, "shard_", lambda i: i)
    add_column(copied, 'a "b"', lambda i: 7)
    found = select(
        copied, 'SELECT shard, "Shard__", shard_, "a ""b""" FROM samples ORDER BY position LIMIT 1'
    )
    assert found == [(0, "s0", 0, 7)]


def test_columns_that_only_some_shards_have_are_null_elsewhere(copied: Catalog) -> None:
    path = copied.shard_path(3).with_suffix(".parquet")
    table = pq.read_table(path)
    pq.write_table(table.append_column("user", pa.array(["me"] * len(table))), path)
    assert select(copied, "SELECT count(*), count(user) FROM samples") == [(40, 8)]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT nothing FROM samples", 'Referenced column "nothing" not found'),
        ("SELCT", "Parser Error"),
        ("", "holds no statement; it takes one SELECT"),
        ("SELECT 1; SELECT 2", "holds SELECT and SELECT; it takes one SELECT"),
        ("DROP VIEW samples", "holds DROP; it takes one SELECT"),
        ("COPY shards TO 'x.csv'", "holds COPY; it takes one SELECT"),
        ("ATTACH 'x.db'", "holds ATTACH; it takes one SELECT"),
        ("SET lock_configuration = false", "holds SET; it takes one SELECT"),
        ("SELECT * FROM read_text('/etc/hostname')", "Permission Error: Cannot access file"),
        ("SELECT * FROM read_csv('http://localhost/x')", "Permission Error"),
        ("SELECT * FROM glob('/*')", "Permission Error"),
        ("SELECT * FROM '/etc/hostname'", "does not exist"),
        ("SELECT error('a\nb')", "a b"),
    ],
)
def test_a_query_that_is_wrong_or_reaches_out_is_refused_in_one_line(
    packed: Catalog, query: str, message: str
) -> None:
    before = sorted(packed.root.iterdir())
    with pytest.raises(UserError) as error:
        select(packed, query)
    assert str(error.value).startswith("--sql")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(packed.root.iterdir()) == before


def test_the_catalog_itself_cannot_be_read_by_a_query(packed: Catalog) -> None:
    for name in ("catalog.json", "shard-000000.tar"):
        with pytest.raises(UserError, match="Permission Error"):
            select(packed, f"SELECT * FROM read_text('{packed.root / name}')")


def test_a_missing_index_is_named_by_inspect_and_by_a_query(copied: Catalog) -> None:
    copied.shard_path(2).with_suffix(".parquet").unlink()
    for look in (summarize, lambda catalog: select(catalog, "SELECT 1")):
        with pytest.raises(UserError, match=r"an index of .* cannot be read .*linerate shard verify"):
            look(copied)


def test_an_answer_is_a_table_or_lines_or_csv_or_json(packed: Catalog, capsys: Capture) -> None:
    query = "SELECT key, [shard, NULL] AS l, NULL AS n FROM samples ORDER BY position"
    out = shown(capsys, packed.root, "--sql", query, "--rows", 2)
    assert all(word in out for word in (packed.keys(0)[0], packed.keys(0)[1], "[0, null]", "NULL"))
    assert packed.keys(0)[2] not in out
    assert "2 rows; there are more: --rows shows them" in out
    assert "row 0" in shown(capsys, packed.root, "--sql", "FROM samples LIMIT 1")
    assert "1 row\n" in shown(capsys, packed.root, "--sql", "FROM samples LIMIT 1")
    rows = list(csv.reader(io.StringIO(shown(capsys, packed.root, "--sql", query, "--csv"))))
    assert rows[0] == ["key", "l", "n"]
    assert rows[1] == [packed.keys(0)[0], "[0, null]", ""]
    assert len(rows) == 41
    answer = json.loads(shown(capsys, packed.root, "--sql", query, "--json", "--rows", 1))
    assert answer == {"columns": ["key", "l", "n"], "rows": [[packed.keys(0)[0], [0, None], None]]}


def test_the_answer_holds_no_control_character(packed: Catalog, capsys: Capture) -> None:
    query = """SELECT 'a' || chr(27) || '[2J[red]' AS "x[bold]y\x1b" """
    out = shown(capsys, packed.root, "--sql", query)
    assert r"a\x1b[2J[red]" in out
    assert r"x[bold]y\x1b" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--csv"], "--csv and --rows are of the answer to --sql"),
        (["--rows", "3"], "--csv and --rows are of the answer to --sql"),
        (["--sql", "SELECT 1", "--rows", "0"], "--rows is 0, at least 1 is needed"),
        (["--classes", "0"], "--classes is 0, at least 1 is needed"),
        (["--sql", "SELECT 1", "--csv", "--json"], "--csv and --json are two forms of one answer"),
        (["--sql", "SELECT"], "--sql: Parser Error"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_code_2(
    packed: Catalog, capsys: Capture, argv: list[str], message: str
) -> None:
    assert main(["shard", "inspect", str(packed.root), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
