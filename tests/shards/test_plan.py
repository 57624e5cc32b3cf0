"""The plan: complete, disjoint, deterministic, shuffled, cut evenly."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from linerate.shards import scan, select_rows, shuffle
from linerate.shards.errors import UserError
from linerate.shards.options import PackOptions, Sizing
from linerate.shards.plan import Plan, load_options, make_plan, shard_bounds
from linerate.shards.shuffle import place_of
from linerate.shards.sources import SourceReject, SourceRow


class ListSource:
    """A source of given rows."""

    def __init__(self, items: list[SourceRow | SourceReject]) -> None:
        self.items = items

    @property
    def containers(self) -> list[Path]:
        return [Path("/nowhere")]

    def rows(self) -> Iterator[SourceRow | SourceReject]:
        yield from self.items


def row(key: str, size: int = 100, label_name: str | None = None, label: int = -1) -> SourceRow:
    return SourceRow(key, key.encode(), 0, 0, size, label_name, label)


def plan_of(folder: Path, items: list[Any], *, seed: int = 0, sizing: Sizing | None = None) -> Plan:
    folder.mkdir(exist_ok=True)
    return make_plan(ListSource(items), folder, seed=seed, sizing=sizing or Sizing(), options={"seed": seed})


def keys_by_shard(plan: Plan) -> list[list[str]]:
    return [plan.load_rows(shard).column("key").to_pylist() for shard in range(plan.num_shards)]


@settings(max_examples=8, deadline=None)
@given(
    num=st.integers(1, 90),
    shard_samples=st.integers(1, 40),
    min_shards=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_every_sample_is_planned_once_whatever_the_sizes(
    num: int, shard_samples: int, min_shards: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    items = [row(f"k\u00e9{i}/\U0001f600") for i in range(num)]
    sizing = Sizing(shard_samples=shard_samples, min_shards=min_shards)
    plan = plan_of(tmp_path_factory.mktemp("p") / "a", items, seed=seed, sizing=sizing)
    shards = keys_by_shard(plan)
    assert sorted(itertools.chain(*shards)) == sorted(item.key for item in items)
    counts = [len(shard) for shard in shards]
    assert max(counts) <= shard_samples
    assert max(counts) - min(counts) <= 1
    assert [plan.first_sample_id(shard) for shard in range(plan.num_shards)] == [
        sum(counts[:shard]) for shard in range(plan.num_shards)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_rows, "run_bytes", lambda memory: 500)  # runs on disk, of a few rows
        patch.setattr(shuffle, "PIECE_BITS", 2)
        patch.setattr(scan, "BATCH_ROWS", 7)
        again = plan_of(tmp_path_factory.mktemp("p") / "b", items[::-1], seed=seed, sizing=sizing)
    assert keys_by_shard(again) == shards
    assert again.plan_id == plan.plan_id


def test_the_order_is_that_of_xxh3_and_stays_so(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "p", [row(f"k{i}") for i in range(6)], seed=3)
    expected = sorted((f"k{i}" for i in range(6)), key=lambda key: xxhash.xxh3_64_intdigest(key.encode(), 3))
    assert keys_by_shard(plan) == [expected]
    # Of another implementation and for all time: XXH3's own test vector of no bytes.
    assert place_of(b"", seed=0) == 0x2D06800538D394C2


def test_another_seed_gives_another_order_and_another_id(tmp_path: Path) -> None:
    items = [row(f"k{i}") for i in range(50)]
    a, b = (plan_of(tmp_path / str(seed), items, seed=seed) for seed in (0, 1))
    assert keys_by_shard(a) != keys_by_shard(b)
    assert a.plan_id != b.plan_id


@pytest.mark.parametrize(
    "changed",
    [row("k0", size=101), row("k0", label_name="cat"), SourceRow("k0", b"k0", 0, 0, 100, None, -1, b"{}")],
)
def test_the_plan_id_depends_on_every_row(tmp_path: Path, changed: SourceRow) -> None:
    items = [row(f"k{i}") for i in range(5)]
    a = plan_of(tmp_path / "a", items)
    assert a.plan_id != plan_of(tmp_path / "b", [changed, *items[1:]]).plan_id


def test_class_names_are_numbered_in_their_order(tmp_path: Path) -> None:
    items = [row("1", label_name="zebra"), row("2", label_name="ant"), row("3"), row("4", label_name="zebra")]
    plan = plan_of(tmp_path / "p", items)
    table = plan.load_rows(0)
    found = dict(zip(table.column("key").to_pylist(), table.column("label").to_pylist(), strict=True))
    assert plan.class_names == ["ant", "zebra"]
    assert found == {"1": 1, "2": 0, "3": -1, "4": 1}


def test_class_numbers_stay_what_the_source_says(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "p", [row("1", label=10), row("2", label=2)])
    assert sorted(plan.load_rows(0).column("label").to_pylist()) == [2, 10]
    assert plan.class_names == [str(label) for label in range(11)]


def test_names_and_numbers_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"by number \(up to 4\) and others by name \(cat\)"):
        plan_of(tmp_path / "p", [row("1", label=4), row("2", label_name="cat")])


def test_more_rows_than_a_batch_come_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "BATCH_ROWS", 7)
    monkeypatch.setattr(shuffle, "STREAM_ROWS", 7)
    seen: list[float] = []
    items: list[Any] = [row(f"k{i}") for i in range(30)]
    items += [SourceReject(f"r{i}", 1, "not an image", "a .txt file by its name") for i in range(15)]
    (tmp_path / "p").mkdir()
    plan = make_plan(
        ListSource(items), tmp_path / "p", seed=0, sizing=Sizing(), options={}, on_rows=seen.append
    )
    assert sorted(itertools.chain(*keys_by_shard(plan))) == sorted(f"k{i}" for i in range(30))
    assert plan.num_source_rejects == 15
    assert sum(seen) == 30


def test_a_source_without_images_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no files"):
        plan_of(tmp_path / "a", [])
    with pytest.raises(UserError, match=r"holds no images: 1 not an image \(a \.txt file\)"):
        plan_of(tmp_path / "b", [SourceReject("a.txt", 1, "not an image", "a .txt file")])


def test_a_stored_plan_loads_as_it_was(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "p", [row("a"), row("b")])
    assert Plan.load(tmp_path / "p") == plan
    assert load_options(tmp_path / "p") == {"seed": 0}


@pytest.mark.parametrize(
    ("samples", "total_bytes", "expected"),
    [
        (1, 100, 1),
        (7, 100, 1),
        (58, 100, 7),
        (1000, 100, 16),
        (1_281_167, 138_000_000_000, 138),
        (50_000_000, 100, 5000),
        (3, 9_000_000_000, 3),
    ],
)
def test_shards_are_large_but_enough(samples: int, total_bytes: int, expected: int) -> None:
    assert Sizing().num_shards(samples=samples, total_bytes=total_bytes) == expected


def test_shard_bounds_cover_all_places() -> None:
    assert shard_bounds(10, 3) == [0, 3, 6, 10]


@pytest.mark.parametrize("field", ["shard_bytes", "shard_samples", "min_shards", "max_pixels"])
def test_options_below_one_are_refused(field: str) -> None:
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')} is 0"):
        PackOptions(**{field: 0})


@pytest.mark.parametrize("name", ["", "a b", "a.b", "../x", "x" * 65])
def test_names_that_readers_would_split_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        PackOptions(name=name)
