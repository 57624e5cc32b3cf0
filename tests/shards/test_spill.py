"""The spill: tars are read front to back into buckets, and no byte of any shard depends on it."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from linerate.shards import spill, spill_layout, spill_task
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack
from linerate.shards.plan import Plan
from linerate.shards.spill_layout import Layout, advise, make_layout, part_path
from linerate.shards.spill_task import SpillTask, load_index

ReadAll = Callable[[Path], dict[str, bytes]]
OPTIONS = PackOptions(seed=7, shard_samples=8)


@pytest.fixture(scope="module")
def tars(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photo_folder in two tars of about 30 KB."""
    root = tmp_path_factory.mktemp("tars")
    for number in range(2):
        with tarfile.open(root / f"{number}.tar", "w") as archive:
            for name in sorted(path.name for path in photo_folder.iterdir())[2 * number : 2 * number + 2]:
                archive.add(photo_folder / name, arcname=name)
    return root


@pytest.fixture(scope="module")
def direct(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """The tars in 5 shards, packed without a spill."""
    return pack(tars, tmp_path_factory.mktemp("direct") / "out", options=OPTIONS, num_workers=0)


SMALL = {"BUCKET_BYTES": 10_000, "PIECE_BYTES": 9_000}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that 60 KB of tars are spilled from several pieces into several buckets."""
    monkeypatch.setattr(spill, "whole_bytes", lambda: 0)
    for name, value in SMALL.items():
        monkeypatch.setattr(spill_layout, name, value)


def stop_at(stage: str) -> Callable[[str, float], None]:
    def on_progress(now: str, amount: float) -> None:
        if now == stage:
            raise KeyboardInterrupt

    return on_progress


def spilled(tars: Path, out: Path) -> Plan:
    """The plan of a run that was interrupted when all was spilled and nothing packed."""
    with pytest.raises(KeyboardInterrupt):
        pack(tars, out, options=OPTIONS, num_workers=0, on_progress=stop_at("plan"))
    return Plan.load(out / ".pack")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_shards_are_those_of_packing_without_a_spill(
    small: None, direct: Catalog, tars: Path, tmp_path: Path, read_all: ReadAll, num_workers: int
) -> None:
    pack(tars, tmp_path / "out", options=OPTIONS, num_workers=num_workers)
    assert read_all(tmp_path / "out") == read_all(direct.root)


def test_every_sample_lies_once_in_the_buckets_and_no_tar_is_read_again(
    small: None, direct: Catalog, tars: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    moved = Path(shutil.copytree(tars, tmp_path / "tars"))
    plan = spilled(moved, tmp_path / "out")
    layout = Layout.load(plan)
    assert layout
    assert layout.num_pieces > 2
    assert 2 < layout.num_buckets < plan.num_shards
    parts = list((tmp_path / "out" / ".pack" / "spill").glob("0*/0*"))
    assert len(parts) == layout.num_pieces * layout.num_buckets
    assert sorted(np.concatenate([load_index(part)[:, 0] for part in parts]).tolist()) == list(range(40))

    def lose_the_tars(stage: str, amount: float) -> None:
        if stage == "plan":
            for path in moved.iterdir():
                path.write_bytes(b"")

    pack(moved, tmp_path / "out", options=OPTIONS, num_workers=0, on_progress=lose_the_tars)
    assert read_all(tmp_path / "out") == read_all(direct.root)


def test_a_bucket_is_removed_when_its_shards_are_whole(small: None, tars: Path, tmp_path: Path) -> None:
    seen = []

    def watch(stage: str, amount: float) -> None:
        if stage == "pack":
            buckets = (tmp_path / "out" / ".pack" / "spill").glob("0*")
            seen.append(
                (len(list((tmp_path / "out").glob("*.parquet"))), sorted(int(path.name) for path in buckets))
            )

    pack(tars, tmp_path / "out", options=OPTIONS, num_workers=0, on_progress=watch)
    buckets = [[0, 0, 1, 1, 2], [0, 0, 1, 2, 3]]  # of the five shards, in three or four buckets
    assert [left for _, left in seen] in [[sorted(set(of[whole:])) for whole in range(5)] for of in buckets]
    assert not (tmp_path / "out" / ".pack").exists()


def test_progress_of_the_spill_counts_every_sample(small: None, tars: Path, tmp_path: Path) -> None:
    seen: dict[str, float] = {}

    def count(stage: str, amount: float) -> None:
        seen[stage] = seen.get(stage, 0) + amount

    pack(tars, tmp_path / "out", options=OPTIONS, num_workers=1, on_progress=count)
    assert seen == {"list": 40, "to spill": 40, "spill": 40, "plan": 40, "pack": 40}


def test_what_fits_into_memory_is_read_in_its_order_and_not_spilled(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, int]] = []
    monkeypatch.setattr(spill, "read_ahead", lambda path, at, size: asked.append((path.name, at, size)))
    monkeypatch.setattr(spill, "READ_WHOLE_BYTES", 16_000)
    seen: dict[str, float] = {}

    def count(stage: str, amount: float) -> None:
        seen[stage] = seen.get(stage, 0) + amount

    pack(tars, tmp_path / "out", options=OPTIONS, num_workers=0, on_progress=count)
    sizes = [(tars / name).stat().st_size for name in ("0.tar", "1.tar")]
    assert asked == [
        (f"{tar}.tar", at, min(16_000, size - at))
        for tar, size in enumerate(sizes)
        for at in range(0, size, 16_000)
    ]
    assert seen.pop("spill") == pytest.approx(40)
    assert seen == {"list": 40, "to spill": 40, "plan": 40, "pack": 40}


def test_a_quarter_of_the_free_memory_may_be_read_ahead_and_no_container_is_outgrown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "CONTROL_GROUP", tmp_path)
    free = spill.whole_bytes()
    assert free >= spill.READ_WHOLE_BYTES
    (tmp_path / "memory.max").write_text("max\n")
    assert spill.whole_bytes() >= spill.READ_WHOLE_BYTES
    (tmp_path / "memory.max").write_text("4000\n")
    monkeypatch.setattr(spill, "READ_WHOLE_BYTES", 10)
    assert spill.whole_bytes() == 1000
    (tmp_path / "memory.max").write_text("20\n")
    assert spill.whole_bytes() == 10


def test_a_folder_has_nothing_to_spill(small: None, photo_folder: Path, tmp_path: Path) -> None:
    plan = spilled(photo_folder, tmp_path / "out")
    assert make_layout(plan) is None
    assert not (plan.folder / "spill").exists()


# --- killed, and begun again

KILLED = """
import os, signal, sys
from pathlib import Path
from linerate.shards import spill, spill_layout
from linerate.shards.pack import pack, PackOptions
left = int(sys.argv[3])

def counted(call):
    def wrapper(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapper

for name in ("writev", "write", "open", "fdatasync", "replace"):
    setattr(os, name, counted(getattr(os, name)))
Path.replace = counted(Path.replace)
spill.whole_bytes = lambda: 0
spill_layout.BUCKET_BYTES, spill_layout.PIECE_BYTES = 10_000, 9_000
pack(sys.argv[1], sys.argv[2], options=PackOptions(seed=7, shard_samples=8), num_workers=0)
print(left)
"""


def run_killed(tars: Path, out: Path, calls: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(tars), str(out), str(calls)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
    )


def test_killed_at_random_points_and_begun_again_the_bytes_are_the_same(
    small: None, direct: Catalog, tars: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    whole = run_killed(tars, tmp_path / "whole", 10_000)
    calls = 10_000 - int(whole.stdout)
    assert calls > 100
    for kill_at in random.Random(0).sample(range(calls), 5):
        out = tmp_path / f"out{kill_at}"
        assert run_killed(tars, out, kill_at).returncode == -signal.SIGKILL
        pack(tars, out, options=OPTIONS, num_workers=0)
        assert read_all(out) == read_all(direct.root)


def test_parts_that_are_whole_are_kept_and_the_leftovers_of_dead_processes_removed(
    small: None, direct: Catalog, tars: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    folder = spilled(tars, tmp_path / "out").folder / "spill"
    part_path(folder, 1, 1).unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("0*/0*")}
    host = os.uname().nodename
    (folder / "0000" / f".0001.{host}.{2**22 + 1}.tmp").touch()
    (folder / "0000" / f".0001.{host}.{os.getpid()}.tmp").touch()
    spilled(tars, tmp_path / "out")
    after = {path: path.stat().st_mtime_ns for path in folder.glob("0*/0*")}
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {part_path(folder, 1, 1)}
    assert [path.name for path in folder.glob("*/.*")] == [f".0001.{host}.{os.getpid()}.tmp"]


def test_a_spill_of_another_plan_is_not_used(small: None, tars: Path, tmp_path: Path) -> None:
    plan = spilled(tars, tmp_path / "out")
    layout = plan.folder / "spill" / "layout.json"
    layout.write_text(layout.read_text().replace(plan.plan_id, "0" * 32))
    assert Layout.load(plan) is None
    rows = plan.load_rows(0)
    assert spill.spilled_rows(plan, rows, 0) == (rows, plan.containers)
    spilled(tars, tmp_path / "out")
    assert Layout.load(plan)


def test_few_samples_of_tars_that_do_not_fit_into_memory_are_not_read_with_all_the_rest(
    small: None, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = spilled(tars, tmp_path / "out")
    layout = make_layout(plan)
    assert layout
    assert layout.row_bytes < layout.total
    monkeypatch.setattr(spill, "whole_bytes", lambda: layout.row_bytes)
    assert spilled(tars, tmp_path / "out2").folder.joinpath("spill", "layout.json").exists()


def test_a_task_whose_spill_was_removed_does_nothing(small: None, tars: Path, tmp_path: Path) -> None:
    plan = spilled(tars, tmp_path / "out")
    shutil.rmtree(plan.folder / "spill")
    task = SpillTask(plan_folder=os.fspath(plan.folder), piece=0, buckets=(0,))
    spill_task.run_task(task, lambda samples: None)()
    assert not (plan.folder / "spill").exists()


# --- disks and tars that fail


def test_a_disk_without_room_for_the_spill_is_seen_before_it(
    small: None, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 812))
    monkeypatch.setattr("linerate.shards.pack.require_space", lambda out, num_bytes: None)
    with pytest.raises(
        UserError, match=r"a copy of their samples .* about [\d.]+ kB, the disk of .*out has 812"
    ):
        pack(tars, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert not list((tmp_path / "out" / ".pack" / "spill").glob("0*"))


def test_the_space_that_a_spill_takes_counts_as_free(
    small: None, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = spilled(tars, tmp_path / "out")
    asked = []
    monkeypatch.setattr("linerate.shards.pack.require_space", lambda out, num_bytes: asked.append(num_bytes))
    spilled(tars, tmp_path / "out")
    assert asked == [plan.total_bytes + 1024 * 40 - spill.spilled_bytes(plan)]
    assert spill.spilled_bytes(plan) > plan.total_bytes


def test_a_full_disk_stops_the_spill_and_the_same_call_goes_on(
    small: None,
    direct: Catalog,
    tars: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_all: ReadAll,
) -> None:
    writev, calls = os.writev, 0

    def fill_up(fd: int, views: list[memoryview]) -> int:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return writev(fd, views)

    monkeypatch.setattr(os, "writev", fill_up)
    with pytest.raises(UserError, match=r"no space left for .*out; 0 of 5 shards are whole"):
        pack(tars, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert not list((tmp_path / "out" / ".pack" / "spill").glob("0*/.*"))
    monkeypatch.undo()
    pack(tars, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert read_all(tmp_path / "out") == read_all(direct.root)


def test_short_writes_are_gone_on_with(
    small: None,
    direct: Catalog,
    tars: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_all: ReadAll,
) -> None:
    monkeypatch.setattr(os, "writev", lambda fd, views: os.write(fd, views[0][:5]))
    pack(tars, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert read_all(tmp_path / "out") == read_all(direct.root)


def test_a_piece_that_cannot_be_spilled_is_read_from_its_tar(
    small: None,
    direct: Catalog,
    tars: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_all: ReadAll,
) -> None:
    run_task = spill_task.run_task

    def fail(task: SpillTask, report: Callable[[int], None]) -> Callable[[], None]:
        if task.piece == 1:
            raise OSError(errno.EIO, "Input/output error")
        return run_task(task, report)

    monkeypatch.setattr(spill_task, "run_task", fail)
    pack(tars, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert read_all(tmp_path / "out") == read_all(direct.root)


def test_a_tar_that_shrank_after_it_was_listed_costs_the_samples_that_it_lost(
    small: None, tars: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(tars, tmp_path / "tars"))

    def shrink(stage: str, amount: float) -> None:
        if stage in ("to spill", "plan"):
            os.truncate(moved / "1.tar", 8000)

    rejects = []
    for whole in (0, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spill, "whole_bytes", lambda whole=whole: whole)
            shutil.copytree(tars, moved, dirs_exist_ok=True)
            out = tmp_path / f"out{whole}"
            pack(moved, out, options=OPTIONS, num_workers=0, on_progress=shrink)
            rejects.append(pq.read_table(out / "rejected.parquet").to_pylist())
    assert rejects[0] == rejects[1]
    assert {row["reason"] for row in rejects[0]} == {"changed while packing"}
    assert 10 < len(rejects[0]) < 20


# --- what is read at once


def rows_at(places: list[tuple[int, int, int]]) -> spill_task._Rows:
    container, offset, size = (np.array(column, np.int64) for column in zip(*places, strict=True))
    return spill_task._Rows(np.arange(len(places)), container, offset, size, np.zeros(len(places), np.int64))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill_task, "BLOCK_BYTES", 100)
    monkeypatch.setattr(spill_task, "GAP_BYTES", 20)


def test_neighbours_are_read_at_once_up_to_a_block_a_gap_and_the_end_of_a_tar(small_blocks: None) -> None:
    rows = rows_at([(0, 0, 40), (0, 60, 40), (0, 100, 5), (0, 126, 10), (0, 200, 300), (1, 0, 0), (1, 0, 7)])
    assert list(spill_task._spans(rows)) == [
        (0, 2, 0, 100),
        (2, 3, 100, 105),
        (3, 4, 126, 136),
        (4, 5, 200, 500),
        (5, 7, 0, 7),
    ]


def test_images_larger_than_a_block_are_spilled_whole(
    small: None,
    small_blocks: None,
    direct: Catalog,
    tars: Path,
    tmp_path: Path,
    read_all: ReadAll,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spill_task, "_MAX_VIEWS", 1)
    pack(tars, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert read_all(tmp_path / "out") == read_all(direct.root)


def test_a_system_without_advice_reads_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    advise(-1, 0, 100, "WILLNEED")
