"""Boxes, masks and keypoints: data sets, network and metric made one job."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from linerate.train.evaluate.detect.annotations import AnnotatedSet
from linerate.train.evaluate.detect.batches import DetectionSource, Item
from linerate.train.evaluate.detect.coco_metric import CocoDetections, coco_metric
from linerate.train.evaluate.detect.job import Job
from linerate.train.evaluate.detect.networks import DetectorOptions, build_detector
from linerate.train.evaluate.detect.voc_metric import VocAp, voc_metric


def detection_job(
    train: AnnotatedSet,
    test: AnnotatedSet,
    *,
    backbone: Callable[[int], ResNet],
    options: DetectorOptions,
    voc_ap: VocAp | None,
) -> Job:
    """A detector on the two sets. backbone: seed -> a network of its own. voc_ap: None is COCO's metric."""

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_detector(backbone(seed), options)  # type: ignore[no-any-return]

    def judge(found: dict[int, Any]) -> dict[str, float]:
        if voc_ap is None:
            return coco_metric(test, found, masks=options.masks)
        return voc_metric(test.images, found, num_classes=options.num_classes, kind=voc_ap)

    return Job(
        build=build,
        train=DetectionSource(train.for_training(), masks=options.masks),
        test=DetectionSource(test, masks=options.masks),
        record=partial(_record, masks=options.masks),
        judge=judge,
        norm_decay=0.0,  # detectron2's default
    )


def _record(prediction: dict[str, Tensor], item: Item, *, masks: bool) -> CocoDetections:
    points = prediction.get("keypoints")
    return CocoDetections(
        boxes=prediction["boxes"].cpu().numpy().astype(np.float64),
        labels=prediction["labels"].cpu().numpy() - 1,
        scores=prediction["scores"].cpu().numpy().astype(np.float64),
        masks=_run_lengths(prediction["masks"]) if masks else [],
        keypoints=None if points is None else points.cpu().numpy().astype(np.float64),
    )


def _run_lengths(masks: Tensor) -> list[dict[str, Any]]:
    """(n, 1, H, W) chances -> n masks of chance above one half, as compressed run lengths."""
    from pycocotools import mask as coco_mask

    drawn = (masks[:, 0] > 0.5).to(torch.uint8).cpu().numpy()
    return [coco_mask.encode(np.asfortranarray(one)) for one in drawn]
