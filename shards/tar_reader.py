"""The members of a tar by its headers alone, ten times as fast as the standard library's reader.

Knows USTAR, GNU long names, PAX paths and sizes, and tars inside a tar; checks every header's sum.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from linerate.shards.errors import UserError

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20  # of a long name or a PAX record
MAX_NAME_BYTES = 4096  # the longest path that a file system takes


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file inside a tar."""

    name: bytes
    offset: int
    """Of its first byte in the tar."""
    size: int


@dataclass(frozen=True, slots=True)
class OtherMember:
    """A link, device, sparse file, or what has no name or an overlong one; folders are not listed."""

    name: bytes
    kind: str


_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"6": "pipe",
    b"S": "sparse file",
}


class Readable(Protocol):
    """A tar's bytes, asked for from front to back."""

    def pread(self, size: int, offset: int) -> bytes:
        """At most `size` bytes from `offset` on; less only at the end."""
        ...


@dataclass(frozen=True)
class _OpenFile:
    fd: int

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self.fd, size, offset)


def read_members(tar: Path, *, within: Member | None = None) -> Iterator[Member | OtherMember]:
    """List what is in an uncompressed tar, in its order; `within` a member of it that is itself a tar.

    Offsets count from the start of the file in either case. Raises UserError when the tar is cut short or
    damaged: where a header is wrong, nothing behind it is known.
    """
    with tar.open("rb") as file:
        yield from walk_members(
            _OpenFile(file.fileno()), tar, size=os.fstat(file.fileno()).st_size, within=within
        )


def walk_members(
    source: Readable, tar: Path | str, *, size: int, within: Member | None = None
) -> Iterator[Member | OtherMember]:
    """As read_members, of what `source` gives, `size` bytes in all; errors call it `tar`.

    What a member holds is not asked for, and nothing is that lies before the member given last.
    """
    pos, end = (within.offset, within.offset + within.size) if within else (0, size)
    said = _Said()
    while header := source.pread(min(BLOCK, max(end - pos, 0)), pos):
        if header.count(0) == BLOCK:
            return
        kind = header[156:157]
        size = _checked_size(tar, header, pos)
        data = pos + BLOCK
        if kind in b"LKxg" and kind:
            if size > MAX_EXTENSION_BYTES:
                raise _damaged(tar, pos, f"{size} bytes of extended header")
            extension = source.pread(size, data)
            if kind == b"L":
                said.name = extension.rstrip(b"\0")
            elif kind == b"x":
                said = _pax(tar, extension, pos, said)
            pos = data + _padded(size)
            continue
        size = size if said.size is None else said.size
        name = (_ustar_name(header) if said.name is None else said.name).removeprefix(b"./")
        if kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
            size = 0  # some writers state a link's target's size; no data follows
        elif kind == b"S" and header[482]:
            data = _behind_sparse_map(source, data, end)
        kind, said = (b"S" if said.sparse else kind), _Said()
        if data + size > end:
            raise _damaged(tar, pos, f"{name[:100]!r} should end at byte {data + size} of {end}")
        if item := _member(name, kind, data, size):
            yield item
        pos = data + _padded(size)
    if pos != end:
        raise _damaged(tar, pos, f"the {'inner tar' if within else 'file'} ends at byte {end}")


@dataclass(slots=True)
class _Said:
    """What GNU and PAX headers say of the member that follows them."""

    name: bytes | None = None
    size: int | None = None
    sparse: bool = False


def _member(name: bytes, kind: bytes, data: int, size: int) -> Member | OtherMember | None:
    if kind in (b"0", b"\0", b"7") and not name.endswith(b"/"):
        if not name:
            return OtherMember(b"(no name)", "a member without a name")
        if len(name) > MAX_NAME_BYTES:
            return OtherMember(name[:100] + b"...", f"a name of {len(name)} bytes")
        return Member(name, data, size)
    if kind in (b"5", b"0", b"\0"):
        return None
    return OtherMember(name[:MAX_NAME_BYTES], _KINDS.get(kind, f"type {kind!r}"))


def _behind_sparse_map(source: Readable, pos: int, end: int) -> int:
    """Where the data of an old GNU sparse file begins: its map may go on in blocks of its own."""
    more = True
    while more and pos < end:
        block = source.pread(BLOCK, pos)
        more = len(block) == BLOCK and block[504] != 0
        pos += BLOCK
    return pos


def is_tar(path: Path, *, within: Member | None = None) -> bool:
    """Does this file, or this member of it, begin with the header of a tar member, uncompressed?"""
    with path.open("rb") as file:
        place = (min(BLOCK, within.size), within.offset) if within else (BLOCK, 0)
        header = os.pread(file.fileno(), *place)
    return begins_tar(header)


def begins_tar(header: bytes) -> bool:
    """Is this the header of a tar's member?"""
    return len(header) == BLOCK and _sum_agrees(header)


def _sum_agrees(header: bytes) -> bool:
    try:
        stated = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return stated == sum(header) - sum(header[148:156]) + 8 * 32


def _checked_size(tar: Path | str, header: bytes, pos: int) -> int:
    if len(header) < BLOCK or not _sum_agrees(header):
        raise _damaged(tar, pos, "no valid member header there")
    digits = header[124:136]
    if digits[0] & 0x80:  # base 256, for what eleven octal digits cannot say
        size = int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:], "big")
    else:
        try:
            size = int(digits.strip(b" \0") or b"0", 8)
        except ValueError:
            size = -1
        if size < 0:
            raise _damaged(tar, pos, f"the size reads {digits!r}")
    return size


def _ustar_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    # GNU's own format keeps times where USTAR keeps the prefix; only the magic tells them apart.
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _pax(tar: Path | str, records: bytes, pos: int, said: _Said) -> _Said:
    """What a PAX header adds to what is said of the next member."""
    start = 0
    try:
        while start < len(records):
            length = int(records[start : records.index(b" ", start)])
            key, value = records[start : start + length].split(b" ", 1)[1].rstrip(b"\n").split(b"=", 1)
            if length < 5 or start + length > len(records):
                raise ValueError
            if key == b"path":
                said.name = value
            elif key == b"size":
                said.size = int(value)
                if said.size < 0:
                    raise ValueError
            elif key.startswith(b"GNU.sparse."):
                said.sparse = True
            start += length
    except (ValueError, IndexError):
        raise _damaged(tar, pos, "an extended header that cannot be read") from None
    return said


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _damaged(tar: Path | str, pos: int, what: str) -> UserError:
    return UserError(f"the tar {tar} is cut short or damaged at byte {pos}: {what}; fetch it again")
