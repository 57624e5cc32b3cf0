"""Images with their objects, whatever layout they came from, and what of them could not be used.

Boxes are (x0, y0, x1, y1) in pixels, x1 and y1 the far edges: a box of the whole image is (0, 0, W, H).
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

Box = tuple[float, float, float, float]
_EXAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One object of an image."""

    box: Box
    label: int
    """0 .. C-1, the place in class_names."""
    difficult: bool = False
    """VOC: trained on, as detectron2 does, and neither right nor wrong when judged."""
    crowd: bool = False
    """COCO: a region of many objects; not trained on, ignored when judged."""
    area: float = 0.0
    """Of the segment, in pixels: COCO sorts objects into sizes by it."""
    segment: Any = None
    """Polygons or run lengths, as COCO writes them; None: there is only the box."""
    keypoints: tuple[float, ...] = ()
    """x, y, visibility of each point, 3 K numbers; none where points are not the task."""

    @property
    def trainable(self) -> bool:
        """Whether something can be learned from it: no crowd, and where there are points, one is visible."""
        return not self.crowd and (not self.keypoints or any(self.keypoints[2::3]))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatedImage:
    """One image and its objects."""

    image_id: int | str
    path: Path
    height: int
    width: int
    instances: tuple[Instance, ...]


@dataclass
class Findings:
    """What was left out or mended, counted by reason, with the first few places."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: object) -> None:
        """Count one."""
        self.counts[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES:
            places.append(str(where))

    def lines(self) -> list[str]:
        """A line for each reason: how many, and where the first are."""
        return [
            f"{count:,} {reason}: {', '.join(self.examples[reason])}"
            + (", ..." if count > len(self.examples[reason]) else "")
            for reason, count in sorted(self.counts.items())
        ]


@dataclass(frozen=True, kw_only=True)
class AnnotatedSet:
    """A split of a data set."""

    images: tuple[AnnotatedImage, ...]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """COCO's number of each class; 1 .. C where the layout has none."""
    findings: Findings
    keypoint_names: tuple[str, ...] = ()

    def for_training(self) -> AnnotatedSet:
        """What can be trained on, and images that have some of it; what is left out is counted already."""
        kept = []
        for image in self.images:
            instances = tuple(one for one in image.instances if one.trainable)
            if instances:
                kept.append(dataclasses.replace(image, instances=instances))
        return dataclasses.replace(self, images=tuple(kept))


def count_doubles(train: Iterable[Path], test: Iterable[Path], findings: Findings) -> None:
    """Count the test images whose very bytes are among the training images.

    Only files of equal size are read.
    """
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in train:
        by_size[path.stat().st_size].append(path)
    hashes: dict[int, set[int]] = {}
    for path in test:
        size = path.stat().st_size
        if size not in by_size:
            continue
        if size not in hashes:
            hashes[size] = {_content_hash(other) for other in by_size[size]}
        if _content_hash(path) in hashes[size]:
            findings.add(
                "images also among those of training (same bytes): the figure is too high", path.stem
            )


def _content_hash(path: Path) -> int:
    return xxhash.xxh3_64_intdigest(path.read_bytes())


def clip_box(box: Box, *, height: int, width: int, where: object, findings: Findings) -> Box | None:
    """The part of the box that lies in the image; None where there is none. What differs is counted."""
    x0, y0, x1, y1 = box
    if not (x1 > x0 and y1 > y0):  # this way NaN is refused too
        findings.add("boxes of zero area, left out", where)
        return None
    inside = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        findings.add("boxes outside the image, left out", where)
        return None
    # Annotators round: what is over the edge by less than a pixel is nothing to tell of.
    if max(abs(a - b) for a, b in zip(box, inside, strict=True)) >= 1:
        findings.add("boxes cut at the image's edge", where)
    return inside
