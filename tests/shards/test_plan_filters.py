"""Which rows a plan takes: conditions, tags, samples, limits, duplicates; on any source."""

import errno
import hashlib
import io
import itertools
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linerate.shards import dedup, plan_rows, spill
from linerate.shards import plan as plan_module
from linerate.shards.dedup import drop_equal_images
from linerate.shards.errors import UserError
from linerate.shards.options import PackOptions, Selection, Sizing
from linerate.shards.pack import pack
from linerate.shards.plan import Plan, make_plan
from linerate.shards.plan_query import load_tags, open_database, parse_memory
from linerate.shards.plan_rows import Counts, first_rows, load_plan_rows, settle
from linerate.shards.sources import FolderSource, SourceReject, SourceRow
from linerate.shards.tar_source import TarSource

EXTRA = '{"hashtags": ["Cat", "big dog"], "likes": 3}'


class ListSource:
    """A source of given rows."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    @property
    def containers(self) -> list[Path]:
        return [Path("/nowhere")]

    def rows(self) -> Any:
        yield from self.items


def row(key: str, size: int = 100, label_name: str | None = None, extra: str | None = None) -> SourceRow:
    return SourceRow(key, key.encode(), 0, 0, size, label_name, -1, extra.encode() if extra else None)


def plan_of(folder: Path, items: list[Any], *, sizing: Sizing | None = None, **selection: Any) -> Plan:
    folder.mkdir(exist_ok=True)
    return make_plan(
        ListSource(items),
        folder,
        seed=0,
        sizing=sizing or Sizing(),
        options=selection,
        selection=Selection(**selection),
    )


def keys_of(plan: Plan) -> list[str]:
    shards = [plan.load_rows(shard).column("key").to_pylist() for shard in range(plan.num_shards)]
    return list(itertools.chain(*shards))


def place(key: str) -> int:
    """Where a key stands in the order of seed 0."""
    return int.from_bytes(hashlib.md5(f"0:{key}".encode()).digest()[8:], "little")


@settings(max_examples=6, deadline=None)
@given(
    keys=st.lists(st.integers(0, 60), min_size=1, max_size=90),
    shard_samples=st.integers(1, 20),
    min_shards=st.integers(1, 12),
    limit=st.none() | st.integers(1, 100),
    sample=st.none() | st.floats(0.3, 1),
    least=st.none() | st.integers(0, 40),
    dedup=st.sampled_from([None, "key"]),
)
def test_a_plan_is_complete_disjoint_and_the_same_whatever_is_asked(
    keys: list[int],
    shard_samples: int,
    min_shards: int,
    limit: int | None,
    sample: float | None,
    least: int | None,
    dedup: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    items = [row(f"k{key}", size=key) for key in keys]
    sizing = Sizing(shard_samples=shard_samples, min_shards=min_shards)
    where = None if least is None else f"size >= {least}"
    asked = {"where": where, "sample": sample, "limit": limit, "dedup": dedup}
    whole = keys_of(plan_of(tmp_path_factory.mktemp("p") / "whole", items))
    wanted = {f"k{key}" for key in keys if least is None or key >= least}
    if sample is not None:
        wanted = {key for key in wanted if place(key) < int(sample * 2**64)}
    folder = tmp_path_factory.mktemp("p")
    if not wanted:
        with pytest.raises(UserError, match="holds no images that are wanted"):
            plan_of(folder / "a", items, sizing=sizing, **asked)
        return
    plan = plan_of(folder / "a", items, sizing=sizing, **asked)
    found = keys_of(plan)
    # Filters leave the order as it was; a limit takes its beginning.
    assert found == [key for key in whole if key in wanted][:limit]
    again = plan_of(folder / "b", items[::-1], sizing=sizing, **asked)
    assert (keys_of(again), again.plan_id) == (found, plan.plan_id)
    counts = [len(plan.load_rows(shard)) for shard in range(plan.num_shards)]
    assert max(counts) <= shard_samples
    assert max(counts) - min(counts) <= 1
    left = len(items) - sum(plan.filtered.values()) - plan.num_source_rejects
    assert plan.num_samples == left or limit is not None
    assert plan.total_bytes == sum(int(key[1:]) for key in found)


def test_a_condition_may_name_what_a_folder_tells(photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    plan = make_plan(
        FolderSource(photo_folder),
        tmp_path / "p",
        seed=0,
        sizing=Sizing(),
        options={},
        selection=Selection(
            where="label_name IN ('ant', 'cat') AND label != 0 AND ends_with(container, '0')"
        ),
    )
    assert {key.split("/")[0] for key in keys_of(plan)} == {"cat"}
    assert (plan.filtered, plan.class_names) == ({"where": 30}, ["ant", "bee", "cat", "dog"])
    assert set(plan.load_rows(0).column("label").to_pylist()) == {2}


def test_a_condition_may_name_what_a_tars_json_says(tmp_path: Path) -> None:
    items = [row("a", extra=EXTRA), row("b", extra="broken"), row("c"), row("d", extra='{"likes": 9}')]
    plan = plan_of(tmp_path / "p", items, where="(extra->>'likes')::INT >= 3 -- with a comment")
    assert sorted(keys_of(plan)) == ["a", "d"]
    rows = plan.load_rows(0).to_pylist()
    assert [one["extra_json"] for one in rows if one["key"] == "a"] == [EXTRA.encode()]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "sise > 3",
            r'Referenced column "sise" not found .*; the columns are key, path, size, label',
        ),
        ("size >", "--where 'size >' does not work: Parser Error"),
        ("key::INT > 3", "Could not convert string 'k1' to INT32"),
        ("nope(size)", "nope does not exist"),
        ("sum(size) > 3", "does not work"),
    ],
)
def test_a_condition_that_does_not_work_is_one_clean_line(tmp_path: Path, where: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan_of(tmp_path / "p", [row("k1")], where=where)
    assert "\n" not in str(caught.value)


def test_when_filters_leave_nothing_the_error_counts_them(tmp_path: Path) -> None:
    items = [row("a"), row("b"), SourceReject("c.txt", 1, "not an image", "a .txt file")]
    with pytest.raises(UserError, match=r"that are wanted: 1 not an image .*; 2 left out by --where"):
        plan_of(tmp_path / "p", items, where="size > 100")


@pytest.mark.parametrize(
    ("extra", "kept"),
    [
        (EXTRA, True),
        ('{"tags": "#x #cat,y"}', True),
        ('{"tags": "#x#CAT"}', True),
        ("{\"hashtags\": \"['a', 'cat']\"}", True),
        ('{"hashtags": ["big dog"]}', True),
        ('{"hashtags": ["dog"]}', False),
        ('{"hashtags": ["concat", "cats"]}', False),
        ('{"hashtags": null}', False),
        ("broken", False),
        (None, False),
    ],
)
def test_images_that_carry_a_wanted_tag_are_kept(tmp_path: Path, extra: str | None, kept: bool) -> None:
    (tmp_path / "tags.txt").write_text("\n  #Cat \nBIG DOG\n#a.c\n")
    items = [row("a", extra=extra), row("z", extra='{"tags": "cat"}')]
    plan = plan_of(tmp_path / "p", items, hashtags=str(tmp_path / "tags.txt"))
    assert ("a" in keys_of(plan)) == kept
    assert plan.filtered == {"hashtags": 1 - kept}


def test_a_file_of_tags_that_holds_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read \\(No such file or directory\\)"):
        load_tags(str(tmp_path / "none"))
    (tmp_path / "tags").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read \\(it is not UTF-8\\)"):
        load_tags(str(tmp_path / "tags"))
    (tmp_path / "tags").write_text(" \n#\n")
    with pytest.raises(UserError, match="holds no tag; write one a line"):
        load_tags(str(tmp_path / "tags"))


def test_a_larger_sample_holds_a_smaller_one(tmp_path: Path) -> None:
    items = [row(f"k{i}") for i in range(300)]
    small, large = (plan_of(tmp_path / str(share), items, sample=share) for share in (0.2, 0.5))
    assert set(keys_of(small)) < set(keys_of(large))
    assert 30 < small.num_samples < 90
    assert small.filtered == {"sample": 300 - small.num_samples}
    assert plan_of(tmp_path / "all", items, sample=1).num_samples == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": " "}, "--where is empty"),
        ({"sample": 0}, "--sample is 0; give a share above 0"),
        ({"sample": 1.5}, "--sample is 1.5; give a share above 0"),
        ({"limit": 0}, "--limit is 0, at least 1 is needed"),
    ],
)
def test_filters_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PackOptions(**options)


def test_memory_is_a_number_with_a_unit() -> None:
    assert [parse_memory(text) for text in ("4GB", "1.5 GiB", "512m")] == [4 * 10**9, 3 * 2**29, 512 * 10**6]
    with pytest.raises(UserError, match="--memory is 'much'; give a number with a unit"):
        parse_memory("much")
    with pytest.raises(UserError, match="--memory is 4MB, a plan needs at least 256MB"):
        parse_memory("4MB")


def test_too_little_memory_and_a_lost_file_are_clean_lines(tmp_path: Path) -> None:
    def run(query: str) -> None:
        with open_database(tmp_path, memory="256MB") as db:
            db.execute("SET temp_directory = ''")
            db.execute(query)

    with pytest.raises(UserError, match="does not fit into --memory 256MB"):
        run("SELECT string_agg(repeat('x', 1000), '') FROM range(400000)")
    with pytest.raises(UserError, match="the source cannot be listed"):
        run("SELECT * FROM read_parquet('/no/such/file.parquet')")


def test_rows_of_one_place_are_ordered_by_key_across_batches() -> None:
    """As if two keys had one hash, which no test could wait for."""
    dropped: list[Any] = []
    places = [1, 1, 1, 1, 2, 3, 3]
    keys = ["b", "a", "b", "c", "d", "f", "e"]
    table = pa.table(
        {
            "key": keys,
            "container": [0] * 7,
            "offset": [0] * 7,
            "size": [9, 1, 5, 1, 1, 1, 1],
            "label": [0] * 7,
            "extra_json": pa.array([None] * 7, pa.binary()),
            "place": pa.array(places, pa.uint64()),
        }
    )
    for step in (1, 2, 3, 7):
        batches = itertools.chain.from_iterable(
            table.slice(start, step).to_batches() for start in range(0, 7, step)
        )
        found = pa.concat_tables(settle(batches, drop=dropped.extend))
        assert found.column("key").to_pylist() == ["a", "b", "c", "d", "e", "f"]
        assert found.column("size").to_pylist() == [1, 5, 1, 1, 1, 1]
    assert dropped == [("b", 9, "duplicate key", "another row of the source has its name")] * 4


def test_the_first_rows_end_the_stream() -> None:
    tables = iter([pa.table({"a": [1, 2]}), pa.table({"a": [3, 4]}), pa.table({"a": [5]})])
    assert [len(table) for table in first_rows(tables, 3)] == [2, 1]
    assert len(next(tables)) == 1


def test_counts_of_a_part_are_in_proportion() -> None:
    counts = Counts({}, num_rows=10, num_known=5, num_bytes=100)
    assert (counts.estimated_bytes, counts.first(2), counts.first(20)) == (200, Counts({}, 2, 1, 20), counts)


def test_a_plan_of_many_shards_lies_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [row(f"k{i}") for i in range(40)]
    whole = keys_of(plan_of(tmp_path / "one", items))
    for module in (plan_rows, plan_module):
        monkeypatch.setattr(module, "SHARDS_PER_FILE", 3)
    plan = plan_of(tmp_path / "p", items, sizing=Sizing(shard_samples=5))
    assert sorted(path.name for path in (tmp_path / "p").glob("*.parquet")) == [
        "plan-1.parquet",
        "plan-2.parquet",
        "plan.parquet",
        "source_rejects.parquet",
    ]
    assert keys_of(plan) == whole
    stored = pa.concat_tables(load_plan_rows(tmp_path / "p"))
    assert stored.column("key").to_pylist() == whole


@pytest.fixture
def doubled(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> Path:
    """12 JPEGs of 8 contents, and one file that is none."""
    (tmp_path / "in").mkdir()
    for i in range(12):
        (tmp_path / "in" / f"{i:02d}.jpg").write_bytes(make_jpeg(i % 8))
    return tmp_path / "in"


def test_of_images_with_the_same_bytes_the_first_by_key_stays(doubled: Path, tmp_path: Path) -> None:
    options = PackOptions(dedup="bytes", shard_samples=3)
    catalog = pack(doubled, tmp_path / "out", options=options, num_workers=0)
    keys = [key for shard in range(catalog.num_shards) for key in catalog.keys(shard)]
    assert sorted(keys) == [f"{i:02d}.jpg" for i in range(8)]
    assert catalog.filtered == {"dedup": 0}
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert [(one["key"], one["reason"], one["detail"]) for one in rejected] == [
        (f"{i:02d}.jpg", "duplicate", f"of {i - 8:02d}.jpg") for i in range(8, 12)
    ]
    assert catalog.shard_sizes.tolist() == [2, 3, 3]


def test_shards_that_are_whole_are_not_hashed_again(
    doubled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PackOptions(dedup="bytes", shard_samples=3)
    first = pack(doubled, tmp_path / "out", options=options, num_workers=0)
    monkeypatch.setattr(dedup, "run_hash_task", None)  # calling it would fail
    again = pack(doubled, tmp_path / "out", options=options, num_workers=0)
    assert (again.plan_id, again.num_samples) == (first.plan_id, first.num_samples)
    assert not (tmp_path / "out" / ".pack").exists()
    (tmp_path / "out" / first.files[0]).unlink()
    with pytest.raises((UserError, TypeError)):  # a shard is missing, so the plan is needed
        pack(doubled, tmp_path / "out", options=options, num_workers=0)


def test_tars_are_hashed_from_the_spill_to_the_same_plan(
    doubled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        archive.add(doubled, arcname=".")
    options = PackOptions(dedup="bytes", shard_samples=3)
    direct = pack(tmp_path / "in.tar", tmp_path / "direct", options=options, num_workers=0)
    monkeypatch.setattr(spill, "whole_bytes", lambda: 0)
    spilled = pack(tmp_path / "in.tar", tmp_path / "spilled", options=options, num_workers=0)
    assert spilled.plan_id == direct.plan_id
    assert spilled.shard_xxh3.tolist() == direct.shard_xxh3.tolist()


def test_every_row_is_counted_once_under_a_limit(tmp_path: Path) -> None:
    items = [row("a"), row("a"), row("b"), row("c"), row("c"), row("d")]
    plan = make_plan(
        ListSource(items), tmp_path, seed=0, sizing=Sizing(), options={}, selection=Selection(limit=1)
    )
    assert plan.num_samples + plan.num_source_rejects + plan.filtered["limit"] == len(items)


def test_workers_find_the_same_duplicates(doubled: Path, tmp_path: Path) -> None:
    plans = []
    for workers in (0, 1):
        (tmp_path / str(workers)).mkdir()
        plan = make_plan(FolderSource(doubled), tmp_path / str(workers), seed=0, sizing=Sizing(), options={})
        folder = tmp_path / f"hashes{workers}"
        plan, _ = drop_equal_images(plan, folder, sizing=Sizing(), num_workers=workers, memory="4GB")
        plans.append((plan.plan_id, keys_of(plan)))
    assert plans[0] == plans[1]


def test_hashes_of_this_plan_are_used_again(doubled: Path, tmp_path: Path) -> None:
    def make() -> Plan:
        folder = tmp_path / "p"
        folder.mkdir(exist_ok=True)
        return make_plan(FolderSource(doubled), folder, seed=0, sizing=Sizing(), options={})

    def drop() -> tuple[Plan, list[int]]:
        seen: list[int] = []
        plan, _ = drop_equal_images(
            make(), tmp_path / "h", sizing=Sizing(), num_workers=0, memory="4GB", on_progress=seen.append
        )
        return plan, seen

    first, seen = drop()
    assert (sum(seen), first.num_samples, first.num_source_rejects) == (12, 8, 4)
    assert drop() == (first, [])
    (tmp_path / "h" / "000000.parquet").write_bytes(b"cut short")
    assert sum(drop()[1]) == 12


def test_images_that_cannot_be_read_are_left_to_packing(doubled: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    plan = make_plan(FolderSource(doubled), tmp_path / "p", seed=0, sizing=Sizing(), options={})
    (doubled / "08.jpg").unlink()
    (doubled / "00.jpg").unlink()
    plan, _ = drop_equal_images(plan, tmp_path / "h", sizing=Sizing(), num_workers=0, memory="4GB")
    assert {"00.jpg", "08.jpg"} < set(keys_of(plan))


def test_when_hashing_fails_the_error_says_so(doubled: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    source = ListSource([SourceRow("a", b"", 0, 0, 5)])
    plan = make_plan(source, tmp_path / "p", seed=0, sizing=Sizing(), options={})
    with pytest.raises(UserError, match=r"1 of 1 planned shards could not be hashed .*FileNotFoundError"):
        drop_equal_images(plan, tmp_path / "h", sizing=Sizing(), num_workers=0, memory="4GB")


def test_when_no_hash_can_be_written_the_error_says_so(
    doubled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(table: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dedup, "_write", fail)
    (tmp_path / "p").mkdir()
    plan = make_plan(FolderSource(doubled), tmp_path / "p", seed=0, sizing=Sizing(), options={})
    with pytest.raises(UserError, match="No space left on device; the same command again continues"):
        drop_equal_images(plan, tmp_path / "h", sizing=Sizing(), num_workers=0, memory="4GB")


def test_a_tars_json_is_asked_for_tags(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (
            ("a.jpg", make_jpeg(1)),
            ("a.json", b'{"hashtags": ["cat"]}'),
            ("b.jpg", make_jpeg(2)),
            ("b.json", b'{"hashtags": ["dog"]}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (tmp_path / "tags").write_text("cat")
    (tmp_path / "p").mkdir()
    plan = make_plan(
        TarSource([tmp_path / "x.tar"]),
        tmp_path / "p",
        seed=0,
        sizing=Sizing(),
        options={},
        selection=Selection(hashtags=str(tmp_path / "tags")),
    )
    assert keys_of(plan) == ["a.jpg"]
