"""Reading a task's samples: what concerns one file, and what concerns all."""

import errno
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tests.shards.servers import serve

from linerate.shards import fetch
from linerate.shards.fetch import SampleReader, hide_userinfo
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.inspect_image import RejectedError
from linerate.shards.remote_url import URL_CONTAINER


def table(rows: list[tuple[bytes, int, int, int]]) -> Any:
    path, container, offset, size = zip(*rows, strict=True)
    return pa.table(
        {"path": pa.array(path, pa.binary()), "container": container, "offset": offset, "size": size}
    )


def read(reader: SampleReader, size: int) -> bytes:
    buffer = bytearray(size + 1)
    assert reader.read_next(lambda size: memoryview(buffer)) == size
    return bytes(buffer[:size])


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_files_and_ranges_come_in_order_with_one_open_tar(tmp_path: Path) -> None:
    files = [os.urandom(i) for i in range(40)]
    for i, data in enumerate(files):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    (tmp_path / "x.tar").write_bytes(b"0123456789")
    rows = [(b"%d.jpg" % i, 0, 0, i) for i in range(40)] + [(b"", 1, 3, 4), (b"", 1, 0, 2)]
    before = num_open_files()
    with SampleReader(table(rows), [str(tmp_path), str(tmp_path / "x.tar")]) as reader:
        assert [read(reader, i) for i in range(40)] == files
        assert [read(reader, 4), read(reader, 2)] == [b"3456", b"01"]
    assert num_open_files() == before


def test_leaving_early_closes_what_was_opened_ahead(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "x.tar").write_bytes(b"0123456789")
    rows = [(b"a.jpg", 0, 0, 1), (b"", 1, 0, 1)] * 10
    before = num_open_files()
    with SampleReader(table(rows), [str(tmp_path), str(tmp_path / "x.tar")]) as reader:
        read(reader, 1)
    assert num_open_files() == before


@pytest.mark.parametrize(
    ("size", "now"), [(2, "more than 2 bytes now, 2"), (9, "5 bytes now, 9"), (0, "more than 0")]
)
def test_a_file_of_another_size_than_listed_is_rejected(tmp_path: Path, size: int, now: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    with (
        SampleReader(table([(b"a.jpg", 0, 0, size)]), [str(tmp_path)]) as reader,
        pytest.raises(RejectedError, match=f"changed while packing: {now}"),
    ):
        read(reader, size)


def test_a_tar_that_shrank_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"12345")
    with (
        SampleReader(table([(b"", 0, 3, 9)]), [str(tmp_path / "x.tar")]) as reader,
        pytest.raises(RejectedError, match="2 bytes now, 9 when listed"),
    ):
        read(reader, 9)


def test_a_file_that_is_gone_is_rejected_and_the_next_one_read(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(b"b")
    with SampleReader(table([(b"a.jpg", 0, 0, 1), (b"b.jpg", 0, 0, 1)]), [str(tmp_path)]) as reader:
        with pytest.raises(RejectedError, match="unreadable: No such file"):
            read(reader, 1)
        assert read(reader, 1) == b"b"


def test_a_failing_disk_is_nobodys_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fetch.os, "open", fail)
    with (
        SampleReader(table([(b"a.jpg", 0, 0, 1)]), [str(tmp_path)]) as reader,
        pytest.raises(OSError, match="Input/output error"),
    ):
        read(reader, 1)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readv = os.readv
    (tmp_path / "a.jpg").write_bytes(b"0123456789")
    monkeypatch.setattr(fetch.os, "readv", lambda fd, views: readv(fd, [views[0][:3]]))
    with SampleReader(table([(b"a.jpg", 0, 0, 10)]), [str(tmp_path)]) as reader:
        assert read(reader, 10) == b"0123456789"


def test_a_file_of_unknown_size_is_measured_when_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    rows = table([(str(tmp_path / "a.jpg").encode()[1:], 0, 0, -1), (b"none.jpg", 0, 0, -1)])
    with SampleReader(rows, ["/"]) as reader:
        assert read(reader, 5) == b"12345"
        with pytest.raises(RejectedError, match="unreadable: No such file"):
            read(reader, 0)


def test_a_pipe_a_device_and_a_folder_hold_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    rows = [(b"pipe", 0, 0, -1), (b"pipe", 0, 0, 7), (b"dev/zero", 1, 0, -1), (b".", 0, 0, -1)]
    before = num_open_files()
    with SampleReader(table(rows), [str(tmp_path), "/"]) as reader:
        for said in ("not a regular file", "Illegal seek", "not a regular file", "not a regular file"):
            with pytest.raises(RejectedError, match=f"unreadable: {said}"):
                read(reader, 0)
    assert num_open_files() == before


def test_an_image_of_too_many_bytes_is_rejected_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    rows = table([(b"a.jpg", 0, 0, 5), (b"a.jpg", 0, 0, -1), (b"", 1, 0, 5), (b"", 1, 0, 4)])
    with SampleReader(rows, [str(tmp_path), str(tmp_path / "a.jpg")], max_bytes=4) as reader:
        for _ in range(3):
            with pytest.raises(RejectedError, match="too many bytes: 5 exceeds 4"):
                read(reader, 5)
        assert read(reader, 4) == b"1234"


def test_urls_files_and_members_come_in_the_order_of_the_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"file")
    options = FetchOptions(allow_private=True)
    with serve({"u.jpg": b"url"}) as server:
        url = server.url("ok/u.jpg").encode()
        rows = table([(url, 0, 0, -1), (b"a.jpg", 1, 0, -1), (url, 0, 0, 999), (b"", 2, 1, 2)] * 5)
        containers = [URL_CONTAINER, str(tmp_path), str(tmp_path / "a.jpg")]
        with SampleReader(rows, containers, options=options) as reader:
            for _ in range(5):
                assert [read(reader, size) for size in (3, 4, 3, 2)] == [b"url", b"file", b"url", b"il"]


def test_keys_and_metadata_lose_name_and_password_of_urls() -> None:
    url = "http://me@corp:secret@a.org/x?y"
    rows = pa.table(
        {
            "key": [url, "b.jpg", "http://me:sec/ret@a.org"],
            "path": pa.array([url.encode(), b"b.jpg", b"c"]),
            "extra_json": pa.array([f'{{"url":"{url}","mail":"a@b.org"}}'.encode(), None, b"{}"]),
            "page": [f"see {url.upper()}", None, "http://a.org/@me"],
            "likes": [1, 2, 3],
        }
    )
    hidden = hide_userinfo(rows, [URL_CONTAINER])
    assert hidden.schema == rows.schema
    assert hidden.to_pydict() == {
        "key": ["http://a.org/x?y", "b.jpg", "http://..."],
        "path": [url.encode(), b"b.jpg", b"c"],  # what is asked for
        "extra_json": [b'{"url":"http://a.org/x?y","mail":"a@b.org"}', None, b"{}"],
        "page": ["see HTTP://A.ORG/X?Y", None, "http://a.org/@me"],
        "likes": [1, 2, 3],
    }
    assert hide_userinfo(rows, ["/"]) is rows
