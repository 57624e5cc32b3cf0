"""Manifests: which rows become samples, what their columns mean, and what is refused or rejected."""

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linerate.shards import manifest, manifest_sql
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.manifest import ManifestSource, find_manifests, open_any_source
from linerate.shards.options import ManifestColumns, PackOptions
from linerate.shards.pack import pack
from linerate.shards.plan import Plan, make_plan
from linerate.shards.sources import FolderSource


def plan_of(path: Path | list[Path], **options: Any) -> Plan:
    paths = path if isinstance(path, list) else [path]
    chosen = PackOptions(**options)
    folder = paths[0].parent / "plan"
    folder.mkdir(exist_ok=True)
    source = open_any_source(paths, columns=chosen.manifest_columns)
    return make_plan(source, folder, seed=0, sizing=chosen.sizing, options={}, selection=chosen.selection)


def rows_of(plan: Plan) -> dict[str, dict[str, Any]]:
    tables = pa.concat_tables([plan.load_rows(shard) for shard in range(plan.num_shards)])
    return {row["key"]: row for row in tables.to_pylist()}


def rejects_of(plan: Plan) -> list[tuple[str, str, str]]:
    rows = pq.read_table(plan.folder / "source_rejects.parquet").to_pylist()
    assert plan.num_source_rejects == len(rows)
    return sorted((row["key"], row["reason"], row["detail"]) for row in rows)


def write(path: Path, /, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


CSV = "path,label,user\na.jpg,cat,ann\nb.jpg,dog,\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", CSV),
        ("m.tsv", CSV.replace(",", "\t")),
        (
            "m.jsonl",
            '{"path": "a.jpg", "label": "cat", "user": "ann"}\n{"path": "b.jpg", "label": "dog"}\n',
        ),
    ],
)
def test_text_manifests_list_what_parquet_does(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    found = plan_of(tmp_path / name)
    same = write(tmp_path / "m.parquet", path=["a.jpg", "b.jpg"], label=["cat", "dog"], user=["ann", None])
    assert rows_of(found) == rows_of(plan_of(same))
    assert found.class_names == ["cat", "dog"]
    assert json.loads(rows_of(found)["b.jpg"]["extra_json"]) == {"user": None}


def test_paths_are_relative_to_the_manifest_and_urls_are_whole(tmp_path: Path) -> None:
    paths = ["in/a.jpg", "/abs/b.jpg", "https://h/c.jpg", "s3://bucket/d e.jpg", "gs://b/f", "http://h/g"]
    plan = plan_of(write(tmp_path / "m.parquet", url=paths))
    found = {
        key: (plan.containers[row["container"]], row["path"].decode(), row["size"])
        for key, row in rows_of(plan).items()
    }
    assert found == {
        "in/a.jpg": (str(tmp_path), "in/a.jpg", -1),
        "/abs/b.jpg": ("/", "abs/b.jpg", -1),
        **{url: ("url:", url, -1) for url in paths[2:]},
    }


def test_manifests_of_several_folders_keep_their_own_paths(tmp_path: Path) -> None:
    files = []
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        files.append(write(tmp_path / name / "m.parquet", path=[f"{name}.jpg"]))
    plan = plan_of(files)
    found = {key: plan.containers[row["container"]] for key, row in rows_of(plan).items()}
    assert found == {"x.jpg": str(tmp_path / "x"), "y.jpg": str(tmp_path / "y")}


def test_rows_that_name_no_sample_are_rejects_with_a_reason(tmp_path: Path) -> None:
    paths = ["ok.jpg", None, "", "ftp://h/a.jpg", "x" * 4001, "nul\0.jpg", "big.jpg", "https:///"]
    sizes = [5, 1, 1, 1, 1, 1, 2**30 + 1, 1]
    plan = plan_of(write(tmp_path / "m.parquet", path=paths, size=sizes))
    assert list(rows_of(plan)) == ["ok.jpg"]
    assert plan.total_bytes == 5
    assert [(reason, detail) for _, reason, detail in rejects_of(plan)] == [
        ("too many bytes", "1073741825 exceeds 1073741824"),
        ("scheme not allowed", "ftp"),
        ("scheme not allowed", "https"),
        ("no path", "it holds a zero byte"),
        ("no path", "the row names no file"),
        ("no path", "the row names no file"),
        ("path too long", "4001 bytes"),
    ]


def test_rows_that_a_filter_leaves_out_are_no_rejects(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "id": ["a", "b", "c", "d"],
        "path": ["/a.jpg", None, "ftp://h/c", "https://h/d"],
        "label": ["x", "y", None, "x"],
        "use": [1, 1, 0, 1],
    }
    plan = plan_of(write(tmp_path / "m.parquet", **columns), where="use = 1", key_column="id")
    rows = {key: (row["container"], row["path"], row["label"]) for key, row in rows_of(plan).items()}
    assert rows == {"a": (1, b"a.jpg", 0), "d": (0, b"https://h/d", 0)}
    assert rejects_of(plan) == [("row 2", "no path", "the row names no file")]
    assert plan.filtered == {"where": 1}


def test_a_size_beyond_what_a_size_can_be_is_a_reject(tmp_path: Path) -> None:
    sizes = pa.array([5, 2**64 - 1], pa.uint64())
    plan = plan_of(write(tmp_path / "m.parquet", path=["a.jpg", "b.jpg"], size=sizes))
    assert rejects_of(plan) == [("b.jpg", "too many bytes", f"{2**64 - 1} exceeds 1073741824")]


def test_lines_that_do_not_parse_are_rejects(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,label\na.jpg,cat\nb.jpg\nc.jpg,dog,3\nd.jpg,dog\n")
    plan = plan_of(tmp_path / "m.csv")
    assert sorted(rows_of(plan)) == ["a.jpg", "d.jpg"]
    assert rejects_of(plan) == [
        ("m.csv line 3", "unreadable row", "missing columns"),
        ("m.csv line 4", "unreadable row", "too many columns"),
    ]
    (tmp_path / "m.jsonl").write_text('{"path": "a.jpg"}\n{"path": \n')
    assert rejects_of(plan_of(tmp_path / "m.jsonl")) == [("row 2", "no path", "the row names no file")]


def test_a_key_that_occurs_twice_is_taken_once(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", path=["b", "a", "b", "b"], label=[2, 0, 1, 2], size=[7, 7, 7, 9])
    plan = plan_of(path)
    found = rows_of(plan)
    assert sorted(found) == ["a", "b"]
    assert (found["b"]["label"], plan.num_samples, plan.filtered) == (1, 2, {})
    assert rejects_of(plan) == [("b", "duplicate key", "another row of the source has its name")] * 2
    counted = plan_of(path, dedup="key")
    assert (counted.filtered, rejects_of(counted), rows_of(counted)) == ({"dedup": 2}, [], found)


def test_columns_of_a_manifest_are_refused_where_there_is_none(photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--path-column url names a column of a manifest, the source is none"
    ):
        pack(photo_folder, tmp_path / "out", options=PackOptions(path_column="url"))


def test_a_key_column_names_the_samples(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", file=["/1.jpg", "s3://b/2", "3"], id=["x", "y", None], w=[1, 2, 3])
    plan = plan_of(path, key_column="ID")
    assert {key: row["path"] for key, row in rows_of(plan).items()} == {"x": b"1.jpg", "y": b"s3://b/2"}
    assert rows_of(plan)["x"]["file"] == "/1.jpg"
    assert rejects_of(plan) == [("3", "no key", "the row has no name")]
    moved = write(path, file=["/9.jpg", "s3://b/2", "3"], id=["x", "y", None], w=[1, 2, 3])
    assert plan_of(moved, key_column="id").plan_id != plan.plan_id
    numbered = rows_of(plan_of(path, key_column="w"))
    assert sorted(numbered) == ["1", "2", "3"]
    too_long = plan_of(write(path, file=["a", "b"], id=["k" * 4001, "k"]), key_column="id")
    assert rejects_of(too_long) == [("a", "key too long", "4001 bytes")]


@pytest.mark.parametrize(
    ("labels", "names", "found"),
    [
        (["zebra", "ant", None, ""], ["ant", "zebra"], [1, 0, -1, -1]),
        ([3, 0, None, 1], ["0", "1", "2", "3"], [3, 0, -1, 1]),
        (["10", "2", "", "2"], [str(n) for n in range(11)], [10, 2, -1, 2]),
    ],
)
def test_labels_are_names_or_numbers(
    tmp_path: Path, labels: list[Any], names: list[str], found: list[int]
) -> None:
    plan = plan_of(write(tmp_path / "m.parquet", path=list("abcd"), target=labels))
    rows = rows_of(plan)
    assert plan.class_names == names
    assert [rows[key]["label"] for key in "abcd"] == found


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["3", "cat"], r"by number \(up to 3\) and others by name \(cat\)"),
        ([-1, 2], "holds -1; classes are numbered from 0"),
        ([5, 10**7], "has 1000000 classes or more"),
        (["5", "10000000"], "has 1000000 classes or more"),
        ([0.5, 1.0], "is DOUBLE; give one of text or whole numbers"),
    ],
)
def test_labels_of_no_use_are_refused(tmp_path: Path, labels: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(write(tmp_path / "m.parquet", path=["a", "b"], label=labels))


def test_too_many_class_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MAX_CLASSES", 2)
    with pytest.raises(UserError, match="has 2 classes or more; name another by --label-column"):
        plan_of(write(tmp_path / "m.parquet", path=list("abc"), label=["x", "y", "z"]))


def test_numbers_and_names_in_json_lines_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"path": "a", "label": 3}\n{"path": "b", "label": "cat"}\n')
    with pytest.raises(UserError, match=r"by number \(up to 3\) and others by name \(cat\)"):
        plan_of(tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"x": ["a"], "y": [1]}, {}, "no column of paths or URLs among x, y; name it by --path-column"),
        ({"path": [1]}, {}, "the path column path of .* is BIGINT; give one of text"),
        ({"path": ["a"]}, {"label_column": "z"}, "--label-column z: .* no such column; there are path"),
        ({"path": ["a"], "s": ["1"]}, {"size_column": "s"}, "--size-column s is VARCHAR"),
        ({"path": ["a"]}, {"hashtags": "t"}, "has no column of tags; name it by --tag-column"),
        ({"path": [None]}, {}, r"holds no images: 1 no path \(the row names no file\)"),
    ],
)
def test_columns_that_are_missing_or_of_no_use_are_refused(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    if columns == {"path": [None]}:
        columns = {"path": pa.array([None], pa.string())}
    with pytest.raises(UserError, match=message):
        plan_of(write(tmp_path / "m.parquet", **columns), **options)


def test_a_size_column_of_another_kind_is_metadata(tmp_path: Path) -> None:
    row = rows_of(plan_of(write(tmp_path / "m.parquet", path=["a"], size=["large"])))["a"]
    assert (row["size"], row["size_"]) == (-1, "large")


def test_unknown_sizes_count_as_the_known_do(tmp_path: Path) -> None:
    assert plan_of(write(tmp_path / "m.parquet", path=["a", "b"])).total_bytes == 220_000
    path = write(tmp_path / "m.parquet", path=list("abc"), bytes=[10, None, 20])
    assert plan_of(path).total_bytes == 45


def test_metadata_travels_as_plain_values(tmp_path: Path) -> None:
    zone = pa.timestamp("us", "America/New_York")
    path = write(
        tmp_path / "m.parquet",
        path=["a"],
        hashtags=[["Cat", "dog"]],
        width=[640],
        Width_=[1],
        time=pa.array([datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)], zone),
        score=[float("nan")],
        vector=pa.array([[1.0, float("inf")]], pa.list_(pa.float32(), 2)),
        nested=[{"a": 1}],
        odd=[{"b": float("nan")}],
    )
    row = rows_of(plan_of(path))["a"]
    assert json.loads(row["extra_json"], parse_constant=pytest.fail) == {
        "hashtags": ["Cat", "dog"],
        "width": 640,
        "Width_": 1,
        "time": "2020-01-01 00:00:00",
        "score": None,
        "vector": [1.0, None],
        "nested": {"a": 1},
        "odd": '{"b":NaN}',
    }
    assert (row["width__"], row["Width_"], row["hashtags"]) == (640, 1, ["Cat", "dog"])
    assert (row["nested"], row["time"]) == ('{"a":1}', datetime.datetime(2020, 1, 1))


def test_too_much_metadata_is_a_reject(tmp_path: Path) -> None:
    plan = plan_of(write(tmp_path / "m.parquet", path=["a", "b"], text=["x" * 2**20, "y"]))
    assert list(rows_of(plan)) == ["b"]
    assert rejects_of(plan) == [("a", "too much metadata", "1048587 bytes exceed 1048576")]


def test_names_that_the_index_has_get_an_underscore() -> None:
    assert manifest_sql.plan_name("Height", ["Height"]) == "Height_"
    assert manifest_sql.plan_name("user", ["user"]) == "user"
    assert manifest_sql.column_sql("x", "UUID") == "x::VARCHAR"


def test_what_counts_as_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    parts = [write(tmp_path / "set" / f"{n}.parquet", path=["a"]) for n in range(2)]
    (tmp_path / "set" / "_SUCCESS").touch()
    assert find_manifests([tmp_path / "set"]) == parts
    assert find_manifests([tmp_path / "set" / "*.parquet"]) == parts
    assert find_manifests([tmp_path / "none"]) == []
    (tmp_path / "set" / "00000.tar").touch()
    assert find_manifests([tmp_path / "set"]) == []
    (tmp_path / "m.csv.gz").touch()
    assert find_manifests([tmp_path / "m.csv.gz"]) == [tmp_path / "m.csv.gz"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    assert isinstance(open_any_source([tmp_path / "images"], columns=ManifestColumns()), FolderSource)


def test_manifests_of_two_kinds_and_names_that_are_patterns_are_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.parquet", path=["a"]), tmp_path / "b.csv"
    b.write_text("path\nb\n")
    with pytest.raises(UserError, match=r"several kinds \(csv, parquet\); pack them apart"):
        plan_of([a, b])
    with pytest.raises(UserError, match="is a pattern to DuckDB; rename"):
        plan_of(write(tmp_path / "a[1].parquet", path=["a"]))


def test_a_damaged_manifest_is_one_clean_line(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="the source cannot be listed"):
        plan_of(tmp_path / "m.parquet")


@pytest.fixture
def photo_manifest(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> Path:
    """9 JPEGs with sizes, labels and metadata; photo 8 has the bytes of photo 0."""
    jpegs = [make_jpeg(i % 8) for i in range(9)]
    for i, jpeg in enumerate(jpegs):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg)
    return write(
        tmp_path / "photos.parquet",
        path=[f"{i}.jpg" for i in range(9)],
        bytes=[len(jpeg) for jpeg in jpegs],
        label=[f"c{i % 3}" for i in range(9)],
        user=[f"u{i}" for i in range(9)],
        size=[i for i in range(9)],
    )


def test_metadata_is_in_the_shards(photo_manifest: Path, tmp_path: Path) -> None:
    options = PackOptions(size_column="bytes", where="user != 'u4'")
    catalog = pack(photo_manifest, tmp_path / "out", options=options, num_workers=0)
    table = catalog.load_table(0)
    assert table.column_names[-2:] == ["user", "size_"]
    found = dict(zip(table.column("key").to_pylist(), table.column("user").to_pylist(), strict=True))
    assert found == {f"{i}.jpg": f"u{i}" for i in range(9) if i != 4}
    assert (catalog.filtered, catalog.class_names) == ({"where": 1}, ("c0", "c1", "c2"))
    assert b'{"user":"u3","size":3}' in catalog.shard_path(0).read_bytes()
    assert Catalog.load(tmp_path / "out").options["where"] == "user != 'u4'"


def test_a_manifest_source_is_its_files(photo_manifest: Path) -> None:
    assert ManifestSource([photo_manifest]).containers == [photo_manifest]


def test_a_path_that_is_no_manifest_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path\nx.jpg\n")
    (tmp_path / "images").mkdir()
    for other in ("missing.csv", "images"):
        with pytest.raises(UserError, match=f"{other} is no manifest, beside others that are"):
            find_manifests([tmp_path / "a.csv", tmp_path / other])


def test_a_disk_is_not_refused_by_a_guess_at_sizes(
    tmp_path: Path, make_jpeg: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number}.jpg" for number in range(20)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(make_jpeg(number))
    (tmp_path / "m.csv").write_text("\n".join(["path", *names]))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 1_000_000))
    assert pack(tmp_path / "m.csv", tmp_path / "out", num_workers=0).num_samples == 20
