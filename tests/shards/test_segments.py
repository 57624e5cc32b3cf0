"""What strip_metadata takes out of a JPEG, what it leaves, and that no pixel notices."""

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from linerate.shards.inspect_image import ORIENTED, TRAILING_BYTES, check_header
from linerate.shards.segments import jpeg_orientation, jpeg_profile, strip_metadata

MakeJpeg = Callable[..., bytes]


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def behind_soi(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def pixels(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.array(image)


def exif(turn: int, **more: str) -> bytes:
    block = Image.Exif()
    block[0x0112] = turn
    block[0x010F] = "the camera's maker"
    return block.tobytes()


SECRETS = [
    segment(0xE1, exif(1)),
    segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x>secret</x>"),
    segment(0xED, b"Photoshop 3.0\0secret"),
    segment(0xFE, b"secret"),
    segment(0xE0, b"JFXX\0\x10secret thumbnail"),
    segment(0xE2, b"MPF\0secret"),
    segment(0xEB, b"secret of a vendor"),
]


@pytest.mark.parametrize("progressive", [False, True])
def test_all_metadata_goes_and_the_pixels_stay(make_jpeg: MakeJpeg, progressive: bool) -> None:
    jpeg = make_jpeg(0, 40, 50, progressive=progressive)
    told = behind_soi(jpeg, *SECRETS) + b"secret behind the end"
    stripped = strip_metadata(told)
    assert stripped == jpeg
    assert strip_metadata(memoryview(stripped)) == stripped


def test_a_comment_between_the_scans_of_a_progressive_image_is_emptied(make_jpeg: MakeJpeg) -> None:
    jpeg = make_jpeg(0, 40, 50, progressive=True)
    second_scan = jpeg.index(b"\xff\xda", jpeg.index(b"\xff\xda") + 2)
    table = jpeg.rindex(b"\xff\xc4", 0, second_scan)
    told = jpeg[:table] + segment(0xFE, b"secret") + jpeg[table:]
    assert b"secret" not in strip_metadata(told)
    assert (pixels(strip_metadata(told)) == pixels(jpeg)).all()


def test_profile_colour_transform_and_tables_stay(make_jpeg: MakeJpeg) -> None:
    jpeg = make_jpeg(0, 40, 50, "CMYK", icc_profile=b"a profile", restart_marker_rows=1)
    assert b"Adobe" in jpeg
    assert strip_metadata(behind_soi(jpeg, *SECRETS)) == jpeg
    assert jpeg_profile(strip_metadata(jpeg)) == b"a profile"


def test_of_exif_the_orientation_alone_stays_and_every_decoder_sees_it(make_jpeg: MakeJpeg) -> None:
    jpeg = make_jpeg(0, 40, 50, exif=exif(6))
    stripped = strip_metadata(jpeg)
    assert b"maker" in jpeg
    assert b"maker" not in stripped
    assert jpeg_orientation(stripped) == 6
    assert check_header(stripped, max_pixels=10**6).flags & ORIENTED
    with Image.open(io.BytesIO(stripped)) as image:
        assert dict(image.getexif()) == {0x0112: 6}
        assert stripped.index(b"JFIF") < stripped.index(b"Exif")


def test_a_thumbnail_in_jfif_goes_too(make_jpeg: MakeJpeg) -> None:
    jpeg = make_jpeg(0)
    start = jpeg.index(b"\xff\xe0")
    jfif = b"JFIF\0\1\1\0\0\1\0\1\2\2" + b"secret thumb"
    told = jpeg[:start] + segment(0xE0, jfif) + jpeg[start + 18 :]
    assert strip_metadata(told) == jpeg


def test_a_scan_that_ends_without_a_marker_gets_an_end(make_jpeg: MakeJpeg) -> None:
    jpeg = make_jpeg(0)
    assert strip_metadata(jpeg[:-2]) == jpeg
    # A marker made by damage, whose segment reaches beyond the file: decoders take it for the end.
    scan = jpeg.index(b"\xff\xda") + 20
    damaged = jpeg[:scan] + b"\xff\xdb\xff\xff" + jpeg[scan:]
    assert strip_metadata(damaged) == jpeg[:scan] + b"\xff\xd9"


def test_bytes_between_segments_and_lone_markers_go(make_jpeg: MakeJpeg) -> None:
    jpeg = make_jpeg(0)
    told = behind_soi(jpeg, b"\xff\xd3", b"\0secret", b"\xff\xff\xff\x01", b"\xff\0")
    assert check_header(told + b"x", max_pixels=10**6).flags == TRAILING_BYTES
    assert strip_metadata(told) == jpeg


def test_what_is_not_there_is_not_found(make_jpeg: MakeJpeg) -> None:
    assert jpeg_orientation(make_jpeg(0)) == 1
    assert jpeg_profile(make_jpeg(0)) == b""
    assert jpeg_orientation(make_jpeg(0, exif=exif(1))) == 1


def test_a_profile_in_chunks_is_put_together_in_their_order(make_jpeg: MakeJpeg) -> None:
    chunks = [segment(0xE2, b"ICC_PROFILE\0" + bytes([n, 2]) + text) for n, text in ((2, b"cd"), (1, b"ab"))]
    assert jpeg_profile(behind_soi(make_jpeg(0), *chunks)) == b"abcd"
