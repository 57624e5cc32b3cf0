"""A thumbnail of whatever a decoder makes of broken or strange bytes, drawn in a process that may die."""

from __future__ import annotations

import functools
import io
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import simplejpeg
from PIL import Image, ImageFile

from linerate.shards.careful import CarefulProcess
from linerate.shards.inspect_image import Buffer, RejectedError, one_line

# None that starts another program (EPS does), and none that a photo never is.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "ICO", "JPEG2000", "PSD", "TGA")
_MAX_PIXELS = 100_000_000
# Such an image in RGBA, twice, and more; of addresses, beside what interpreter and libraries have taken.
_MAX_BYTES = 2 << 30
_LIMIT_S = 20.0


class Drawn(NamedTuple):
    """What could be made visible."""

    jpeg: bytes
    facts: str
    """Format and size, as its header says."""


def open_artist(*, side: int, quality: int) -> CarefulProcess[Drawn]:
    """A function of bytes that raises RejectedError for what cannot be shown, even if it kills a decoder."""
    return CarefulProcess(functools.partial(_make_artist, side, quality), limit_s=_LIMIT_S)


def draw(data: Buffer, *, side: int, quality: int) -> Drawn:
    """The image as a JPEG of at most this many pixels a side, grey where its data end before it does.

    Raises RejectedError with what the decoders said.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _drawn(*_open(data, side), side, quality)
    except RejectedError:
        raise
    except Exception as error:  # Pillow raises OSError, TypeError, ValueError and more on broken files
        why = one_line(error) or type(error).__name__
    try:
        return _drawn(*_open_by_simplejpeg(data, side), side, quality)
    except Exception:  # ValueError, and KeyError where it does not know the subsampling
        raise RejectedError("not drawn", why) from None


def _drawn(image: Any, facts: str, side: int, quality: int) -> Drawn:
    image.thumbnail((side, side))
    if (factor := side // max(image.size)) > 1:
        image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Drawn(out.getvalue(), facts)


def _make_artist(side: int, quality: int) -> Callable[[Buffer], Drawn]:
    """Only in a process of its own: the limits stay."""
    _limit(resource.RLIMIT_AS, _taken_bytes() + _MAX_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    return functools.partial(draw, side=side, quality=quality)


def _limit(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _taken_bytes() -> int:
    """Addresses of this process: on many cores libraries reserve gigabytes; 0 where nothing tells."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def _open(data: Buffer, side: int) -> tuple[Any, str]:
    image: Any = Image.open(io.BytesIO(data), formats=_FORMATS)
    facts = f"{image.format}, {image.width} x {image.height}"
    if image.width * image.height > _MAX_PIXELS:
        raise RejectedError("not drawn", f"{facts} is more than is decoded for a page")
    image.draft("RGB", (2 * side, 2 * side))
    image.load()
    return _on_white(image), facts


def _on_white(image: Any) -> Any:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        low, high = image.convert("F").getextrema()
        scale = 255 / (high - low) if high > low else 1.0
        return image.convert("F").point(lambda level: level * scale - low * scale).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    return image.convert("RGB")


def _open_by_simplejpeg(data: Buffer, side: int) -> tuple[Any, str]:
    """What libjpeg-turbo makes of a JPEG that Pillow gave up on. Raises ValueError."""
    height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
    if height * width > _MAX_PIXELS:
        raise ValueError(f"{width} x {height}")
    pixels = simplejpeg.decode_jpeg(data, "RGB", True, True, 2 * side, 2 * side, 8, strict=False)
    return Image.fromarray(pixels), f"JPEG, {width} x {height}"
