"""Reading a task's samples: what concerns one file, and what concerns all."""

import errno
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from linerate.shards import fetch
from linerate.shards.fetch import SampleReader
from linerate.shards.inspect_image import RejectedError


def table(rows: list[tuple[bytes, int, int, int]]) -> Any:
    path, container, offset, size = zip(*rows, strict=True)
    return pa.table(
        {"path": pa.array(path, pa.binary()), "container": container, "offset": offset, "size": size}
    )


def read(reader: SampleReader, size: int) -> bytes:
    buffer = bytearray(size + 1)
    reader.read_next(memoryview(buffer))
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
