"""A labelled source as two: what the demo trains on, and what it is judged on."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from linerate.shards.sources import Source, SourceReject, SourceRow

ClassName = tuple[str | None, int]
NO_CLASS: ClassName = (None, -1)


@dataclass(frozen=True)
class SourcePart:
    """The train or the test rows of a source: a sixth of each class is for testing, at least one image.

    Both parts have the same classes. An image without a class, or the only one of its class, is trained on
    without a label. Of a class only the first `per_class` images in the order listed count.
    """

    whole: Source
    part: Literal["train", "test"]
    per_class: int | None = None

    @property
    def containers(self) -> Sequence[Path | str]:
        return self.whole.containers

    @cached_property
    def num_of_class(self) -> Counter[ClassName]:
        """Images of each class that count, in this part and the other together."""
        counts = Counter(class_of(row) for row in self.whole.rows() if isinstance(row, SourceRow))
        return Counter({name: min(num, self.per_class or num) for name, num in counts.items()})

    def rows(self) -> Iterator[SourceRow | SourceReject]:
        seen: Counter[ClassName] = Counter()
        for row in self.whole.rows():
            if isinstance(row, SourceReject):
                if self.part == "train":
                    yield row
                continue
            name = class_of(row)
            place, num = seen[name], self.num_of_class[name]
            seen[name] += 1
            if place >= num:
                continue
            if name == NO_CLASS or num == 1:
                if self.part == "train":
                    yield dataclasses.replace(row, label_name=None, label=-1)
            elif is_test(place, num=num) == (self.part == "test"):
                yield row


def class_of(row: SourceRow) -> ClassName:
    """The name or the number of the row's class, whichever its source gives."""
    return (row.label_name, row.label)


def is_test(place: int, *, num: int) -> bool:
    """Whether the place-th of num images is for testing: a sixth of them, spread evenly."""
    num_test = max(1, num // 6)
    return (place + 1) * num_test // num > place * num_test // num
