"""Manifests at URLs: fetched whole, then read as those on disk, but they name nothing on this machine."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.shards.servers import FaultyServer, serve

from linerate.shards import remote_tars
from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack
from linerate.shards.remote_source import open_urls

MakeJpeg = Callable[..., bytes]
FETCH = FetchOptions(timeout_s=2, retries=1, backoff_s=0.01, allow_private=True)
OPTIONS = PackOptions(seed=7, min_shards=2)


@pytest.fixture
def server(make_jpeg: MakeJpeg) -> Iterator[FaultyServer]:
    with serve({f"{i}.jpg": make_jpeg(i) for i in range(8)}) as running:
        yield running


def pack_url(url: str, out: Path, **named: Any) -> Any:
    named = {"options": OPTIONS, "num_workers": 0, "fetch": FETCH} | named
    return pack(url, out, **named)


def keys_and_rejects(out: Path) -> tuple[set[str], set[tuple[str, str]]]:
    keys = {key for path in out.glob("shard-*.parquet") for key in pq.read_table(path)["key"].to_pylist()}
    rejected = pq.read_table(out / "rejected.parquet").to_pylist()
    return keys, {(row["key"], row["reason"]) for row in rejected}


def test_a_csv_at_a_url_names_images_relative_to_itself_and_none_of_this_machine(
    server: FaultyServer, tmp_path: Path
) -> None:
    (tmp_path / "secret.jpg").write_bytes(server.files["0.jpg"])
    rows = [f"{i}.jpg,{'even' if i % 2 == 0 else 'odd'}" for i in range(6)]
    rows += [f"{server.url('ok/6.jpg')},even", f"{tmp_path}/secret.jpg,odd", "none.jpg,odd"]
    server.files["list.csv"] = "\n".join(["path,label", *rows, ""]).encode()
    out = tmp_path / "out"
    catalog = pack_url(server.url("ranged/list.csv"), out)
    keys, rejects = keys_and_rejects(out)
    assert keys == {*(f"{i}.jpg" for i in range(6)), server.url("ok/6.jpg")}
    assert rejects == {("file://...", "scheme not allowed"), ("none.jpg", "not found")}
    assert catalog.class_names == ("even", "odd")
    assert not (out / ".pack").exists()


def test_a_manifest_whose_connection_breaks_is_fetched_on(server: FaultyServer, tmp_path: Path) -> None:
    server.files["list.jsonl"] = b"".join(
        b'{"url": "%b"}\n' % server.url(f"ok/{i}.jpg").encode() for i in range(8)
    )
    assert pack_url(server.url("broken/50/list.jsonl"), tmp_path / "out").num_samples == 8


def test_a_manifest_that_is_not_there_or_not_public_is_told(server: FaultyServer, tmp_path: Path) -> None:
    server.files["list.csv"] = b"path\n0.jpg\n"
    for url, fetch, said in [
        (server.url("ok/none.csv"), FETCH, r"none\.csv cannot be read: not found: HTTP 404"),
        (server.url("ok/list.csv"), FetchOptions(), "address refused: .*--allow-private permits it"),
        ("file:///etc/list.csv", FETCH, "the scheme file is none of"),
    ]:
        with pytest.raises(UserError, match=said):
            pack_url(url, tmp_path / "out", fetch=fetch)
        assert not (tmp_path / "out").exists()


def test_a_manifest_that_finds_no_room_is_refused_with_its_size(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["list.csv"] = b"path\n0.jpg\n"
    usage = type("Usage", (), {"free": 3})
    monkeypatch.setattr(remote_tars.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"the manifest http://.*list\.csv takes 11 bytes, the disk of"):
        pack_url(server.url("ok/list.csv"), tmp_path / "out")


def test_no_password_of_a_manifests_url_is_kept(server: FaultyServer, tmp_path: Path) -> None:
    server.files["list.csv"] = b"path\n0.jpg\n1.jpg\n"
    url = server.url("ok/list.csv").replace("://", "://me:topsecret@")
    out = tmp_path / "out"
    pack_url(url, out)
    assert set(server.authorizations) == {"Basic bWU6dG9wc2VjcmV0"}
    assert all(b"topsecret" not in path.read_bytes() for path in out.iterdir())


def test_kinds_are_not_mixed() -> None:
    from linerate.shards.options import ManifestColumns

    with pytest.raises(UserError, match="the URLs are of tars and of manifests; give one kind"):
        open_urls(["http://a.org/x.csv", "http://a.org/x.tar"], ManifestColumns(), FETCH)


def test_parts_of_a_parquet_manifest_in_a_bucket_are_one(
    store: Any, make_jpeg: MakeJpeg, tmp_path: Path
) -> None:
    for i in range(8):
        store.pipe_file(f"shards/a/images/{i}.jpg", make_jpeg(i))
    for part in range(2):
        paths = [f"images/{i}.jpg" for i in range(4 * part, 4 * part + 4)]
        pq.write_table(pa.table({"path": paths, "user": paths}), tmp_path / "x")
        store.pipe_file(f"shards/a/list/{part}.parquet", (tmp_path / "x").read_bytes())
    with pytest.raises(UserError, match="none of the 8 files is an image"):
        pack_url("s3://shards/a/list/", tmp_path / "none")  # relative to list/, where no images are
    for part in range(2):
        store.mv(f"shards/a/list/{part}.parquet", f"shards/a/{part}.parquet")
    pack_url("s3://shards/a/?.parquet", tmp_path / "out")
    keys, rejects = keys_and_rejects(tmp_path / "out")
    assert keys == {f"images/{i}.jpg" for i in range(8)}
    assert not rejects
