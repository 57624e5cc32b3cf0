"""The paper's three detectors on torchvision's parts: R50-C4, R50-FPN and R50-dilated-C5.

Every BatchNorm is trained, those of the new layers too. Numbers are detectron2's where the paper's code uses
its defaults. torchvision differs from it in two: RoIAlign is not shifted by half a pixel, and the RPN's box
loss turns quadratic below 1/9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from linerate.train.evaluate.detect.backbones import Stages, channels_of, dilate

Network = Literal["c4", "fpn", "dilated-c5"]

# ImageNet's, of pixels in 0 .. 1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_SIZES = (32, 64, 128, 256, 512)
_RATIOS = (0.5, 1.0, 2.0)
_FPN_CHANNELS = 256
_C5_CHANNELS = 512
_FC_WIDTH = 1024
_MASK_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """What a detector is, but for its backbone."""

    network: Network
    num_classes: int
    """C, without the background."""
    masks: bool = False
    num_keypoints: int = 0
    """0: no keypoints. Needs the FPN."""
    train_sides: tuple[int, ...]
    """Short sides in pixels, one drawn for each image."""
    test_side: int
    max_side: int = 1333
    rois: int = 512
    """RoIs of an image that are trained on."""
    proposals: int = 1000
    """What the RPN hands over when judging, and with an FPN also in training."""
    detections: int = 100
    """At most, of an image."""


@dataclass(frozen=True)
class _Parts:
    """What differs between the networks."""

    backbone: nn.Module
    channels: int
    anchor_sizes: tuple[tuple[int, ...], ...]
    maps: list[str]
    """Names of the maps that RoIs are cut from."""
    head: dict[str, Any]
    """RoIHeads' arguments on boxes and masks."""
    rpn_before_nms: dict[str, int]
    rpn_after_nms: dict[str, int]


def build_detector(backbone: ResNet, options: DetectorOptions) -> GeneralizedRCNN:
    """A detector that owns the backbone: in training (images, targets) -> losses, else images -> detections.

    images: list of (3, H, W) float32 in 0 .. 1; targets: boxes (n, 4), labels (n,) in 1 .. C, with masks
    (n, H, W) uint8 and keypoints (n, K, 3) where they are asked for.
    """
    parts = _BUILDERS[options.network](backbone, options)
    anchors = AnchorGenerator(parts.anchor_sizes, (_RATIOS,) * len(parts.anchor_sizes))
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(parts.channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n=parts.rpn_before_nms,
        post_nms_top_n=parts.rpn_after_nms,
        nms_thresh=0.7,
    )
    heads = _SharedRoIHeads if options.network == "c4" and options.masks else RoIHeads
    roi_heads = heads(
        **parts.head,
        **_keypoint_head(parts, options),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=options.rois,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=options.detections,
    )
    transform = GeneralizedRCNNTransform(options.train_sides, options.max_side, MEAN, STD)
    return GeneralizedRCNN(parts.backbone, rpn, roi_heads, _SidesOfItsOwn(transform, options.test_side))


class _SidesOfItsOwn(nn.Module):
    """torchvision's transform judges at the last of the training sides; this one at a side of its own."""

    def __init__(self, transform: GeneralizedRCNNTransform, test_side: int) -> None:
        super().__init__()
        self.inner = transform
        self.train_sides, self.test_sides = transform.min_size, (test_side,)

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        self.inner.min_size = self.train_sides if self.training else self.test_sides
        return self.inner(images, targets)

    def postprocess(self, *words: Any) -> Any:
        return self.inner.postprocess(*words)


def _build_c4(backbone: ResNet, options: DetectorOptions) -> _Parts:
    """RoIs are cut from conv4 at 14x14; conv5 is their head, with one more BN after it, then the mean."""
    body = Stages(backbone, first=3, last=3)
    (channels,) = channels_of(body)
    head = _Conv5Head(
        backbone.get_submodule("layer4"),
        channels_of(Stages(backbone, first=4, last=4))[0],
        keep=options.masks,
    )
    roi: dict[str, Any] = {
        "box_roi_pool": MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0),
        "box_head": head,
        "box_predictor": FastRCNNPredictor(head.channels, options.num_classes + 1),
    }
    if options.masks:
        roi["mask_roi_pool"] = _SharedPool(roi["box_roi_pool"])
        roi["mask_head"] = nn.Identity()  # _SharedRoIHeads has conv5's maps already
        roi["mask_predictor"] = MaskRCNNPredictor(head.channels, _MASK_WIDTH, options.num_classes + 1)
    return _Parts(
        backbone=_with_channels(body, channels),
        channels=channels,
        anchor_sizes=(_SIZES,),
        maps=["0"],
        head=roi,
        rpn_before_nms={"training": 12_000, "testing": 6000},
        rpn_after_nms={"training": 2000, "testing": options.proposals},
    )


def _build_fpn(backbone: ResNet, options: DetectorOptions) -> _Parts:
    """A pyramid over conv2 .. conv5 with BN in it; two fc; masks by four 3x3 convolutions with BN."""
    body = Stages(backbone, first=1, last=4)
    pyramid = FeaturePyramidNetwork(
        channels_of(body), _FPN_CHANNELS, extra_blocks=LastLevelMaxPool(), norm_layer=nn.BatchNorm2d
    )
    maps = ["0", "1", "2", "3"]
    return _Parts(
        backbone=_with_channels(nn.Sequential(body, pyramid), _FPN_CHANNELS),
        channels=_FPN_CHANNELS,
        anchor_sizes=tuple((size,) for size in _SIZES),
        maps=maps,
        head=_fc_heads(maps, _FPN_CHANNELS, options),
        rpn_before_nms={"training": 2000, "testing": 1000},
        rpn_after_nms={"training": options.proposals, "testing": options.proposals},
    )


def _build_dilated_c5(backbone: ResNet, options: DetectorOptions) -> _Parts:
    """conv5 with stride 1 and dilation 2, then a 3x3 convolution with BN to 512 channels; two fc."""
    dilate(backbone.get_submodule("layer4"))
    body = Stages(backbone, first=4, last=4)
    conv = nn.Conv2d(channels_of(body)[0], _C5_CHANNELS, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    reduce = nn.Sequential(conv, nn.BatchNorm2d(_C5_CHANNELS))
    return _Parts(
        backbone=_with_channels(nn.Sequential(body, _First(), reduce), _C5_CHANNELS),
        channels=_C5_CHANNELS,
        anchor_sizes=(_SIZES,),
        maps=["0"],
        head=_fc_heads(["0"], _C5_CHANNELS, options),
        rpn_before_nms={"training": 12_000, "testing": 6000},
        rpn_after_nms={"training": 2000, "testing": options.proposals},
    )


_BUILDERS = {"c4": _build_c4, "fpn": _build_fpn, "dilated-c5": _build_dilated_c5}


def _fc_heads(maps: list[str], channels: int, options: DetectorOptions) -> dict[str, Any]:
    roi: dict[str, Any] = {
        "box_roi_pool": MultiScaleRoIAlign(maps, output_size=7, sampling_ratio=0),
        "box_head": TwoMLPHead(channels * 7 * 7, _FC_WIDTH),
        "box_predictor": FastRCNNPredictor(_FC_WIDTH, options.num_classes + 1),
    }
    if options.masks:
        roi["mask_roi_pool"] = MultiScaleRoIAlign(maps, output_size=14, sampling_ratio=0)
        roi["mask_head"] = MaskRCNNHeads(channels, (_MASK_WIDTH,) * 4, 1, norm_layer=nn.BatchNorm2d)
        roi["mask_predictor"] = MaskRCNNPredictor(_MASK_WIDTH, _MASK_WIDTH, options.num_classes + 1)
    return roi


def _keypoint_head(parts: _Parts, options: DetectorOptions) -> dict[str, Any]:
    if not options.num_keypoints:
        return {}
    head = KeypointRCNNHeads(parts.channels, (512,) * 8)
    return {
        "keypoint_roi_pool": MultiScaleRoIAlign(parts.maps, output_size=14, sampling_ratio=2),
        "keypoint_head": head,
        "keypoint_predictor": KeypointRCNNPredictor(512, options.num_keypoints),
    }


def _with_channels(body: nn.Module, channels: int) -> nn.Module:
    body.out_channels = channels  # type: ignore[assignment]
    return body


class _First(nn.Module):
    """forward: a dictionary of maps -> the first of them."""

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        return next(iter(maps.values()))


class _Conv5Head(nn.Module):
    """forward: RoIs (R, channels of conv4, 14, 14) -> (R, channels of conv5), the mean over the place."""

    def __init__(self, conv5: nn.Module, channels: int, *, keep: bool) -> None:
        super().__init__()
        self.conv5, self.norm, self.channels, self.keep = conv5, nn.BatchNorm2d(channels), channels, keep
        self.kept: Tensor | None = None

    def maps(self, rois: Tensor) -> Tensor:
        """(R, channels of conv5, 7, 7)."""
        normed: Tensor = self.norm(self.conv5(rois))
        return normed

    def forward(self, rois: Tensor) -> Tensor:
        maps = self.maps(rois)
        self.kept = maps if self.keep and self.training else None
        return maps.mean((2, 3))


class _SharedPool(nn.Module):
    """Stands where RoIHeads cuts the masks' RoIs; _SharedRoIHeads ties it to the box head."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.owner: list[_SharedRoIHeads] = []  # in a list, for else it would count as a module inside

    def forward(
        self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]
    ) -> Tensor:
        return self.owner[0].mask_maps(features, boxes, shapes)


class _SharedRoIHeads(RoIHeads):  # type: ignore[misc]
    """Boxes and masks share conv5: in training its maps of the positive RoIs are used, not made again.

    A second pass would give its BN the statistics of positives alone, half of the time.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.mask_roi_pool.owner.append(self)

    def select_training_samples(self, proposals: Any, targets: Any) -> Any:
        selected = super().select_training_samples(proposals, targets)
        self.labels = selected[2]
        return selected

    def mask_maps(self, features: Any, boxes: list[Tensor], shapes: Any) -> Tensor:
        """conv5's maps of the boxes, which in training are the positive ones of those just classified."""
        if not self.training:
            return self.box_head.maps(self.box_roi_pool(features, boxes, shapes))  # type: ignore[no-any-return]
        kept, self.box_head.kept = self.box_head.kept, None
        return kept[torch.cat([labels > 0 for labels in self.labels])]  # type: ignore[no-any-return]
