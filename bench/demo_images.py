"""Labelled JPEGs drawn by the project itself, so that the whole way can be tried without any data.

What makes a class: the outline of the one large figure together with its texture (`CLASSES`), for example a
disc with stripes or a crescent with a grid. Nothing else: two images of a class share neither colour nor
place nor background.

What is nuisance: the figure's position, scale (radius 24 to 40 % of the side), rotation (sigma 23 degrees),
and phase and period of its texture; the two colours of the texture; the background's colours and gradient; up
to two small plain clutter figures, whose outlines are those of other classes; noise.

The draws of MoCo (crop, flip, colour jitter) remove a part of colour, position and scale. They touch neither
background gradient, clutter, rotation nor texture phase, and no draw makes one class into another or holds
fixed just what the class is: an encoder that were only invariant to the draws could still keep every
nuisance. That outline and texture come out is learned.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linerate.pipeline.cores import usable_cores

Floats = Any  # float32 arrays; numpy types what its functions return as float64 or not at all
Field = Callable[[Floats, Floats], Floats]

SUPERSAMPLE = 2  # pixels are drawn at twice the side and averaged: edges without stairs
SIZE = 64
QUALITY = 92


def _polar(u: Floats, v: Floats) -> tuple[Floats, Floats]:
    return np.hypot(u, v), np.arctan2(v, u)


def _triangle(u: Floats, v: Floats) -> Floats:
    radius, angle = _polar(u, v)
    sector = np.mod(angle, 2 * math.pi / 3) - math.pi / 3
    return np.float32(1.15 * math.cos(math.pi / 3)) / np.cos(sector) - radius


def _petals(count: int, mean: float, swing: float) -> Field:
    def outline(u: Floats, v: Floats) -> Floats:
        radius, angle = _polar(u, v)
        return np.float32(mean) + np.float32(swing) * np.cos(count * angle) - radius

    return outline


def _cross(u: Floats, v: Floats) -> Floats:
    u, v = abs(u), abs(v)
    return np.maximum(np.minimum(0.33 - u, 1 - v), np.minimum(0.33 - v, 1 - u))


def _crescent(u: Floats, v: Floats) -> Floats:
    return np.minimum(1 - np.hypot(u, v), np.hypot(u - np.float32(0.55), v) - np.float32(0.75))


def _hourglass(u: Floats, v: Floats) -> Floats:
    return np.minimum(0.95 - abs(v), np.float32(0.9) * abs(v) + np.float32(0.08) - abs(u))


# Outlines: positive inside, in units of the figure's radius.
OUTLINES: dict[str, Field] = {
    "disc": lambda u, v: 1 - np.hypot(u, v),
    "square": lambda u, v: 0.85 - np.maximum(abs(u), abs(v)),
    "triangle": _triangle,
    "star": _petals(5, 0.72, 0.40),
    "cross": _cross,
    "ring": lambda u, v: 0.22 - abs(np.hypot(u, v) - np.float32(0.78)),
    "crescent": _crescent,
    "bar": lambda u, v: np.minimum(0.35 - abs(u), 1.05 - abs(v)),
    "hourglass": _hourglass,
    "flower": _petals(8, 0.75, 0.25),
}


def _bricks(u: Floats, v: Floats) -> Floats:
    row = np.floor(v / 0.6)
    mortar = np.sin(np.float32(math.pi / 0.6) * v) ** 2 * 4 - np.float32(0.5)
    return np.minimum(np.sin(np.float32(0.6 * 2 * math.pi) * u + np.float32(math.pi) * row) + 0.9, mortar)


_TURN = np.float32(2 * math.pi)
# Textures: positive where the first colour is, one period a unit.
TEXTURES: dict[str, Field] = {
    "plain": lambda u, v: np.ones_like(u),
    "stripes": lambda u, v: np.sin(_TURN * u),
    "checks": lambda u, v: np.sin(_TURN * u) * np.sin(_TURN * v),
    "dots": lambda u, v: np.cos(_TURN * u) + np.cos(_TURN * v) - np.float32(0.7),
    "rings": lambda u, v: np.sin(_TURN * np.hypot(u, v)),
    "rays": lambda u, v: np.sin(6 * np.arctan2(v, u)),
    "bricks": _bricks,
    "waves": lambda u, v: np.sin(_TURN * (v + np.float32(0.35) * np.sin(np.float32(0.7) * _TURN * u))),
    "grid": lambda u, v: 0.6 - np.maximum(np.cos(_TURN * u), np.cos(_TURN * v)),
}
_CENTRED = ("rings", "rays")  # these have a middle, which stays in the figure's

CLASSES: dict[str, tuple[str, str]] = {
    f"{outline}-{texture}": (outline, texture)
    for outline, texture in (
        ("disc", "stripes"),
        ("square", "dots"),
        ("triangle", "checks"),
        ("star", "plain"),
        ("cross", "rings"),
        ("ring", "rays"),
        ("crescent", "grid"),
        ("bar", "waves"),
        ("hourglass", "bricks"),
        ("flower", "dots"),
    )
}


def draw_image(class_name: str, *, rng: np.random.Generator, size: int = SIZE) -> NDArray[np.uint8]:
    """One image of the class, (size, size, 3) uint8 RGB; all nuisance comes from rng."""
    outline, texture = CLASSES[class_name]
    side = size * SUPERSAMPLE
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    image = _background(rng, side)
    for _ in range(rng.integers(0, 3)):
        _paint_clutter(image, x, y, rng)
    radius = rng.uniform(0.24, 0.40)
    centre = rng.uniform(0.8 * radius, 1 - 0.8 * radius, 2)
    u, v = _frame(x, y, centre=centre, radius=radius, angle=rng.normal(0, 0.4))
    phase = np.zeros(2) if texture in _CENTRED else rng.random(2)
    period = rng.uniform(0.4, 0.6)
    weave = TEXTURES[texture](*(((w + p) / np.float32(period)) for w, p in zip((u, v), phase, strict=True)))
    first, second = _figure_colours(rng)
    colours = second + (first - second) * np.clip(weave * 4 + np.float32(0.5), 0, 1)[..., None]
    _blend(image, colours, OUTLINES[outline](u, v) * np.float32(radius * side))
    small = image.reshape(size, SUPERSAMPLE, size, SUPERSAMPLE, 3).mean((1, 3))
    small += rng.normal(0, 0.02, small.shape)
    pixels: NDArray[np.uint8] = (np.clip(small, 0, 1) * 255).astype(np.uint8)
    return pixels


def _background(rng: np.random.Generator, side: int) -> Floats:
    """Two near colours in a smooth random pattern of 1 to 3 cells a side."""
    hue, value = rng.random(), rng.uniform(0.15, 0.9)
    near = _rgb(hue, rng.uniform(0.1, 0.5), value)
    far = _rgb(hue + rng.normal(0, 0.1), rng.uniform(0.1, 0.5), value + rng.normal(0, 0.1))
    cells = int(rng.integers(1, 4))
    corners = rng.random((cells + 1, cells + 1), dtype=np.float32)
    at = np.linspace(0, cells, side, endpoint=False, dtype=np.float32)
    low = at.astype(int)
    part = at - low
    part = part * part * (3 - 2 * part)
    rows = corners[low] * (1 - part)[:, None] + corners[low + 1] * part[:, None]
    pattern = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return (near + (far - near) * pattern[..., None]).astype(np.float32)


def _paint_clutter(image: Floats, x: Floats, y: Floats, rng: np.random.Generator) -> None:
    radius = rng.uniform(0.03, 0.09)
    u, v = _frame(x, y, centre=rng.random(2), radius=radius, angle=rng.uniform(0, 2 * math.pi))
    outline = OUTLINES[("disc", "square", "triangle", "bar")[rng.integers(4)]]
    colour = _rgb(rng.random(), rng.uniform(0.2, 1), rng.uniform(0.2, 1))
    _blend(image, colour, outline(u, v) * np.float32(radius * image.shape[0]))


def _figure_colours(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Two colours that differ in brightness by 0.4 to 0.55, in random order."""
    hue, bright = rng.random(), rng.uniform(0.6, 1)
    first = _rgb(hue, rng.uniform(0.3, 1), bright)
    second = _rgb(hue + rng.normal(0, 0.15), rng.uniform(0.3, 1), bright - rng.uniform(0.4, 0.55))
    return (first, second) if rng.random() < 0.5 else (second, first)


def _frame(x: Floats, y: Floats, *, centre: Floats, radius: float, angle: float) -> tuple[Floats, Floats]:
    """The figure's own coordinates: its centre is 0, its radius 1."""
    cos, sin = (np.float32(f(angle) / radius) for f in (math.cos, math.sin))
    x, y = x - np.float32(centre[0]), y - np.float32(centre[1])
    return x * cos + y * sin, y * cos - x * sin


def _blend(image: Floats, colours: Floats, inside_pixels: Floats) -> None:
    """Paint where inside_pixels (signed distance, pixels) is positive, with an edge one pixel wide."""
    cover = np.clip(inside_pixels + np.float32(0.5), 0, 1)[..., None]
    image += (colours - image) * cover


def _rgb(hue: float, saturation: float, value: float) -> Floats:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, min(max(value, 0.05), 1)), np.float32)


def write_images(
    folder: Path,
    *,
    num_images: int,
    seed: int,
    size: int = SIZE,
    on_progress: Callable[[float], None] = lambda images: None,
) -> None:
    """Write num_images JPEGs into FOLDER/<class>/NNNNNN.jpg, the classes in turn.

    Image i of a seed is always the same, however many there are and whichever process draws it.
    """
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    chunks = [
        (folder, range(start, min(start + 100, num_images)), seed, size)
        for start in range(0, num_images, 100)
    ]
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("forkserver")) as pool:
        for drawn in pool.map(_write_chunk, chunks):
            on_progress(drawn)


def _write_chunk(chunk: tuple[Path, range, int, int]) -> int:
    from PIL import Image

    folder, numbers, seed, size = chunk
    names = list(CLASSES)
    for number in numbers:
        name = names[number % len(names)]
        image = draw_image(name, rng=np.random.default_rng((seed, number)), size=size)
        Image.fromarray(image).save(folder / name / f"{number:06d}.jpg", quality=QUALITY, subsampling=0)
    return len(numbers)
