"""A picture of what the augmentation does: stored images beside their query and key views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from linerate.pipeline.cache import Place, open_shards, place_of
from linerate.pipeline.draws import JITTER_ORDERS, Draw, Draws, draw_views
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.evaluation_views import decode_rgb
from linerate.pipeline.loader import open_backend
from linerate.pipeline.reader import ShardReader
from linerate.pipeline.recipe import ViewRecipe
from linerate.pipeline.undecodable import UndecodableImages
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError

_TILE = 224  # pixels of a tile's side on the sheet
_GAP, _CAPTION, _TITLE = 10, 50, 48
_COLOURS = {"query": (31, 95, 191), "key": (200, 90, 10)}
_INK, _FAINT, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)
_OPERATIONS = "bcsh"  # the columns of JITTER_ORDERS
_LEGEND = "jitter in the order applied: b brightness, c contrast, s saturation (factors), h hue (turns)"


@dataclass(frozen=True)
class ChosenFetch:
    """`fetch(step)` that gives the same chosen positions at every step."""

    place: Place
    positions: tuple[int, ...]

    def __call__(self, step: int) -> EncodedBatch:
        reader = ShardReader(open_shards(self.place))
        try:
            return reader.read(np.array(self.positions, dtype=np.int64))
        finally:
            reader.close()


@dataclass(frozen=True)
class SeenSample:
    """One sample in one epoch: the stored image, its two views, and what was drawn for each."""

    image: Image.Image
    query: NDArray[np.uint8]
    """(S, S, 3)."""
    key: NDArray[np.uint8]
    """(S, S, 3)."""
    query_draws: NDArray[np.float32]
    key_draws: NDArray[np.float32]
    sample_id: int
    position: int
    label: int
    epoch: int

    def describe(self, class_names: Sequence[str]) -> dict[str, Any]:
        """All but the pixels, for --json."""
        return {
            "sample_id": self.sample_id,
            "position": self.position,
            "label": self.label,
            "class": class_names[self.label] if self.label >= 0 else None,
            "epoch": self.epoch,
            "height": self.image.height,
            "width": self.image.width,
            "query": {d.name.lower(): float(self.query_draws[d]) for d in Draw},
            "key": {d.name.lower(): float(self.key_draws[d]) for d in Draw},
        }


def find_position(catalog: Catalog, sample_id: int) -> int:
    """The position of a sample by its id. Loads log2(S) indexes. Raises UserError where there is none."""
    filled = np.flatnonzero(catalog.shard_sizes)
    low, high = 0, len(filled)
    while high - low > 1:
        middle = (low + high) // 2
        first = catalog.shard_index(int(filled[middle])).sample_id[0]
        low, high = (middle, high) if first <= sample_id else (low, middle)
    if high:
        shard = int(filled[low])
        ids = catalog.shard_index(shard).sample_id
        row = int(np.searchsorted(ids, sample_id))
        if row < len(ids) and ids[row] == sample_id:
            return int(catalog.starts[shard]) + row
    planned = f"0..{catalog.num_planned - 1}"
    why = "was rejected when packing" if 0 <= sample_id < catalog.num_planned else f"is not in {planned}"
    raise UserError(f"sample {sample_id} {why}; `linerate shard inspect {catalog.root}` shows what there is")


def see_samples(
    catalog: Catalog,
    positions: Sequence[int],
    *,
    recipe: ViewRecipe,
    backend: str,
    seed: int,
    epochs: range,
) -> list[SeenSample]:
    """The samples at positions as training with that seed sees them, epoch after epoch."""
    fetch = ChosenFetch(place_of(catalog), tuple(positions))
    # One step of a few images: a thread is enough, and worker processes would take longer to start.
    maker = open_backend(backend, recipe=recipe, seed=seed, batch=len(positions), num_threads=1)
    try:
        views = [next(iter(maker.run(fetch, range(1), epoch=epoch))) for epoch in epochs]
    finally:
        maker.close()
    encoded = fetch(0)
    images = [_stored_image(encoded, row) for row in range(len(positions))]
    seen = []
    for epoch, two in zip(epochs, views, strict=True):
        query, key = (view.permute(0, 2, 3, 1).numpy() for view in (two.query, two.key))
        drawn = [_draws(recipe, encoded, seed=seed, epoch=epoch, view=view) for view in (0, 1)]
        seen += [
            SeenSample(
                image=images[i],
                query=query[i],
                key=key[i],
                query_draws=drawn[0].array[i],
                key_draws=drawn[1].array[i],
                sample_id=int(encoded.sample_id[i]),
                position=int(encoded.position[i]),
                label=int(encoded.label[i]),
                epoch=epoch,
            )
            for i in range(len(positions))
        ]
    return seen


def _stored_image(encoded: EncodedBatch, row: int) -> Image.Image:
    try:
        return Image.fromarray(decode_rgb(encoded.jpegs[row]))
    except ValueError as error:
        raise UndecodableImages(
            [int(encoded.sample_id[row])], [int(encoded.position[row])], str(error)
        ) from None


def draw_sheet(
    seen: Sequence[SeenSample], *, title: str, class_names: Sequence[str], columns: int = 2
) -> Image.Image:
    """The contact sheet: stored image (crop windows marked), query view, key view, `columns` trios a row."""
    columns = min(columns, len(seen))
    rows = -(-len(seen) // columns)
    trio_width, row_height = 3 * (_TILE + _GAP), _TILE + _CAPTION + _GAP
    size = (columns * (trio_width + 2 * _GAP), _TITLE + rows * row_height)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 4), title, fill=_INK, font=ImageFont.load_default(16))
    pen.text((_GAP, 23), _LEGEND, fill=_FAINT, font=ImageFont.load_default(11))
    for nth, sample in enumerate(seen):
        left = _GAP + nth % columns * (trio_width + 2 * _GAP)
        top = _TITLE + nth // columns * row_height
        _draw_trio(sheet, pen, sample, left=left, top=top, class_names=class_names)
    return sheet


def write_sheet(path: Path, seen: Sequence[SeenSample], *, title: str, class_names: Sequence[str]) -> None:
    """The contact sheet as a PNG."""
    draw_sheet(seen, title=title, class_names=class_names).save(path)


def caption(draws: NDArray[np.float32], *, height: int, width: int) -> list[str]:
    """Lines that say what was drawn for a view."""
    area = (draws[Draw.BOTTOM] - draws[Draw.TOP]) * (draws[Draw.RIGHT] - draws[Draw.LEFT])
    words = [f"crop {area / (height * width):.0%}"]
    words += ["flip"] if draws[Draw.FLIP] else []
    words += ["gray first"] if draws[Draw.GRAY_FIRST] else []
    words += ["gray"] if draws[Draw.GRAY] else []
    words += [f"blur {draws[Draw.BLUR_SIGMA]:.2f}"] if draws[Draw.BLUR_SIGMA] else []
    words += ["solarize"] if draws[Draw.SOLARIZE] else []
    if not draws[Draw.JITTER]:
        return ["  ".join(words), "no jitter"]
    values = [draws[d] for d in (Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION, Draw.HUE)]
    in_order = JITTER_ORDERS[int(draws[Draw.JITTER_ORDER])]
    jitter = [
        f"{_OPERATIONS[i]}{values[i]:+.2f}" if i == 3 else f"{_OPERATIONS[i]}{values[i]:.2f}"
        for i in in_order
    ]
    return ["  ".join(words), "jitter " + " ".join(jitter)]


def _draws(recipe: ViewRecipe, encoded: EncodedBatch, *, seed: int, epoch: int, view: int) -> Draws:
    return draw_views(
        recipe,
        seed=seed,
        epoch=epoch,
        sample_id=encoded.sample_id,
        height=encoded.height,
        width=encoded.width,
        view=view,
    )


def _draw_trio(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    sample: SeenSample,
    *,
    left: int,
    top: int,
    class_names: Sequence[str],
) -> None:
    source = _fit(sample.image)
    at = (left + (_TILE - source.width) // 2, top + (_TILE - source.height) // 2)
    sheet.paste(source, at)
    zoom = (source.width / sample.image.width, source.height / sample.image.height)
    for name, draws in (("query", sample.query_draws), ("key", sample.key_draws)):
        x0, x1 = (at[0] + float(draws[d]) * zoom[0] for d in (Draw.LEFT, Draw.RIGHT))
        y0, y1 = (at[1] + float(draws[d]) * zoom[1] for d in (Draw.TOP, Draw.BOTTOM))
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=_COLOURS[name], width=3)
    class_name = class_names[sample.label] if sample.label >= 0 else "no label"
    size = f"{sample.image.width}x{sample.image.height}"
    _write(
        pen,
        [f"{sample.sample_id:012d}", f"{class_name[:24]}  {size}"],
        left,
        top,
        name=f"epoch {sample.epoch}",
    )
    for nth, (name, view, draws) in enumerate(
        (("query", sample.query, sample.query_draws), ("key", sample.key, sample.key_draws)), start=1
    ):
        x = left + nth * (_TILE + _GAP)
        sheet.paste(Image.fromarray(view).resize((_TILE, _TILE), Image.Resampling.NEAREST), (x, top))
        pen.rectangle((x - 1, top - 1, x + _TILE, top + _TILE), outline=_COLOURS[name], width=2)
        lines = caption(draws, height=sample.image.height, width=sample.image.width)
        _write(pen, lines, x, top, name=name, colour=_COLOURS[name])


def _write(
    pen: ImageDraw.ImageDraw,
    lines: list[str],
    left: int,
    top: int,
    *,
    name: str,
    colour: tuple[int, int, int] = _INK,
) -> None:
    font = ImageFont.load_default(12)
    pen.text((left, top + _TILE + 3), f"{name}: {lines[0]}", fill=colour, font=font)
    pen.text((left, top + _TILE + 19), lines[1], fill=_FAINT, font=font)


def _fit(image: Image.Image) -> Image.Image:
    zoom = _TILE / max(image.size)
    size = (max(1, round(image.width * zoom)), max(1, round(image.height * zoom)))
    return image.resize(size, Image.Resampling.NEAREST if zoom > 2 else Image.Resampling.BICUBIC)
