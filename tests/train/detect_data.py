"""Small data sets in VOC's and COCO's layouts: coloured rectangles on noise, and a run to transfer."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tests.train.small import SMALL

from linerate.train.checkpoint import Checkpoint, save_checkpoint
from linerate.train.encoder import build_encoder

SIDE = 64
COLOURS = {"red": (220, 40, 40), "blue": (40, 40, 220)}
POINTS = ["middle", "left_top", "right_top"]
Drawn = tuple[str, tuple[int, int, int, int]]


def write_run(root: Path, *, encoder: str = "tiny-resnet-w4") -> Path:
    """A run folder whose one checkpoint holds an encoder as it was born."""
    model = dataclasses.replace(SMALL.model, encoder=encoder, stem="imagenet")
    torch.manual_seed(3)
    weights = build_encoder(encoder, dim=model.dim).state_dict()
    checkpoint = Checkpoint(
        step=1,
        epoch=0,
        images=16,
        config=dataclasses.replace(SMALL, model=model),
        trained_on=None,
        moco={f"query_encoder.{name}": tensor for name, tensor in weights.items()},
        optimizer={},
        rng={"cpu": torch.get_rng_state()},
    )
    save_checkpoint(root / "checkpoints", checkpoint, keep=1)
    return root


def draw(seed: int) -> tuple[Image.Image, list[Drawn]]:
    """An image with one red and one blue rectangle that do not touch, and their boxes from 0."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(90, 130, (SIDE, SIDE, 3), dtype=np.uint8)
    boxes = []
    for name, left in zip(COLOURS, (0, SIDE // 2), strict=True):
        x0, y0 = left + int(generator.integers(2, 6)), int(generator.integers(4, 20))
        x1, y1 = x0 + int(generator.integers(16, 24)), y0 + int(generator.integers(16, 36))
        pixels[y0:y1, x0:x1] = COLOURS[name]
        boxes.append((name, (x0, y0, x1, y1)))
    return Image.fromarray(pixels), boxes


def write_voc(root: Path, splits: Mapping[str, Sequence[int]]) -> Path:
    """VOC's layout with the images of these seeds, boxes and masks (1 red, 2 blue)."""
    for folder in (
        "JPEGImages",
        "Annotations",
        "ImageSets/Main",
        "ImageSets/Segmentation",
        "SegmentationClass",
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, seeds in splits.items():
        names = []
        for seed in seeds:
            image, drawn = draw(seed)
            image.save(root / "JPEGImages" / f"{seed:03}.jpg", quality=95)
            # VOC counts pixels from 1, and the far ones belong to the box.
            objects = [(name, (x0 + 1, y0 + 1, x1, y1)) for name, (x0, y0, x1, y1) in drawn]
            write_xml(root / "Annotations" / f"{seed:03}.xml", objects)
            mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
            for nth, (_, (x0, y0, x1, y1)) in enumerate(drawn, start=1):
                mask[y0:y1, x0:x1] = nth
            Image.fromarray(mask).save(root / "SegmentationClass" / f"{seed:03}.png")
            names.append(f"{seed:03}\n")
        for kind in ("Main", "Segmentation"):
            (root / "ImageSets" / kind / f"{split}.txt").write_text("".join(names))
    return root


def write_xml(
    path: Path, objects: Sequence[tuple[str, Sequence[float]]], *, size: int = SIDE, more: str = ""
) -> None:
    """An annotation of VOC; more: what stands in each object besides."""
    rows = "".join(
        f"<object><name>{name}</name>{more}<bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin>"
        f"<xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
        for name, b in objects
    )
    extent = f"<size><width>{size}</width><height>{size}</height></size>" if size else ""
    path.write_text(f"<annotation>{extent}{rows}</annotation>")


def coco_notes(seeds: Sequence[int], *, keypoints: bool = False) -> dict[str, Any]:
    """COCO's JSON for the images of these seeds: masks as polygons; with keypoints one class, the red."""
    notes = []
    for seed in seeds:
        for name, (x0, y0, x1, y1) in draw(seed)[1]:
            if keypoints and name != "red":
                continue
            note: dict[str, Any] = {
                "id": len(notes) + 1,
                "image_id": seed,
                "category_id": 7 if name == "red" else 3,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
            }
            if keypoints:
                note["keypoints"] = [(x0 + x1) / 2, (y0 + y1) / 2, 2, x0 + 1, y0 + 1, 2, x1 - 1, y0 + 1, 1]
                note["num_keypoints"] = 3
            notes.append(note)
    person = {"id": 7, "name": "red", **({"keypoints": POINTS} if keypoints else {})}
    return {
        "images": [{"id": s, "file_name": f"{s:03}.jpg", "height": SIDE, "width": SIDE} for s in seeds],
        "annotations": notes,
        "categories": [person] if keypoints else [person, {"id": 3, "name": "blue"}],
    }


def write_coco(root: Path, splits: Mapping[str, Sequence[int]]) -> Path:
    """COCO's layout with the images of these seeds, as instances and as keypoints."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, seeds in splits.items():
        (root / split).mkdir(exist_ok=True)
        for seed in seeds:
            draw(seed)[0].save(root / split / f"{seed:03}.jpg", quality=95)
        for kind, points in (("instances", False), ("person_keypoints", True)):
            notes = coco_notes(seeds, keypoints=points)
            (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(notes))
    return root
