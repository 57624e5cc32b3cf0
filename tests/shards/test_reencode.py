"""What is written anew: its size, its way up, its colours, and that the same bytes come out again."""

import io
import subprocess
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageCms, ImageOps

from linerate.shards import reencode
from linerate.shards.inspect_image import (
    CMYK,
    CONVERTED,
    GRAY,
    PROGRESSIVE,
    RESIZED,
    TO_SRGB,
    TRANSCODED,
    TURNED,
    RejectedError,
    check_header,
)
from linerate.shards.options import ImagePolicy
from linerate.shards.reencode import rewrite_jpeg, rewrite_other, target_size

MakeJpeg = Callable[..., bytes]
BASELINE = ImagePolicy(baseline=True, quality=95)


def smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Pixels that JPEG keeps to a grey level or two."""
    coarse = np.random.default_rng(height * width).integers(60, 200, (4, 5, channels), dtype=np.uint8)
    image = Image.fromarray(coarse.squeeze()).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image)


def saved(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def decoded(jpeg: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(jpeg, "RGB")


def rewrite(data: bytes, policy: ImagePolicy) -> tuple[bytes, int]:
    try:
        header = check_header(data, max_pixels=policy.max_pixels)
    except RejectedError as why:
        return rewrite_other(data, why, policy)
    return rewrite_jpeg(data, header, policy)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference, grey levels."""
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 50), (32, 16)),
        ((50, 101), (16, 32)),
        ((16, 900), (16, 900)),
        ((9, 9), (9, 9)),
        ((33, 17), (31, 16)),
    ],
)
def test_the_shorter_side_is_met_and_nothing_grows(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert target_size(*size, 16) == expected
    assert target_size(*size, None) == size


@pytest.mark.parametrize("size", [(90, 120), (128, 200), (257, 301), (700, 530)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_shrunk_image_is_pillows_within_two_levels(size: tuple[int, int], channels: int) -> None:
    pixels = smooth(*size, channels)
    jpeg, done = rewrite(saved(pixels, "JPEG", quality=95), ImagePolicy(resize=64, quality=95))
    height, width = target_size(*size, 64)
    expected = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR).convert("RGB")
    header = check_header(jpeg, max_pixels=10**6)
    assert done == RESIZED
    assert (header.height, header.width, header.flags) == (height, width, GRAY if channels == 1 else 0)
    assert distance(decoded(jpeg), np.array(expected)) < 2


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("resize", [None, 32])
def test_what_is_written_anew_is_upright(turn: int, resize: int | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    image = Image.fromarray(smooth(48, 64))
    source = saved(image, "JPEG", exif=exif, quality=95)
    jpeg, done = rewrite(source, ImagePolicy(baseline=True, resize=resize, quality=95))
    with Image.open(io.BytesIO(source)) as opened:
        expected = ImageOps.exif_transpose(opened)
    if resize:
        expected = ImageOps.scale(expected, 32 / 48, Image.Resampling.BILINEAR)
    assert distance(decoded(jpeg), np.array(expected)) < 2
    assert bool(done & TURNED) == (turn > 1)
    assert b"Exif" not in jpeg


def test_progressive_and_cmyk_become_baseline_rgb(make_jpeg: MakeJpeg) -> None:
    progressive = saved(smooth(40, 50), "JPEG", progressive=True, quality=95, subsampling=0)
    for source, flag in ((progressive, PROGRESSIVE), (make_jpeg(0, 40, 50, "CMYK"), CMYK)):
        assert check_header(source, max_pixels=10**6).flags == flag
        jpeg, done = rewrite(source, BASELINE)
        assert done == TRANSCODED
        assert check_header(jpeg, max_pixels=10**6) == (40, 50, 0)
        with Image.open(io.BytesIO(source)) as image:
            assert distance(decoded(jpeg), np.array(image.convert("RGB"))) < 2
    assert simplejpeg.decode_jpeg_header(rewrite(progressive, BASELINE)[0])[3] == "444"


def test_an_image_keeps_the_subsampling_of_its_source_and_a_shrunk_one_is_420() -> None:
    def subsampling(policy: ImagePolicy, source: int) -> str:
        jpeg, _ = rewrite(saved(smooth(64, 64), "JPEG", subsampling=source, progressive=True), policy)
        return str(simplejpeg.decode_jpeg_header(jpeg)[3])

    assert [subsampling(BASELINE, source) for source in (0, 1, 2)] == ["444", "420", "420"]
    assert subsampling(ImagePolicy(resize=32), 0) == "420"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_other_formats_become_jpegs_of_the_same_pixels(kind: str) -> None:
    pixels = smooth(40, 50)
    source = saved(pixels, kind, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(source)) as image:
        expected = np.array(image.convert("RGB"))
    jpeg, done = rewrite(source, BASELINE)
    assert done == CONVERTED
    assert distance(decoded(jpeg), expected) < 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    source = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert distance(decoded(rewrite(source, BASELINE)[0]), np.array(frames[0])) < 3


def test_what_is_transparent_becomes_white() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    for image in (clear, clear.convert("LA"), clear.convert("P")):
        jpeg, _ = rewrite(saved(image, "PNG", **({"transparency": 0} if image.mode == "P" else {})), BASELINE)
        assert decoded(jpeg).min() == 255, image.mode


def test_sixteen_bits_become_eight_and_one_bit_becomes_gray() -> None:
    deep = (np.linspace(0, 65535, 64 * 64).reshape(64, 64)).astype(np.uint16)
    for data, expected in (
        (saved(deep, "PNG"), deep >> 8),
        (saved(deep, "TIFF"), deep >> 8),
        (saved(Image.fromarray(deep > 30000), "PNG"), (deep > 30000) * 255),
    ):
        jpeg, _ = rewrite(data, BASELINE)
        assert check_header(jpeg, max_pixels=10**6).flags == GRAY
        assert distance(simplejpeg.decode_jpeg(jpeg, "GRAY")[..., 0], expected) < 2


def test_orientation_is_obeyed_once_in_png_and_tiff() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = smooth(40, 50)
    expected = np.rot90(pixels, -1)
    png, done = rewrite(saved(pixels, "PNG", exif=exif), BASELINE)
    assert done == CONVERTED | TURNED
    assert distance(decoded(png), expected) < 3
    tiff, _ = rewrite(saved(pixels, "TIFF", tiffinfo={0x0112: 6}), BASELINE)
    assert distance(decoded(tiff), expected) < 3


def wide_gamut() -> bytes:
    """A profile in which red and green have changed places, so that its effect is plain to see."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(srgb[at : at + 4]): at for at in range(132, 132 + 12 * srgb[131], 12)}
    red, green = (bytes(srgb[tags[name] + 4 : tags[name] + 12]) for name in (b"rXYZ", b"gXYZ"))
    srgb[tags[b"rXYZ"] + 4 : tags[b"rXYZ"] + 12] = green
    srgb[tags[b"gXYZ"] + 4 : tags[b"gXYZ"] + 12] = red
    return (
        bytes(srgb).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"sRGB", b"swap")
    )


def test_a_profile_is_dropped_or_its_colours_become_srgb() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[..., 0] = 250  # red, which the profile calls green
    for kind in ("JPEG", "PNG"):
        source = saved(pixels, kind, icc_profile=wide_gamut(), quality=95)
        policy = ImagePolicy(baseline=True, resize=16)
        dropped, done = rewrite(source, policy)
        assert not done & TO_SRGB
        assert distance(decoded(dropped)[:16], pixels[:16, :16]) < 4
        converted, done = rewrite(source, ImagePolicy(baseline=True, resize=16, icc="srgb"))
        assert done & TO_SRGB
        assert distance(decoded(converted)[..., [1, 0, 2]], pixels[:16, :16]) < 12
        assert b"ICC_PROFILE" not in dropped + converted


@pytest.mark.parametrize(
    "profile", [b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_a_broken_profile_and_srgb_itself_change_nothing(profile: bytes) -> None:
    source = saved(smooth(40, 40), "JPEG", icc_profile=profile)
    _, done = rewrite(source, ImagePolicy(resize=16, icc="srgb"))
    assert done == RESIZED


def test_the_colours_of_a_cmyk_image_with_a_profile_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    source = saved(image, "JPEG", icc_profile=b"of some press")
    asked = []

    def transform(profile: bytes, mode: str) -> object:
        asked.append((profile, mode))
        return None

    monkeypatch.setattr(reencode, "_to_srgb", transform)
    _, done = rewrite(source, ImagePolicy(baseline=True, icc="srgb"))
    assert asked == [(b"of some press", "CMYK"), (b"of some press", "RGB")]
    assert done == TRANSCODED
    monkeypatch.setattr(reencode, "_to_srgb", lambda profile, mode: "T" if mode == "CMYK" else None)
    monkeypatch.setattr(
        reencode.ImageCms, "applyTransform", lambda image, transform: Image.new("RGB", (9, 9))
    )
    assert rewrite(source, ImagePolicy(baseline=True, icc="srgb"))[1] == TRANSCODED | TO_SRGB


def refused(data: bytes, policy: ImagePolicy = BASELINE) -> str:
    with pytest.raises(RejectedError) as caught:
        rewrite(data, policy)
    return str(caught.value)


def test_damage_that_the_header_hides_is_found_when_writing_anew(make_jpeg: MakeJpeg) -> None:
    for mode in ("RGB", "L", "CMYK"):
        jpeg = make_jpeg(0, 90, 90, mode)
        assert "does not decode: " in refused(jpeg[: len(jpeg) // 2] + b"\xff\xd9", ImagePolicy(resize=16))
    png = saved(smooth(90, 90), "PNG")
    assert refused(png[: len(png) // 2]) == "does not decode: image file is truncated"
    assert refused(b"\x89PNG\r\n\x1a\n") == "does not decode: cannot identify it"


def test_what_cannot_become_a_jpeg_keeps_the_reason_of_the_header(make_jpeg: MakeJpeg) -> None:
    assert refused(b"\0\0\1\0 an icon") == "not a JPEG: ICO"
    deep = bytearray(make_jpeg(0))
    deep[deep.index(b"\xff\xc0") + 4] = 12
    assert refused(bytes(deep)) == "unsupported coding: 12 bits per channel; decoders take 8"
    assert refused(saved(Image.new("F", (4, 4)), "TIFF")) == "unsupported coding: pixels of Pillow's mode F"
    long = saved(Image.new("L", (70_000, 2)), "PNG")
    assert refused(long) == "unsupported size: 70000 x 2; a JPEG has at most 65500"


def test_a_bomb_is_stopped_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    small = saved(Image.new("L", (9, 3)), "PNG")
    png = bytearray(saved(Image.new("L", (1, 1)), "PNG"))
    png[16:24] = (2_000_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it was decoded"))
    assert refused(bytes(png)) == "too many pixels: 2000000 x 2000000 exceeds --max-pixels 100000000"
    assert refused(small, ImagePolicy(baseline=True, min_side=4)).startswith("too small")
    assert limit == Image.MAX_IMAGE_PIXELS


def test_odd_subsampling_takes_the_second_decoder(make_jpeg: MakeJpeg) -> None:
    odd = bytearray(make_jpeg(0, 32, 32, subsampling=0))
    odd[odd.index(b"\xff\xc0") + 11] = 0x24  # 2x4, which simplejpeg has no name for
    jpeg, done = rewrite(bytes(odd), ImagePolicy(resize=16))
    assert (check_header(jpeg, max_pixels=10**6)[:2], done) == ((16, 16), RESIZED)


def test_the_same_bytes_come_out_of_any_number_of_threads_and_of_a_fresh_process() -> None:
    source = saved(smooth(400, 500), "JPEG")
    policy = ImagePolicy(resize=128)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        many = rewrite(source, policy)
    finally:
        torch.set_num_threads(threads)
    assert rewrite(source, policy) == many
    probe = (
        "import sys; from linerate.shards.image_policy import make_judge;"
        "from linerate.shards.options import ImagePolicy; before = 'torch' in sys.modules;"
        "taken = make_judge(ImagePolicy(resize=128))(sys.stdin.buffer.read()); import torch;"
        "assert not before and torch.get_num_threads() == 1; sys.stdout.buffer.write(taken.jpeg)"
    )
    done = subprocess.run([sys.executable, "-c", probe], input=source, capture_output=True, check=True)
    assert done.stdout == many[0]
