"""A contact sheet: what the shards really hold, for the eye."""

from __future__ import annotations

import io
import math
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.terminal import make_parent

CELL_PX = 144
TEXT_PX = 30
GAP_PX = 6
BACKGROUND = (250, 250, 250)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
INK = (40, 40, 40)
BROKEN = (235, 200, 200)


def choose_positions(catalog: Catalog, *, num: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """`num` places drawn without replacement, ascending; all of them where there are fewer."""
    count = min(num, catalog.num_samples)
    chosen = np.random.default_rng(seed).choice(catalog.num_samples, size=count, replace=False)
    return np.sort(chosen).astype(np.int64)


def draw_contact_sheet(catalog: Catalog, *, num: int = 48, seed: int = 0) -> Image.Image:
    """A sheet of `num` random samples, each with its class and place under it.

    An image that does not decode is drawn as a red cell with the reason.
    """
    if num < 1:
        raise UserError(f"--num is {num}; a contact sheet shows at least 1 sample")
    positions = choose_positions(catalog, num=num, seed=seed)
    columns = max(1, min(len(positions), round(math.sqrt(len(positions) * 1.5))))
    rows = -(-len(positions) // columns)
    width, height = CELL_PX + GAP_PX, CELL_PX + TEXT_PX + GAP_PX
    sheet = Image.new("RGB", (columns * width + GAP_PX, rows * height + GAP_PX), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for cell, (jpeg, lines) in enumerate(_load_cells(catalog, positions)):
        left = GAP_PX + cell % columns * width
        top = GAP_PX + cell // columns * height
        _draw_image(sheet, draw, jpeg, left, top, font)
        for number, line in enumerate(lines):
            draw.text((left, top + CELL_PX + 1 + 14 * number), _fit(draw, line, font), fill=INK, font=font)
    return sheet


def write_contact_sheet(catalog: Catalog, path: Path, *, num: int = 48, seed: int = 0) -> Path:
    """Draw it into a PNG (or what the suffix says). Raises UserError for a suffix that no writer has."""
    sheet = draw_contact_sheet(catalog, num=num, seed=seed)
    make_parent(path)
    temp = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        sheet.save(temp)
    except ValueError:
        raise UserError(f"--out {path} has no suffix that an image can be written as; name it .png") from None
    temp.replace(path)
    return path


def _load_cells(
    catalog: Catalog, positions: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> list[tuple[bytes, tuple[str, str]]]:
    cells = []
    shards = np.searchsorted(catalog.starts, positions, side="right") - 1
    for shard in np.unique(shards):
        index = catalog.shard_index(int(shard))
        with catalog.open_tar(int(shard)) as tar:
            for row in positions[shards == shard] - catalog.starts[shard]:
                tar.seek(int(index.offset[row]))
                jpeg = tar.read(int(index.size[row]))
                label = int(index.label[row])
                name = catalog.class_names[label] if 0 <= label < len(catalog.class_names) else "no label"
                size = f"{index.width[row]}x{index.height[row]}"
                cells.append((jpeg, (name, f"#{int(index.sample_id[row])}  {size}")))
    return cells


def _draw_image(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    jpeg: bytes,
    left: int,
    top: int,
    font: Font,
) -> None:
    try:
        image = load_thumbnail(jpeg, side=CELL_PX)
    except Exception as error:  # Pillow raises OSError, TypeError, ValueError and more on broken files
        draw.rectangle((left, top, left + CELL_PX, top + CELL_PX), fill=BROKEN)
        draw.text((left + 4, top + 4), type(error).__name__, fill=INK, font=font)
        return
    sheet.paste(image, (left + (CELL_PX - image.width) // 2, top + (CELL_PX - image.height) // 2))


def load_thumbnail(jpeg: bytes, *, side: int) -> Image.Image:
    """The image in RGB, its longer side at most this many pixels; very small ones are enlarged.

    Raises what Pillow does on broken files: OSError, TypeError, ValueError and more.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as opened:
            opened.draft("RGB", (2 * side, 2 * side))
            image = opened.convert("RGB")
    image.thumbnail((side, side))
    if (factor := side // max(image.size)) > 1:  # CIFAR's 32 pixels are hard to see otherwise
        image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    return image


def _fit(draw: ImageDraw.ImageDraw, text: str, font: Font) -> str:
    while text and draw.textlength(text, font=font) > CELL_PX:
        text = text[:-2].rstrip(".") + "."
    return text
