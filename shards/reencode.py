"""An image written anew as baseline JPEG: shrunk, upright, in RGB or gray, without metadata.

The same bytes from the same bytes in any process; torch is loaded where an image is shrunk, and only there.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageCms

from linerate.shards.inspect_image import (
    CMYK,
    CONVERTED,
    GRAY,
    ICC,
    NOT_BASELINE,
    ORIENTED,
    RESIZED,
    TO_SRGB,
    TRANSCODED,
    TURNED,
    Buffer,
    JpegHeader,
    RejectedError,
    check_decode,
    check_size,
    hide_profile,
    is_limit_of_simplejpeg,
    may_be_scaled,
    one_line,
)
from linerate.shards.options import ImagePolicy
from linerate.shards.segments import jpeg_orientation, jpeg_profile

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB or (H, W, 1) gray
# Pillow's name for what may become a JPEG, by the name that the header check gives it.
_CONVERTIBLE = {
    "PNG": "PNG",
    "WebP": "WEBP",
    "GIF": "GIF",
    "BMP": "BMP",
    "TIFF": "TIFF",
    "PNM": "PPM",
    "AVIF or HEIC": "AVIF",
}
_MAX_JPEG_SIDE = 65_500  # libjpeg's
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """Decoded pixels, and what is still to be done to them."""

    pixels: Pixels
    size: tuple[int, int]
    """(height, width) of the whole image; the pixels may have been decoded to a half, quarter or eighth."""
    turn: int
    """EXIF orientation 1..8."""
    profile: bytes
    chroma: str
    """Subsampling for an image that keeps its size: what its source had."""
    done: int
    """Flags."""


def rewrite_jpeg(data: Buffer, header: JpegHeader, policy: ImagePolicy) -> tuple[bytes, int]:
    """(baseline JPEG, flags of what was done) of a JPEG that check_header took. Raises RejectedError.

    Damage that the header does not show is found here and rejected, whatever `policy.check` says.
    """
    loaded = _load_cmyk(data, header, policy) if header.flags & CMYK else _load_jpeg(data, header, policy)
    return _write(loaded, policy)


def rewrite_other(data: Buffer, why: RejectedError, policy: ImagePolicy) -> tuple[bytes, int]:
    """(baseline JPEG, flags) of what check_header refused with `why`: PNG, WebP, 12 bits ...

    Several frames become their first, transparency becomes white. Raises RejectedError: `why` itself for
    what is not known here.
    """
    if why.reason == "unsupported coding":
        try:
            return _write(_load_by_pillow(data, "JPEG", policy, done=TRANSCODED), policy)
        except RejectedError:
            raise why from None
    if why.detail not in _CONVERTIBLE:
        raise why
    return _write(_load_by_pillow(data, _CONVERTIBLE[why.detail], policy, done=CONVERTED), policy)


def target_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """(height, width) with this shorter side and the same shape; never larger than it was."""
    if short_side is None or min(height, width) <= short_side:
        return height, width
    scale = short_side / min(height, width)
    return round(height * scale), round(width * scale)


def _load_jpeg(data: Buffer, header: JpegHeader, policy: ImagePolicy) -> _Loaded:
    colorspace = "GRAY" if header.flags & GRAY else "RGB"
    visible = hide_profile(data, header)
    # By powers of two only: for other factors libjpeg-turbo has no fast transform.
    side = min(header.height, header.width) if may_be_scaled(header) else 0
    factor = next((f for f in (8, 4, 2) if policy.resize is not None and -(-side // f) >= policy.resize), 1)
    least = (-(-header.height // factor), -(-header.width // factor)) if factor > 1 else (0, 0)
    try:
        pixels = simplejpeg.decode_jpeg(visible, colorspace, False, False, *least, factor, strict=True)
    except ValueError as error:
        if not is_limit_of_simplejpeg(error):
            raise RejectedError("does not decode", one_line(error)) from None
        return _load_by_pillow(data, "JPEG", policy, done=_transcoded(header))
    return _Loaded(
        pixels=pixels,
        size=(header.height, header.width),
        turn=jpeg_orientation(data) if header.flags & ORIENTED else 1,
        profile=jpeg_profile(data) if policy.icc == "srgb" and header.flags & ICC else b"",
        chroma=_chroma(visible),
        done=_transcoded(header),
    )


def _load_cmyk(data: Buffer, header: JpegHeader, policy: ImagePolicy) -> _Loaded:
    check_decode(data, header)  # Pillow passes over most damage
    return _load_by_pillow(data, "JPEG", policy, done=TRANSCODED)


def _transcoded(header: JpegHeader) -> int:
    return TRANSCODED if header.flags & NOT_BASELINE else 0


def _chroma(jpeg: Buffer) -> str:
    try:
        return "444" if simplejpeg.decode_jpeg_header(jpeg, strict=False)[3] == "444" else "420"
    except ValueError:
        return "420"


def _load_by_pillow(data: Buffer, kind: str, policy: ImagePolicy, *, done: int) -> _Loaded:
    """kind: Pillow's name of the one format that may be tried."""
    try:
        with _open_by_pillow(data, kind) as image:
            check_size(image.height, image.width, max_pixels=policy.max_pixels, min_side=policy.min_side)
            image.load()
            # Only now: Pillow turns a TIFF itself while it loads it.
            turn = image.getexif().get(_EXIF_ORIENTATION, 1)
            profile = image.info.get("icc_profile") or b"" if policy.icc == "srgb" else b""
            if image.mode == "CMYK" and (transform := _to_srgb(profile, "CMYK")):
                pixels, profile, done = (
                    np.array(ImageCms.applyTransform(image, transform)),
                    b"",
                    done | TO_SRGB,
                )
            else:
                pixels = _to_pixels(image)
    except RejectedError:
        raise
    except Exception as error:  # Pillow raises OSError, TypeError, ValueError and more on broken files
        raise RejectedError("does not decode", one_line(error) or type(error).__name__) from None
    return _Loaded(
        pixels=pixels,
        size=(pixels.shape[0], pixels.shape[1]),
        turn=turn if turn in range(1, 9) else 1,
        profile=profile,
        chroma="444",
        done=done,
    )


@contextlib.contextmanager
def _open_by_pillow(data: Buffer, kind: str) -> Iterator[Image.Image]:
    """The image, its header read and nothing decoded; for its size --max-pixels holds, not Pillow's limit."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=(kind,)) as image:
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _to_pixels(image: Any) -> Pixels:
    if image.mode.startswith("I;16"):
        return (np.array(image) >> 8).astype(np.uint8)[:, :, None]
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise RejectedError("unsupported coding", f"pixels of Pillow's mode {image.mode}")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return np.array(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
    if image.mode in ("1", "L"):
        return np.array(image.convert("L"))[:, :, None]
    return np.array(image.convert("RGB"))


def _write(image: _Loaded, policy: ImagePolicy) -> tuple[bytes, int]:
    pixels, done, chroma = image.pixels, image.done, image.chroma
    size = target_size(*image.size, policy.resize)
    if size != image.size:
        done, chroma = done | RESIZED, "420"
    if size != pixels.shape[:2]:
        pixels = _shrink(pixels, size)
    if image.turn > 1:
        pixels, done = _upright(pixels, image.turn), done | TURNED
    if pixels.shape[2] == 3 and (transform := _to_srgb(image.profile, "RGB")):
        pixels, done = np.array(ImageCms.applyTransform(Image.fromarray(pixels), transform)), done | TO_SRGB
    if max(pixels.shape) > _MAX_JPEG_SIDE:
        raise RejectedError(
            "unsupported size", f"{pixels.shape[1]} x {pixels.shape[0]}; a JPEG has at most {_MAX_JPEG_SIDE}"
        )
    space, chroma = ("GRAY", "Gray") if pixels.shape[2] == 1 else ("RGB", chroma)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), policy.quality, space, chroma), done


def _shrink(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Bilinear with antialiasing, as torchvision's and Pillow's resize; 74 dB from the latter."""
    # The layout of channels_last, which is what the fast kernel wants: 0.26 instead of 0.37 ms a photo.
    image = _torch().from_numpy(pixels)[None].permute(0, 3, 1, 2)
    small = _torch().nn.functional.interpolate(image, size=size, mode="bilinear", antialias=True)
    shrunk: Pixels = small[0].permute(1, 2, 0).numpy()
    return shrunk


@functools.cache
def _torch() -> Any:
    ours = "torch" not in sys.modules
    import torch

    if ours:  # one image at a time on one core; a program that had loaded torch before keeps its threads
        torch.set_num_threads(1)
    return torch


def _upright(pixels: Pixels, turn: int) -> Pixels:
    """The pixels as EXIF orientation `turn` means them to be seen."""
    if turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


@functools.lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """Pillow's transform of this mode from the profile to sRGB; None where there is none, or it is sRGB."""
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None  # broken, or of other colours: decoders pass over it too
