"""The tar writer against the standard library's reader."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from linerate.shards.tar_writer import MAX_MEMBER_BYTES, TarWriter, padded, ustar_header, ustar_headers

names = st.binary(min_size=1, max_size=100).filter(lambda name: b"\0" not in name and not name.endswith(b"/"))


def write(path: Path, members: list[tuple[bytes, bytes]], *, buffer_bytes: int) -> tuple[int, int, list[int]]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        writer = TarWriter(fd, buffer_bytes=buffer_bytes)
        offsets = [writer.add(name, data) for name, data in members]
        return *writer.finish(), offsets
    finally:
        os.close(fd)


@settings(max_examples=40, deadline=None)
@given(
    members=st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=8),
    buffer_bytes=st.integers(1024, 6000),
)
def test_any_names_and_bytes_come_back(
    members: list[tuple[bytes, bytes]], buffer_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    size, digest, offsets = write(path, members, buffer_bytes=buffer_bytes)
    stored = path.read_bytes()
    assert len(stored) == size
    assert xxhash.xxh3_64_intdigest(stored) == digest
    assert [stored[o : o + len(data)] for o, (_, data) in zip(offsets, members, strict=True)] == [
        data for _, data in members
    ]
    with tarfile.open(fileobj=io.BytesIO(stored), mode="r:", errors="surrogateescape") as archive:
        read = [(os.fsencode(m.name), archive.extractfile(m)) for m in archive]
        assert [(name, file.read()) for name, file in read if file] == members


def test_header_is_that_of_the_standard_library() -> None:
    info = tarfile.TarInfo("000000000042.jpg")
    info.size = 123_456
    assert ustar_header(b"000000000042.jpg", 123_456) == info.tobuf(tarfile.USTAR_FORMAT)


def test_many_headers_at_once_are_those_one_by_one() -> None:
    sizes = [0, 7, 8, 511, 123_456, MAX_MEMBER_BYTES]
    names = [b"%012d.jpg" % (10**number) for number in range(6)]
    many = ustar_headers(np.array(names, "S16").view(np.uint8).reshape(6, 16), np.array(sizes))
    assert many.tobytes() == b"".join(map(ustar_header, names, sizes))


@pytest.mark.parametrize(
    ("name", "size"), [(b"", 1), (b"x" * 101, 1), (b"a\0b", 1), (b"a", -1), (b"a", MAX_MEMBER_BYTES + 1)]
)
def test_many_headers_refuse_what_one_refuses(name: bytes, size: int) -> None:
    with pytest.raises(ValueError, match="USTAR"):
        ustar_headers(np.frombuffer(name, np.uint8)[None, :], np.array([size]))


@pytest.mark.parametrize(
    ("name", "size"),
    [(b"", 1), (b"x" * 101, 1), (b"a\0b", 1), (b"a", -1), (b"a", MAX_MEMBER_BYTES + 1)],
)
def test_what_ustar_cannot_say_is_refused(name: bytes, size: int) -> None:
    with pytest.raises(ValueError, match="a USTAR"):
        ustar_header(name, size)


def test_a_sample_that_is_not_committed_leaves_no_trace(tmp_path: Path) -> None:
    with (tmp_path / "x.tar").open("wb") as file:
        writer = TarWriter(file.fileno())
        writer.room(100)[:100] = b"r" * 100
        writer.room(3)[:3] = b"abc"
        writer.commit(ustar_header(b"kept", 3), 3)
        writer.finish()
    assert b"r" not in (tmp_path / "x.tar").read_bytes().replace(b"ustar", b"")


def test_a_member_larger_than_the_buffer_is_written(tmp_path: Path) -> None:
    data = os.urandom(10_000)
    write(tmp_path / "x.tar", [(b"small", b"1"), (b"large", data), (b"after", b"2")], buffer_bytes=2048)
    with tarfile.open(tmp_path / "x.tar") as archive:
        large = archive.extractfile("large")
        assert large is not None
        assert large.read() == data
        assert archive.getnames() == ["small", "large", "after"]


def test_padded_rounds_up_to_blocks() -> None:
    assert [padded(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]
