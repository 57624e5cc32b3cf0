"""What was left out, on the page of thumbnails: by reason, with a picture of whatever can still be drawn."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError, show_bytes
from linerate.shards.gallery_page import Cell, RejectGroup
from linerate.shards.inspect_image import RejectedError
from linerate.shards.options import ManifestColumns
from linerate.shards.overview import reject_example, reject_reason
from linerate.shards.plan_rows import DUPLICATE_BYTES
from linerate.shards.reject_images import load_images
from linerate.shards.shard_stats import load_sources
from linerate.shards.tolerant import open_artist

# Of the files that got no place in the plan only these are looked up: others were ruled out by their names,
# or the source has something else of that name, which was packed.
_DRAWN_WITHOUT_PLACE = (DUPLICATE_BYTES, "no label")


@dataclass(frozen=True)
class RejectExamples:
    """What was left out for one reason, and the first few of them by name."""

    why: str
    count: int
    files: list[dict[str, Any]]
    """key; text: the key, then `: ` and the detail where `why` lacks it; wanted: may it be looked up?"""


def load_reject_examples(db: Any, num: int) -> list[RejectExamples]:
    """At most `num` of each reason, the most frequent reason first. db: of open_tables."""
    wanted = f"sample_id IS NOT NULL OR reason IN {_DRAWN_WITHOUT_PLACE}"
    found = db.execute(
        f"SELECT {reject_reason()} AS why, count(*) AS n, arg_min({{'key': key, 'wanted': {wanted}, "
        f"'text': {reject_example()}}}, key, {num}) "
        f"FROM rejected GROUP BY why ORDER BY n DESC, why"
    )
    return [RejectExamples(*row) for row in found.fetchall()]


def draw_rejects(
    catalog: Catalog,
    examples: Sequence[RejectExamples],
    *,
    source: Sequence[Path | str],
    side: int,
    quality: int,
) -> tuple[list[RejectGroup], str]:
    """(the groups of the page; why there are no pictures, or nothing).

    source: where to look, by default where packing found them; then what is gone costs the pictures only.
    Raises UserError where `source` cannot be opened.
    """
    files = [file for group in examples for file in group.files]
    keys = {file["key"] for file in files if file["wanted"]}
    cells: dict[str, Cell] = {}
    why_not: dict[str, str] = {}
    sources, note = ([source], "") if source else _recorded(catalog)
    artist = open_artist(side=side, quality=quality)
    notes = {file["key"]: file["text"][len(file["key"]) + 2 :] for file in files}
    try:
        for key, found in load_images(sources, keys, columns=_columns(catalog)):
            if isinstance(found, str):
                why_not[key] = found
                continue
            try:
                jpeg, facts = artist(found)
            except (RejectedError, MemoryError) as error:
                why_not[key] = str(error) or "more memory than is given to a thumbnail"
                continue
            cells[key] = Cell(
                key=key,
                class_name="",
                facts=f"{facts}, {show_bytes(len(found))}",
                more="",
                image=base64.b64encode(jpeg).decode(),
                trouble=None,
                note=notes[key],
            )
    except UserError as error:
        if source:
            raise
        note = f"no pictures: {error}"
    finally:
        artist.close()
    return [_group(group, cells, why_not) for group in examples], note


def _group(group: RejectExamples, cells: dict[str, Cell], why_not: dict[str, str]) -> RejectGroup:
    drawn = [file for file in group.files if file["wanted"] and file["key"] in cells]
    others = [file for file in group.files if file not in drawn]
    return RejectGroup(
        reason=group.why,
        count=group.count,
        shown=[cells[file["key"]] for file in drawn],
        listed=[
            f"{file['text']} ({why_not[file['key']]})"
            if file["wanted"] and file["key"] in why_not
            else file["text"]
            for file in others
        ],
    )


def _recorded(catalog: Catalog) -> tuple[list[list[str]], str]:
    """(the sources that are still there, what is to be said of the others)."""
    sources = load_sources(catalog.root)
    if not sources:
        return [], "no pictures: nothing says where the source was; give it by --source"
    there = [paths for paths in sources if all(Path(path).exists() for path in paths)]
    gone = [paths for paths in sources if paths not in there]
    if not gone:
        return there, ""
    return there, f"no pictures from {', '.join(gone[0][:3])}, which is not here; give its place by --source"


def _columns(catalog: Catalog) -> ManifestColumns:
    names = [field.name for field in fields(ManifestColumns)]
    return ManifestColumns(**{name: catalog.options.get(name) for name in names})
