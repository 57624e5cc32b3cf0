"""Deterministic USTAR written from one large buffer: whoever knows the bytes knows the tar."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import xxhash

BLOCK = 512
MAX_NAME_BYTES = 100
MAX_MEMBER_BYTES = 8 * 1024**3 - 1  # eleven octal digits
# What is read is hashed twice and written while it lies in a core's cache: 684 photos of 110 KB on tmpfs took
# 0.93 to 0.95 of the CPU time of 8 MiB at 0.5, 1 and 2 MiB (medians of 31, on a busy machine). Mapping the
# files instead of reading them gained nothing.
BUFFER_BYTES = 1024**2
END_OF_TAR = bytes(2 * BLOCK)

# A regular file of uid, gid and mtime 0, mode 0644; name, size and checksum are filled in per member.
_TEMPLATE = bytearray(BLOCK)
_TEMPLATE[100:108] = b"0000644\0"
_TEMPLATE[108:116] = b"0000000\0"
_TEMPLATE[116:124] = b"0000000\0"
_TEMPLATE[135:136] = b"\0"
_TEMPLATE[136:148] = b"00000000000\0"
_TEMPLATE[148:156] = b" " * 8  # what the checksum is computed over
_TEMPLATE[156:157] = b"0"
_TEMPLATE[257:265] = b"ustar\x0000"
_TEMPLATE_SUM = sum(_TEMPLATE)
_HEADER_FORMAT = b"%%b%%b%b%%b%b%%06o\0 %b" % (
    bytes(_TEMPLATE[100:124]),
    bytes(_TEMPLATE[135:148]),
    bytes(_TEMPLATE[156:]),
)
# Of a member beside its data: header, padding, and what may follow at once.
_BESIDE = 4 * BLOCK
_NAME_PADS = [bytes(MAX_NAME_BYTES - length) for length in range(MAX_NAME_BYTES + 1)]
_PADS = [bytes(length) for length in range(BLOCK)]


def ustar_header(name: bytes, size: int) -> bytes:
    """The 512 bytes before a member. Raises ValueError for what USTAR cannot say."""
    if not 0 < len(name) <= MAX_NAME_BYTES or b"\0" in name:
        raise ValueError(f"a USTAR name has 1 to {MAX_NAME_BYTES} bytes and no NUL, this has {name!r}")
    if not 0 <= size <= MAX_MEMBER_BYTES:
        raise ValueError(f"a USTAR member has 0 to {MAX_MEMBER_BYTES} bytes, {name!r} has {size}")
    digits = b"%011o" % size
    checksum = _TEMPLATE_SUM + sum(name) + sum(digits)
    # One formatting of bytes: joining slices took twice as long, and a shard has 20,000 of these.
    return _HEADER_FORMAT % (name, _NAME_PADS[len(name)], digits, checksum)


def ustar_headers(names: npt.NDArray[np.uint8], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """(N, 512) uint8: the headers of N members, as ustar_header makes them, in a tenth of the time.

    names: (N, L) uint8, names of L bytes. Raises ValueError for what USTAR cannot say.
    """
    count, length = names.shape
    if not 0 < length <= MAX_NAME_BYTES or not names.all():
        raise ValueError(f"USTAR names have 1 to {MAX_NAME_BYTES} bytes and no NUL, these have {length}")
    if count and not 0 <= sizes.min() <= sizes.max() <= MAX_MEMBER_BYTES:
        raise ValueError(f"USTAR members have 0 to {MAX_MEMBER_BYTES} bytes, one has {sizes.max()}")
    headers = np.tile(np.frombuffer(_TEMPLATE, np.uint8), (count, 1))
    headers[:, :length] = names
    headers[:, 124:135] = octal(sizes, 11)
    checksums = headers.sum(axis=1, dtype=np.int64)
    headers[:, 148:154] = octal(checksums, 6)
    headers[:, 154] = 0
    return headers


def octal(numbers: npt.NDArray[np.int64], digits: int) -> npt.NDArray[np.uint8]:
    """(N, digits) uint8: ASCII."""
    shifts = 3 * np.arange(digits - 1, -1, -1)
    return ((numbers[:, None] >> shifts & 7) + ord("0")).astype(np.uint8)


def small_member(name: bytes, data: bytes) -> bytes:
    """A whole member: header, data, padding."""
    return ustar_header(name, len(data)) + data + _PADS[-len(data) % BLOCK]


def padded(size: int) -> int:
    """Bytes that a member's data takes in a tar."""
    return -(-size // BLOCK) * BLOCK


Buffer = bytes | bytearray | memoryview


class TarWriter:
    """Members into an open file descriptor through one buffer; the hash of all bytes comes for free.

    A member's data is read straight into the buffer: `room(size)`, fill it, `commit(header, size)`. Not
    committing leaves no trace, so a sample can be judged where it lies.
    """

    def __init__(self, fd: int, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._fd = fd
        self._view = memoryview(bytearray(buffer_bytes))
        self._capacity = buffer_bytes
        self._fill = 0
        self._flushed = 0
        self._hash = xxhash.xxh3_64()

    def room(self, size: int) -> memoryview:
        """At least `size` + 1 writable bytes where the next member's data goes.

        The byte too many shows a reader that a file is longer than it was said to be.
        """
        need = size + _BESIDE
        if self._fill + need > self._capacity:
            self._flush()
            if need > self._capacity:
                self._view = memoryview(bytearray(need))
                self._capacity = need
        start = self._fill + BLOCK
        return self._view[start : start + size + 1]

    def data(self, size: int) -> memoryview:
        """The first `size` bytes of the last room()."""
        start = self._fill + BLOCK
        return self._view[start : start + size]

    def commit(self, header: Buffer, size: int, after: Buffer = b"") -> int:
        """Make the first `size` bytes of the last room() a member; the offset of its data in the tar.

        header: of ustar_header; after: a small member of at most 1024 bytes that follows at once.
        """
        fill = self._fill
        start = fill + BLOCK
        end = start + size
        view = self._view
        view[fill:start] = header
        if pad := -size % BLOCK:
            view[end : end + pad] = _PADS[pad]
            end += pad
        if after:
            end, start_after = end + len(after), end
            view[start_after:end] = after
        self._fill = end
        return self._flushed + start

    def add(self, name: bytes, data: bytes) -> int:
        """A small member from memory; the offset of its data in the tar."""
        block = small_member(name, data)
        if self._fill + len(block) > self._capacity:
            self.room(len(block))
        self._view[self._fill : self._fill + len(block)] = block
        self._fill += len(block)
        return self._flushed + self._fill - len(block) + BLOCK

    def finish(self) -> tuple[int, int]:
        """Write what is left and the end mark; (bytes, xxh3_64) of the whole tar. Does not sync."""
        self._flush()
        self._view[: len(END_OF_TAR)] = END_OF_TAR
        self._fill = len(END_OF_TAR)
        self._flush()
        return self._flushed, self._hash.intdigest()

    def _flush(self) -> None:
        rest = self._view[: self._fill]
        self._hash.update(rest)
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        self._flushed += self._fill
        self._fill = 0
