"""The header reader against the standard library's writer, and against damage."""

import contextlib
import functools
import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linerate.shards.errors import UserError
from linerate.shards.sources import SourceRow
from linerate.shards.tar_reader import Member, OtherMember, is_tar, read_members
from linerate.shards.tar_source import TarSource

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, members: list[tuple[str, bytes]], *, format: int) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read(path: Path) -> list[tuple[str, bytes]]:
    stored = path.read_bytes()
    return [
        (os.fsdecode(m.name), stored[m.offset : m.offset + m.size])
        for m in read_members(path)
        if isinstance(m, Member)
    ]


parts = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/"), min_size=1, max_size=60
)
long_names = st.lists(parts, min_size=1, max_size=6).map("/".join).filter(lambda n: not n.startswith("."))


@settings(max_examples=40, deadline=None)
@given(
    members=st.lists(st.tuples(long_names, st.binary(max_size=700)), max_size=5),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_any_names_are_read_as_they_were_written(
    members: list[tuple[str, bytes]], format: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert read(write_tar(tmp_path_factory.mktemp("t") / "x.tar", members, format=format)) == members


def test_ustar_prefixes_are_joined(tmp_path: Path) -> None:
    name = "/".join(["folder" * 8] * 4) + "/x.jpg"
    path = write_tar(tmp_path / "x.tar", [(name, b"1")], format=tarfile.USTAR_FORMAT)
    assert read(path) == [(name, b"1")]


def test_links_and_devices_are_listed_but_are_no_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for kind, name in (
            (tarfile.DIRTYPE, "folder"),
            (tarfile.SYMTYPE, "link"),
            (tarfile.FIFOTYPE, "pipe"),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "elsewhere"
            archive.addfile(info)
    assert list(read_members(tmp_path / "x.tar")) == [
        OtherMember(b"link", "symbolic link"),
        OtherMember(b"pipe", "pipe"),
    ]


def test_a_size_in_base_256_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a", b"12345")], format=tarfile.GNU_FORMAT)
    stored = bytearray(path.read_bytes())
    stored[124:136] = b"\x80" + (5).to_bytes(11, "big")
    stored[148:156] = b"%06o\0 " % (sum(stored[:148]) + 256 + sum(stored[156:512]))
    path.write_bytes(stored)
    assert read(path) == [("a", b"12345")]


def test_a_size_that_only_pax_can_say_is_read(tmp_path: Path) -> None:
    record = b"10 size=5\n"
    stored = _with_header(b"p", b"x", b"%011o\0" % len(record), record)
    stored += _with_header(b"a", b"0", b"%011o\0" % 0) + b"12345".ljust(512, b"\0") + bytes(1024)
    (tmp_path / "x.tar").write_bytes(stored)
    assert read(tmp_path / "x.tar") == [("a", b"12345")]


def test_data_without_its_padding_is_cut_short(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(_with_header(b"a", b"0", b"%011o\0" % 5) + b"12345")
    with pytest.raises(UserError, match="damaged at byte 1024: the file ends at byte 517"):
        read(tmp_path / "x.tar")


def test_a_leading_dot_slash_is_dropped(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("./cat/1.jpg", b"x")], format=tarfile.GNU_FORMAT)
    assert read(path) == [("cat/1.jpg", b"x")]


@pytest.mark.parametrize("keep", [100, 512, 700, 1536, 2048])
def test_a_tar_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    path = write_tar(tmp_path / "x.tar", [("a", b"1" * 900), ("b", b"2" * 900)], format=tarfile.USTAR_FORMAT)
    path.write_bytes(path.read_bytes()[:keep])
    if keep in (1536,):  # ends between two members, which no header tells
        assert read(path) == [("a", b"1" * 900)]
        return
    with pytest.raises(UserError, match=r"x\.tar is cut short or damaged at byte"):
        read(path)


def test_a_flipped_bit_in_a_header_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a", b"1"), ("b", b"2")], format=tarfile.USTAR_FORMAT)
    stored = bytearray(path.read_bytes())
    stored[1024] ^= 1
    path.write_bytes(stored)
    with pytest.raises(UserError, match="damaged at byte 1024"):
        read(path)


def _with_header(name: bytes, kind: bytes, size: bytes, data: bytes = b"") -> bytes:
    header = bytearray(tarfile.TarInfo(name.decode()).tobuf(tarfile.USTAR_FORMAT))
    header[156:157] = kind
    header[124:136] = size
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    return bytes(header) + data.ljust(-(-len(data) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (_with_header(b"a", b"x", b"00000000013\0", b"nonsense..."), "extended header that cannot be read"),
        (_with_header(b"a", b"x", b"00000000013\0", b"99 path=a\n."), "extended header that cannot be read"),
        (_with_header(b"a", b"L", b"77777777777\0"), "bytes of extended header"),
        (_with_header(b"a", b"0", b"zzzzzzzzzzz\0"), "the size reads"),
        (_with_header(b"a", b"0", b"77777777777\0"), "should end at byte"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, block: bytes, why: str) -> None:
    (tmp_path / "x.tar").write_bytes(block + bytes(1024))
    with pytest.raises(UserError, match=why):
        read(tmp_path / "x.tar")


@pytest.mark.parametrize("digits", [b"       -1000", b"-0000000001\0"])
def test_negative_sizes_are_refused(tmp_path: Path, digits: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(_with_header(b"a", b"0", digits) + bytes(1024))
    with pytest.raises(UserError, match="the size reads"):
        read(tmp_path / "x.tar")
    record = b"14 size=-1000\n"
    (tmp_path / "x.tar").write_bytes(_with_header(b"p", b"x", b"%011o\0" % len(record), record) + bytes(1024))
    with pytest.raises(UserError, match="extended header that cannot be read"):
        read(tmp_path / "x.tar")


def test_sparse_files_are_no_members_and_their_maps_are_stepped_over(tmp_path: Path) -> None:
    record = b"22 GNU.sparse.major=1\n"
    pax = _with_header(b"p", b"x", b"%011o\0" % len(record), record) + _with_header(
        b"s", b"0", b"00000000001\0", b"1"
    )
    head = bytearray(_with_header(b"t", b"S", b"00000000003\0"))
    head[482] = 1
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 256 + sum(head[156:]))
    more, last = bytearray(512), bytes(512)
    more[504] = 1
    gnu = bytes(head) + bytes(more) + last + b"abc".ljust(512, b"\0")
    end = _with_header(b"a", b"0", b"00000000002\0", b"ok") + bytes(1024)
    (tmp_path / "x.tar").write_bytes(pax + gnu + end)
    assert list(read_members(tmp_path / "x.tar"))[:2] == [
        OtherMember(b"s", "sparse file"),
        OtherMember(b"t", "sparse file"),
    ]
    assert read(tmp_path / "x.tar") == [("a", b"ok")]


def test_a_member_without_a_name_is_no_member(tmp_path: Path) -> None:
    header = bytearray(_with_header(b"a", b"0", b"00000000000\0"))
    header[0] = 0
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(1024))
    assert list(read_members(tmp_path / "x.tar")) == [OtherMember(b"(no name)", "a member without a name")]


def test_a_name_that_no_file_system_takes_is_no_member(tmp_path: Path) -> None:
    members = [("n" * 4096, b"x"), ("n" * 4097, b"x")]
    path = write_tar(tmp_path / "x.tar", members, format=tarfile.GNU_FORMAT)
    assert read(path) == members[:1]
    assert list(read_members(path))[1:] == [OtherMember(b"n" * 100 + b"...", "a name of 4097 bytes")]


def test_a_tar_in_a_tar_is_read_where_it_lies(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "i.tar", [("a", b"1"), ("b", b"22")], format=tarfile.USTAR_FORMAT)
    members = [("x", b"before"), ("i.tar", inner.read_bytes()), ("y", b"behind")]
    path = write_tar(tmp_path / "x.tar", members, format=tarfile.USTAR_FORMAT)
    before, within, behind = read_members(path)
    assert isinstance(within, Member)
    assert is_tar(path, within=within)
    assert not is_tar(path, within=before if isinstance(before, Member) else None)
    stored = path.read_bytes()
    found = [item for item in read_members(path, within=within) if isinstance(item, Member)]
    assert [(item.name, stored[item.offset : item.offset + item.size]) for item in found] == [
        (b"a", b"1"),
        (b"b", b"22"),
    ]
    cut = Member(b"i.tar", within.offset, 700)
    with pytest.raises(UserError, match=r"the inner tar ends at byte"):
        list(read_members(path, within=cut))
    assert isinstance(behind, Member)


def damaged(hits: list[tuple[int, bytes]], *, mend_sums: bool, keep: int, more: bytes) -> bytes:
    """A tar with everything in it that the reader knows, hit in some places, cut and gone on with."""
    stored = bytearray(_whole())
    for at, new in hits:
        stored[at : at + len(new)] = new
    if mend_sums:
        for at in range(0, len(stored) - 511, 512):
            if stored[at + 257 : at + 262] == b"ustar":
                total = sum(stored[at : at + 148]) + 256 + sum(stored[at + 156 : at + 512])
                stored[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(stored[:keep]) + more


@functools.cache
def _whole() -> bytes:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("\u00e4" * 60))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in (
            ("cat/1.jpg", b"1" * 600),
            ("i.tar", inner.getvalue()),
            ("n" * 150 + ".jpg", b"2"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, data in (("w.jpg", b"3"), ("w.json", b'{"a": 1}'), ("w.cls", b"7")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


places = st.integers(0, 17_000)  # of 20,480 bytes; what follows are zeros


@settings(max_examples=300, deadline=None)
@given(
    hits=st.lists(st.tuples(places, st.binary(min_size=1, max_size=16)), max_size=4),
    mend_sums=st.booleans(),
    keep=places | st.just(1 << 20),
    more=st.binary(max_size=600),
)
def test_any_damage_to_headers_is_a_user_error_or_rows_within_the_file(
    hits: list[tuple[int, bytes]],
    mend_sums: bool,
    keep: int,
    more: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    stored = damaged(hits, mend_sums=mend_sums, keep=keep, more=more)
    path.write_bytes(stored)
    with contextlib.suppress(UserError):
        for row in TarSource([path]).rows():
            assert row.key.encode()
            assert row.size >= 0
            if isinstance(row, SourceRow):
                assert 0 <= row.offset <= row.offset + row.size <= len(stored)


def test_is_tar_knows_tars_from_other_files(tmp_path: Path) -> None:
    assert is_tar(write_tar(tmp_path / "x.tar", [("a", b"1")], format=tarfile.PAX_FORMAT))
    assert is_tar(write_tar(tmp_path / "empty.tar", [], format=tarfile.GNU_FORMAT))
    (tmp_path / "least.tar").write_bytes(bytes(1024))
    assert is_tar(tmp_path / "least.tar")
    for number, other in enumerate((b"", b"short", bytes(512), bytes(20_480), b"\xff\xd8" * 400)):
        (tmp_path / str(number)).write_bytes(other)
        assert not is_tar(tmp_path / str(number))
