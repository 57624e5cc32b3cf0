"""Pascal VOC's average precision, also at the ten thresholds of COCO, as detectron2 computes it.

AP50 and AP75 are at an overlap of 0.5 and 0.75, AP the mean over 0.5, 0.55 .. 0.95; all are means over the
classes that occur. 2007's figure is the mean of the best precision at 11 recalls, later years' is the area.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from linerate.train.evaluate.detect.annotations import AnnotatedImage

VocAp = Literal["11-point", "area"]
THRESHOLDS = tuple(round(0.5 + 0.05 * nth, 2) for nth in range(10))
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image; best first or not."""

    boxes: Floats
    """(n, 4) pixels of the image as it is stored."""
    labels: NDArray[np.int64]
    """(n,) 0 .. C-1."""
    scores: Floats
    """(n,)."""


def voc_metric(
    images: Sequence[AnnotatedImage],
    found: Mapping[int, Detections],
    *,
    num_classes: int,
    kind: VocAp,
) -> dict[str, float]:
    """AP, AP50 and AP75 in percent, and `classes_without_objects`, which count for nothing.

    found: by place in images; a missing image has none.
    """
    table = np.full((num_classes, len(THRESHOLDS)), np.nan)
    of_class = _objects_by_class(images)
    for label in range(num_classes):
        if any(len(boxes[~difficult]) for boxes, difficult in of_class[label].values()):
            table[label] = class_ap(of_class[label], _found_of(found, label), kind=kind)
    present = table[~np.isnan(table).all(axis=1)]
    if not len(present):
        return {"AP": float("nan"), "AP50": float("nan"), "AP75": float("nan")}
    mean = 100 * present.mean(axis=0)
    return {
        "AP": float(mean.mean()),
        "AP50": float(mean[THRESHOLDS.index(0.5)]),
        "AP75": float(mean[THRESHOLDS.index(0.75)]),
        "classes_without_objects": float(num_classes - len(present)),
    }


_Objects = dict[int, tuple[Floats, NDArray[np.bool_]]]


def _objects_by_class(images: Sequence[AnnotatedImage]) -> dict[int, _Objects]:
    """label -> place of the image -> its boxes of that class, and which of them are difficult."""
    gathered: dict[int, dict[int, list[tuple[Sequence[float], bool]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for place, image in enumerate(images):
        for one in image.instances:
            gathered[one.label][place].append((one.box, one.difficult))
    objects: dict[int, _Objects] = defaultdict(dict)
    for label, by_image in gathered.items():
        for place, rows in by_image.items():
            boxes = np.array([box for box, _ in rows], dtype=np.float64)
            objects[label][place] = boxes, np.array([difficult for _, difficult in rows])
    return objects


def _found_of(found: Mapping[int, Detections], label: int) -> list[tuple[float, int, Floats]]:
    """(score, place of the image, box) of a class, best first; ties in the order of the images."""
    rows = [
        (float(score), place, box)
        for place, one in sorted(found.items())
        for score, box, its in zip(one.scores, one.boxes, one.labels, strict=True)
        if its == label
    ]
    return sorted(rows, key=lambda row: -row[0])


def class_ap(objects: _Objects, found: list[tuple[float, int, Floats]], *, kind: VocAp) -> Floats:
    """(10,) the average precision of one class at each threshold, 0 .. 1.

    A detection belongs to the object that it overlaps most. The first one there is right, later ones are
    wrong; one at a difficult object is neither.
    """
    num_objects = sum(int((~difficult).sum()) for _, difficult in objects.values())
    if not found:
        return np.zeros(len(THRESHOLDS))
    nearest = [_nearest(box, objects.get(place)) for _, place, box in found]
    result = []
    for threshold in THRESHOLDS:
        taken: set[tuple[int, int]] = set()
        right, wrong = np.zeros(len(found)), np.zeros(len(found))
        for nth, ((_, place, _), (overlap, at)) in enumerate(zip(found, nearest, strict=True)):
            if overlap <= threshold:
                wrong[nth] = 1
            elif objects[place][1][at]:
                continue
            elif (place, at) in taken:
                wrong[nth] = 1
            else:
                right[nth] = 1
                taken.add((place, at))
        hits, misses = right.cumsum(), wrong.cumsum()
        precision = hits / np.maximum(hits + misses, np.finfo(np.float64).eps)
        result.append(average_precision(hits / num_objects, precision, kind=kind))
    return np.array(result)


def _nearest(box: Floats, objects: tuple[Floats, NDArray[np.bool_]] | None) -> tuple[float, int]:
    """The greatest overlap (intersection over union) with an object of the image, and which it is."""
    if objects is None:
        return 0.0, -1
    boxes = objects[0]
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod() - shared
    overlaps = shared / union
    at = int(overlaps.argmax())
    return float(overlaps[at]), at


def average_precision(recall: Floats, precision: Floats, *, kind: VocAp) -> float:
    """Of a curve whose recall rises: its best precision from each recall on, averaged."""
    best = np.maximum.accumulate(precision[::-1])[::-1]
    if kind == "11-point":
        points = np.linspace(0, 1, 11)
        # A hair less: 0.3 and 3 / 10 differ in the last bit.
        at = np.searchsorted(recall, points - 1e-12)
        return float(np.append(best, 0.0)[at].mean())
    steps = np.diff(recall, prepend=0.0)
    return float((steps * best).sum())
