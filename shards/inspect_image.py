"""Is this a JPEG that can be trained on? Judged by its bytes, never by its name."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from typing import NamedTuple

import simplejpeg

Buffer = bytes | bytearray | memoryview

# Bits of the `flags` column.
PROGRESSIVE = 1
GRAY = 2
CMYK = 4
ORIENTED = 8  # EXIF asks for a rotation or a mirror image; decoders disagree on whether to obey
ICC = 16
EXIF = 32
UNUSUAL_CODING = 64  # arithmetic or lossless: software decoders only
TRAILING_BYTES = 128  # something follows the end-of-image marker
EXTENDED = 256  # extended sequential: what baseline has, and more tables
NOT_BASELINE = PROGRESSIVE | CMYK | UNUSUAL_CODING | EXTENDED
# What was done to the image when it was packed; the bits above are those of the stored JPEG.
RESIZED = 1 << 10
TRANSCODED = 1 << 11  # was progressive, CMYK, arithmetic ...
CONVERTED = 1 << 12  # was no JPEG
TURNED = 1 << 13  # as its EXIF asked
TO_SRGB = 1 << 14
STRIPPED = 1 << 15
REWRITTEN = RESIZED | TRANSCODED | CONVERTED | TURNED | TO_SRGB | STRIPPED
FLAG_NAMES = {
    PROGRESSIVE: "progressive",
    GRAY: "grayscale",
    CMYK: "cmyk",
    ORIENTED: "oriented",
    ICC: "icc",
    EXIF: "exif",
    UNUSUAL_CODING: "arithmetic or lossless",
    TRAILING_BYTES: "trailing bytes",
    EXTENDED: "extended sequential",
    RESIZED: "resized when packed",
    TRANSCODED: "made baseline when packed",
    CONVERTED: "made a JPEG when packed",
    TURNED: "turned upright when packed",
    TO_SRGB: "brought to sRGB when packed",
    STRIPPED: "metadata stripped when packed",
}

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "PSD"),
    (b"%PDF", "PDF"),
    (b"PK\3\4", "ZIP"),
    (b"\x1f\x8b", "gzip"),
    (b"\xd0\xcf\x11\xe0", "OLE document"),
    (b"version https://git-lfs", "git LFS pointer, not the file itself"),
)


class JpegHeader(NamedTuple):
    height: int
    width: int
    flags: int


class RejectedError(Exception):
    """This sample is left out of the shards. reason: one of few; detail: the values at hand."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[RejectedError], tuple[str, str]]:
        return RejectedError, (self.reason, self.detail)  # it travels between processes


def check_header(data: Buffer, *, max_pixels: int) -> JpegHeader:
    """What the JPEG's header says, after checking markers, dimensions and the end-of-image marker.

    Nothing is decoded, so damage inside the image data passes; see check_decode. Raises RejectedError.
    """
    if data[:3] != b"\xff\xd8\xff":
        raise RejectedError(*_why_no_jpeg(data))
    try:
        height, width, flags, scan = _walk_header(data)
    except IndexError:
        raise RejectedError("cut short", "ends inside the header") from None
    check_size(height, width, max_pixels=max_pixels)
    if data[-2:] != b"\xff\xd9":
        # A thumbnail inside EXIF ends with the same marker, so only one behind the scan counts.
        if bytes(data[scan:]).rfind(b"\xff\xd9") < 0:
            raise RejectedError("cut short", "no end-of-image marker")
        flags |= TRAILING_BYTES
    return JpegHeader(height, width, flags)


def check_size(height: int, width: int, *, max_pixels: int, min_side: int = 1) -> None:
    """Before anything is decoded. Raises RejectedError."""
    if not height or not width:
        raise RejectedError("no dimensions", f"the header says {width} x {height}")
    if height * width > max_pixels:
        raise RejectedError("too many pixels", f"{width} x {height} exceeds --max-pixels {max_pixels}")
    if min(height, width) < min_side:
        raise RejectedError("too small", f"{width} x {height}, less than --min-side {min_side}")


def check_decode(data: Buffer, header: JpegHeader) -> None:
    """Decode to 1/8 of the size, every warning an error. Raises RejectedError.

    Finds the damage that a full decode finds, at 1.5 times its rate: the entropy-coded data is read whole.
    """
    _decode(data, header, min_factor=8)


def check_full_decode(data: Buffer, header: JpegHeader) -> None:
    """Decode every pixel, every warning an error. Raises RejectedError."""
    _decode(data, header, min_factor=1)


def _decode(data: Buffer, header: JpegHeader, *, min_factor: int) -> None:
    data = hide_profile(data, header)
    colorspace = "CMYK" if header.flags & CMYK else "GRAY"
    # Without a least height and width a factor is not obeyed.
    least = 1 if min_factor > 1 else 0
    try:
        simplejpeg.decode_jpeg(data, colorspace, True, True, least, least, min_factor, strict=True)
    except ValueError as error:
        if not is_limit_of_simplejpeg(error):
            raise RejectedError("does not decode", one_line(error)) from None
        _decode_by_pillow(data)


def hide_profile(data: Buffer, header: JpegHeader) -> Buffer:
    """The JPEG with no profile that a decoder sees: a broken one is a warning, but no pixel depends on it."""
    if not header.flags & ICC:
        return data
    return bytes(data).replace(b"ICC_PROFILE\0", b"icc_profile\0")


def is_limit_of_simplejpeg(error: ValueError) -> bool:
    """Does simplejpeg refuse a sound but rare image: odd subsampling, lossless RGB?"""
    return any(limit in str(error) for limit in ("subsampling level", "color conversion"))


def _decode_by_pillow(data: Buffer) -> None:
    from PIL import Image  # a sixth of a worker's start, and few images come here

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                image.load()
    except Exception as error:  # Pillow raises OSError, TypeError, ValueError and more on broken files
        raise RejectedError("does not decode", one_line(error)) from None


def _walk_header(data: Buffer) -> tuple[int, int, int, int]:
    """As _walk_markers, on a copy of the first bytes where the header ends in them.

    Single bytes are read from `bytes` in two thirds of the time that a memoryview takes.
    """
    head = bytes(data[:_HEAD_BYTES])
    with contextlib.suppress(IndexError):
        found = _walk_markers(head)
        if found[3] <= len(head):  # else the last segments were not seen whole
            return found
    return _walk_markers(data)


def _walk_markers(data: Buffer) -> tuple[int, int, int, int]:
    """(height, width, flags, where the scan begins). IndexError: the data ends first."""
    pos, flags = 2, 0
    height = width = -1
    while True:
        while data[pos] != 0xFF:  # libjpeg skips stray bytes between segments too
            pos += 1
        pos += 1
        while (marker := data[pos]) == 0xFF:
            pos += 1
        pos += 1
        if marker in _SAY_NOTHING and (length := data[pos] << 8 | data[pos + 1]) >= 2:
            pos += length
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7 or marker == 0x00:
            continue
        if marker == 0xD8:
            raise RejectedError("broken header", "a second image begins inside the header")
        if marker == 0xD9:
            raise RejectedError("cut short", "no image data between the markers")
        length = data[pos] << 8 | data[pos + 1]
        if length < 2:
            raise RejectedError("broken header", f"segment {marker:02X} has length {length}")
        if marker == 0xDA:
            if height < 0:
                raise RejectedError("broken header", "the image data begins before the dimensions")
            return height, width, flags, pos + length
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if height >= 0:
                raise RejectedError("broken header", "two frame headers")
            height = data[pos + 3] << 8 | data[pos + 4]
            width = data[pos + 5] << 8 | data[pos + 6]
            flags |= _frame_flags(marker, data[pos + 2], data[pos + 7])
        elif marker == 0xE1 and data[pos + 2 : pos + 8] == b"Exif\0\0":
            flags |= EXIF | (ORIENTED if exif_orientation(data[pos + 8 : pos + length]) > 1 else 0)
        elif marker == 0xE2 and data[pos + 2 : pos + 14] == b"ICC_PROFILE\0":
            flags |= ICC
        pos += length


def _frame_flags(marker: int, precision: int, components: int) -> int:
    if precision != 8:
        raise RejectedError("unsupported coding", f"{precision} bits per channel; decoders take 8")
    if marker in (0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF):
        raise RejectedError("unsupported coding", f"frame type {marker:02X} (hierarchical)")
    if components not in (1, 3, 4):
        raise RejectedError("unsupported coding", f"{components} colour channels")
    flags = {1: GRAY, 4: CMYK}.get(components, 0)
    if marker == 0xC1:
        flags |= EXTENDED
    if marker in (0xC2, 0xCA):
        flags |= PROGRESSIVE
    if marker in (0xC3, 0xC9, 0xCA):
        flags |= UNUSUAL_CODING
    return flags


_HEAD_BYTES = 1024
# Tables, restart intervals, JFIF, comments: only their lengths matter, and most segments are one of them.
_SAY_NOTHING = frozenset({0xDB, 0xC4, 0xDD, 0xE0, 0xFE})


def exif_orientation(tiff: Buffer) -> int:
    """The EXIF orientation 1..8 from a TIFF block; 1 when it says nothing sensible."""
    order = {b"II": "little", b"MM": "big"}.get(bytes(tiff[:2]))
    if order is None:
        return 1

    def number(start: int, size: int) -> int:
        return int.from_bytes(tiff[start : start + size], "little" if order == "little" else "big")

    start = number(4, 4)
    for entry in range(start + 2, start + 2 + 12 * min(number(start, 2), 512), 12):
        if number(entry, 2) == 0x0112:
            value = number(entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _why_no_jpeg(data: Buffer) -> tuple[str, str]:
    head = bytes(data[:64])
    if not head:
        return "empty", "0 bytes"
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return "not a JPEG", name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "not a JPEG", "WebP"
    if head[4:8] == b"ftyp":
        return "not a JPEG", "AVIF or HEIC" if head[8:12] in _HEIF_BRANDS else "ISO media"
    if head[:2] == b"\xff\xd8":
        return "cut short", "nothing follows the start-of-image marker"
    if head[:1] == b"P" and head[1:2] in b"1234567" and head[2:3].isspace():
        return "not a JPEG", "PNM"
    if not head.strip(b"\0"):
        return "not a JPEG", "zero bytes"
    if all(byte in b"\t\n\r" or byte >= 32 for byte in head):
        return "not a JPEG", "text" if head.isascii() else "unknown format"
    return "not a JPEG", "unknown format"


_HEIF_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1", b"hevc")


def one_line(error: BaseException) -> str:
    """What a decoder says, without the memory address that some of Pillow's messages hold."""
    text = re.sub(r"image file <_io\.BytesIO object at 0x[0-9a-f]+>", "it", str(error))
    return " ".join(text.split())[:200]
