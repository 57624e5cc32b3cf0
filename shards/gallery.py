"""A page of thumbnails by class, hashtag, shard or size, for whoever wants to see what the shards hold."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from linerate.shards import gallery_page
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError, show_bytes
from linerate.shards.gallery_page import Cell
from linerate.shards.gallery_rejects import draw_rejects, load_reject_examples
from linerate.shards.inspect_image import FLAG_NAMES, one_line
from linerate.shards.overview import (
    BIN_BYTES,
    LARGEST_BIN,
    NO_CLASS,
    tags_of_sample,
)
from linerate.shards.preview import load_thumbnail
from linerate.shards.sql import open_tables
from linerate.shards.terminal import make_parent

By = Literal["class", "hashtag", "shard", "size"]
SIDE_PX = 160
QUALITY = 80
# A page of so many thumbnails has about 150 MB, which is what browsers still scroll through.
MAX_CELLS = 20_000
_PLURAL = {"class": "classes", "hashtag": "hashtags", "shard": "shards", "size": "sizes"}


@dataclass(frozen=True, kw_only=True)
class GalleryReport:
    """What a page shows."""

    out: str
    num: int
    """Thumbnails; one sample can be under several hashtags."""
    groups: dict[str, int]
    """Samples that the shards hold, by group, as they follow on the page."""
    num_groups: int
    """That the shards hold."""
    num_broken: int
    """Samples that did not decode; they are on the page with the reason."""
    num_rejects_drawn: int
    """Of the rejects on the page; some decoder makes something of them."""
    num_bytes: int


@dataclass(frozen=True)
class _Group:
    name: str
    count: int
    samples: list[dict[str, Any]]


def write_gallery(
    catalog: Catalog,
    path: Path,
    *,
    by: By = "class",
    per_group: int = 12,
    num_groups: int = 50,
    seed: int = 0,
    source: Sequence[Path | str] = (),
    on_cells: Callable[[float], None] = lambda cells: None,
) -> GalleryReport:
    """One HTML file that needs no other: random samples of every group, and what was rejected.

    Of classes and hashtags the most frequent are shown, of shards and sizes the first. Rejects are looked up
    in `source`, by default where packing found them.
    Raises UserError for a page that would hold too much, and for hashtags where there are none.
    """
    for name, value in (("per", per_group), ("groups", num_groups)):
        if value < 1:
            raise UserError(f"--{name} is {value}, at least 1 is needed")
    if per_group * num_groups > MAX_CELLS:
        raise UserError(
            f"--per {per_group} and --groups {num_groups} make a page of {per_group * num_groups:,} images; "
            f"browsers bear {MAX_CELLS:,}: give less of either"
        )
    with open_tables(catalog) as db:
        groups, total = _choose(db, catalog, by, per_group=per_group, num_groups=num_groups, seed=seed)
        examples = load_reject_examples(db, per_group)
    rejects, note = draw_rejects(catalog, examples, source=source, side=SIDE_PX, quality=QUALITY)
    make_parent(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temp.open("w", encoding="utf-8") as page:
            num_broken = _write(page, catalog, by, groups, total, on_cells)
            page.write(gallery_page.rejects_section(rejects, note=note))
            page.write(gallery_page.closing())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    return GalleryReport(
        out=str(path),
        num=sum(len(group.samples) for group in groups),
        groups={group.name: group.count for group in groups},
        num_groups=total,
        num_broken=num_broken,
        num_rejects_drawn=sum(len(group.shown) for group in rejects),
        num_bytes=path.stat().st_size,
    )


def _write(
    page: TextIO,
    catalog: Catalog,
    by: By,
    groups: list[_Group],
    total: int,
    on_cells: Callable[[float], None],
) -> int:
    shown = f"{len(groups)} of {total:,} {_PLURAL[by]}" if len(groups) < total else f"by {by}"
    facts = (
        f"{catalog.num_samples:,} samples in {catalog.num_shards} shards, "
        f"{show_bytes(int(catalog.shard_bytes.sum()))}, {catalog.num_rejected:,} files rejected; {shown}"
    )
    page.write(
        gallery_page.opening(
            title=catalog.name,
            facts=facts,
            groups=[(group.name, group.count) for group in groups],
            num_rejected=catalog.num_rejected,
        )
    )
    num_broken = 0
    for number, group in enumerate(groups):
        cells = list(_load_cells(catalog, group.samples))
        num_broken += sum(cell.trouble is not None for cell in cells)
        page.write(gallery_page.section(number, group.name, group.count, cells))
        on_cells(len(cells))
    return num_broken


def _choose(
    db: Any, catalog: Catalog, by: By, *, per_group: int, num_groups: int, seed: int
) -> tuple[list[_Group], int]:
    """The groups with samples drawn at random, and how many groups there are."""
    grouped = f"(SELECT {_group_of(db, by)} AS name, * FROM samples)"
    order = "name" if by in ("shard", "size") else "n DESC, name"
    # Two passes: of the many hashtags that are not shown only the number is ever held.
    counts = db.execute(
        f"SELECT name, count(*) AS n, count(*) OVER () FROM {grouped} GROUP BY name ORDER BY {order} LIMIT ?",
        [num_groups],
    ).fetchall()
    drawn = db.execute(
        f"SELECT name, unnest(arg_min(sample, place, {per_group})) FROM (SELECT name, "
        f"{{'shard': shard, 'offset': \"offset\", 'size': size, 'key': key, 'class': class_name, "
        f"'sample_id': sample_id, 'width': width, 'height': height, 'flags': flags}} AS sample, "
        f"md5_number_lower(concat(?::VARCHAR, ':', sample_id)) AS place FROM {grouped} "
        f"WHERE name IN (SELECT unnest(?))) GROUP BY name",
        [str(seed), [row[0] for row in counts]],
    ).fetchall()
    samples: dict[Any, list[dict[str, Any]]] = {row[0]: [] for row in counts}
    for name, sample in drawn:
        samples[name].append(sample)
    groups = [_Group(_shown_name(catalog, by, name), count, samples[name]) for name, count, _ in counts]
    return groups, counts[0][2] if counts else 0


def _group_of(db: Any, by: By) -> str:
    """SQL for the group of a sample; for hashtags a row for each."""
    if by == "hashtag":
        tags = tags_of_sample(db)
        if tags is None:
            raise UserError(
                "--by hashtag: these shards have no column `hashtags` of texts or lists of texts; "
                "give --by class, shard or size"
            )
        return f"unnest({tags})"
    if by == "size":
        return f"coalesce(list_min(list_filter({BIN_BYTES}, lambda b: b >= size)), {LARGEST_BIN})"
    return {"class": f"coalesce(class_name, '{NO_CLASS}')", "shard": "shard"}[by]


def _shown_name(catalog: Catalog, by: By, name: Any) -> str:
    if by == "shard":
        return str(catalog.files[name])
    if by == "size":
        return f"over {show_bytes(BIN_BYTES[-1])}" if name == LARGEST_BIN else f"up to {show_bytes(name)}"
    return str(name)


def _load_cells(catalog: Catalog, samples: list[dict[str, Any]]) -> Iterator[Cell]:
    for sample in samples:
        with catalog.open_tar(sample["shard"]) as tar:
            tar.seek(sample["offset"])
            jpeg = tar.read(sample["size"])
        flags = [name for bit, name in FLAG_NAMES.items() if sample["flags"] & bit]
        image, trouble = _thumbnail(jpeg)
        yield Cell(
            key=sample["key"],
            class_name=sample["class"] or "",
            facts=f"{sample['width']} x {sample['height']}, {show_bytes(len(jpeg))}",
            more=", ".join([f"sample {sample['sample_id']}", *flags]),
            image=image,
            trouble=trouble,
        )


def _thumbnail(jpeg: bytes) -> tuple[str, str | None]:
    """(base64 of a small JPEG without metadata, None), or ("", why there is none)."""
    try:
        image = load_thumbnail(jpeg, side=SIDE_PX)
    except Exception as error:  # Pillow raises OSError, TypeError, ValueError and more on broken files
        return "", one_line(error) or type(error).__name__
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return base64.b64encode(out.getvalue()).decode(), None
