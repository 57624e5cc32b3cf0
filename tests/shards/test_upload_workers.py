"""Appending, independent workers and `finish` where OUT is a bucket: the bytes of a folder."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from linerate.shards import claims, worker_upload
from linerate.shards.bucket import Bucket
from linerate.shards.catalog import Catalog
from linerate.shards.claims import CLAIMS_NAME, ClaimedError, Role, claim
from linerate.shards.cli import main
from linerate.shards.errors import UserError
from linerate.shards.options import PackOptions
from linerate.shards.pack import Effort, pack
from linerate.shards.sources import open_source
from linerate.shards.upload import PACKS_ALL
from linerate.shards.worker_index import Part, PartReport, finish_parts, pack_part

ReadAll = Callable[[Path], dict[str, bytes]]
OUT = "s3://shards/out"
OPTIONS = PackOptions(seed=7, shard_samples=8)
HERE = Effort(num_workers=0)


def stored(store: Any) -> dict[str, bytes]:
    found = [name for name in store.find("shards/out") if not name.endswith("/pack_stats.parquet")]
    return {name.removeprefix("shards/out/"): store.cat_file(name) for name in found}


def work(source: Path, staging: Path, index: int, count: int = 2, **named: Any) -> PartReport:
    named = {"options": OPTIONS, "effort": HERE, "staging": staging} | named
    return pack_part(open_source([source]), OUT, Part(index=index, count=count), **named)


def test_workers_and_finish_write_what_one_pack_into_a_folder_writes(
    store: Any, packed: Catalog, photo_folder: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    first = work(photo_folder, tmp_path / "one", 1)
    assert (first.num_shards, first.mine, first.packed_now) == (5, 2, 2)
    with pytest.raises(UserError, match=r"3 of 5 shards of s3://shards/out .* with --worker-index 0"):
        finish_parts(OUT, staging=tmp_path / "end")
    assert work(photo_folder, tmp_path / "two", 0).packed_now == 3
    assert work(photo_folder, tmp_path / "three", 0).packed_now == 0
    with pytest.raises(UserError, match=r"OUT s3://shards/out was begun with .*--seed was 7, now 8"):
        work(photo_folder, tmp_path / "two", 0, options=PackOptions(seed=8, shard_samples=8))
    assert finish_parts(OUT, staging=tmp_path / "end").num_samples == 40
    assert stored(store) == read_all(packed.root)
    assert "shards/out/pack_stats.parquet" in store.find("shards/out")
    assert work(photo_folder, tmp_path / "two", 0).finished
    assert main(["finish", OUT, "--staging", str(tmp_path / "end"), "--json"]) == 0
    assert stored(store) == read_all(packed.root)


def test_an_append_writes_what_it_would_in_a_folder(
    store: Any, packed: Catalog, photo_folder: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    more = Path(shutil.copytree(photo_folder, tmp_path / "more"))
    (more / "new").mkdir()
    for i in range(3):
        shutil.copy(more / "ant" / f"{i:04d}.jpg", more / "new" / f"{i}.jpg")
    here = Path(shutil.copytree(packed.root, tmp_path / "here"))
    pack(more, here, options=OPTIONS, num_workers=0, append=True)
    named = {"options": OPTIONS, "num_workers": 0, "staging": tmp_path / "staging", "append": True}
    with pytest.raises(UserError, match="--append adds to finished shards"):
        pack(more, OUT, **named)
    store.put(str(packed.root) + "/", "shards/out/", recursive=True)
    script = (
        "import os, signal, sys\n"
        "from linerate.shards.bucket import Bucket\n"
        "from linerate.shards.cli import main\n"
        "put = Bucket.put\n"
        "def put_and_die(self, path, name):\n"
        "    put(self, path, name)\n"
        "    if name == 'shards.parquet':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Bucket.put = put_and_die\n"
        "main(sys.argv[1:])\n"
    )
    words = ["pack", str(more), OUT, "--append", "--seed", "7", "--shard-samples", "8", "--workers", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", script, *words, "--staging", str(tmp_path / "killed")]
    died = subprocess.run(argv, env=environment, capture_output=True, timeout=60, check=False)
    assert died.returncode == -9
    assert json.loads(stored(store)["catalog.json"])["num_samples"] == 40
    with pytest.raises(UserError, match="OUT s3://shards/out has an unfinished append"):
        pack(more, OUT, **(named | {"append": False}))
    assert pack(more, OUT, **named).num_samples == 43
    assert stored(store) == read_all(here)
    assert pack(more, OUT, **named).num_samples == 43
    store.pipe_file("shards/out/shard-000077.tar", b"x")
    with pytest.raises(UserError, match=r"s3://shards/out holds shard-000077\.tar, which its catalog does"):
        pack(more, OUT, **named)


def test_a_worker_waits_for_the_plan_that_another_one_makes(
    store: Any, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_upload, "POLL_S", 0.01)
    waited: list[str] = []

    def wait(whom: str) -> None:
        waited.append(whom)
        held.__exit__(None, None, None)

    held = claim(Bucket(OUT), Role("plan"))
    held.__enter__()
    work(photo_folder, tmp_path, 0, on_wait=wait)
    assert waited == [f"process {os.getpid()} on {socket.gethostname()}"]
    store.rm("shards/out", recursive=True)
    with (
        claim(Bucket(OUT), Role("plan")),
        pytest.raises(UserError, match="has not finished the plan of s3://shards/out in 0 s"),
    ):
        work(photo_folder, tmp_path, 0, wait_limit_s=0)


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (PACKS_ALL, PACKS_ALL, False),
        (PACKS_ALL, Role("worker-0-of-2", 2), False),
        (Role("worker-0-of-2", 2), PACKS_ALL, False),
        (Role("worker-0-of-2", 2), Role("worker-1-of-2", 2), True),
        (Role("worker-0-of-2", 2), Role("worker-0-of-2", 2), False),
        (Role("worker-0-of-2", 2), Role("worker-1-of-3", 3), False),
        (Role("worker-0-of-2", 2), Role("plan"), True),
        (Role("plan"), Role("plan"), False),
    ],
)
def test_who_may_write_beside_whom(first: Role, second: Role, both: bool) -> None:
    assert second.bears(first.name) == both


def put_claim(host: str, pid: int) -> str:
    name = f"{CLAIMS_NAME}/pack--other.json"
    Bucket(OUT).put_bytes(json.dumps({"host": host, "pid": pid}).encode(), name)
    return name


def test_a_live_writer_is_seen_a_dead_one_is_not(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(OUT)
    monkeypatch.setattr(claims, "POLL_S", 0.01)
    with (
        claim(bucket, PACKS_ALL),
        pytest.raises(ClaimedError, match=r"another .*\(process \d+ on .*\) writes to s3"),
        claim(bucket, PACKS_ALL),
    ):
        pass
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    put_claim(socket.gethostname(), dead.pid)
    with claim(bucket, PACKS_ALL):
        assert len(bucket.details(CLAIMS_NAME)) == 1
    assert not stored(store)


def test_a_writer_elsewhere_is_told_by_its_claim(
    store: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = Bucket(OUT)
    monkeypatch.setattr(claims, "POLL_S", 0.01)
    name = put_claim("elsewhere", 1)
    with pytest.raises(ClaimedError, match="process 1 on elsewhere"), claim(bucket, PACKS_ALL, wait=False):
        pass

    def renewed(seconds: float) -> None:
        bucket.put_bytes(json.dumps({"host": "elsewhere", "pid": 1, "beat": 2}).encode(), name)

    with monkeypatch.context() as patch:
        patch.setattr(claims.time, "sleep", renewed)
        with pytest.raises(ClaimedError, match="process 1 on elsewhere"), claim(bucket, PACKS_ALL):
            pass
    assert "waiting up to 100 s to see whether process 1 on elsewhere still writes to" in caplog.text
    monkeypatch.setattr(claims, "STALE_S", 0.0)
    with claim(bucket, PACKS_ALL):
        assert name not in bucket.details(CLAIMS_NAME)


def test_a_claim_is_renewed(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(OUT)
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.01)
    with claim(bucket, PACKS_ALL):
        (name,) = bucket.details(CLAIMS_NAME)
        first = store.cat_file(f"shards/out/{name}")
        for _ in range(200):
            if store.cat_file(f"shards/out/{name}") != first:
                break
        else:
            pytest.fail("the claim stayed as it was")
    put_claim("elsewhere", 1)
    Bucket(OUT).put_bytes(b"no JSON", f"{CLAIMS_NAME}/pack--x.json")
    with pytest.raises(ClaimedError), claim(bucket, PACKS_ALL, wait=False):
        pass


def test_tars_at_urls_are_not_read_by_each_worker(tmp_path: Path) -> None:
    from linerate.shards.remote_source import RemoteTars

    with pytest.raises(UserError, match="--worker-index with tars at URLs needs an OUT in a folder"):
        pack_part(RemoteTars(("http://a.org/x.tar",)), OUT, Part(index=0, count=2), staging=tmp_path)
