"""Appending: new images in new shards, and not a byte of what was there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests.shards.servers import serve

from linerate.__main__ import main
from linerate.shards import dedup
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.options import PackOptions, Sizing
from linerate.shards.overview import summarize
from linerate.shards.pack import pack
from linerate.shards.plan import make_plan
from linerate.shards.repair import repair_shards
from linerate.shards.sources import FolderSource
from linerate.shards.verify import verify_shards

MakeJpeg = Callable[..., bytes]
ReadAll = Callable[[Path], dict[str, bytes]]
OPTIONS = PackOptions(seed=7, shard_samples=8)
CATALOG_FILES = ("catalog.json", "shards.parquet", "rejected.parquet")


@pytest.fixture
def out(packed: Catalog, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.root, tmp_path / "out"))


@pytest.fixture
def more(photo_folder: Path, make_jpeg: MakeJpeg, tmp_path: Path) -> Path:
    """photo_folder and 12 new images: 6 of a known class, 6 of one that sorts before it; and a broken one."""
    root = Path(shutil.copytree(photo_folder, tmp_path / "more"))
    (root / "aardvark").mkdir()
    for i in range(6):
        (root / "bee" / f"new{i}.jpg").write_bytes(make_jpeg(1000 + i))
        (root / "aardvark" / f"{i}.jpg").write_bytes(make_jpeg(2000 + i, 50, 50))
    (root / "bee" / "broken.jpg").write_bytes(make_jpeg(3000)[:-2])
    (root / "notes.txt").write_text("hello")
    return root


def sample_rows(catalog: Catalog) -> dict[str, tuple[int, str]]:
    """Key -> (sample_id, name of its class)."""
    rows = {}
    for shard in range(catalog.num_shards):
        for row in catalog.load_table(shard).to_pylist():
            assert row["key"] not in rows
            rows[row["key"]] = (row["sample_id"], catalog.class_names[row["label"]])
    return rows


def test_new_images_become_new_shards_and_old_ones_keep_every_byte(
    packed: Catalog, out: Path, more: Path, read_all: ReadAll
) -> None:
    before = read_all(out)
    catalog = pack(more, out, options=OPTIONS, num_workers=0, append=True)
    after = read_all(out)
    assert {name: after[name] for name in before if name not in CATALOG_FILES} == {
        name: data for name, data in before.items() if name not in CATALOG_FILES
    }
    assert (catalog.num_samples, catalog.num_planned, catalog.num_rejected) == (52, 53, 2)
    assert catalog.files[:5] == packed.files
    assert catalog.files[5:] == ["shard-000005.tar", "shard-000006.tar"]
    assert catalog.class_names == ("ant", "bee", "cat", "dog", "aardvark")
    rows, old = sample_rows(catalog), sample_rows(packed)
    assert old.items() <= rows.items()
    new = {key: row for key, row in rows.items() if key not in old}
    assert all(key.split("/")[0] == name for key, (_, name) in new.items())
    rejects = pq.read_table(out / "rejected.parquet").to_pylist()
    ids = [sample_id for sample_id, _ in new.values()] + [row["sample_id"] for row in rejects[:1]]
    assert sorted(ids) == list(range(40, 53))
    assert [row["key"] for row in rejects] == ["bee/broken.jpg", "notes.txt"]
    assert summarize(catalog).classes["aardvark"] == 6
    assert verify_shards(catalog, num_workers=0).ok


def test_an_append_is_recorded_and_changes_the_plan_id(packed: Catalog, out: Path, more: Path) -> None:
    options = PackOptions(seed=8, check="decode")
    catalog = pack(more, out, options=options, num_workers=0, append=True)
    (record,) = catalog.appends
    assert record["base_plan_id"] == packed.plan_id == catalog.shard_plan_id(0)
    assert record["plan_id"] == catalog.shard_plan_id(catalog.num_shards - 1)
    assert catalog.plan_id not in (record["plan_id"], packed.plan_id)
    names = ("first_shard", "first_sample_id", "num_samples", "num_planned", "num_known", "num_rejected")
    assert [record[name] for name in names] == [5, 40, 12, 13, 40, 2]
    assert (record["options"]["seed"], record["options"]["check"]) == (8, "decode")
    assert (catalog.seed, catalog.options) == (7, packed.options)


def test_the_same_append_again_changes_nothing(out: Path, more: Path) -> None:
    first = pack(more, out, options=OPTIONS, num_workers=0, append=True)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = pack(more, out, options=OPTIONS, num_workers=0, append=True)
    assert again.plan_id == first.plan_id
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_second_append_goes_on_from_the_first(out: Path, more: Path, make_jpeg: MakeJpeg) -> None:
    pack(more, out, options=OPTIONS, num_workers=0, append=True)
    (more / "zebra").mkdir()
    (more / "zebra" / "z.jpg").write_bytes(make_jpeg(5))
    catalog = pack(more, out, options=OPTIONS, num_workers=0, append=True)
    assert [append["first_shard"] for append in catalog.appends] == [5, 7]
    assert catalog.class_names[-1] == "zebra"
    assert sample_rows(catalog)["zebra/z.jpg"] == (53, "zebra")
    # The broken image, which had a place before, and the text, which never had one, are not listed again.
    assert catalog.num_rejected == 2
    assert verify_shards(catalog, num_workers=0).ok


def test_numbered_classes_go_on_by_number(out: Path, make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name, data in (("a.jpg", make_jpeg(0)), ("a.cls", b"5")):
            (tmp_path / name).write_bytes(data)
            archive.add(tmp_path / name, arcname=name)
    catalog = pack(tmp_path / "in.tar", out, options=OPTIONS, num_workers=0, append=True)
    assert catalog.class_names == ("ant", "bee", "cat", "dog", "4", "5")
    assert sample_rows(catalog)["a.jpg"] == (40, "5")


def test_an_append_of_broken_images_leaves_everything_as_it_was(
    out: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    before = read_all(out)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match="none of the 1 files is an image"):
        pack(tmp_path / "bad", out, options=OPTIONS, num_workers=0, append=True)
    assert read_all(out) == before


def test_an_append_killed_anywhere_is_whole_after_the_same_command(
    out: Path, more: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    whole = Path(shutil.copytree(out, tmp_path / "whole"))
    options = PackOptions(seed=7, shard_samples=2)
    expected_catalog = pack(more, whole, options=options, num_workers=0, append=True)
    # Forks of one process kill themselves at the n-th rename or removal: of plan, base, shards, tables,
    # catalog and work folder. It reads a number a line and answers with how the fork ended.
    script = """
import os, shutil, signal, sys
from pathlib import Path
from linerate.shards.pack import pack, PackOptions

def counted(what):
    def run(*args, **more):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return what(*args, **more)
    return run

Path.replace, Path.unlink, shutil.rmtree = map(counted, (Path.replace, Path.unlink, shutil.rmtree))
for line in sys.stdin:
    left, code = int(line), 1
    if not (child := os.fork()):
        try:
            options = PackOptions(seed=7, shard_samples=2)
            pack(sys.argv[1], sys.argv[2], options=options, num_workers=0, append=True)
            code = 0
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(more), str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for step in (3, 6, 9, 20, 29, 30, 31, 32, 33, 34, 35):
            print(step, file=process.stdin, flush=True)
            code = int(process.stdout.readline())
            found = Catalog.load(out)  # readable at every moment: before or after, nothing in between
            assert found.num_samples in (40, 52)
            if code == 0:
                break
            assert code == -signal.SIGKILL
        process.stdin.close()
    pack(more, out, options=options, num_workers=0, append=True)
    assert read_all(out) == read_all(whole)
    assert Catalog.load(out).plan_id == expected_catalog.plan_id
    assert not (out / ".pack").exists()


def test_a_pack_without_append_is_refused_on_appended_shards(
    out: Path, more: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(stage: str, amount: float) -> None:
        if stage == "pack":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(more, out, options=OPTIONS, num_workers=0, append=True, on_progress=interrupt)
    with pytest.raises(UserError, match="has an unfinished append; the same command as then, with --append"):
        pack(photo_folder, out, options=OPTIONS, num_workers=0)
    with pytest.raises(UserError, match="--seed was 7, now 9"):
        pack(more, out, options=PackOptions(seed=9, shard_samples=8), num_workers=0, append=True)
    assert Catalog.load(out).num_samples == 40
    pack(more, out, options=OPTIONS, num_workers=0, append=True)
    with pytest.raises(UserError, match="was packed and then appended to 1 times; --append adds more"):
        pack(photo_folder, out, options=OPTIONS, num_workers=0)


def test_only_finished_shards_of_the_same_name_can_be_added_to(
    out: Path, more: Path, photo_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"--append adds to finished shards, .* holds none; leave"):
        pack(more, tmp_path / "empty", options=OPTIONS, num_workers=0, append=True)
    assert not (tmp_path / "empty").exists()
    with pytest.raises(UserError, match=r"--name is x, but the shards of .* are named shard; give"):
        pack(more, out, options=PackOptions(name="x"), num_workers=0, append=True)
    (out / "shard-000009.tar").touch()
    with pytest.raises(UserError, match=r"holds shard-000009\.tar, which its catalog does not list"):
        pack(more, out, options=OPTIONS, num_workers=0, append=True)

    def interrupt(stage: str, amount: float) -> None:
        if stage == "pack":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(photo_folder, tmp_path / "begun", options=OPTIONS, num_workers=0, on_progress=interrupt)
    with pytest.raises(UserError, match="are not finished; the same `linerate shard pack` as before"):
        pack(more, tmp_path / "begun", options=OPTIONS, num_workers=0, append=True)


def test_repair_keeps_what_was_appended(out: Path, more: Path) -> None:
    before = pack(more, out, options=OPTIONS, num_workers=0, append=True)
    (out / "shard-000001.parquet").unlink()
    (out / "shard-000006.idx").unlink()
    assert repair_shards(out, num_workers=0).shards == ["shard-000001.tar", "shard-000006.tar"]
    after = Catalog.load(out)
    assert (after.appends, after.plan_id) == (before.appends, before.plan_id)
    assert verify_shards(after, num_workers=0).ok


def test_a_longer_table_of_shards_than_the_header_says_is_an_unfinished_append(out: Path, more: Path) -> None:
    header = (out / "catalog.json").read_text()
    pack(more, out, options=OPTIONS, num_workers=0, append=True)
    longer = json.loads((out / "catalog.json").read_text())
    assert longer["num_shards"] == 7
    (out / "catalog.json").write_text(header)
    catalog: Any = Catalog.load(out)
    assert (catalog.num_shards, catalog.num_samples) == (5, 40)


def test_class_folders_with_numbers_for_names_go_by_name(make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    for number in range(12):
        (first / str(number)).mkdir(parents=True)
        (first / str(number) / "a.jpg").write_bytes(make_jpeg(number))
    for number in range(3):
        (second / str(number)).mkdir(parents=True)
        (second / str(number) / "b.jpg").write_bytes(make_jpeg(20 + number))
    pack(first, out, num_workers=0)
    catalog = pack(second, out, num_workers=0, append=True)
    assert {key: name for key, (_, name) in sample_rows(catalog).items() if key.endswith("b.jpg")} == {
        f"{number}/b.jpg": str(number) for number in range(3)
    }


def test_what_had_the_bytes_of_another_does_not_come_back(make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, number in (("a", 0), ("b", 1), ("z", 0)):
        (source / f"{name}.jpg").write_bytes(make_jpeg(number))
    options = PackOptions(dedup="bytes")
    assert pack(source, out, options=options, num_workers=0).num_samples == 2
    again = pack(source, out, options=options, num_workers=0, append=True)
    assert (again.num_samples, again.appends) == (2, ())


def test_keys_are_known_without_the_password_of_their_urls(make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    with serve({"a.jpg": make_jpeg(0), "b.jpg": make_jpeg(1)}) as server:
        url = server.url("ok/a.jpg").replace("://", "://bob:sekret@")
        rows = [url, url, server.url("ok/b.jpg")]
        (tmp_path / "m.csv").write_text("\n".join(["url", *rows]))
        fetch = FetchOptions(allow_private=True)
        out = tmp_path / "out"
        assert pack(tmp_path / "m.csv", out, num_workers=0, fetch=fetch).num_samples == 2
        assert pack(tmp_path / "m.csv", out, num_workers=0, fetch=fetch, append=True).num_samples == 2
    for path in out.rglob("*"):
        if path.is_file():
            assert b"sekret" not in path.read_bytes()
    keys = pq.read_table(out / "rejected.parquet").column("key").to_pylist()
    assert keys == [server.url("ok/a.jpg")]


@pytest.fixture
def renamed(photo_folder: Path, tmp_path: Path, make_jpeg: MakeJpeg) -> Path:
    """Three files of photo_folder under other names, two equal new ones, one more, and one that is broken."""
    root = tmp_path / "renamed"
    root.mkdir()
    for i in range(3):
        shutil.copy(photo_folder / "cat" / f"000{i}.jpg", root / f"copy{i}.jpg")
    for name, number in (("new0", 50), ("new1", 51), ("twin", 50)):
        (root / f"{name}.jpg").write_bytes(make_jpeg(number))
    (root / "broken.jpg").write_bytes(make_jpeg(52)[:-2])
    return root


BY_BYTES = PackOptions(shard_samples=8, dedup="bytes")


def test_dedup_bytes_leaves_out_what_the_old_shards_hold_under_another_name(
    packed: Catalog, out: Path, renamed: Path, read_all: ReadAll
) -> None:
    before = read_all(out)
    catalog = pack(renamed, out, options=BY_BYTES, num_workers=0, append=True)
    assert sample_keys(catalog) - sample_keys(packed) == {"new0.jpg", "new1.jpg"}
    rejects = pq.read_table(out / "rejected.parquet").to_pylist()
    told = {row["key"]: row["detail"] for row in rejects if row["reason"] == "duplicate"}
    assert told == {f"copy{i}.jpg": f"of cat/000{i}.jpg" for i in range(3)} | {"twin.jpg": "of new0.jpg"}
    (record,) = catalog.appends
    assert (record["num_known"], record["num_known_bytes"], record["num_incomparable"]) == (0, 3, 0)
    assert (record["num_samples"], record["num_planned"], record["num_rejected"]) == (2, 3, 5)
    assert {
        name: read_all(out)[name] for name in before if name not in CATALOG_FILES
    }.items() <= before.items()
    assert verify_shards(catalog, num_workers=0).ok
    again = pack(renamed, out, options=BY_BYTES, num_workers=0, append=True)
    assert again.appends == catalog.appends


def sample_keys(catalog: Catalog) -> set[str]:
    return {key for shard in range(catalog.num_shards) for key in catalog.keys(shard)}


def test_an_append_of_known_bytes_alone_changes_nothing_and_says_so(
    out: Path, renamed: Path, read_all: ReadAll, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in renamed.glob("[!c]*"):
        path.unlink()
    before = read_all(out)
    argv = ["shard", "pack", str(renamed), str(out), "--append", "--dedup", "bytes", "--workers", "0"]
    assert main(argv) == 0
    assert "nothing new: the keys or the bytes of all 3 images are there" in capsys.readouterr().out
    assert read_all(out) == before
    assert not (out / ".pack").exists()


def test_equals_of_images_that_were_written_anew_are_not_found_but_counted(
    make_jpeg: MakeJpeg, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    old.mkdir()
    for name, more in (("plain", {}), ("told", {"comment": b"hello"}), ("also", {"comment": b"you"})):
        (old / f"{name}.jpg").write_bytes(make_jpeg(len(name), **more))
    first = pack(old, out, options=PackOptions(strip_exif=True), num_workers=0)
    shutil.copytree(old, new / "copy")
    argv = ["shard", "pack", str(new), str(out), "--append", "--dedup", "bytes", "--workers", "0"]
    assert main(argv) == 0
    assert "2 there were written anew when packed: their equals are not found" in capsys.readouterr().out
    catalog = Catalog.load(out)
    assert sample_keys(catalog) - sample_keys(first) == {"copy/told.jpg", "copy/also.jpg"}
    assert (catalog.appends[0]["num_known_bytes"], catalog.appends[0]["num_incomparable"]) == (1, 2)


def test_an_append_by_bytes_that_was_interrupted_goes_on_with_its_hashes(
    out: Path, renamed: Path, tmp_path: Path, read_all: ReadAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(shutil.copytree(out, tmp_path / "whole"))
    expected = pack(renamed, whole, options=BY_BYTES, num_workers=0, append=True)

    def interrupt(stage: str, amount: float) -> None:
        if stage == "pack":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(renamed, out, options=BY_BYTES, num_workers=0, append=True, on_progress=interrupt)
    monkeypatch.setattr(dedup, "run_hash_task", None)
    assert pack(renamed, out, options=BY_BYTES, num_workers=0, append=True).plan_id == expected.plan_id
    assert read_all(out) == read_all(whole)


def test_dedup_key_counts_the_doubles_of_an_append(out: Path, tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    (tmp_path / "cat").mkdir()
    for name in ("0000", "new"):
        (tmp_path / "cat" / f"{name}.jpg").write_bytes(make_jpeg(60))
    rows = ["cat/0000.jpg", "cat/new.jpg", "cat/new.jpg", "cat/new.jpg"]
    (tmp_path / "m.csv").write_text("\n".join(["path", *rows]))
    options = PackOptions(shard_samples=8, dedup="key")
    (record,) = pack(tmp_path / "m.csv", out, options=options, num_workers=0, append=True).appends
    assert (record["num_samples"], record["num_known"], record["filtered"]) == (1, 1, {"dedup": 2})
    assert "num_known_bytes" not in record


def test_old_hashes_without_what_an_append_compares_are_made_again(
    out: Path, renamed: Path, tmp_path: Path
) -> None:
    plan = make_plan(FolderSource(renamed), make_folder(tmp_path / "p"), seed=0, sizing=Sizing(), options={})
    how: dict[str, Any] = {"sizing": Sizing(), "num_workers": 0, "memory": "1GB"}
    hashes = tmp_path / "h"
    dedup.drop_equal_images(plan, hashes, **how)
    (file,) = hashes.glob("*.parquet")
    pq.write_table(pq.read_table(file).drop_columns(["xxh3_64"]), file)
    plan = make_plan(FolderSource(renamed), make_folder(tmp_path / "q"), seed=0, sizing=Sizing(), options={})
    left, _ = dedup.drop_equal_images(plan, hashes, **how)
    assert left.num_samples == 6


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path
