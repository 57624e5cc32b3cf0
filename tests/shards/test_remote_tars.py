"""Tars at URLs: read once, front to back, and the shards of the same tars on disk."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.shards.servers import FaultyServer, serve

from linerate.shards import remote_stream, remote_tars
from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack

MakeJpeg = Callable[..., bytes]
ReadAll = Callable[[Path], dict[str, bytes]]
FETCH = FetchOptions(timeout_s=2, retries=2, backoff_s=0.01, allow_private=True)
OPTIONS = PackOptions(seed=7, min_shards=3)


def tar_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture(scope="module")
def tars(make_jpeg: MakeJpeg) -> dict[str, bytes]:
    """One of each kind: class folders, WebDataset with captions, ImageNet's tar of tars."""
    photos = {f"{c}/{i}.jpg": make_jpeg(10 * n + i) for n, c in enumerate(("ant", "bee")) for i in range(8)}
    photos |= {"ant/notes.txt": b"x", "ant/.hidden.jpg": b"y", "bee/broken.jpg": b"no image"}
    samples: dict[str, bytes] = {}
    for i in range(12):
        samples[f"{i:05d}.jpg"] = make_jpeg(100 + i)
        samples[f"{i:05d}.txt"] = f"caption {i}".encode()
        samples[f"{i:05d}.json"] = json.dumps({"key": f"{i:05d}", "status": "success", "user": i}).encode()
    samples["00099.json"] = json.dumps({"status": "failed_to_download", "error_message": "404"}).encode()
    inner = {
        f"n{c:08d}.tar": tar_of({f"n{c:08d}_{i}.JPEG": make_jpeg(200 + 10 * c + i) for i in range(9)})
        for c in range(2)
    }
    return {
        "folder.tar": tar_of(photos),
        "00000.tar": tar_of(samples),
        "train.tar": tar_of(inner | {"fake.tar": b"z" * 700, "small.tar": b"z"}),
    }


@pytest.fixture
def server(tars: dict[str, bytes]) -> Iterator[FaultyServer]:
    with serve(tars) as running:
        yield running


def pack_url(
    url: str | list[str], out: Path, options: PackOptions = OPTIONS, **named: Any
) -> dict[str, bytes]:
    named = {"num_workers": 0, "fetch": FETCH} | named
    root = pack(url, out, options=options, **named).root
    assert not (root / ".pack").exists()
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name != "pack_stats.parquet"}


@pytest.fixture(scope="module")
def local(tars: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What packing each of the tars from disk writes."""
    root = tmp_path_factory.mktemp("tars")
    for name, data in tars.items():
        (root / name).write_bytes(data)
    return {name: pack_url(str(root / name), root / f"out-{name}") for name in tars}


@pytest.mark.parametrize("name", ["folder.tar", "00000.tar", "train.tar"])
def test_a_tar_at_a_url_makes_the_shards_of_the_same_tar_on_disk(
    server: FaultyServer, local: dict[str, dict[str, bytes]], tmp_path: Path, name: str
) -> None:
    assert pack_url(server.url(f"ranged/{name}"), tmp_path / "out") == local[name]
    assert [(first, size > 1) for asked, first, size in server.ranges if asked == name] == [
        (0, False),
        (0, True),
    ]


def test_a_connection_that_breaks_goes_on_at_the_byte_that_it_reached(
    server: FaultyServer, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    assert pack_url(server.url("broken/4000/folder.tar"), tmp_path / "out") == local["folder.tar"]
    answers = [(first, size) for _, first, size in server.ranges[1:]]
    assert len(answers) > 3
    assert [first for first, _ in answers] == [4000 * n for n in range(len(answers))]


def test_a_server_without_ranges_is_read_over_to_where_it_broke(
    server: FaultyServer, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    assert pack_url(server.url("deaf/4000/folder.tar"), tmp_path / "out") == local["folder.tar"]


def test_several_pieces_and_buckets_make_the_same_shards(
    server: FaultyServer, tars: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_tars, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(remote_tars, "BUCKET_BYTES", 5_000)
    parts = ["folder.tar", "again.tar"]
    server.files = {"folder.tar": tars["folder.tar"], "again.tar": tars["folder.tar"]}
    for name in parts:
        (tmp_path / name).write_bytes(tars["folder.tar"])
    there = pack_url([server.url(f"ranged/{name}") for name in parts], tmp_path / "a")
    assert there == pack_url([str(tmp_path / name) for name in parts], tmp_path / "b")


def test_filters_and_equal_images_are_those_of_local_tars(
    server: FaultyServer, tars: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "00000.tar").write_bytes(tars["00000.tar"])
    options = PackOptions(seed=1, dedup="bytes", where="extra->>'user' != '3'", min_shards=2)
    there = pack_url(server.url("ranged/00000.tar"), tmp_path / "a", options)
    assert there == pack_url(str(tmp_path / "00000.tar"), tmp_path / "b", options)


def test_killed_after_reading_the_tars_are_not_read_again(
    server: FaultyServer, local: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("ranged/folder.tar")

    def die(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("linerate.shards.pack.make_plan", die)
        with pytest.raises(KeyboardInterrupt):
            pack_url(url, tmp_path / "out")
    server.ranges.clear()
    assert pack_url(url, tmp_path / "out") == local["folder.tar"]
    assert [(first, size) for _, first, size in server.ranges] == [(0, 1)]


def test_a_tar_that_changed_since_it_was_read_is_read_anew(
    server: FaultyServer, local: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("ranged/folder.tar")
    with monkeypatch.context() as patch:
        patch.setattr("linerate.shards.pack.make_plan", lambda *args, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack_url(url, tmp_path / "out")
    server.versions["folder.tar"] = "v2"
    server.ranges.clear()
    assert pack_url(url, tmp_path / "out") == local["folder.tar"]
    assert len(server.ranges) == 2


def test_a_finished_set_is_left_alone_without_reading_its_tars(
    server: FaultyServer, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    url = server.url("ranged/folder.tar")
    pack_url(url, tmp_path / "out")
    server.ranges.clear()
    assert pack_url(url, tmp_path / "out") == local["folder.tar"]
    assert not server.ranges
    (tmp_path / "out" / "shard-000001.tar").unlink()
    assert pack_url(url, tmp_path / "out") == local["folder.tar"]


def test_what_is_no_tar_or_cannot_be_read_is_told_in_a_line(
    server: FaultyServer, tars: dict[str, bytes], tmp_path: Path
) -> None:
    server.files |= {"x.tar": b"\x1f\x8b" * 600, "cut.tar": tars["folder.tar"][:5000], "empty.tar": b""}
    for path, said in {
        "ranged/x.tar": r"ranged/x\.tar is no uncompressed tar; a \.tar\.gz or \.zip",
        "ranged/cut.tar": r"cut\.tar is cut short or damaged at byte",
        "ranged/empty.tar": r"empty\.tar cannot be read: no bytes",
        "ok/none.tar": r"none\.tar cannot be read: not found: HTTP 404",
        "chunked/folder.tar": "does not say how long it is; download it first",
        "flaky/9/folder.tar": r"cannot be read: HTTP 500 after 3 tries; the same command again continues",
        "stall/folder.zip": "neither a tar nor a manifest by its name",
    }.items():
        with pytest.raises(UserError, match=said):
            pack_url(server.url(path), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_tar_on_a_private_address_is_refused_unless_allowed(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"address refused: 127\.0\.0\.1 is the loopback .*--allow-private"):
        pack_url(server.url("ranged/folder.tar"), tmp_path / "out", fetch=FetchOptions())
    with pytest.raises(UserError, match="the scheme ftp is none of http, https, s3, gs"):
        pack_url("ftp://a.org/x.tar", tmp_path / "out")
    assert not server.ranges


def test_a_tar_that_changes_while_it_is_read_is_refused(server: FaultyServer, tmp_path: Path) -> None:
    file = remote_stream.ask_file(server.url("broken/4000/folder.tar"), FETCH)
    chunks = remote_stream.stream(file, FETCH)
    next(chunks)
    server.versions["folder.tar"] = "v2"
    with pytest.raises(UserError, match=r"folder\.tar changed while it was read"):
        list(chunks)


def test_local_and_remote_sources_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.tar lies here, other sources at URLs"):
        pack(["http://a.org/y.tar", str(tmp_path / "x.tar")], tmp_path / "out")


def test_lost_images_of_read_tars_are_told(server: FaultyServer, tmp_path: Path, monkeypatch: Any) -> None:
    from linerate.shards import pack as pack_module

    plan_tasks = pack_module.plan_tasks

    def lose(*args: Any) -> Any:
        shutil.rmtree(tmp_path / "out" / ".pack" / "tars" / "0000")
        return plan_tasks(*args)

    monkeypatch.setattr(pack_module, "plan_tasks", lose)
    with pytest.raises(UserError, match=r"0000 lacks images of .*folder\.tar; remove .*tars, and the same"):
        pack_url(server.url("ranged/folder.tar"), tmp_path / "out")


@pytest.mark.parametrize("where", ["s3://shards/wds/*.tar", "s3://shards/wds/", "s3://shards/wds"])
def test_a_prefix_of_img2datasets_tars_is_the_folder_of_them(
    store: Any, tars: dict[str, bytes], tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_stream, "PART_BYTES", 3000)
    folder = tmp_path / "wds"
    folder.mkdir()
    for name in ("00000.tar", "00001.tar"):
        (folder / name).write_bytes(tars["00000.tar"])
    failed = {"key": ["7"], "status": ["failed_to_download"], "error_message": ["gone"]}
    pq.write_table(pa.table(failed), folder / "00001.parquet")
    (folder / "00000_stats.json").write_text("{}")
    for path in folder.iterdir():
        store.pipe_file(f"shards/wds/{path.name}", path.read_bytes())
    assert pack_url(where, tmp_path / "a") == pack_url(str(folder), tmp_path / "b")


def test_a_store_that_breaks_and_truncates_is_asked_for_the_rest(
    store: Any, tars: dict[str, bytes], local: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: Any
) -> None:
    s3fs = pytest.importorskip("s3fs")
    store.pipe_file("shards/train.tar", tars["train.tar"])
    cat_file, asked = s3fs.S3FileSystem._cat_file, []

    async def faulty(self: Any, path: str, **named: int) -> bytes:
        data: bytes = await cat_file(self, path, **named)
        asked.append((named["start"], named["end"]))
        if len(asked) % 3 == 1:
            raise ConnectionResetError("reset")
        return data[: 1 + len(data) // 2] if len(asked) % 3 == 2 else data

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", faulty)
    assert pack_url("s3://shards/train.tar", tmp_path / "out") == local["train.tar"]
    assert [start for start, _ in asked] == [0, 0, 25601]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://shards/none.tar", "not found"),
        ("s3://shards/none/", r"does not exist; give tars \(\.tar\), manifests"),
        ("s3://shards/*.tar", "matches no tar and no manifest among 1 objects"),
        ("s3://shards/photos", "holds 1 objects, which are not all tars or Parquet files"),
        ("s3://no-such-bucket/x/", "cannot be|does not exist"),
        ("s3://", "bad URL"),
    ],
)
def test_what_is_not_in_the_bucket_is_told(store: Any, tmp_path: Path, url: str, said: str) -> None:
    store.pipe_file("shards/photos/a.jpg", b"x")
    with pytest.raises(UserError, match=said):
        pack_url(url, tmp_path / "out")


def test_a_bucket_is_removed_when_its_shards_are_whole_and_not_read_again(
    server: FaultyServer,
    local: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_tars, "BUCKET_BYTES", 3_000)
    url, tars = server.url("ranged/folder.tar"), tmp_path / "out" / ".pack" / "tars"
    left: list[int] = []

    def count(stage: str, amount: float) -> None:
        if stage == "pack":
            left.append(len(list(tars.glob("[0-9]*/0000"))))
            if len(left) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_url(url, tmp_path / "out", on_progress=count)
    assert 0 < left[1] < left[0]
    server.ranges.clear()
    assert pack_url(url, tmp_path / "out") == local["folder.tar"]
    assert [size for _, _, size in server.ranges] == [1]


def test_how_much_is_fetched_is_told(server: FaultyServer, tars: dict[str, bytes], tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    pack_url(server.url("ranged/folder.tar"), tmp_path / "out", on_progress=lambda *stage: told.append(stage))
    size = len(tars["folder.tar"])
    assert told[0] == ("to fetch", size)
    assert sum(amount for stage, amount in told if stage == "fetch") == size


def test_a_run_of_tars_that_was_read_whole_is_not_read_again(
    server: FaultyServer, tars: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_tars, "PIECE_BYTES", 10_000)
    server.files = {name: tars["folder.tar"] for name in ("a.tar", "b.tar")}
    urls = [server.url("ranged/a.tar"), server.url("ranged/b.tar")]
    stream = remote_stream.stream

    def lose_the_second(file: remote_stream.RemoteFile, options: FetchOptions) -> Iterator[bytes]:
        if file.url == urls[1]:
            raise UserError("it is lost")
        return stream(file, options)

    with monkeypatch.context() as patch:
        patch.setattr("linerate.shards.remote_tar_task.stream", lose_the_second)
        with pytest.raises(UserError, match="it is lost"):
            pack_url(urls, tmp_path / "out")
    server.ranges.clear()
    there = pack_url(urls, tmp_path / "out")
    assert {(name, size > 1) for name, _, size in server.ranges} == {
        ("a.tar", False),
        ("b.tar", False),
        ("b.tar", True),
    }
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(tars["folder.tar"])
    assert there == pack_url([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], tmp_path / "here")
