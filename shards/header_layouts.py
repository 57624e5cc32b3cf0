"""JPEG headers that are laid out like some before them, read in one step instead of segment by segment."""

from __future__ import annotations

import struct
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview
Found = tuple[int, int, int, int]
"""(height, width, flags, where the scan begins)."""

# Tables, restart intervals, JFIF, comments: only their lengths matter, and most segments are one of them.
SAY_NOTHING = frozenset({0xFFDB, 0xFFC4, 0xFFDD, 0xFFE0, 0xFFFE})
_FRAMES = frozenset({0xFFC0, 0xFFC1, 0xFFC2})
_SCAN = 0xFFDA
_pair_at = struct.Struct(">HH").unpack_from


class _Layout(NamedTuple):
    """All segments of a header with their lengths, and what its flags depend on beside those."""

    format: str
    """Of a struct from byte 2 on: markers, lengths, and of the frame precision, height, width, channels."""
    before: tuple[int, ...]
    """The fields before the height."""
    after: tuple[int, ...]
    """The fields behind the width."""


class HeaderLayouts:
    """The last few layouts that headers in sequence had in common.

    Nothing depends on what was seen before but the time: a header that fits is what a walk would find it to
    be, since every byte that the walk reads is compared.
    """

    def __init__(self, *, most: int = 4) -> None:
        self._most = most
        self._known: list[tuple[int, struct.Struct, _Layout, int]] = []  # scan, fields, layout, flags
        self._missed: _Layout | None = None

    def read(self, data: Buffer) -> Found | None:
        """What a header says that is laid out as one of those; None for any other."""
        size = len(data)
        for scan, fields, (_, before, after), flags in self._known:
            if scan <= size:
                values = fields.unpack_from(data, 2)
                height = len(before)
                if values[:height] == before and values[height + 2 :] == after:
                    return values[height], values[height + 1], flags, scan
        return None

    def learn(self, head: bytes, found: Found) -> None:
        """Keep the layout of a header that was walked, if the one before that did not fit had it too.

        Where images have tables of their own no two are alike, and little time goes into it.
        """
        layout = _layout_of(head)
        if layout is not None and layout == self._missed:
            _, _, flags, scan = found
            self._known.insert(0, (scan, struct.Struct(layout.format), layout, flags))
            del self._known[self._most :]
        self._missed = layout


def _layout_of(head: bytes) -> _Layout | None:
    """None where there is a segment whose content matters, or anything unusual."""
    pos, form, fields = 2, ">", []
    frame: int | None = None
    while True:
        marker, length = _pair_at(head, pos)
        fields += [marker, length]
        form += "HH"
        if marker == _SCAN:
            break
        if marker in SAY_NOTHING and length >= 2:
            form += f"{length - 2}x"
        elif marker in _FRAMES and length >= 8 and frame is None:
            form += f"BHHB{length - 8}x"
            fields += [head[pos + 4], head[pos + 9]]
            frame = len(fields) - 1
        else:
            return None
        pos += 2 + length
    return None if frame is None else _Layout(form, tuple(fields[:frame]), tuple(fields[frame:]))
