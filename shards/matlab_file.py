"""Numbers and texts of a struct array in a MATLAB 5 file: what ImageNet's meta.mat needs, and no more.

Source: "MAT-File Format", MathWorks, level 5. Raises ValueError for anything else.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

MAX_BYTES = 64 << 20  # unpacked; ImageNet's has 0.4 MB
_MATRIX, _COMPRESSED = 14, 15
_STRUCT, _CHAR = 2, 4
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
_TEXTS = {1: "latin-1", 2: "latin-1", 16: "utf-8"}


def read_struct_array(stored: bytes, variable: str, fields: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """These fields of every element of a struct array: a float, a text, or None for what is neither."""
    try:
        return _read_struct_array(stored, variable, fields)
    except (struct.error, zlib.error, IndexError, StopIteration, UnicodeDecodeError) as error:
        raise ValueError(f"not a MATLAB 5 file that can be read: {error}") from None


def _read_struct_array(stored: bytes, variable: str, fields: tuple[str, ...]) -> list[tuple[Any, ...]]:
    order = {b"IM": "<", b"MI": ">"}.get(stored[126:128])
    if order is None:
        raise ValueError("not a MATLAB 5 file")
    for kind, data in _elements(stored[128:], order):
        if kind == _COMPRESSED:
            unpack = zlib.decompressobj()
            unpacked = unpack.decompress(data, MAX_BYTES)
            if unpack.unconsumed_tail:
                raise ValueError(f"a variable of more than {MAX_BYTES} bytes")
            kind, data = next(_elements(unpacked, order))
        if kind != _MATRIX:
            continue
        parts = _elements(data, order)
        flags, _shape, name = (next(parts)[1] for _ in range(3))
        if name.rstrip(b"\0").decode("latin-1") == variable:
            if _class_of(flags, order) != _STRUCT:
                raise ValueError(f"{variable} is no struct array")
            return list(_rows(parts, order, fields))
    raise ValueError(f"it holds no {variable}")


def _rows(
    parts: Iterator[tuple[int, bytes]], order: str, fields: tuple[str, ...]
) -> Iterator[tuple[Any, ...]]:
    (length,) = struct.unpack(order + "i", next(parts)[1])
    packed = next(parts)[1]
    if not 0 < length <= 64:
        raise ValueError(f"field names of {length} bytes")
    names = [
        packed[at : at + length].split(b"\0", 1)[0].decode("latin-1") for at in range(0, len(packed), length)
    ]
    if missing := set(fields) - set(names):
        raise ValueError(f"it has no field {', '.join(sorted(missing))}")
    while True:
        row: dict[str, Any] = {}
        for name in names:
            kind, data = next(parts, (0, b""))
            if not kind:
                if row:
                    raise ValueError("it is cut short")
                return
            row[name] = _value(data, order) if name in fields else None
        yield tuple(row[name] for name in fields)


def _value(matrix: bytes, order: str) -> float | str | None:
    parts = _elements(matrix, order)
    flags = next(parts)[1]
    _ = next(parts), next(parts)  # shape, name
    kind, data = next(parts, (0, b""))
    if _class_of(flags, order) == _CHAR:
        if kind in (4, 17):
            return data.decode("utf-16-le" if order == "<" else "utf-16-be")
        return data.decode(_TEXTS[kind]) if kind in _TEXTS else None
    if kind not in _NUMBERS or not data:
        return None
    return float(struct.unpack_from(order + _NUMBERS[kind], data)[0])


def _class_of(flags: bytes, order: str) -> int:
    return int(struct.unpack_from(order + "I", flags)[0]) & 0xFF


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, bytes) of each element in turn."""
    pos = 0
    while pos + 8 <= len(data):
        (tag,) = struct.unpack_from(order + "I", data, pos)
        if tag >> 16:  # up to four bytes stand in the tag itself
            yield tag & 0xFFFF, data[pos + 4 : pos + 4 + (tag >> 16)]
            pos += 8
            continue
        (size,) = struct.unpack_from(order + "I", data, pos + 4)
        if pos + 8 + size > len(data):
            raise ValueError(f"an element of {size} bytes where {len(data) - pos - 8} are left")
        yield tag, data[pos + 8 : pos + 8 + size]
        pos += 8 + (size if tag == _COMPRESSED else -(-size // 8) * 8)
