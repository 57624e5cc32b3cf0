"""Independent workers over one OUT: the bytes of a single pack, and one plan."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from linerate.shards import worker_index
from linerate.shards.catalog import Catalog
from linerate.shards.engines import Engine
from linerate.shards.errors import UserError
from linerate.shards.options import PackOptions
from linerate.shards.pack import Effort, pack
from linerate.shards.sources import open_source
from linerate.shards.worker_index import Part, PartReport, choose_part, finish_parts, pack_part

ReadAll = Callable[[Path], dict[str, bytes]]
OPTIONS = PackOptions(seed=7, shard_samples=8)
HERE = Effort(num_workers=0)


def work(source: Path, out: Path, index: int, count: int = 3, options: PackOptions = OPTIONS) -> PartReport:
    return pack_part(open_source([source]), out, Part(index=index, count=count), options=options, effort=HERE)


def test_workers_and_finish_write_what_one_pack_writes(
    packed: Catalog, photo_folder: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    out = tmp_path / "out"
    reports = [work(photo_folder, out, index) for index in (2, 0, 1)]
    assert [(r.mine, r.packed_now) for r in reports] == [(1, 1), (2, 2), (2, 2)]
    assert work(photo_folder, out, 0).packed_now == 0
    assert finish_parts(out).num_samples == 40
    assert read_all(out) == read_all(packed.root)
    assert work(photo_folder, out, 0).finished
    assert finish_parts(out).num_samples == 40
    assert read_all(out) == read_all(packed.root)
    assert not (out / ".pack").exists()


def test_workers_at_the_same_time_share_one_plan(
    packed: Catalog, photo_folder: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    script = "import sys; from linerate.__main__ import main; sys.exit(main())"
    argv = [sys.executable, "-c", script, "shard", "pack", str(photo_folder), str(tmp_path / "out"), "--json"]
    argv += ["--seed", "7", "--shard-samples", "8", "--workers", "0", "--worker-count", "2", "--worker-index"]
    workers = [
        subprocess.Popen(
            [*argv, str(index)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.DEVNULL,
        )
        for index in range(2)
    ]
    assert [worker.wait() for worker in workers] == [0, 0]
    finish_parts(tmp_path / "out")
    assert read_all(tmp_path / "out") == read_all(packed.root)


def test_finish_names_the_missing_shards_and_their_workers(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work(photo_folder, out, 1)
    with pytest.raises(
        UserError,
        match=r"3 of 5 shards of .* \(shard-000000, shard-000002, shard-000003\); .* --worker-index 0, 2",
    ):
        finish_parts(out)
    (out / ".pack" / "worker_count.json").unlink()
    with pytest.raises(UserError, match=r"first shard-000000\); the same `linerate shard pack` again"):
        finish_parts(out)


def test_an_ordinary_pack_goes_on_where_workers_stopped(
    packed: Catalog, photo_folder: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    work(photo_folder, tmp_path / "out", 1)
    pack(photo_folder, tmp_path / "out", options=OPTIONS, num_workers=0)
    assert read_all(tmp_path / "out") == read_all(packed.root)


def test_workers_can_append(packed: Catalog, photo_folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(packed.root, tmp_path / "out"))
    more = Path(shutil.copytree(photo_folder, tmp_path / "more"))
    (more / "new").mkdir()
    shutil.copy(more / "ant" / "0000.jpg", more / "new" / "x.jpg")
    source = open_source([more])
    for index in range(2):
        part = Part(index=index, count=2)
        pack_part(source, out, part, options=OPTIONS, effort=HERE, append=True)
    with pytest.raises(UserError, match=r"what is under way in .* is an append; repeat the command"):
        work(more, out, 0, count=2)
    assert finish_parts(out).num_samples == 41
    assert pack_part(source, out, Part(index=0, count=2), options=OPTIONS, effort=HERE, append=True).finished


def test_another_plan_is_refused(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work(photo_folder, out, 0)
    with pytest.raises(UserError, match="--seed was 7, now 1"):
        work(photo_folder, out, 1, options=PackOptions(seed=1, shard_samples=8))
    other = Path(shutil.copytree(photo_folder, tmp_path / "other"))
    with pytest.raises(UserError, match=r"the plan in .* is of .*photos.*, not of .*other; give every"):
        work(other, out, 1)
    part = Part(index=1, count=3)
    with pytest.raises(UserError, match="is none; repeat the command of the other workers"):
        pack_part(open_source([photo_folder]), out, part, options=OPTIONS, effort=HERE, append=True)
    for index in range(3):
        work(photo_folder, out, index)
    finish_parts(out)
    with pytest.raises(UserError, match="--seed was 7, now 1"):
        work(photo_folder, out, 1, options=PackOptions(seed=1, shard_samples=8))


def test_who_may_run_beside_whom(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_index, "POLL_S", 0.01)
    out = tmp_path / "out"
    work(photo_folder, out, 0)
    with worker_index._lock_part(out, Part(index=1, count=3)):
        with pytest.raises(UserError, match=r"worker 1 of 3 is running already \(process \d+ on"):
            work(photo_folder, out, 1)
        with pytest.raises(UserError, match=r"workers of --worker-count 3 are writing to .* says 4"):
            work(photo_folder, out, 3, count=4)
        with pytest.raises(UserError, match=r"another `linerate shard pack` \(process"):
            pack(photo_folder, out, options=OPTIONS, num_workers=0)
        with pytest.raises(UserError, match="another `linerate shard pack`"):
            finish_parts(out)
        assert work(photo_folder, out, 2).mine == 1
    from linerate.shards.out_folder import lock_folder

    with lock_folder(out), pytest.raises(UserError, match=r"another `linerate shard pack` .* wait until it"):
        work(photo_folder, out, 1)
    assert work(photo_folder, out, 4, count=5).mine == 1  # alone, it may say another count


def test_a_folder_finished_at_the_same_moment_is_told(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_index, "_join", lambda shared, out, part: shutil.rmtree(out / ".pack"))
    with pytest.raises(UserError, match="was finished at this moment; start worker 0 of 3 again"):
        work(photo_folder, tmp_path / "out", 0)


def test_a_worker_waits_for_the_plan_only_so_long(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_index, "POLL_S", 0.01)
    out, told = tmp_path / "out", list[str]()
    (out / ".pack").mkdir(parents=True)
    with (
        worker_index._lock_plan(out, told.append, 1.0),
        pytest.raises(UserError, match=r"process \d+ on .* has not finished the plan of .* in 0 s; wait"),
    ):
        pack_part(
            open_source([photo_folder]),
            out,
            Part(index=0, count=2),
            options=OPTIONS,
            effort=HERE,
            on_wait=told.append,
            wait_limit_s=0.05,
        )
    assert told == [f"process {os.getpid()} on {os.uname().nodename}"]


def test_a_folder_that_knows_no_locks_takes_workers_all_the_same(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = errno.ENOLCK

    def no_locks(*args: object) -> None:
        raise OSError(code, "No locks available")

    monkeypatch.setattr(worker_index.fcntl, "flock", no_locks)
    assert work(photo_folder, tmp_path / "out", 0).mine == 2
    code = errno.EIO
    with pytest.raises(OSError, match="No locks"):
        work(photo_folder, tmp_path / "out", 1)


def test_old_temporary_files_of_a_workers_own_shards_are_removed(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work(photo_folder, out, 0)
    (out / "shard-000003.parquet").unlink()
    old, fresh, foreign = (out / f".shard-{n:06d}.tar.host-1{i}.tmp" for i, n in enumerate((3, 3, 1)))
    for path in (old, fresh, foreign):
        path.touch()
    for path in (old, foreign):
        os.utime(path, (1, 1))
    work(photo_folder, out, 0)
    assert [path.exists() for path in (old, fresh, foreign)] == [False, True, True]


def test_an_engine_is_refused_beside_an_index(photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--worker-index needs no engine: leave --engine ray out"):
        pack_part(
            open_source([photo_folder]),
            tmp_path / "out",
            Part(index=0, count=1),
            effort=Effort(engine=Engine(kind="ray")),
        )


def test_finish_needs_a_plan(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no plan in .*; `linerate shard pack SOURCE\.\.\. "):
        finish_parts(tmp_path)


SLURM = {
    "SLURM_ARRAY_TASK_ID": "14",
    "SLURM_ARRAY_TASK_MIN": "2",
    "SLURM_ARRAY_TASK_STEP": "4",
    "SLURM_ARRAY_TASK_COUNT": "5",
}


def test_auto_reads_slurm_and_kubernetes() -> None:
    assert choose_part(None, None, SLURM) is None
    assert choose_part(2, 5, SLURM) == Part(index=2, count=5)
    assert choose_part("auto", "auto", SLURM) == choose_part("auto", None, SLURM) == Part(index=3, count=5)
    assert choose_part("auto", 9, {"JOB_COMPLETION_INDEX": "8"}) == Part(index=8, count=9)


@pytest.mark.parametrize(
    ("index", "count", "environment", "message"),
    [
        (1, None, {}, "go together"),
        (None, 4, {}, "go together"),
        ("auto", 4, {"ID": "ubuntu"}, "finds neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX"),
        ("auto", None, {"JOB_COMPLETION_INDEX": "8"}, "give --worker-count N"),
        (4, 4, {}, "--worker-index 4 --worker-count 4: indices run from 0"),
        (0, -1, {}, "indices run from 0"),
    ],
)
def test_a_part_that_is_none_is_refused(
    index: worker_index.Word, count: worker_index.Word, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_part(index, count, environment)
