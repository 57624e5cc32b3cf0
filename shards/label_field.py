"""Classes out of a field of each image's .json, such as img2dataset's tars have."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from linerate.shards.errors import UserError
from linerate.shards.sources import Source, SourceReject, SourceRow

_SHOWN_FIELDS = 20


@dataclass(frozen=True)
class FieldLabelledSource:
    """A source whose classes are what this field says, and nothing else; an image without it has no class."""

    source: Source
    field: str

    @property
    def containers(self) -> Sequence[Path | str]:
        return self.source.containers

    def rows(self) -> Iterator[SourceRow | SourceReject]:
        num_rows = num_labelled = 0
        fields: dict[str, None] = {}
        for row in self.source.rows():
            if isinstance(row, SourceReject):
                yield row
                continue
            document = _parse(row.extra_json)
            name, label = parse_label(document.get(self.field))
            num_rows += 1
            num_labelled += name is not None or label >= 0
            if not num_labelled and len(fields) < _SHOWN_FIELDS:
                fields.update(dict.fromkeys(document))
            yield dataclasses.replace(row, label_name=name, label=label)
        if num_rows and not num_labelled:
            where = ", ".join(os.fspath(path) for path in self.containers[:3])
            there = (
                f"their fields are {', '.join(fields)}" if fields else "there is none: give tars that have"
            )
            raise UserError(
                f"--label-column {self.field}: no .json beside the images of {where} has a text or a whole "
                f"number in this field; {there}"
            )


def parse_label(value: object) -> tuple[str | None, int]:
    """(name, number) of the class that a JSON value names: one of the two, or none.

    Digits are a number, as in a .cls, and so is 3.0: what wrote the .json had rows without a class.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return None, value
    if not isinstance(value, str):
        return None, -1
    text = value.strip()
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return None, int(text)
    return text or None, -1


def _parse(stored: bytes | None) -> dict[str, object]:
    try:
        document = json.loads(stored or b"{}")
    except (ValueError, RecursionError):  # it travels as it is; a bad .json tells no class
        return {}
    return document if isinstance(document, dict) else {}
