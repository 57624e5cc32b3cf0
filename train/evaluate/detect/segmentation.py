"""Semantic segmentation by FCN-16s on Pascal VOC's layout. Source: MoCo A.5.

JPEGImages/NAME.jpg, SegmentationClass/NAME.png (a class number a pixel, 255 for none),
ImageSets/Segmentation/SPLIT.txt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import functional as transforms

from linerate.shards.errors import UserError
from linerate.train.evaluate.detect.annotations import Findings
from linerate.train.evaluate.detect.backbones import Stages, channels_of, dilate
from linerate.train.evaluate.detect.batches import Item, Target
from linerate.train.evaluate.detect.job import Job
from linerate.train.evaluate.detect.networks import MEAN, STD
from linerate.train.evaluate.detect.voc_layout import split_file

UNLABELLED = 255
_HEAD_CHANNELS = 256
_HEAD_DILATION = 6
_SCALES = (0.5, 2.0)
_FIRST_CHECKED = 16


@dataclass(frozen=True)
class MaskedSet:
    """Images with a class for each pixel."""

    pairs: tuple[tuple[Path, Path], ...]
    """Image and mask."""
    findings: Findings


def read_masks(roots: Sequence[Path], split: str, *, num_classes: int) -> MaskedSet:
    """The split of one folder or several. Raises UserError where there is none, or classes are too few."""
    findings, pairs = Findings(), []
    for root in roots:
        for line in split_file(root, split, kind="Segmentation").read_text(encoding="utf-8").split():
            pair = root / "JPEGImages" / f"{line}.jpg", root / "SegmentationClass" / f"{line}.png"
            missing = [
                what for what, path in zip(("images", "masks"), pair, strict=True) if not path.is_file()
            ]
            if missing:
                findings.add(f"missing {' and '.join(missing)}, left out", line)
            else:
                pairs.append(pair)
    if not pairs:
        told = "; ".join(findings.lines()) or "the list is empty"
        raise UserError(
            f"no image of {split} in {', '.join(map(str, roots))} has a mask: {told}; name another split"
        )
    for _, mask in pairs[:_FIRST_CHECKED]:
        try:
            _load_mask(mask, num_classes)
        except (OSError, ValueError) as error:
            raise UserError(f"{error}; give --num-classes, background included, or mend the mask") from None
    return MaskedSet(tuple(pairs), findings)


def _load_mask(path: Path, num_classes: int) -> Tensor:
    with Image.open(path) as opened:
        if opened.mode not in ("P", "L"):
            raise ValueError(f"{path} holds colours ({opened.mode}), not a class number a pixel")
        mask = torch.from_numpy(np.array(opened))
    strange = mask[(mask >= num_classes) & (mask != UNLABELLED)]
    if strange.numel():
        raise ValueError(f"{path} has class {int(strange[0])}, which is not below {num_classes}")
    return mask


class SegmentationSource:
    """Images of a masked set; when drawn, scaled by 0.5 .. 2, flipped half of the time and cropped."""

    def __init__(self, masked: MaskedSet, *, num_classes: int, crop: int) -> None:
        self.masked, self.num_classes, self.crop = masked, num_classes, crop

    def __len__(self) -> int:
        return len(self.masked.pairs)

    def load(self, index: int, draws: np.random.Generator | None) -> tuple[Tensor, Target]:
        """(3, H, W) float32 in 0 .. 1 and {"classes": (H, W) uint8}. Raises OSError, ValueError."""
        path, mask_path = self.masked.pairs[index]
        with Image.open(path) as opened:
            image = transforms.pil_to_tensor(opened.convert("RGB")).float().div_(255)
        mask = _load_mask(mask_path, self.num_classes)
        if image.shape[1:] != mask.shape:
            raise ValueError(
                f"{mask_path} is of {tuple(mask.shape)} pixels, its image of {tuple(image.shape[1:])}"
            )
        if draws is not None:
            image, mask = self._augment(image, mask, draws)
        return image, {"classes": mask}

    def _augment(self, image: Tensor, mask: Tensor, draws: np.random.Generator) -> tuple[Tensor, Tensor]:
        scale = draws.uniform(*_SCALES)
        size = [max(1, round(side * scale)) for side in mask.shape]
        image = functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
        mask = functional.interpolate(mask[None, None], size=size, mode="nearest")[0, 0]
        if draws.random() < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        below, right = (max(0, self.crop - side) for side in size)
        # Grown by the mean colour, which is 0 to the network, and by pixels of no class.
        grown = torch.tensor(MEAN).view(3, 1, 1).repeat(1, size[0] + below, size[1] + right)
        grown[:, : size[0], : size[1]] = image
        classes = functional.pad(mask, (0, right, 0, below), value=UNLABELLED)
        top, left = (int(draws.integers(0, side - self.crop + 1)) for side in classes.shape)
        window = (slice(top, top + self.crop), slice(left, left + self.crop))
        return grown[:, window[0], window[1]].contiguous(), classes[window].contiguous()


class Fcn16(nn.Module):
    """FCN-16s: conv5 dilated by 2, two 3x3 convolutions of 256 dilated by 6, each with BN, and a classifier.

    In training (images of one size, targets) -> losses, else images -> list of (H, W) classes.
    """

    def __init__(self, backbone: ResNet, *, num_classes: int) -> None:
        super().__init__()
        dilate(backbone.get_submodule("layer4"))
        self.body = Stages(backbone, first=4, last=4)
        layers: list[nn.Module] = []
        channels = channels_of(self.body)[0]
        for _ in range(2):
            dilation = _HEAD_DILATION
            conv = nn.Conv2d(channels, _HEAD_CHANNELS, 3, padding=dilation, dilation=dilation, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(_HEAD_CHANNELS), nn.ReLU(inplace=True)]
            channels = _HEAD_CHANNELS
        self.head = nn.Sequential(*layers, nn.Conv2d(_HEAD_CHANNELS, num_classes, kernel_size=1))

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        batch = transforms.normalize(torch.stack(images), mean=list(MEAN), std=list(STD))
        logits = self.head(self.body(batch)["0"])
        logits = functional.interpolate(logits, size=batch.shape[-2:], mode="bilinear", align_corners=False)
        if not self.training:
            return list(logits.argmax(dim=1))
        assert targets is not None
        classes = torch.stack([target["classes"] for target in targets]).long()
        losses = functional.cross_entropy(logits, classes, ignore_index=UNLABELLED, reduction="none")
        # A crop may lie wholly in what has no class: a mean over no pixel would be NaN.
        return {"loss_pixels": losses.sum() / (classes != UNLABELLED).sum().clamp(min=1)}


def segmentation_job(
    train: MaskedSet,
    test: MaskedSet,
    *,
    backbone: Callable[[int], ResNet],
    num_classes: int,
    crop: int,
) -> Job:
    """FCN-16s on the two sets; judged on whole images at their own size."""

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Fcn16(backbone(seed), num_classes=num_classes)

    def record(prediction: Tensor, item: Item) -> NDArray[np.int64]:
        return confusion(prediction.cpu(), item.target["classes"], num_classes=num_classes)

    return Job(
        build=build,
        train=SegmentationSource(train, num_classes=num_classes, crop=crop),
        test=SegmentationSource(test, num_classes=num_classes, crop=crop),
        record=record,
        judge=lambda counts: mean_iou(sum(counts.values(), np.zeros((num_classes, num_classes), np.int64))),
        norm_decay=1e-4,
    )


def confusion(predicted: Tensor, truth: Tensor, *, num_classes: int) -> NDArray[np.int64]:
    """(C, C) pixels by true and by predicted class; pixels of no class are left out."""
    known = truth != UNLABELLED
    cells = truth[known].long() * num_classes + predicted[known].long()
    counts: NDArray[np.int64] = torch.bincount(cells, minlength=num_classes**2).numpy()
    return counts.reshape(num_classes, num_classes)


def mean_iou(counts: NDArray[np.int64]) -> dict[str, float]:
    """mIoU over the classes that occur, and the share of right pixels, in percent."""
    right, true, said = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    present = true > 0
    if not present.any():
        return {"mIoU": float("nan"), "pixel_accuracy": float("nan")}
    iou = right[present] / (true + said - right)[present]
    return {
        "mIoU": float(100 * iou.mean()),
        "pixel_accuracy": float(100 * right.sum() / true.sum()),
        "classes_without_pixels": float((~present).sum()),
    }
