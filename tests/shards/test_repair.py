"""What repair brings back, what it leaves out, and that it changes no byte of a tar."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.shards.test_verify import edit, patch, said

from linerate.__main__ import main
from linerate.pipeline.reader import ShardReader
from linerate.shards import repair
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack
from linerate.shards.repair import RepairReport, repair_shards
from linerate.shards.verify import verify_shards
from linerate.shards.worker import TaskFailure

ReadAll = Callable[[Path], dict[str, bytes]]
NOTHING = RepairReport([], [], catalog=False)


@pytest.fixture
def root(packed: Catalog, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.root, tmp_path / "copy"))


def mend(root: Path, **options: Any) -> RepairReport:
    """Repair; afterwards all is well, and once more there is nothing to do."""
    tars = {path.name: path.read_bytes() for path in root.glob("*.tar*")}
    report = repair_shards(root, num_workers=0, **options)
    assert sorted(tars.values()) == sorted(path.read_bytes() for path in root.glob("*.tar*"))
    checked = verify_shards(Catalog.load(root), num_workers=0, decode=options.get("decode", "header"))
    assert checked.ok, said(checked)
    assert repair_shards(root, num_workers=0, **options) == NOTHING
    assert not list(root.glob(".*"))
    return report


def rejected(root: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in pq.read_table(root / "rejected.parquet").to_pylist()]


def test_sound_shards_are_left_alone(root: Path, read_all: ReadAll) -> None:
    before = read_all(root)
    assert mend(root) == NOTHING
    assert read_all(root) == before


def test_lost_and_wrong_text_indexes_come_back_byte_for_byte(root: Path, read_all: ReadAll) -> None:
    before = read_all(root)
    (root / "shard-000000.idx").unlink()
    (root / "shard-000003.idx").write_text("v1.2 0\n")
    assert mend(root).shards == ["shard-000000.tar", "shard-000003.tar"]
    assert read_all(root) == before


@pytest.mark.parametrize(
    "lost",
    [["catalog.json"], ["shards.parquet"], ["rejected.parquet"], ["shards.parquet", "rejected.parquet"]],
)
def test_a_lost_catalog_comes_back(root: Path, packed: Catalog, lost: list[str]) -> None:
    for name in lost:
        (root / name).unlink()
    mend(root)
    found = Catalog.load(root)
    assert (found.num_samples, found.num_planned, found.num_rejected) == (40, 40, 0)
    assert (found.plan_id, found.files, found.max_height) == (packed.plan_id, packed.files, packed.max_height)
    assert found.shard_xxh3.tolist() == packed.shard_xxh3.tolist()
    # Names of classes and options stand in catalog.json alone.
    known = "catalog.json" not in lost
    assert found.class_names == (packed.class_names if known else ("0", "1", "2", "3"))
    assert found.options == (packed.options if known else {})


def test_a_lost_parquet_comes_back_without_the_names_in_the_source(root: Path, packed: Catalog) -> None:
    (root / "shard-000001.parquet").unlink()
    (root / "shard-000002.parquet").write_bytes(b"PAR1")
    assert mend(root).shards == ["shard-000001.tar", "shard-000002.tar"]
    found = Catalog.load(root)
    for shard in (1, 2):
        lost, now = packed.load_table(shard), found.load_table(shard)
        assert now.drop(["key"]).equals(lost.drop(["key"]))
        assert now.column("key").to_pylist() == [f"{n:012d}" for n in now.column("sample_id").to_pylist()]
    assert found.load_table(0).equals(packed.load_table(0))


def test_everything_but_the_tars_may_be_lost(root: Path, packed: Catalog) -> None:
    for path in root.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    mend(root)
    found = Catalog.load(root)
    assert (found.num_samples, found.plan_id, found.name) == (40, "repaired", "shard")
    assert [index.label.tolist() for index in map(found.shard_index, range(5))] == [
        index.label.tolist() for index in map(packed.shard_index, range(5))
    ]


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("offset", lambda v: [v[0] + 512, *v[1:]]),
        ("height", lambda v: [v[0] + 1, *v[1:]]),
        ("label", lambda v: [(v[0] + 1) % 4, *v[1:]]),
    ],
)
def test_wrong_values_in_a_parquet_are_put_right(
    root: Path, packed: Catalog, column: str, change: Callable[[list[Any]], list[Any]]
) -> None:
    edit(root / "shard-000004.parquet", column, change)
    report = mend(root)
    assert (report.shards, report.left_out) == (["shard-000004.tar"], [])
    assert Catalog.load(root).load_table(4).equals(packed.load_table(4))


def flip(root: Path, shard: int, row: int) -> int:
    """Flip a bit of an image; its sample_id."""
    index = Catalog.load(root).shard_index(shard)
    at = int(index.offset[row] + index.size[row] // 2)
    tar = root / f"shard-{shard:06d}.tar"
    patch(tar, at, bytes([tar.read_bytes()[at] ^ 4]))
    return int(index.sample_id[row])


def test_a_broken_image_is_left_out_and_every_other_stays(root: Path, packed: Catalog) -> None:
    broken = flip(root, 3, 2)
    key = packed.keys(3)[2]
    why = "its bytes differ from the checksum in the .parquet"
    report = mend(root)
    assert report == RepairReport(["shard-000003.tar"], [("shard-000003.tar", broken, why)], catalog=True)
    found = Catalog.load(root)
    assert (found.num_samples, found.num_planned, found.num_rejected) == (39, 40, 1)
    assert rejected(root) == [(broken, key, int(packed.shard_index(3).size[2]), "damaged in the shard", why)]
    assert str(broken).zfill(12) not in (root / "shard-000003.idx").read_text()
    positions = np.delete(np.arange(40), int(packed.starts[3]) + 2)
    with_all, without = ShardReader(packed), ShardReader(found)
    try:
        theirs = with_all.read(positions)
        ours = without.read(np.arange(39))
        assert [jpeg.tobytes() for jpeg in ours.jpegs] == [jpeg.tobytes() for jpeg in theirs.jpegs]
    finally:
        with_all.close()
        without.close()


def test_what_was_left_out_stays_out_when_more_is_lost(root: Path) -> None:
    broken = flip(root, 3, 2)
    mend(root)
    (root / "shard-000003.parquet").unlink()
    assert mend(root).left_out == []
    assert [reject[0] for reject in rejected(root)] == [broken]
    assert Catalog.load(root).num_samples == 39


def test_a_damaged_tar_header_costs_no_image(root: Path, packed: Catalog) -> None:
    start = int(packed.shard_index(2).offset[4]) - 512
    patch(root / "shard-000002.tar", start, b"\xff" * 20)
    before = (root / "shard-000002.idx").read_bytes()
    report = mend(root)
    assert (report.shards, report.left_out) == (["shard-000002.tar"], [])
    assert (root / "shard-000002.idx").read_bytes() == before
    assert Catalog.load(root).load_table(2).equals(packed.load_table(2))


def test_of_a_tar_that_was_cut_the_whole_images_stay(root: Path, packed: Catalog) -> None:
    index = packed.shard_index(1)
    os.truncate(root / "shard-000001.tar", int(index.offset[5]) + 10)
    report = mend(root)
    assert [sample_id for _, sample_id, _ in report.left_out] == index.sample_id[5:].tolist()
    assert Catalog.load(root).shard_sizes.tolist() == [8, 5, 8, 8, 8]
    # Without the index, which knew the places of the others, the end of the tar is all that is missed.
    (root / "shard-000001.idx").unlink()
    mend(root)


def test_missing_and_empty_tars_leave_the_catalog(root: Path, packed: Catalog) -> None:
    (root / "shard-000000.tar").unlink()
    os.truncate(root / "shard-000002.tar", 0)
    report = mend(root)
    assert {why for _, _, why in report.left_out} == {"the tar is missing or empty"}
    found = Catalog.load(root)
    assert found.files == ["shard-000001.tar", "shard-000003.tar", "shard-000004.tar"]
    assert (found.num_samples, found.num_planned) == (24, 40)
    assert {reject[0] for reject in rejected(root)} == {
        *packed.shard_index(0).sample_id.tolist(),
        *packed.shard_index(2).sample_id.tolist(),
    }
    assert (root / "shard-000002.tar.broken").exists()
    assert not (root / "shard-000002.idx").exists()


def test_full_decoding_leaves_out_what_does_not_decode(
    make_jpeg: Callable[..., bytes], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(make_jpeg(0, 90, 90)[:-40] + b"\xff\xd9")
    (tmp_path / "in" / "b.jpg").write_bytes(make_jpeg(1))
    pack(tmp_path / "in", tmp_path / "out", num_workers=0)
    report = mend(tmp_path / "out", decode="full")
    assert "does not decode" in report.left_out[0][2]


def test_packing_again_from_the_source_brings_everything_back(
    root: Path, packed: Catalog, photo_folder: Path, read_all: ReadAll
) -> None:
    flip(root, 3, 2)
    mend(root)
    (root / "shard-000003.parquet").unlink()
    pack(photo_folder, root, options=PackOptions(seed=7, shard_samples=8), num_workers=0)
    assert read_all(root) == read_all(packed.root)


def test_unfinished_foreign_and_ambiguous_folders_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="holds no tar of shards"):
        repair_shards(tmp_path, num_workers=0)
    shutil.copy(root / "shard-000000.tar", root / "shard-000009.tar")
    (root / "catalog.json").unlink()
    with pytest.raises(UserError, match=r"shard-000009.tar holds samples that shard-000004.tar holds too"):
        repair_shards(root, num_workers=0)
    (root / "shard-000009.tar").rename(root / "other-000009.tar")
    with pytest.raises(UserError, match=r"holds tars of several names \(other, shard\)"):
        repair_shards(root, num_workers=0)
    (root / ".pack").mkdir()
    (root / ".pack" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="are not finished"):
        repair_shards(root, num_workers=0)


def test_when_nothing_is_sound_it_says_so(root: Path) -> None:
    for path in root.glob("*.tar"):
        os.truncate(path, 0)
    with pytest.raises(UserError, match=r"nothing in the tars of .* is sound"):
        repair_shards(root, num_workers=0)


def test_a_shard_that_cannot_be_repaired_ends_the_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "shard-000000.idx").unlink()

    def fail(*args: object, **options: object) -> dict[int, Any]:
        return {0: TaskFailure("MemoryError", "too large")}

    monkeypatch.setattr(repair, "run_tasks", fail)
    with pytest.raises(UserError, match="1 shards cannot be repaired: MemoryError: too large"):
        repair_shards(root, num_workers=0)


def test_the_command_repairs_and_says_what(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = flip(root, 3, 2)
    assert main(["shard", "verify", str(root), "--json"]) == 1
    capsys.readouterr()
    assert main(["shard", "verify", str(root), "--repair", "--json", "--workers", "0"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"]
    assert [left_out[1] for left_out in result["repaired"]["left_out"]] == [broken]
    assert main(["shard", "verify", str(root), "--repair", "--workers", "0"]) == 0
    assert "repaired: nothing" in capsys.readouterr().out
    flip(root, 1, 1)
    assert main(["shard", "verify", str(root), "--repair", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "shard-000001.tar sample 9 is left out" in out
    assert "repaired: 1 shards" in out
