"""What a JPEG carries beside its pixels: orientation, colour profile, and all that --strip-exif takes out."""

from __future__ import annotations

import re
from collections.abc import Iterator

from linerate.shards.inspect_image import Buffer, exif_orientation

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOS, _APP0, _APP1, _APP2, _ADOBE, _COMMENT = 0xDA, 0xE0, 0xE1, 0xE2, 0xEE, 0xFE
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
# Inside image data: what ends a scan. Other markers there are damage, which decoders step over as we do.
_AFTER_SCAN = re.compile(rb"\xff+([\xc4\xcc\xd9-\xdd\xe0-\xef\xfe])")
# EXIF of one entry, the orientation, in a little-endian TIFF block.
_ORIENTATION_ONLY = b"\xff\xe1\x00\x22Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0%c\0\0\0\0\0\0\0"


def strip_metadata(jpeg: Buffer) -> bytes:
    """The JPEG without EXIF, XMP, IPTC, comments, thumbnails and trailing bytes; its pixels do not change.

    Colour profile and Adobe's colour transform stay, and so does the orientation where it asks for a turn, in
    an EXIF segment that holds nothing else. jpeg: one that check_header took.
    """
    data = bytes(jpeg)
    kept = [_SOI]
    turn, turn_at = 1, 1  # the orientation goes behind JFIF, which must be first
    for marker, at, end in _segments(data):
        payload = data[at + 2 : end]
        if marker == _APP0 and payload[:5] == b"JFIF\0":
            kept.insert(1, b"\xff\xe0\x00\x10" + payload[:12].ljust(12, b"\0") + b"\0\0")  # no thumbnail
            turn_at = 2
        elif marker == _APP1 and payload[:6] == b"Exif\0\0":
            turn = exif_orientation(payload[6:]) if turn == 1 else turn
        elif marker == _SOS:
            kept.extend(_scans(data, at - 2))
        elif _must_stay(marker, payload):
            kept.append(data[at - 2 : end])
    if turn > 1:
        kept.insert(turn_at, _ORIENTATION_ONLY % turn)
    return b"".join(kept)


def _scans(data: bytes, pos: int) -> Iterator[bytes]:
    """Everything from the first scan's marker on, until the end of the image."""
    while True:
        marker, body = data[pos + 1], pos + 2
        end = body + int.from_bytes(data[body : body + 2], "big")
        if end > len(data):
            break  # a decoder takes this for the end too
        if marker >= _APP0:
            # Emptied, not left out: where damage made it, a decoder that stops at it must still do so.
            yield data[pos:body] + b"\0\2"
        else:
            yield data[pos:end]
        found = _AFTER_SCAN.search(data, end)
        yield data[end : found.start() if found else None]
        if found is None:
            break
        pos = found.end() - 2
        if data[pos : pos + 2] == _EOI:
            break
    yield _EOI


def jpeg_orientation(jpeg: Buffer) -> int:
    """The EXIF orientation 1..8; 1 where there is none."""
    data = bytes(jpeg)
    for marker, at, end in _segments(data):
        if marker == _APP1 and data[at + 2 : at + 8] == b"Exif\0\0":
            turn = exif_orientation(data[at + 8 : end])
            if turn > 1:
                return turn
    return 1


def jpeg_profile(jpeg: Buffer) -> bytes:
    """The colour profile, its chunks in their order; empty where there is none. It may be broken."""
    data = bytes(jpeg)
    chunks = {
        data[at + 14]: data[at + 16 : end]
        for marker, at, end in _segments(data)
        if marker == _APP2 and data[at + 2 : at + 14] == b"ICC_PROFILE\0" and end > at + 16
    }
    return b"".join(chunks[number] for number in sorted(chunks))


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, where its length stands, where it ends) of every segment up to that of the first scan."""
    marker, pos = 0, 2
    while marker != _SOS:
        found = _MARKER.search(data, pos)
        assert found, "check_header saw a scan"
        marker, pos = found[1][0], found.end()
        if marker != 0x01 and not 0xD0 <= marker <= 0xD7:  # those stand alone
            end = pos + int.from_bytes(data[pos : pos + 2], "big")
            yield marker, pos, end
            pos = end


def _must_stay(marker: int, payload: bytes) -> bool:
    if marker == _APP2:
        return payload[:12] == b"ICC_PROFILE\0"
    if marker == _ADOBE:
        return payload[:5] == b"Adobe"
    return not (_APP0 <= marker <= 0xEF or marker == _COMMENT)
