"""COCO's metric by pycocotools, on the annotations as they were read: what was left out counts nowhere."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linerate.train.evaluate.detect.annotations import AnnotatedSet
from linerate.train.evaluate.detect.batches import run_lengths
from linerate.train.evaluate.detect.voc_metric import Detections

# Of COCO's 17 points of a person; another set of points gets the mean.
_PERSON_SIGMAS = 17
_NAMES = {
    "bbox": ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    "segm": ("mask_AP", "mask_AP50", "mask_AP75", "mask_AP_small", "mask_AP_medium", "mask_AP_large"),
    "keypoints": ("keypoint_AP", "keypoint_AP50", "keypoint_AP75", "keypoint_AP_medium", "keypoint_AP_large"),
}


@dataclass(frozen=True)
class CocoDetections(Detections):
    """Boxes and what else there is of one image."""

    masks: list[dict[str, Any]] = field(default_factory=list)
    """Compressed run lengths."""
    keypoints: NDArray[np.float64] | None = None
    """(n, K, 3)."""


def coco_metric(
    annotated: AnnotatedSet, found: Mapping[int, CocoDetections], *, masks: bool
) -> dict[str, float]:
    """AP, AP50, AP75 and AP by size of boxes, and of masks (mask_) and keypoints (keypoint_), in percent.

    NaN where no object is of a size. Needs pycocotools.
    """
    kinds = ["bbox", *(["segm"] if masks else []), *(["keypoints"] if annotated.keypoint_names else [])]
    truth = _open(_truth(annotated, masks=masks))
    results = _results(annotated, found)
    numbers: dict[str, float] = {}
    for kind in kinds:
        values = _evaluate(truth, results, kind, num_points=len(annotated.keypoint_names))
        for name, value in zip(_NAMES[kind], values, strict=False):
            numbers[name] = 100 * value if value >= 0 else float("nan")
    return numbers


def _open(dataset: dict[str, Any]) -> Any:
    from pycocotools.coco import COCO

    truth = COCO()
    truth.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _evaluate(truth: Any, results: list[dict[str, Any]], kind: str, *, num_points: int) -> list[float]:
    from pycocotools.cocoeval import COCOeval

    if not results:
        return [0.0] * len(_NAMES[kind])
    with contextlib.redirect_stdout(io.StringIO()):
        # With a box there, pycocotools would sort masks into sizes by the box's area.
        left_out = "bbox" if kind == "segm" else None
        rows = [{name: value for name, value in row.items() if name != left_out} for row in results]
        evaluation = COCOeval(truth, truth.loadRes(rows), kind)
        if kind == "keypoints" and num_points != _PERSON_SIGMAS:
            evaluation.params.kpt_oks_sigmas = np.full(num_points, evaluation.params.kpt_oks_sigmas.mean())
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def _truth(annotated: AnnotatedSet, *, masks: bool) -> dict[str, Any]:
    notes: list[dict[str, Any]] = []
    for place, image in enumerate(annotated.images):
        for one in image.instances:
            x0, y0, x1, y1 = one.box
            note: dict[str, Any] = {
                "id": len(notes) + 1,
                "image_id": place,
                "category_id": annotated.category_ids[one.label],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": one.area,
                "iscrowd": int(one.crowd),
            }
            if masks and one.segment:
                note["segmentation"] = run_lengths(one, height=image.height, width=image.width)
            if one.keypoints:
                note["keypoints"] = list(one.keypoints)
                note["num_keypoints"] = sum(seen > 0 for seen in one.keypoints[2::3])
            notes.append(note)
    return {
        "info": {},
        "images": [
            {"id": nth, "height": i.height, "width": i.width} for nth, i in enumerate(annotated.images)
        ],
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(annotated.category_ids, annotated.class_names, strict=True)
        ],
        "annotations": notes,
    }


def _results(annotated: AnnotatedSet, found: Mapping[int, CocoDetections]) -> list[dict[str, Any]]:
    rows = []
    for place, one in sorted(found.items()):
        for nth, (box, label, score) in enumerate(zip(one.boxes, one.labels, one.scores, strict=True)):
            x0, y0, x1, y1 = map(float, box)
            row: dict[str, Any] = {
                "image_id": place,
                "category_id": annotated.category_ids[int(label)],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(score),
            }
            if one.masks:
                row["segmentation"] = one.masks[nth]
            if one.keypoints is not None:
                row["keypoints"] = [float(value) for value in one.keypoints[nth].reshape(-1)]
            rows.append(row)
    return rows
