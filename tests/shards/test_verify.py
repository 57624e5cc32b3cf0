"""verify finds every kind of damage, and says where it is."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linerate.shards import verify_shard
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.pack import pack
from linerate.shards.verify import Report, choose_shards, verify_shards


@pytest.fixture
def root(packed: Catalog, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.root, tmp_path / "copy"))


def check(root: Path, **options: Any) -> Report:
    return verify_shards(Catalog.load(root), num_workers=0, **options)


def said(report: Report) -> str:
    return " | ".join(f"{p.file} {p.sample_id}: {p.what}" for p in report.problems)


def patch(path: Path, offset: int, data: bytes) -> None:
    stored = bytearray(path.read_bytes())
    stored[offset : offset + len(data)] = data
    path.write_bytes(stored)


def edit(path: Path, column: str, change: Callable[[list[Any]], list[Any]]) -> None:
    """Change a column of a shard's .parquet and keep its mark."""
    table = pq.read_table(path)
    at = table.schema.get_field_index(column)
    values = pa.array(change(table.column(column).to_pylist()), table.schema.field(column).type)
    pq.write_table(table.set_column(at, table.schema.field(column), values), path)


@pytest.mark.parametrize("decode", ["none", "header", "full"])
def test_sound_shards_are_sound(packed: Catalog, decode: verify_shard.Decode) -> None:
    seen: list[float] = []
    report = verify_shards(packed, decode=decode, num_workers=0, on_progress=seen.append)
    assert report.ok
    assert (report.num_shards, report.num_samples, sum(seen)) == (5, 40, 40)
    assert report.to_json()["ok"] is True


def test_processes_find_the_same(root: Path) -> None:
    patch(root / "shard-000002.tar", 600, b"\0\0\0\0")
    catalog = Catalog.load(root)
    assert verify_shards(catalog, num_workers=2) == verify_shards(catalog, num_workers=0)


def test_one_flipped_bit_is_found_and_placed(root: Path) -> None:
    index = Catalog.load(root).shard_index(3)
    at = int(index.offset[2] + index.size[2] // 2)
    byte = (root / "shard-000003.tar").read_bytes()[at]
    patch(root / "shard-000003.tar", at, bytes([byte ^ 4]))
    report = check(root, decode="none")
    assert [(p.file, p.sample_id) for p in report.problems] == [
        ("shard-000003.tar", None),
        ("shard-000003.tar", int(index.sample_id[2])),
    ]
    assert "the tar's xxh3_64 is" in report.problems[0].what
    assert report.problems[1].what == "its bytes differ from the checksum in the .parquet"


def test_tars_that_are_missing_short_or_empty_are_named(root: Path) -> None:
    (root / "shard-000000.tar").unlink()
    os.truncate(root / "shard-000001.tar", 2000)
    os.truncate(root / "shard-000002.tar", 0)
    text = said(check(root))
    assert "shard-000000.tar None: the tar is missing" in text
    assert "shard-000001.tar None: the tar has 2000 bytes, the catalog says" in text
    assert "shard-000001.tar is cut short or damaged at byte" in text
    assert "shard-000002.tar None: cannot mmap an empty file" in text


def test_indices_that_are_missing_or_differ_are_named(root: Path) -> None:
    (root / "shard-000000.idx").unlink()
    (root / "shard-000001.parquet").unlink()
    idx = root / "shard-000002.idx"
    idx.write_text(idx.read_text().replace("jpg 512 ", "jpg 1024 "))
    table = pq.read_table(root / "shard-000003.parquet")
    pq.write_table(table.replace_schema_metadata(None), root / "shard-000003.parquet")
    text = said(check(root))
    assert "shard-000000.tar None: its .idx is missing" in text
    assert "shard-000001.parquet is missing" in text
    assert "shard-000002.tar None: its .idx differs from the tar from line 2 on" in text
    assert "shard-000003.tar None: the .parquet has no mark of a finished shard" in text
    assert len(check(root).problems) == 4


def test_a_mark_of_another_run_is_named(root: Path, photo_folder: Path, tmp_path: Path) -> None:
    other = pack(photo_folder, tmp_path / "other", num_workers=0)
    shutil.copy(other.shard_path(0).with_suffix(".parquet"), root / "shard-000000.parquet")
    assert f"the .parquet's mark says plan_id {other.plan_id}, the catalog" in said(check(root))
    path = root / "shard-000001.parquet"
    table = pq.read_table(path)
    mark = table.schema.metadata[b"linerate"].replace(b'"samples": 8', b'"samples": 9')
    pq.write_table(table.replace_schema_metadata({b"linerate": mark}), path)
    assert "the .parquet's mark says samples 9, the catalog 8" in said(check(root))


@pytest.mark.parametrize(
    ("column", "change", "expected"),
    [
        ("offset", lambda v: [v[0] + 512, *v[1:]], "lies at 512 with"),
        ("height", lambda v: [v[0] + 1, *v[1:]], "the .parquet says"),
        ("xxh3_64", lambda v: [v[0] ^ 1, *v[1:]], "differ from the checksum"),
        ("label", lambda v: [(v[0] + 1) % 4, *v[1:]], "its label is"),
        ("sample_id", lambda v: [9999, *v[1:]], "the .parquet lists it, the tar does not hold it"),
    ],
)
def test_a_wrong_value_in_the_parquet_is_found(
    root: Path, column: str, change: Callable[[list[Any]], list[Any]], expected: str
) -> None:
    edit(root / "shard-000004.parquet", column, change)
    assert expected in said(check(root))


def test_a_label_beyond_the_classes_is_found(root: Path) -> None:
    catalog = (root / "catalog.json").read_text()
    (root / "catalog.json").write_text(catalog.replace(',\n  "dog"', ""))
    assert "its label is 3, the catalog names 3 classes" in said(check(root))


def test_damaged_pixels_are_found_by_decoding(make_jpeg: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(make_jpeg(0, 90, 90)[:-40] + b"\xff\xd9")
    pack(tmp_path / "in", tmp_path / "out", num_workers=0)
    assert check(tmp_path / "out").ok
    assert "does not decode" in said(check(tmp_path / "out", decode="full"))


def test_a_sample_that_is_no_image_is_found_by_its_header(root: Path) -> None:
    index = Catalog.load(root).shard_index(0)
    patch(root / "shard-000000.tar", int(index.offset[0]), b"\0\0")
    import xxhash

    start, size = int(index.offset[0]), int(index.size[0])
    digest = xxhash.xxh3_64_intdigest((root / "shard-000000.tar").read_bytes()[start : start + size])
    edit(root / "shard-000000.parquet", "xxh3_64", lambda v: [digest, *v[1:]])
    assert "not a JPEG: unknown format" in said(check(root))


def test_foreign_tars_and_a_wrong_list_of_rejects_are_found(root: Path) -> None:
    shutil.copy(root / "shard-000000.tar", root / "shard-000009.tar")
    rejects = pq.read_table(root / "rejected.parquet")
    row = pa.table({"sample_id": [5], "key": ["x"], "size": [1], "reason": ["r"], "detail": [""]})
    pq.write_table(pa.concat_tables([rejects, row.cast(rejects.schema)]), root / "rejected.parquet")
    text = said(check(root))
    assert "shard-000009.tar None: is not listed in the catalog" in text
    assert "rejected.parquet None: has 1 rows, the catalog says 0" in text
    assert "40 samples and 1 rejects are not the 40 that were planned" in text
    (root / "rejected.parquet").unlink()
    assert "rejected.parquet None: cannot be read (FileNotFoundError)" in said(check(root))


def test_the_list_of_problems_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_shard, "MAX_PROBLEMS", 3)
    edit(root / "shard-000000.parquet", "xxh3_64", lambda v: [0] * len(v))
    problems = check(root).problems
    assert len(problems) == 4
    assert problems[-1].what == "more than 3 problems; the rest is not listed"


def test_a_shard_whose_check_fails_is_a_problem(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr(verify_shard, "_check_shard", fail)
    report = check(root)
    assert len(report.problems) == 5
    assert report.problems[0].what == "MemoryError: too large"


def test_a_sample_reads_some_shards_and_sees_the_size_of_all(root: Path) -> None:
    catalog = Catalog.load(root)
    chosen = choose_shards(5, sample=0.4, seed=1)
    report = check(root, sample=0.4, seed=1)
    assert report.ok
    assert (report.num_shards, report.num_samples, len(chosen)) == (2, 16, 2)
    assert report.num_bytes == int(catalog.shard_bytes[chosen].sum())
    others = [shard for shard in range(5) if shard not in chosen]
    (root / f"shard-{others[0]:06d}.tar").unlink()
    os.truncate(root / f"shard-{others[1]:06d}.tar", 2000)
    patch(root / f"shard-{others[2]:06d}.tar", 600, b"\0\0\0\0")  # its size stays, so nobody sees it
    patch(root / f"shard-{chosen[1]:06d}.tar", 600, b"\0\0\0\0")
    problems = {(p.file, p.what.split(",")[0]) for p in check(root, sample=0.4, seed=1).problems}
    assert {file for file, _ in problems} == {
        f"shard-{shard:06d}.tar" for shard in (others[0], others[1], chosen[1])
    }
    assert (f"shard-{others[0]:06d}.tar", "the tar is missing") in problems
    assert (f"shard-{others[1]:06d}.tar", "the tar has 2000 bytes") in problems


def test_seeds_draw_other_shards_and_at_least_one() -> None:
    assert {tuple(choose_shards(5, sample=0.01, seed=seed)) for seed in range(50)} == {(n,) for n in range(5)}
    assert choose_shards(5, sample=1.0, seed=3) == [0, 1, 2, 3, 4]
    for share in (0.0, -1.0, 1.1):
        with pytest.raises(UserError, match=f"--sample is {share}; give a share"):
            choose_shards(5, sample=share, seed=0)
