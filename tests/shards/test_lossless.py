"""Lossless JPEGs, which libjpeg-turbo decodes whole into an array that was made for a fraction of them."""

import struct
from typing import Any

import numpy as np
import pytest
import simplejpeg

from linerate.shards import tolerant
from linerate.shards.image_policy import make_judge
from linerate.shards.inspect_image import RESIZED, TRANSCODED, UNUSUAL_CODING
from linerate.shards.options import ImagePolicy

UNTOUCHED = 77


def lossless(height: int, width: int, channels: bytes) -> bytes:
    """All levels 128: every difference to the pixel before is nothing, which one bit says."""
    num = len(channels)
    frame = struct.pack(">HHBHHB", 0xFFC3, 8 + 3 * num, 8, height, width, num)
    frame += b"".join(bytes([channel, 0x11, 0]) for channel in channels)
    table = struct.pack(">HHBB16x", 0xFFC4, 20, 0, 1)
    scan = struct.pack(">HHB", 0xFFDA, 6 + 2 * num, num) + b"".join(bytes([c, 0]) for c in channels)
    return b"\xff\xd8" + frame + table + scan + b"\1\0\0" + bytes(num * height * width // 8) + b"\xff\xd9"


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """simplejpeg decodes into an array that is far too long, and nothing behind the image may be written."""
    decode = simplejpeg.decode_jpeg

    def decode_into(*args: Any, **named: Any) -> Any:
        buffer = np.full(1 << 20, UNTOUCHED, np.uint8)
        pixels = decode(*args, **named, buffer=buffer)
        assert (buffer[pixels.size :] == UNTOUCHED).all()
        return pixels.copy()

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_into)


@pytest.mark.parametrize(
    ("policy", "size", "done"),
    [
        (ImagePolicy(check="decode"), (64, 96), UNUSUAL_CODING),
        (ImagePolicy(resize=16), (16, 24), RESIZED | TRANSCODED),
        (ImagePolicy(baseline=True), (64, 96), TRANSCODED),
    ],
)
def test_no_policy_writes_over_the_end(policy: ImagePolicy, size: tuple[int, int], done: int) -> None:
    header, jpeg = make_judge(policy)(lossless(64, 96, b"Y"))
    assert header[:2] == size
    assert header.flags & (UNUSUAL_CODING | RESIZED | TRANSCODED) == done
    if jpeg is not None:
        assert set(np.unique(simplejpeg.decode_jpeg(jpeg, "GRAY"))) == {128}


def test_a_page_of_rejects_does_not_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(*args: object) -> None:
        raise OSError("Pillow gave up")

    monkeypatch.setattr(tolerant, "_open", give_up)
    assert tolerant.draw(lossless(64, 96, b"RGB"), side=4, quality=90).facts == "JPEG, 96 x 64"
