"""Shards of images that a source names by URL."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.shards.servers import FaultyServer, serve

from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.options import ImagePolicy, Sizing
from linerate.shards.pack_shard import PackedShard, ShardMark, ShardTask, finish_shard, pack_shard
from linerate.shards.plan import HEADER_NAME, make_plan
from linerate.shards.remote_url import URL_CONTAINER
from linerate.shards.sources import SourceRow

MakeJpeg = Callable[..., bytes]
FETCH = FetchOptions(timeout_s=1, retries=1, backoff_s=0.01, allow_private=True)


class _Rows:
    """A source of these rows, all in one container."""

    def __init__(self, rows: list[SourceRow]) -> None:
        self.containers = [Path("/")]
        self._rows = rows

    def rows(self) -> Iterator[SourceRow]:
        return iter(self._rows)


@pytest.fixture
def server(make_jpeg: MakeJpeg) -> Iterator[FaultyServer]:
    with serve({f"{i}.jpg": make_jpeg(i) for i in range(8)}) as running:
        yield running


def pack_rows(rows: list[SourceRow], container: str, out: Path, **policy: int) -> ShardMark:
    out.mkdir()
    plan = out / "plan"
    plan.mkdir()
    make_plan(_Rows(rows), plan, seed=0, sizing=Sizing(min_shards=1), options={})
    header = json.loads((plan / HEADER_NAME).read_text())
    header["plan"]["containers"] = [container]
    (plan / HEADER_NAME).write_text(json.dumps(header))
    task = ShardTask(
        plan_folder=os.fspath(plan),
        shard=0,
        out=os.fspath(out),
        name="x",
        policy=ImagePolicy(**policy),  # type: ignore[arg-type]
        fetch=FETCH,
    )
    packed: PackedShard = pack_shard(task)
    return finish_shard(packed)


def url_rows(urls: dict[str, str]) -> list[SourceRow]:
    return [SourceRow(key, url.encode(), 0, 0, -1) for key, url in urls.items()]


def test_fetched_images_make_the_bytes_of_local_ones(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, data in server.files.items():
        (tmp_path / "in" / name).write_bytes(data)
    pack_rows(
        url_rows({name: server.url(f"ok/{name}") for name in server.files}), URL_CONTAINER, tmp_path / "a"
    )
    local = [SourceRow(name, name.encode(), 0, 0, -1) for name in server.files]
    pack_rows(local, str(tmp_path / "in"), tmp_path / "b")
    for name in ("x-000000.tar", "x-000000.idx", "x-000000.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_every_image_is_packed_or_rejected_with_its_reason(server: FaultyServer, tmp_path: Path) -> None:
    words = ("ok/0.jpg", "flaky/1/1.jpg", "ok/none.jpg", "drop/2.jpg", "status/403/x", "long/3.jpg")
    words += ("endless/x",)
    urls = {word: server.url(word) for word in words} | {"ftp": "ftp://a.org/x"}
    mark = pack_rows(url_rows(urls), URL_CONTAINER, tmp_path / "out", max_image_bytes=100_000)
    half = len(server.files["2.jpg"]) // 2
    assert mark.samples == 2
    assert {key: (size, f"{reason}: {detail}") for _, key, size, reason, detail in mark.rejects} == {
        "ok/none.jpg": (0, "not found: HTTP 404"),
        "drop/2.jpg": (
            0,
            f"unreachable: cut short ({half} of {len(server.files['2.jpg'])} bytes) after 2 tries",
        ),
        "status/403/x": (0, "forbidden: HTTP 403"),
        "long/3.jpg": (len(server.files["3.jpg"]) - 10, "cut short: no end-of-image marker"),
        "endless/x": (0, "too many bytes: more than 100000"),
        "ftp": (0, "bad URL: the scheme ftp is none of http, https, s3, gs"),
    }


def test_no_password_reaches_the_index_or_the_rejects(server: FaultyServer, tmp_path: Path) -> None:
    urls = [server.url(f"ok/{name}").replace("://", "://me:topsecret@") for name in ("0.jpg", "none.jpg")]
    mark = pack_rows(url_rows({url: url for url in urls}), URL_CONTAINER, tmp_path / "out")
    keys = pq.read_table(tmp_path / "out" / "x-000000.parquet").column("key").to_pylist()
    assert keys == [server.url("ok/0.jpg")]
    assert "topsecret" not in str(mark)
    assert set(server.authorizations) == {"Basic bWU6dG9wc2VjcmV0"}


def test_an_outage_leaves_no_shard(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        urls = {f"{i}": f"http://127.0.0.1:{unused.getsockname()[1]}/{i}" for i in range(20)}
    with pytest.raises(UserError, match=r"20 images in a row .* unreachable: no connection"):
        pack_rows(url_rows(urls), URL_CONTAINER, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*x-0*"))
