"""What the header check takes and refuses, each by a file made to be so."""

import io
import struct
from collections.abc import Callable

import pytest
from PIL import Image

from linerate.shards.inspect_image import (
    CMYK,
    EXIF,
    GRAY,
    ICC,
    ORIENTED,
    PROGRESSIVE,
    TRAILING_BYTES,
    UNUSUAL_CODING,
    JpegHeader,
    RejectedError,
    check_decode,
    check_full_decode,
    check_header,
)

MakeJpeg = Callable[..., bytes]
LIMIT = 10_000


def header(data: bytes) -> JpegHeader:
    return check_header(memoryview(data), max_pixels=LIMIT)


def why(data: bytes) -> str:
    with pytest.raises(RejectedError) as caught:
        header(data)
    return str(caught.value)


def sof(jpeg: bytes) -> int:
    """Where the frame header's marker lies."""
    return next(i for i in range(len(jpeg)) if jpeg[i] == 0xFF and jpeg[i + 1] in (0xC0, 0xC2))


def patched(jpeg: bytes, offset: int, value: bytes) -> bytes:
    start = sof(jpeg) + offset
    return jpeg[:start] + value + jpeg[start + len(value) :]


def test_dimensions_and_properties_are_read(make_jpeg: MakeJpeg) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert header(make_jpeg(0, 20, 30)) == (20, 30, 0)
    assert header(make_jpeg(0, 20, 30, progressive=True)).flags == PROGRESSIVE
    assert header(make_jpeg(0, 20, 30, "L")).flags == GRAY
    assert header(make_jpeg(0, 20, 30, "CMYK")).flags == CMYK
    assert header(make_jpeg(0, icc_profile=b"profile")).flags == ICC
    assert header(make_jpeg(0, exif=exif)).flags == EXIF | ORIENTED
    assert header(make_jpeg(0) + b"\0\0").flags == TRAILING_BYTES
    arithmetic = make_jpeg(0)
    arithmetic = patched(arithmetic, 1, b"\xc9")
    assert header(arithmetic).flags == UNUSUAL_CODING


@pytest.mark.parametrize(("order", "flags"), [("<", EXIF | ORIENTED), (">", EXIF | ORIENTED)])
def test_orientation_is_read_in_both_byte_orders(make_jpeg: MakeJpeg, order: str, flags: int) -> None:
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IHHHIHH", 8, 1, 0x0112, 3, 1, 3, 0)
    segment = b"Exif\0\0" + tiff
    jpeg = make_jpeg(0)
    jpeg = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]
    assert header(jpeg).flags == flags


@pytest.mark.parametrize("tiff", [b"", b"II", b"XX*\0" + bytes(30), b"II*\0\xff\xff\xff\xff" + bytes(10)])
def test_nonsense_exif_is_no_orientation(make_jpeg: MakeJpeg, tiff: bytes) -> None:
    segment = b"Exif\0\0" + tiff
    jpeg = make_jpeg(0)
    jpeg = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]
    assert header(jpeg).flags == EXIF


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty: 0 bytes"),
        (b"\xff\xd8", "cut short: nothing follows"),
        (b"\xff\xd8\xff", "cut short: ends inside the header"),
        (b"\xff\xd8\xff\xd9", "cut short: no image data"),
        (b"\xff\xd8\xff\xd8\xff", "broken header: a second image"),
        (b"\xff\xd8\xff\xe0\0\1", "broken header: segment E0 has length 1"),
        (b"\xff\xd8\xff\xda\0\2", "broken header: the image data begins before the dimensions"),
        (b"hello there\n", "not a JPEG: text"),
        (b"\0" * 100, "not a JPEG: zero bytes"),
        (b"\x01\x02\x03\x04", "not a JPEG: unknown format"),
        (b"\x80abc", "not a JPEG: unknown format"),
        (b"P6 2 2 255 ", "not a JPEG: PNM"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "not a JPEG: WebP"),
        (b"\0\0\0\x20ftypavif", "not a JPEG: AVIF or HEIC"),
        (b"\0\0\0\x20ftypisom", "not a JPEG: ISO media"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a JPEG: git LFS pointer"),
    ],
)
def test_what_is_no_jpeg_is_named(data: bytes, expected: str) -> None:
    assert why(data).startswith(expected)


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF", "ICO", "JPEG2000"])
def test_other_formats_are_named_whatever_the_file_is_called(format: str) -> None:
    out = io.BytesIO()
    try:
        Image.new("RGB", (16, 16)).save(out, format)
    except OSError:
        pytest.skip(f"this Pillow writes no {format}, so its signature stays untested")
    assert why(out.getvalue()) == f"not a JPEG: {format.replace('JPEG2000', 'JPEG 2000')}"


def test_impossible_frames_are_refused(make_jpeg: MakeJpeg) -> None:
    jpeg = make_jpeg(0, 20, 30)
    assert why(patched(jpeg, 4, b"\x0c")) == "unsupported coding: 12 bits per channel; decoders take 8"
    assert why(patched(jpeg, 1, b"\xc5")) == "unsupported coding: frame type C5 (hierarchical)"
    assert why(patched(jpeg, 9, b"\x02")) == "unsupported coding: 2 colour channels"
    assert why(patched(jpeg, 5, b"\0\0")) == "no dimensions: the header says 30 x 0"
    assert why(patched(jpeg, 5, b"\xff\xff")) == "too many pixels: 30 x 65535 exceeds --max-pixels 10000"
    frame = jpeg[sof(jpeg) : sof(jpeg) + 19]
    assert why(jpeg[: sof(jpeg)] + frame + jpeg[sof(jpeg) :]) == "broken header: two frame headers"


def test_a_thumbnail_does_not_pass_for_the_end_of_a_cut_image(make_jpeg: MakeJpeg) -> None:
    segment = b"Exif\0\0" + make_jpeg(1, 8, 8)
    jpeg = make_jpeg(0)
    jpeg = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]
    assert header(jpeg)[:2] == (20, 30)
    assert why(jpeg[:-2]) == "cut short: no end-of-image marker"


@pytest.mark.parametrize("check", [check_decode, check_full_decode])
def test_damage_in_the_image_data_is_found_by_decoding(
    make_jpeg: MakeJpeg, check: Callable[[bytes, JpegHeader], None]
) -> None:
    for mode in ("RGB", "L", "CMYK"):
        jpeg = make_jpeg(0, 90, 90, mode)
        check(jpeg, header(jpeg))
        damaged = jpeg[: len(jpeg) // 2] + b"\xff\xd9"
        assert header(damaged)
        with pytest.raises(RejectedError, match="does not decode: "):
            check(damaged, header(damaged))


def test_a_broken_profile_does_not_condemn_sound_pixels(make_jpeg: MakeJpeg) -> None:
    jpeg = make_jpeg(0, icc_profile=b"profile")
    at = jpeg.index(b"ICC_PROFILE\0") + 12
    broken = jpeg[:at] + b"\x07\x02" + jpeg[at + 2 :]
    check_decode(broken, header(broken))


def test_odd_subsampling_is_decoded_by_the_second_decoder(make_jpeg: MakeJpeg) -> None:
    jpeg = make_jpeg(0, 32, 32, subsampling=0)
    odd = patched(jpeg, 11, b"\x24")  # 2x4, which simplejpeg has no name for
    check_decode(odd, header(odd))
    with pytest.raises(RejectedError, match=r"(?i)does not decode: .*truncated"):
        check_decode(odd[: len(odd) // 2], header(odd))


@pytest.mark.parametrize("padding", [900, 1000, 1010, 1020, 1024, 1030, 5000, 60_000])
def test_a_header_is_read_to_its_end_however_long_it_is(
    make_jpeg: Callable[..., bytes], padding: int
) -> None:
    comment = b"\xff\xfe" + (padding + 2).to_bytes(2, "big") + bytes(padding)
    orientation = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    exif = b"\xff\xe1" + (len(orientation) + 8).to_bytes(2, "big") + b"Exif\0\0" + orientation
    jpeg = make_jpeg(0, 20, 30)
    header = check_header(jpeg[:2] + comment + exif + jpeg[2:], max_pixels=10**6)
    assert header == (20, 30, EXIF | ORIENTED)
