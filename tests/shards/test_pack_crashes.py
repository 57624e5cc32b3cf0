"""Killed at random times, and on disks that end: afterwards the same command gives the same bytes."""

import errno
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from linerate.shards.errors import UserError
from linerate.shards.options import PackOptions
from linerate.shards.out_folder import lock_folder
from linerate.shards.pack import pack

ReadAll = Callable[[Path], dict[str, bytes]]
OPTIONS = PackOptions(seed=5, shard_samples=2, check="decode")
FLAGS = ["--seed", "5", "--shard-samples", "2", "--check", "decode", "--json"]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def command(source: Path, out: Path, *more: str) -> list[str]:
    script = "import sys; from linerate.__main__ import main; sys.exit(main())"
    return [sys.executable, "-c", script, "shard", "pack", str(source), str(out), *FLAGS, *more]


def shards_in(out: Path) -> int:
    return len(list(out.glob("*.parquet")))


def kill_group_after(argv: list[str], out: Path, *, new_shards: int, wait_s: float) -> int:
    """Start argv in a group of its own and SIGKILL all of it, wait_s after so many more shards are whole."""
    before = shards_in(out)
    process = subprocess.Popen(argv, env=ENV, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and shards_in(out) < before + new_shards:
        time.sleep(0.005)
    time.sleep(wait_s)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def test_killed_at_random_times_again_and_again_gives_the_same_bytes(
    photo_folder: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    pack(photo_folder, tmp_path / "whole", options=OPTIONS, num_workers=0)
    draw = random.Random(0)
    out = tmp_path / "out"
    codes = []
    for number in range(4):
        argv = command(photo_folder, out, "--workers", str(number % 3))
        wait_s = draw.uniform(0, 0.03)
        codes.append(kill_group_after(argv, out, new_shards=draw.randrange(4), wait_s=wait_s))
    assert -signal.SIGKILL in codes
    assert set(codes) <= {0, -signal.SIGKILL}
    subprocess.run(command(photo_folder, out, "--workers", "2"), env=ENV, check=True, capture_output=True)
    assert read_all(out) == read_all(tmp_path / "whole")


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="needs Ray: that a killed run on it can go on stays untested",
)
def test_a_run_on_ray_that_is_killed_goes_on_as_a_local_one(
    photo_folder: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    pack(photo_folder, tmp_path / "whole", options=OPTIONS, num_workers=0)
    out = tmp_path / "out"
    argv = command(photo_folder, out, "--engine", "ray", "--workers", "1")
    assert kill_group_after(argv, out, new_shards=3, wait_s=0) in (0, -signal.SIGKILL)
    assert shards_in(out) >= 3
    pack(photo_folder, out, options=OPTIONS, num_workers=0)
    assert read_all(out) == read_all(tmp_path / "whole")


def test_two_commands_on_one_folder_are_refused(photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".pack").mkdir(parents=True)
    with lock_folder(tmp_path / "out"):
        done = subprocess.run(
            command(photo_folder, tmp_path / "out"), env=ENV, capture_output=True, text=True
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"another `linerate shard pack` (process {os.getpid()} on" in done.stderr


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_limit_on_file_sizes_stops_the_run_and_without_it_the_same_command_goes_on(
    photo_folder: Path, tmp_path: Path, read_all: ReadAll, workers: str
) -> None:
    """What a full disk is to a writer: the system refuses the bytes. The plan still fits, no shard does."""
    options = PackOptions(seed=5, shard_samples=20, check="decode")
    catalog = pack(photo_folder, tmp_path / "whole", options=options, num_workers=0)
    limit = int(catalog.shard_bytes.min()) // 2
    argv = command(photo_folder, tmp_path / "out", "--workers", workers, "--shard-samples", "20")
    argv[2] = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));{argv[2]}"
    )
    done = subprocess.run(argv, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{os.strerror(errno.EFBIG)}; 0 of 5 shards are whole; the same command again" in done.stderr
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert not (tmp_path / "out" / "catalog.json").exists()
    pack(photo_folder, tmp_path / "out", options=options, num_workers=0)
    assert read_all(tmp_path / "out") == read_all(tmp_path / "whole")


def test_a_disk_that_fills_up_stops_the_run_and_with_more_space_it_goes_on(
    photo_folder: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs: a disk that is really full stays untested, its error is not")
    try:
        pack(photo_folder, tmp_path / "whole", options=OPTIONS, num_workers=0)
        (disk / "ballast").write_bytes(bytes(60_000))
        with pytest.raises(UserError, match=r"no space left for|the shards need about"):
            pack(photo_folder, disk / "out", options=OPTIONS, num_workers=0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("linerate.shards.pack.require_space", lambda out, num_bytes: None)
            with pytest.raises(UserError, match=r"no space left for .* shards are whole; the same command"):
                pack(photo_folder, disk / "out", options=OPTIONS, num_workers=0)
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        pack(photo_folder, disk / "out", options=OPTIONS, num_workers=0)
        assert read_all(disk / "out") == read_all(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_shard_finished_twice_is_harmless(photo_folder: Path, tmp_path: Path, read_all: ReadAll) -> None:
    """Two hosts may take the same worker's shards: the same bytes take each other's place."""
    from linerate.shards.pack_shard import ShardTask, finish_shard, pack_shard
    from linerate.shards.sources import open_source
    from linerate.shards.worker_index import Part, finish_parts, pack_part

    pack(photo_folder, tmp_path / "whole", options=OPTIONS, num_workers=0)
    out = tmp_path / "out"
    pack_part(open_source([photo_folder]), out, Part(index=0, count=1), options=OPTIONS)
    task = ShardTask(
        plan_folder=str(out / ".pack"), shard=3, out=str(out), name="shard", policy=OPTIONS.policy
    )
    first = json.dumps(vars(finish_shard(pack_shard(task))))
    assert json.dumps(vars(finish_shard(pack_shard(task)))) == first
    finish_parts(out)
    assert read_all(out) == read_all(tmp_path / "whole")
