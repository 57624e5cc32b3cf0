import contextlib
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from linerate.pipeline import ahead as ahead_module
from linerate.pipeline import remote_shards
from linerate.pipeline.ahead import Ahead
from linerate.pipeline.bad_samples import BadSamples
from linerate.pipeline.cache import (
    CacheOptions,
    LostShardError,
    Place,
    cache_need,
    lanes_here,
    open_shards,
    parse_size,
    place_of,
)
from linerate.pipeline.loader import open_views
from linerate.pipeline.order import EpochOrder
from linerate.pipeline.reader import EpochFetch, ShardReader
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError


def load_helper():
    """flaky_server.py beside this file: tests are no package."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("flaky_server", Path(__file__).with_name("flaky_server.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FlakyServer = load_helper().FlakyServer


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(remote_shards, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def remote_root(catalog, tmp_path) -> Path:
    root = tmp_path / "remote"
    shutil.copytree(catalog.root, root)
    return root


@pytest.fixture
def server(remote_root) -> Iterator:
    with FlakyServer(remote_root) as server:
        yield server


def opened(server, tmp_path, *, cache_bytes="1GB", timeout_s=5.0) -> Catalog:
    options = CacheOptions(cache_dir=tmp_path / "cache", cache_bytes=cache_bytes, timeout_s=timeout_s)
    return open_shards(server.url, options)


def small_blocks(monkeypatch, size: int) -> None:
    monkeypatch.setattr(remote_shards, "MAX_BLOCK_BYTES", size)
    monkeypatch.setattr(remote_shards, "MIN_BLOCK_BYTES", min(size, 2048))


def tars_here(catalog: Catalog) -> list[str]:
    return sorted(path.name for path in catalog.root.glob("*.tar"))


def fetch_of(place: Place, **options) -> EpochFetch:
    settings = {"seed": 5, "epoch": 0, "global_batch": 8, "num_lanes": 4, "window_shards": 2}
    return EpochFetch(place, **settings | options)


def test_a_remote_set_reads_as_the_local_one(catalog, server, tmp_path):
    remote = opened(server, tmp_path)
    reader, positions = ShardReader(remote), np.array([40, 0, 13, 33, 7])
    batch, expected = reader.read(positions, verify=True), ShardReader(catalog).read(positions)
    assert [one.tobytes() for one in batch.jpegs] == [one.tobytes() for one in expected.jpegs]
    assert remote.keys(1) == catalog.keys(1)
    reader.close()


def test_only_what_is_read_is_fetched_and_only_once(server, tmp_path):
    for _ in range(2):
        reader = ShardReader(opened(server, tmp_path))
        reader.read(np.arange(3))
        reader.close()
    assert {name: num for name, num in server.counts.items() if name.startswith("test-")} == {
        "test-000000.tar": 1,
        "test-000000.parquet": 1,
    }


def test_two_ranks_see_exactly_what_local_ranks_see(catalog, server, tmp_path):
    remote = opened(server, tmp_path)
    for rank in range(2):
        theirs, ours = (
            fetch_of(place, rank=rank, world_size=2) for place in (catalog.root, place_of(remote))
        )
        ours = pickle.loads(pickle.dumps(ours))
        for epoch in range(2):
            theirs, ours = theirs.for_epoch(epoch), ours.for_epoch(epoch)
            for step in range(5):
                a, b = theirs(step), ours(step)
                assert a.sample_id.tolist() == b.sample_id.tolist()
                assert [j.tobytes() for j in a.jpegs] == [j.tobytes() for j in b.jpegs]
        theirs.close()
        ours.close()
    assert all(num == 1 for name, num in server.counts.items() if name.endswith(".tar"))


def test_views_from_afar_equal_views_from_here(catalog, server, tmp_path):
    options = {"recipe": "v1", "backend": "torch", "seed": 1, "global_batch": 8, "num_lanes": 4}
    taken = []
    for shards in (catalog, opened(server, tmp_path)):
        loader = open_views(shards, num_threads=1, **options)
        taken.append([(v.query, v.key) for v in loader.epoch(0)])
        loader.close()
    assert all(q.equal(r) and k.equal(m) for (q, k), (r, m) in zip(*taken, strict=True))


def test_the_webdataset_backend_reads_from_afar(server, tmp_path):
    loader = open_views(
        opened(server, tmp_path), recipe="v1", backend="webdataset", seed=1, global_batch=8, num_threads=1
    )
    assert sum(len(views.sample_id) for views in loader.epoch(0)) == 40
    loader.close()


@pytest.mark.parametrize("trouble", ["drop", "truncate", "500"])
def test_a_broken_transfer_goes_on_at_the_byte_it_reached(server, tmp_path, monkeypatch, trouble):
    small_blocks(monkeypatch, 4096)
    server.trouble = lambda name, nth: trouble if name.endswith(".tar") and nth % 3 == 1 else None
    remote = opened(server, tmp_path)
    path = remote.ready_path(0)
    assert path.read_bytes() == (server.root / path.name).read_bytes()
    starts = [first for name, first, _ in server.requests if name == path.name]
    assert starts == sorted(starts)
    assert starts.count(0) == 1


def test_a_stalled_transfer_is_asked_for_again(server, tmp_path):
    server.trouble = lambda name, nth: "stall" if name.endswith(".tar") and nth == 0 else None
    remote = opened(server, tmp_path, timeout_s=0.3)
    began = time.monotonic()
    assert remote.ready_path(0).stat().st_size == remote.shard_bytes[0]
    assert time.monotonic() - began < 20


def test_a_server_that_stays_silent_loses_the_shard_in_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_shards, "ATTEMPTS", 2)
    server.trouble = lambda name, nth: "stall" if name.endswith(".tar") else None
    remote = opened(server, tmp_path, timeout_s=0.1)
    with pytest.raises(LostShardError, match=r"test-000000\.tar: no answer within 0\.1 s, 2 times"):
        remote.ready_path(0)


def test_a_server_without_ranges_sends_the_file_once(server, tmp_path, monkeypatch):
    small_blocks(monkeypatch, 4096)
    server.trouble = lambda name, nth: "whole"
    remote = opened(server, tmp_path)
    path = remote.ready_path(0)
    assert server.counts[path.name] == 1
    assert path.stat().st_size == remote.shard_bytes[0]


def test_corrupt_bytes_are_fetched_once_more(server, tmp_path):
    server.trouble = lambda name, nth: "corrupt" if name.endswith(".tar") and nth == 0 else None
    remote = opened(server, tmp_path)
    path = remote.ready_path(0)
    assert path.read_bytes() == (server.root / path.name).read_bytes()
    assert server.counts[path.name] == 2


def test_a_corrupt_object_is_replaced_by_neighbours_and_counted(catalog, server, tmp_path):
    broken = server.root / "test-000001.tar"
    broken.write_bytes(bytes(len(broken.read_bytes())))
    found = []
    loader = open_views(
        opened(server, tmp_path),
        recipe="v1",
        backend="torch",
        seed=1,
        global_batch=8,
        num_lanes=4,
        num_threads=1,
        bad_share=0.5,
        on_bad=found.append,
    )
    seen = [one for views in loader.epoch(0) for one in views.position.tolist()]
    loader.close()
    assert len(seen) == 40
    assert not set(seen) & set(range(12, 22))
    assert [one.shard for one in found] == ["test-000001.tar"]
    assert "fail the checksum in shards.parquet, fetched twice" in found[0].reason
    assert loader.replacements.num_replaced > 0
    assert not (tmp_path / "cache" / broken.name).exists()


def test_a_short_object_is_lost_at_once_with_both_sizes(server, tmp_path):
    os.truncate(server.root / "test-000002.tar", 3000)
    remote = opened(server, tmp_path)
    with pytest.raises(LostShardError, match=r"it holds 3,000 bytes, the catalog says") as error:
        remote.ready_path(2)
    assert error.value.shard == 2
    assert server.counts["test-000002.tar"] <= 3


def test_a_missing_object_is_a_lost_shard(server, tmp_path):
    (server.root / "test-000003.tar").unlink()
    reader = ShardReader(opened(server, tmp_path))
    with pytest.raises(BadSamples, match=r"test-000003\.tar: there is no such file") as error:
        reader.read(np.arange(41))
    assert (error.value.shard, error.value.position) == (3, list(range(34, 41)))
    reader.close()


def test_a_missing_index_is_a_lost_shard(server, tmp_path):
    (server.root / "test-000003.parquet").unlink()
    reader = ShardReader(opened(server, tmp_path))
    with pytest.raises(BadSamples, match=r"test-000003\.parquet: there is no such file") as error:
        reader.index_rows(np.arange(41))
    assert error.value.shard == 3
    with pytest.raises(BadSamples, match=r"test-000003\.parquet: there is no such file"):
        reader.read(np.arange(41))
    reader.close()


def test_the_shard_used_longest_ago_leaves_first(server, tmp_path):
    remote = opened(server, tmp_path)
    indexes = sum(path.stat().st_size for path in server.root.glob("test-*.parquet"))
    budget = int(remote.shard_bytes[[0, 1, 2]].sum()) + indexes
    remote = opened(server, tmp_path, cache_bytes=str(budget))
    for nth, shard in enumerate((0, 1, 2, 0)):
        os.utime(remote.ready_path(shard), (nth, nth))
    remote.ready_path(3)
    assert tars_here(remote) == ["test-000000.tar", "test-000002.tar", "test-000003.tar"]


def test_another_set_in_the_folder_counts_and_leaves(server, tmp_path, catalog):
    fsspec.filesystem("memory").put(str(catalog.root), "/other", recursive=True)
    options = CacheOptions(cache_dir=tmp_path / "cache", cache_bytes=str(int(catalog.shard_bytes[0]) + 1))
    other = open_shards("memory://other", options)
    os.utime(other.ready_path(1), (1, 1))
    opened(server, tmp_path, cache_bytes=options.cache_bytes).ready_path(0)
    assert tars_here(other) == []


def test_what_a_reader_holds_stays_and_the_budget_gives_way(server, tmp_path, caplog):
    remote = opened(server, tmp_path)
    remote = opened(server, tmp_path, cache_bytes=str(int(remote.shard_bytes[0])))
    file = remote.bring.open_tar(0)
    assert not remote.bring.fetch(1, ".tar", urgent=False)
    assert tars_here(remote) == ["test-000000.tar"]
    assert remote.bring.fetch(1, ".tar")
    assert "beyond its budget" in caplog.text
    assert tars_here(remote) == ["test-000000.tar", "test-000001.tar"]
    os.close(file)
    remote.ready_path(2)
    assert tars_here(remote) == ["test-000002.tar"]


def test_a_shard_that_left_is_fetched_again(server, tmp_path):
    remote = opened(server, tmp_path)
    first = remote.ready_path(0)
    first.unlink()
    assert remote.ready_path(0).exists()
    assert server.counts[first.name] == 2


def test_what_is_held_in_the_background_is_not_fetched_again_once_it_left(server, tmp_path):
    remote = opened(server, tmp_path)
    remote.ready_path(0).unlink()
    assert remote.bring.hold_tar(0) is None
    assert server.counts["test-000000.tar"] == 1


def test_the_coming_window_arrives_in_the_background(server, tmp_path):
    remote = opened(server, tmp_path)
    ahead = Ahead(remote.bring)
    ahead.want([2, 0])
    wait_until(lambda: ahead.has(2) and ahead.has(0))
    assert tars_here(remote) == ["test-000000.tar", "test-000002.tar"]
    assert held(remote, 2)
    ahead.want([0])
    assert not held(remote, 2)
    assert held(remote, 0)
    ahead.close()
    assert not held(remote, 0)


def test_two_readers_that_each_fetch_what_the_other_needs_both_get_it(server, tmp_path, monkeypatch):
    small_blocks(monkeypatch, 1024)
    server.delay_s = 0.02
    one, two = (Ahead(opened(server, tmp_path).bring) for _ in range(2))
    one.want([0])
    two.want([1])
    wait_until(lambda: 0 in one._busy and 1 in two._busy)
    needs = [threading.Thread(target=ahead.need, args=([shard],)) for ahead, shard in ((one, 1), (two, 0))]
    for need in needs:
        need.start()
    for need in needs:
        need.join(30)
    assert not any(need.is_alive() for need in needs)
    one.close()
    two.close()


def test_the_background_does_not_fetch_a_lost_shard_over_and_over(server, tmp_path, monkeypatch):
    monkeypatch.setattr(ahead_module, "RETRY_S", 0.01)
    remote = opened(server, tmp_path)
    broken = server.root / "test-000001.tar"
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    ahead = Ahead(remote.bring)
    ahead.want([1, 0])
    wait_until(lambda: ahead.has(0) and 1 in ahead._lost)
    time.sleep(0.2)
    assert server.counts["test-000001.tar"] == 2
    with pytest.raises(LostShardError, match="fail the checksum"):
        ahead.need([1])
    ahead.close()


def test_closing_does_not_wait_for_a_server_that_stalls(server, tmp_path, monkeypatch):
    monkeypatch.setattr(ahead_module, "CLOSE_LIMIT_S", 0.1)
    ahead = Ahead(opened(server, tmp_path, timeout_s=20.0).bring)
    server.trouble = lambda asked, nth: "stall"
    ahead.want([0, 1])
    wait_until(lambda: len(ahead._busy) == 2)
    began = time.monotonic()
    ahead.close()
    assert time.monotonic() - began < 10


def test_an_index_that_is_none_is_not_kept(server, tmp_path):
    remote = opened(server, tmp_path)
    (server.root / "test-000002.parquet").write_bytes(b"<html>log in first</html>")
    with pytest.raises(LostShardError, match="it is no index of"):
        remote.load_table(2)
    assert not remote.bring.path(2, ".parquet").exists()


def test_a_second_job_on_the_set_does_not_change_the_budget_of_the_first(server, tmp_path):
    first = opened(server, tmp_path, cache_bytes="900MB")
    opened(server, tmp_path, cache_bytes="1MB")
    assert open_shards(place_of(first)).bring.budget == 900_000_000


def test_a_folder_that_somebody_sent_makes_no_requests(catalog, tmp_path):
    folder = tmp_path / "sent"
    shutil.copytree(catalog.root, folder)
    (folder / "remote.json").write_text('{"url": "http://169.254.169.254/"}')
    assert open_shards(folder).bring is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc", "is none of s3://, gs://, https://, http://"),
        ("https://user:hunter2@host/set", r"https://host/set has a name and password in it"),
    ],
)
def test_urls_of_other_kinds_and_with_secrets_are_refused(tmp_path, url, message):
    with pytest.raises(UserError, match=message) as refused:
        open_shards(url, CacheOptions(cache_dir=tmp_path))
    assert "hunter2" not in str(refused.value)


def test_the_background_keeps_the_budget(server, tmp_path):
    remote = opened(server, tmp_path)
    budget = int(remote.shard_bytes[[0, 1]].sum()) + 10_000
    remote = opened(server, tmp_path, cache_bytes=str(budget))
    ahead = Ahead(remote.bring)
    ahead.want([0, 1, 2, 3])
    wait_until(lambda: len(ahead._held) >= 2 and not ahead._busy)
    assert sum(path.stat().st_size for path in remote.root.glob("*.tar")) <= budget
    ahead.close()


def test_an_urgent_shard_overtakes_the_background(server, tmp_path, monkeypatch):
    small_blocks(monkeypatch, 4096)
    server.delay_s = 0.02
    remote = opened(server, tmp_path)
    ahead = Ahead(remote.bring)
    ahead.want([0, 2])
    wait_until(lambda: bool(ahead._busy))
    before = server.sent("test-000000.tar")
    ahead.need([3])
    assert remote.bring.path(3, ".tar").exists()
    assert server.sent("test-000000.tar") <= before + 3 * 4096
    ahead.need([0])  # one that the background has begun
    assert remote.bring.path(0, ".tar").exists()
    ahead.close()


def test_a_process_that_was_forked_starts_its_own_background(server, tmp_path):
    remote = opened(server, tmp_path)
    ahead = Ahead(remote.bring)
    ahead._pid -= 1  # as the child of a fork finds it
    stale = ahead._changed
    ahead.need([0])
    assert ahead._changed is not stale
    ahead.close()


READ_ALL = """
import pickle, sys, numpy as np
from linerate.pipeline.cache import open_shards
from linerate.pipeline.reader import ShardReader
reader = ShardReader(open_shards(pickle.loads(bytes.fromhex(sys.argv[1]))))
sys.stdin.readline()
assert len(reader.read(np.arange(41), verify=True).jpegs) == 41
reader.close()
"""


def as_word(catalog: Catalog) -> str:
    """Where its shards lie, for the command line of another process."""
    return pickle.dumps(place_of(catalog)).hex()


def start(script: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_two_processes_fetch_each_shard_once(server, tmp_path):
    server.delay_s = 0.05
    remote = opened(server, tmp_path)
    both = [start(READ_ALL, as_word(remote)) for _ in range(2)]
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(60) for process in both] == [0, 0]
    for process in both:
        process.stdin.close()
    shards = {name: num for name, num in server.counts.items() if name.startswith("test-")}
    assert set(shards.values()) == {1}
    assert len(shards) == 8
    assert not list(remote.root.glob(".*part"))


def test_a_killed_download_is_continued_by_the_next(server, tmp_path, monkeypatch):
    small_blocks(monkeypatch, 4096)
    remote = opened(server, tmp_path)
    name = "test-000000.tar"
    script = (
        "import pickle, sys; from linerate.pipeline import remote_shards as r;"
        "r.MAX_BLOCK_BYTES = r.MIN_BLOCK_BYTES = 4096;"
        "from linerate.pipeline.cache import open_shards;"
        "open_shards(pickle.loads(bytes.fromhex(sys.argv[1]))).ready_path(0)"
    )
    server.trouble = lambda asked, nth: "stall" if asked == name and nth == 2 else None
    process = start(script, as_word(remote))
    wait_until(lambda: server.counts[name] >= 3, limit_s=60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    part = next(remote.root.glob(f".{name}.*.part"))
    assert part.stat().st_size == 8192
    assert remote.ready_path(0).read_bytes() == (server.root / name).read_bytes()
    assert [first for asked, first, _ in server.requests if asked == name].count(0) == 1
    assert not part.exists()


def test_a_part_that_is_too_long_starts_anew(server, tmp_path):
    remote = opened(server, tmp_path)
    size = int(remote.shard_bytes[0])
    (remote.root / f".test-000000.tar.{size}.part").write_bytes(bytes(size + 1))
    assert remote.ready_path(0).read_bytes() == (server.root / "test-000000.tar").read_bytes()


def test_who_waited_for_a_failure_does_not_repeat_it(server, tmp_path):
    remote = opened(server, tmp_path)
    note = remote.root / ".test-000000.tar.failed"
    note.write_text("the reason")
    os.utime(note, (time.time() + 60,) * 2)
    with pytest.raises(LostShardError, match=r"^the reason$"):
        remote.ready_path(0)
    os.utime(note, (1, 1))
    assert remote.ready_path(0).exists()
    assert not note.exists()


def test_a_changed_set_gets_a_folder_of_its_own(server, tmp_path):
    before = opened(server, tmp_path)
    header = json.loads((server.root / "catalog.json").read_text())
    (server.root / "catalog.json").write_text(json.dumps(header | {"plan_id": "other"}))
    after = opened(server, tmp_path)
    assert (before.plan_id, after.plan_id) == ("test", "other")
    assert before.root != after.root
    assert opened(server, tmp_path).root == after.root


def test_s3_is_read_through_the_cache(catalog, tmp_path, monkeypatch):
    with s3_server(monkeypatch) as client:
        client.create_bucket(Bucket="photos")
        for path in catalog.root.iterdir():
            client.upload_file(str(path), "photos", f"in/{path.name}")
        remote = open_shards("s3://photos/in", CacheOptions(cache_dir=tmp_path))
        fetch = fetch_of(place_of(remote))
        assert fetch(0).sample_id.tolist() == fetch_of(catalog.root)(0).sample_id.tolist()
        fetch.close()
        with pytest.raises(UserError, match=r"there is no catalog\.json in s3://nowhere/in"):
            open_shards("s3://nowhere/in", CacheOptions(cache_dir=tmp_path))


@contextlib.contextmanager
def s3_server(monkeypatch) -> Iterator:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        yield boto3.client("s3")
    finally:
        server.stop()


def test_no_catalog_there_is_one_line(server, tmp_path):
    (server.root / "catalog.json").unlink()
    with pytest.raises(UserError, match=r"there is no catalog\.json in http.*`linerate shard pack` wrote$"):
        opened(server, tmp_path)


def test_denied_access_says_so(server, tmp_path):
    server.trouble = lambda name, nth: "403"
    with pytest.raises(UserError, match=r"catalog\.json: access is denied .*credentials that may read it"):
        opened(server, tmp_path)


def test_missing_credentials_say_where_they_are_looked_for(tmp_path, monkeypatch):
    for name in [*os.environ]:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"there are no credentials; set .*AWS_PROFILE.*FSSPEC_S3="):
        open_shards("s3://bucket/in", CacheOptions(cache_dir=tmp_path))


@pytest.mark.parametrize(
    ("scheme", "module", "extra"),
    [("s3", "s3fs", "s3"), ("http", "aiohttp", "http"), ("https", "aiohttp", "http")],
)
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, scheme, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    said = rf"{scheme}:// needs another package: pip install 'linerate\[{extra}\]'"
    with pytest.raises(UserError, match=said):
        open_shards(f"{scheme}://bucket/in", CacheOptions(cache_dir=tmp_path))


def test_an_unknown_protocol_names_those_that_are(tmp_path):
    with pytest.raises(UserError, match=r"is none of s3://, gs://, https://, http://"):
        open_shards("gopher://x/in", CacheOptions(cache_dir=tmp_path))


def test_a_catalog_that_reaches_out_of_its_folder_is_refused(remote_root, tmp_path, server):
    import pyarrow.parquet as pq

    table = pq.read_table(remote_root / "shards.parquet")
    names = ["../evil.tar", *table.column("file").to_pylist()[1:]]
    pq.write_table(table.set_column(0, "file", [names]), remote_root / "shards.parquet")
    with pytest.raises(UserError, match=r"lists '\.\./evil\.tar', which is no name of a shard"):
        opened(server, tmp_path)


def test_a_cache_dir_that_cannot_be_written_is_one_line(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"--cache-dir .* cannot be written .*a disk with room"):
        opened(server, tmp_path)


def test_a_full_disk_spares_no_idle_shard_and_then_says_so(server, tmp_path, monkeypatch):
    remote = opened(server, tmp_path)
    remote.ready_path(1)
    real, calls = os.pwrite, []

    def full_until_evicted(file, data, place):
        calls.append(place)
        if tars_here(remote):
            raise OSError(28, "No space left on device")
        return real(file, data, place)

    monkeypatch.setattr(os, "pwrite", full_until_evicted)
    remote.bring.fetch(0, ".tar")
    assert tars_here(remote) == ["test-000000.tar"]
    assert len(calls) > 1
    file = remote.bring.open_tar(0)
    with pytest.raises(UserError, match=r"the disk of --cache-dir .* is full and no shard there"):
        remote.ready_path(2)
    os.close(file)
    monkeypatch.setattr(os, "pwrite", raise_os_error)
    with pytest.raises(OSError, match="broken"):
        remote.ready_path(2)


def raise_os_error(*args: object) -> int:
    raise OSError(5, "broken")


def test_a_budget_below_the_windows_is_refused_with_the_numbers(server, tmp_path, monkeypatch):
    remote = opened(server, tmp_path, cache_bytes="20k")
    options = {"recipe": "v1", "backend": "synthetic", "seed": 1, "global_batch": 8, "num_lanes": 4}
    with pytest.raises(UserError, match=r"--cache-bytes 20 kB does not hold .*: 4 lanes of 4 \+ 1 shards, "):
        open_views(remote, **options)
    assert cache_need(remote, num_lanes=1, window_shards=0) == remote.shard_bytes.max()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert lanes_here(64, world_size=8) == 16
    assert lanes_here(64, world_size=1) == 64


def test_ffcv_needs_the_shards_here(server, tmp_path):
    with pytest.raises(UserError, match=r"--backend ffcv reads a \.beton .*copy the shards here"):
        open_views(opened(server, tmp_path), recipe="v1", backend="ffcv", seed=1, global_batch=8, num_lanes=4)


@pytest.mark.parametrize(
    ("text", "size"), [("200GB", 200 * 10**9), ("1.5 tb", 15 * 10**11), ("12", 12), ("3K", 3000)]
)
def test_sizes_are_decimal(text, size):
    assert parse_size(text, flag="--cache-bytes") == size


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match=r"--cache-bytes much is no size; give one such as 200GB"):
        CacheOptions(cache_bytes="much")
    with pytest.raises(UserError, match=r"--cache-bytes 0 keeps nothing"):
        CacheOptions(cache_bytes="0")
    with pytest.raises(UserError, match=r"--timeout-s 0 must be more than 0"):
        CacheOptions(timeout_s=0)


def test_errors_cross_processes():
    lost = pickle.loads(pickle.dumps(LostShardError(3, "gone")))
    assert (lost.shard, str(lost)) == (3, "gone")
    remote = pickle.loads(pickle.dumps(remote_shards.RemoteError("s3://b/x", "gone")))
    assert str(remote) == "s3://b/x: gone"


def test_local_shards_know_no_cache(catalog):
    assert open_shards(catalog.root).bring is None
    assert not ShardReader(catalog).is_remote


def test_coming_shards_are_those_that_are_read_soonest_first():
    sizes = np.random.default_rng(0).integers(5, 20, 40)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    order = EpochOrder(sizes, seed=1, epoch=0, global_batch=8, num_lanes=4, window_shards=2)
    step = 0
    while step < order.num_steps:
        coming, change = order.coming_shards(step, rank=1, world_size=2)
        waits = [wait for wait, _ in coming]
        assert waits == sorted(waits)
        assert step < change <= order.num_steps
        wait_of = {shard: wait for wait, shard in coming}
        for later in range(step, change):
            positions = order.positions(later, rank=1, world_size=2)
            shards = np.searchsorted(starts, positions, side="right") - 1
            assert all(wait_of[shard] <= later - step for shard in shards.tolist())
        step = change


def held(catalog: Catalog, shard: int) -> bool:
    with catalog.shard_path(shard).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def wait_until(true, *, limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
