"""COCO's layout: annotations/instances_SPLIT.json (person_keypoints_SPLIT.json), SPLIT/*.jpg."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from linerate.shards.errors import UserError
from linerate.train.evaluate.detect.annotations import (
    AnnotatedImage,
    AnnotatedSet,
    Findings,
    Instance,
    clip_box,
)


def require_pycocotools() -> None:
    """Raise UserError where pycocotools, which draws masks and judges as COCO does, is not installed."""
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError(
            "COCO's masks and metric need the package pycocotools: pip install 'linerate[detection]'"
        )


def read_coco(root: Path, split: str, *, keypoints: bool = False) -> AnnotatedSet:
    """The split of a COCO folder, with masks, and with keypoints where they are asked for.

    Raises UserError where the annotation file is missing or is none, or no image is there.
    """
    path = root / "annotations" / f"{'person_keypoints' if keypoints else 'instances'}_{split}.json"
    notes = _load(path, root)
    findings = Findings()
    categories = sorted(notes["categories"], key=lambda one: int(one["id"]))
    if keypoints:
        categories = [one for one in categories if one.get("keypoints")]
        if len(categories) != 1:
            raise UserError(
                f"{path} has {len(categories)} categories with keypoints; one, as COCO's person, is needed"
            )
    places = {int(one["id"]): place for place, one in enumerate(categories)}
    of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for note in notes["annotations"]:
        of_image[note["image_id"]].append(note)
    images = []
    for entry in notes["images"]:
        file = root / split / entry["file_name"]
        if not file.is_file():
            findings.add("missing images, left out", entry["file_name"])
            continue
        images.append(
            _image(entry, file, of_image.get(entry["id"], []), places, findings, keypoints=keypoints)
        )
    if not images:
        told = "; ".join(findings.lines()) or "the list is empty"
        raise UserError(f"{root / split} has no image of {path.name}: {told}; give --data the folder above")
    strangers = set(of_image) - {entry["id"] for entry in notes["images"]}
    for image_id in sorted(strangers):
        for _ in of_image[image_id]:
            findings.add("annotations of an image that is not listed, left out", image_id)
    return AnnotatedSet(
        images=tuple(images),
        class_names=tuple(one["name"] for one in categories),
        category_ids=tuple(places),
        findings=findings,
        keypoint_names=tuple(categories[0]["keypoints"]) if keypoints else (),
    )


def _load(path: Path, root: Path) -> dict[str, Any]:
    if not path.is_file():
        present = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        there = f"there are {', '.join(present)}" if present else f"{path.parent} holds no .json"
        raise UserError(f"{root} has no {path.relative_to(root)}; {there}")
    try:
        notes: dict[str, Any] = json.loads(path.read_bytes())
        for key in ("images", "annotations", "categories"):
            if not isinstance(notes[key], list):
                raise TypeError(key)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no annotation file of COCO ({type(error).__name__}: {error})") from None
    return notes


def _image(
    entry: dict[str, Any],
    file: Path,
    notes: list[dict[str, Any]],
    places: dict[int, int],
    findings: Findings,
    *,
    keypoints: bool,
) -> AnnotatedImage:
    height, width, name = int(entry["height"]), int(entry["width"]), entry["file_name"]
    instances = []
    for note in notes:
        if note["category_id"] not in places:
            findings.add("objects of an unknown class, left out", f"{name} ({note['category_id']})")
            continue
        points = tuple(map(float, note.get("keypoints", ()))) if keypoints else ()
        if keypoints and not any(points[2::3]):
            findings.add("persons without keypoints (not trained on, ignored when judged)", name)
        x, y, w, h = map(float, note["bbox"])
        box = clip_box((x, y, x + w, y + h), height=height, width=width, where=name, findings=findings)
        if box is None:
            continue
        crowd = bool(note.get("iscrowd", 0))
        if crowd:
            findings.add("crowd regions (not trained on, ignored when judged)", name)
        instances.append(
            Instance(
                box=box,
                label=places[note["category_id"]],
                crowd=crowd,
                area=float(note.get("area", w * h)),
                segment=note.get("segmentation"),
                keypoints=points,
            )
        )
    if not instances:
        findings.add("images without a usable object (not trained on, judged)", name)
    return AnnotatedImage(
        image_id=entry["id"], path=file, height=height, width=width, instances=tuple(instances)
    )
