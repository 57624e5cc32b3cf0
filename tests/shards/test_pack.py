"""Packing: the same bytes however it went, and nothing lost when it cannot go on."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from linerate.shards import engines, out_folder, pack_shard, tar_writer
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.options import ManifestColumns, PackOptions, Selection
from linerate.shards.pack import pack
from linerate.shards.pack_shard import ShardTask, load_mark
from linerate.shards.plan import make_plan
from linerate.shards.sources import FolderSource

ReadAll = Callable[[Path], dict[str, bytes]]
MakeJpeg = Callable[..., bytes]
OPTIONS = PackOptions(seed=7, shard_samples=8)


@pytest.fixture
def copy_of_packed(packed: Catalog, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.root, tmp_path / "copy"))


def rejected(root: Path) -> dict[str, str]:
    rows = pq.read_table(root / "rejected.parquet").to_pylist()
    return {row["key"]: f"{row['reason']}: {row['detail']}" for row in rows}


def test_every_image_lies_where_the_index_says_with_its_label(packed: Catalog, photo_folder: Path) -> None:
    seen = {}
    for shard in range(packed.num_shards):
        index, stored = packed.shard_index(shard), packed.shard_path(shard).read_bytes()
        for row, key in enumerate(packed.keys(shard)):
            jpeg = stored[index.offset[row] : index.offset[row] + index.size[row]]
            assert jpeg == (photo_folder / key).read_bytes()
            assert packed.class_names[index.label[row]] == key.split("/")[0]
            number = int(Path(key).stem)
            assert (index.height[row], index.width[row]) == (16 + number, 40 - number)
            seen[key] = int(index.sample_id[row])
    assert sorted(seen.values()) == list(range(40))
    assert len(seen) == packed.num_samples == 40


def test_neighbours_in_a_shard_come_from_all_classes(packed: Catalog) -> None:
    for shard in range(packed.num_shards):
        assert len(set(packed.shard_index(shard).label)) > 1


@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    packed: Catalog, photo_folder: Path, tmp_path: Path, read_all: ReadAll, num_workers: int
) -> None:
    pack(photo_folder, tmp_path / "out", options=OPTIONS, num_workers=num_workers)
    assert read_all(tmp_path / "out") == read_all(packed.root)


def test_a_folder_elsewhere_with_other_times_gives_the_same_bytes(
    packed: Catalog, photo_folder: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    shutil.copytree(photo_folder, tmp_path / "copy", copy_function=shutil.copyfile)
    pack(tmp_path / "copy", tmp_path / "out", options=OPTIONS, num_workers=0)
    assert read_all(tmp_path / "out") == read_all(packed.root)


def test_a_tar_of_the_folder_gives_the_same_shards(
    packed: Catalog, photo_folder: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photo_folder, arcname=".")
    catalog = pack(tmp_path / "photos.tar", tmp_path / "out", options=OPTIONS, num_workers=0)
    assert catalog.class_names == packed.class_names
    ours, theirs = read_all(tmp_path / "out"), read_all(packed.root)
    assert {k: v for k, v in ours.items() if k.endswith((".tar", ".idx"))} == {
        k: v for k, v in theirs.items() if k.endswith((".tar", ".idx"))
    }


def test_shards_are_themselves_a_source(packed: Catalog, tmp_path: Path) -> None:
    again = pack(packed.root, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert again.num_samples == 40
    assert again.class_names == ("0", "1", "2", "3")


def test_metadata_of_the_source_travels_into_the_tar(make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name, data in (("a.jpg", make_jpeg(0)), ("a.json", b'{"tag": "x"}'), ("a.cls", b"3")):
            (tmp_path / name).write_bytes(data)
            archive.add(tmp_path / name, arcname=name)
    catalog = pack(tmp_path / "in.tar", tmp_path / "out", num_workers=0)
    with tarfile.open(catalog.shard_path(0)) as archive:
        assert archive.getnames() == ["000000000000.jpg", "000000000000.cls", "000000000000.json"]
        member = archive.extractfile("000000000000.json")
        assert member
        assert member.read() == b'{"tag": "x"}'


def test_what_is_rejected_leaves_a_gap_and_a_reason(make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(6):
        (source / f"{i}.jpg").write_bytes(make_jpeg(i))
    (source / "cut.jpg").write_bytes(make_jpeg(9)[:-2])
    (source / "text.jpg").write_bytes(b"hello, I am no image")
    (source / "notes.txt").write_bytes(b"hello")
    catalog = pack(source, tmp_path / "out", options=PackOptions(shard_samples=3), num_workers=0)
    assert rejected(tmp_path / "out") == {
        "cut.jpg": "cut short: no end-of-image marker",
        "notes.txt": "not an image: a .txt file by its name",
        "text.jpg": "not a JPEG: text",
    }
    ids = [int(i) for shard in range(catalog.num_shards) for i in catalog.shard_index(shard).sample_id]
    places = pq.read_table(tmp_path / "out" / "rejected.parquet").column("sample_id").to_pylist()
    assert sorted(ids + [place for place in places if place is not None]) == list(range(8))
    assert (catalog.num_samples, catalog.num_planned, catalog.num_rejected) == (6, 8, 3)


def test_a_shard_without_samples_is_no_shard(make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(4):
        (source / f"{i}.jpg").write_bytes(make_jpeg(i) if i else b"broken")
    options = PackOptions(shard_samples=1)
    catalog = pack(source, tmp_path / "out", options=options, num_workers=0)
    assert catalog.num_shards == len(list((tmp_path / "out").glob("*.tar"))) == 3
    assert list(catalog.shard_sizes) == [1, 1, 1]
    assert pack(source, tmp_path / "out", options=options, num_workers=0).num_samples == 3


def test_decode_checks_reject_damage_that_the_header_does_not_show(
    make_jpeg: MakeJpeg, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "good.jpg").write_bytes(make_jpeg(0, 90, 90))
    (source / "bad.jpg").write_bytes(make_jpeg(1, 90, 90)[:-40] + b"\xff\xd9")
    assert pack(source, tmp_path / "a", num_workers=0).num_samples == 2
    assert pack(source, tmp_path / "b", options=PackOptions(check="decode"), num_workers=0).num_samples == 1
    assert rejected(tmp_path / "b")["bad.jpg"].startswith("does not decode: ")


# --- taking it up again


def test_the_same_call_again_changes_nothing(
    copy_of_packed: Path, photo_folder: Path, read_all: ReadAll
) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy_of_packed.iterdir()}
    pack(photo_folder, copy_of_packed, options=OPTIONS, num_workers=0)
    assert {path: path.stat().st_mtime_ns for path in copy_of_packed.iterdir()} == before


@pytest.mark.parametrize(
    "lost", ["shard-000001.tar", "shard-000001.idx", "shard-000001.parquet", "catalog.json"]
)
def test_what_is_missing_is_written_again(
    packed: Catalog, copy_of_packed: Path, photo_folder: Path, read_all: ReadAll, lost: str
) -> None:
    (copy_of_packed / lost).unlink()
    pack(photo_folder, copy_of_packed, options=OPTIONS, num_workers=0)
    assert read_all(copy_of_packed) == read_all(packed.root)


def test_a_mark_that_does_not_agree_is_no_mark(packed: Catalog, copy_of_packed: Path) -> None:
    task = ShardTask(plan_folder="", shard=1, out=str(copy_of_packed), name="shard", policy=OPTIONS.policy)
    assert load_mark(task, plan_id=packed.plan_id)
    assert load_mark(task, plan_id="another") is None
    with task.stem.with_suffix(".tar").open("ab") as tar:
        tar.write(b"x")
    assert load_mark(task, plan_id=packed.plan_id) is None
    task.stem.with_suffix(".parquet").write_bytes(b"PAR1")
    assert load_mark(task, plan_id=packed.plan_id) is None


def test_killed_at_any_point_and_run_again_gives_the_same_bytes(
    photo_folder: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    options = PackOptions(seed=1, shard_samples=2)
    pack(photo_folder, tmp_path / "whole", options=options, num_workers=0)
    expected = read_all(tmp_path / "whole")
    # It kills itself: however slow or fast the machine is, it cannot end before.
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from linerate.shards.pack import pack, PackOptions\n"
        "def die(stage, amount):\n"
        "    if len(list(Path(sys.argv[2]).glob('*.parquet'))) >= int(sys.argv[3]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "options = PackOptions(seed=1, shard_samples=2)\n"
        "pack(sys.argv[1], sys.argv[2], options=options, num_workers=1, on_progress=die)"
    )
    for kill_at in (1, 8):
        out = tmp_path / f"out{kill_at}"
        done = subprocess.run(
            [sys.executable, "-c", script, str(photo_folder), str(out), str(kill_at)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        assert done.returncode == -signal.SIGKILL
        assert not (out / "catalog.json").exists()
        with pytest.raises(UserError, match="are not finished; the same `linerate shard pack` again"):
            Catalog.load(out)
        _wait_until_unlocked(out)
        pack(photo_folder, out, options=options, num_workers=0)
        assert read_all(out) == expected


def _wait_until_unlocked(out: Path) -> None:
    time.sleep(0.05)  # the killed one's worker notices and dies; the lock itself is free at once
    assert (out / ".pack" / "lock").exists()


def test_an_interrupt_leaves_no_temporary_files(photo_folder: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, amount: float) -> None:
        if stage == "pack" and list(tmp_path.glob("out/*.parquet")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(photo_folder, tmp_path / "out", options=OPTIONS, num_workers=0, on_progress=interrupt)
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert pack(photo_folder, tmp_path / "out", options=OPTIONS, num_workers=0).num_samples == 40


def test_progress_counts_every_sample(photo_folder: Path, tmp_path: Path) -> None:
    seen: dict[str, float] = {}

    def count(stage: str, amount: float) -> None:
        seen[stage] = seen.get(stage, 0) + amount

    pack(photo_folder, tmp_path / "out", options=OPTIONS, num_workers=1, on_progress=count)
    assert seen == {"list": 40, "plan": 40, "pack": 40}


# --- refusals


def test_other_options_are_refused_with_what_differs(
    copy_of_packed: Path, photo_folder: Path, read_all: ReadAll
) -> None:
    before = read_all(copy_of_packed)
    with pytest.raises(UserError, match=r"--seed was 7, now 8; --shard-samples was 8, now 10000"):
        pack(photo_folder, copy_of_packed, options=PackOptions(seed=8), num_workers=0)
    assert read_all(copy_of_packed) == before


def test_another_source_is_refused(copy_of_packed: Path, photo_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(photo_folder, tmp_path / "more")
    shutil.copy(tmp_path / "more" / "ant" / "0000.jpg", tmp_path / "more" / "ant" / "new.jpg")
    with pytest.raises(UserError, match=r"not the one that OUT .* \(40 samples then, 41 now"):
        pack(tmp_path / "more", copy_of_packed, options=OPTIONS, num_workers=0)
    assert Catalog.load(copy_of_packed).num_samples == 40
    assert not (copy_of_packed / ".pack").exists()


def test_a_source_without_images_makes_no_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds no images"):
        pack(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_without_a_catalog_are_not_overwritten_by_another_plan(
    copy_of_packed: Path, photo_folder: Path
) -> None:
    (copy_of_packed / "catalog.json").unlink()
    before = (copy_of_packed / "shard-000000.tar").read_bytes()
    with pytest.raises(UserError, match=r"is not the one that OUT .* other names, sizes or options"):
        pack(photo_folder, copy_of_packed, options=PackOptions(seed=8, shard_samples=8), num_workers=0)
    assert (copy_of_packed / "shard-000000.tar").read_bytes() == before


def test_a_source_that_changed_in_mid_run_is_refused(photo_folder: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, amount: float) -> None:
        if stage == "pack":
            raise KeyboardInterrupt

    shutil.copytree(photo_folder, tmp_path / "in")
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "in", tmp_path / "out", options=OPTIONS, num_workers=0, on_progress=interrupt)
    (tmp_path / "in" / "ant" / "0000.jpg").unlink()
    with pytest.raises(UserError, match="40 samples then, 39 now"):
        pack(tmp_path / "in", tmp_path / "out", options=OPTIONS, num_workers=0)
    with pytest.raises(UserError, match="--seed was 7, now 9"):
        pack(tmp_path / "in", tmp_path / "out", options=PackOptions(seed=9, shard_samples=8), num_workers=0)


def test_a_folder_with_something_else_is_left_alone(photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("three years")
    with pytest.raises(UserError, match=r"holds something else \(thesis\.txt\)"):
        pack(photo_folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_impossible_places_are_refused(photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; give a folder"):
        pack(photo_folder, tmp_path / "file")
    with pytest.raises(UserError, match="lies inside the source"):
        pack(photo_folder, photo_folder / "shards")
    with pytest.raises(UserError, match="cannot be written"):
        pack(photo_folder, "/proc/no-such-folder/out")
    assert not (photo_folder / "shards").exists()


def test_a_second_writer_is_refused_and_told_who_the_first_is(photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".pack").mkdir(parents=True)
    with (tmp_path / "out" / ".pack" / "lock").open("w") as lock:
        lock.write("process 1 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            UserError, match=r"another `linerate shard pack` \(process 1 on elsewhere\) writes"
        ):
            pack(photo_folder, tmp_path / "out")
    assert pack(photo_folder, tmp_path / "out", num_workers=0).num_samples == 40


def test_a_folder_that_knows_no_locks_is_packed_all_the_same(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = errno.ENOLCK

    def no_locks(*args: object) -> None:
        raise OSError(code, "No locks available")

    monkeypatch.setattr(out_folder.fcntl, "flock", no_locks)
    assert pack(photo_folder, tmp_path / "out", num_workers=0).num_samples == 40
    code = errno.EIO
    with pytest.raises(OSError, match="No locks"):
        pack(photo_folder, tmp_path / "out2", num_workers=0)


def test_a_source_of_broken_images_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "in" / "b.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 2 files .*1 not a JPEG \(PNG\).*--baseline"):
        pack(tmp_path / "in", tmp_path / "out", num_workers=0)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="none of the 2 files"):
        pack(tmp_path / "in", tmp_path / "out", num_workers=0)
    assert list((tmp_path / "out").iterdir()) == []


# --- disks that fail


def test_a_disk_that_is_too_small_is_seen_before_the_first_image(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        out_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9999, 9187, 812)
    )
    with pytest.raises(
        UserError, match=r"the shards need about [\d.]+ kB, the disk of .* has 812 bytes free"
    ):
        pack(photo_folder, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert not list((tmp_path / "out").glob("*shard-*"))


def test_a_full_disk_stops_cleanly_and_the_same_call_goes_on(
    packed: Catalog, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_all: ReadAll
) -> None:
    written = 0
    write = os.write

    def fill_up(fd: int, data: Any) -> int:
        nonlocal written
        written += len(data)
        if written > 30_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(tar_writer.os, "write", fill_up)
    with pytest.raises(
        UserError, match=r"no space left for .*out; [1-4] of 5 shards are whole; the same command"
    ):
        pack(photo_folder, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert not list((tmp_path / "out").glob(".*.tmp"))
    monkeypatch.undo()
    pack(photo_folder, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert read_all(tmp_path / "out") == read_all(packed.root)


def test_what_an_older_version_began_is_refused(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = out / ".pack"
    work.mkdir(parents=True)
    make_plan(FolderSource(photo_folder), work, seed=0, sizing=OPTIONS.sizing, options=asdict(OPTIONS))
    header = json.loads((work / "plan.json").read_text())
    del header["version"]  # as the first one wrote it
    (work / "plan.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match=r"another order \(its plan is of version 1, this one makes 2\)"):
        pack(photo_folder, out, options=OPTIONS, num_workers=0)
    assert [path.name for path in out.iterdir()] == [".pack"]


def test_a_folder_that_may_not_be_written_stops_the_run(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "out/.shard.tmp")

    monkeypatch.setattr(pack_shard, "TarWriter", refuse)
    with pytest.raises(UserError, match=r"Permission denied: out/\.shard\.tmp; 0 of 5 shards are whole"):
        pack(photo_folder, tmp_path / "out", options=OPTIONS, num_workers=0)


def test_shards_that_fail_three_times_are_named_and_the_others_are_kept(
    packed: Catalog, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_all: ReadAll
) -> None:
    run_task = pack_shard.run_task

    def fail(task: ShardTask, report: Callable[[int], None]) -> Any:
        if task.shard == 3:
            raise RuntimeError("struck by lightning")
        return run_task(task, report)

    monkeypatch.setattr(pack_shard, "run_task", fail)
    with pytest.raises(UserError, match=r"1 of 5 shards failed three times \(shard 3: RuntimeError: struck"):
        pack(photo_folder, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 4
    monkeypatch.undo()
    pack(photo_folder, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert read_all(tmp_path / "out") == read_all(packed.root)


def test_a_failed_sync_leaves_no_mark(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr(engines, "MAX_ATTEMPTS", 1)
    with pytest.raises(UserError, match="Input/output error"):
        pack(photo_folder, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert not list((tmp_path / "out").glob("*shard-*"))


def test_the_catalog_records_all_options(packed: Catalog) -> None:
    document = json.loads((packed.root / "catalog.json").read_text())
    none = [*Selection.__dataclass_fields__, *ManifestColumns.__dataclass_fields__]
    assert document["options"] == dict.fromkeys(none) | {
        "name": "shard",
        "seed": 7,
        "shard_bytes": 1_000_000_000,
        "shard_samples": 8,
        "min_shards": 16,
        "check": "header",
        "max_pixels": 100_000_000,
        "max_image_bytes": 100_000_000,
        "min_side": 1,
        "resize": None,
        "quality": 90,
        "baseline": False,
        "icc": "drop",
        "strip_exif": False,
    }
    assert not (packed.root / ".pack").exists()
