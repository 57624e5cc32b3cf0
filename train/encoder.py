"""The encoder f: uint8 images -> normalised floats -> backbone -> pooled features -> projection.

Legend: N images, S pixels a side, F dimensions of a feature, C of a projection.
Names: `resnet50` and any other of timm's; our own `resnet50-w2x`, `resnet50-w4x` (every channel doubled or
quadrupled, the stem too) and `resnext50-32x8d` of the paper's Table 1; `tiny-resnet` and `tiny-resnet-w16`
(any width) for images of some 32 pixels.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any, Literal

import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, make_blocks
from torch import Tensor, nn
from torch.nn.functional import conv2d

from linerate.shards.errors import UserError

Head = Literal["linear", "mlp"]
Stem = Literal["imagenet", "cifar"]
Block = type[BasicBlock] | type[Bottleneck]

# Means and standard deviations of ImageNet's channels, in grey levels.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)
_TINY = re.compile(r"tiny-resnet(?:-w(\d+))?")
_TINY_WIDTH = 24


class Encoder(nn.Module):
    """forward: (N, 3, S, S) uint8 -> (N, C), not yet on the unit sphere. `features`: -> (N, F)."""

    def __init__(self, backbone: nn.Module, head: nn.Module, *, num_features: int, dim: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.num_features, self.dim = num_features, dim
        std = torch.tensor(_STD).view(1, 3, 1, 1)
        self.register_buffer("_scale", 1.0 / std, persistent=False)
        self.register_buffer("_shift", -torch.tensor(_MEAN).view(1, 3, 1, 1) / std, persistent=False)

    def require_size(self, size: int) -> None:
        """Raise UserError where the backbone takes square images of another side alone, as ViTs do."""
        about = getattr(self.backbone, "pretrained_cfg", None) or {}
        if about.get("fixed_input_size") and about["input_size"][1:] != (size, size):
            height, width = about["input_size"][1:]
            raise UserError(
                f"this encoder takes images of {height}x{width} pixels alone, not of size={size}; "
                f"give --size {height}, or an encoder that takes any size, as a ResNet"
            )

    def features(self, images: Tensor) -> Tensor:
        """(N, F) pooled features of the backbone, before the head.

        images: uint8; floating-point images count as normalised already.
        """
        if not images.is_floating_point():
            # One operation: cast, subtract the mean, divide by the deviation; strides stay channels_last.
            images = torch.addcmul(self._shift, images, self._scale)  # type: ignore[arg-type]
        return self.backbone(images)  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))  # type: ignore[no-any-return]


def build_encoder(name: str, *, dim: int = 128, head: Head = "linear", stem: Stem = "imagenet") -> Encoder:
    """A randomly initialised encoder, as torch's generator stands.

    head: linear is MoCo v1's, mlp (one hidden layer of F, ReLU) v2's. stem: cifar puts a 3x3 convolution of
    stride 1 in the place of 7x7 stride 2 and max-pool. Under `torch.device("meta")` it costs no memory.
    Raises UserError for a name that is unknown, with the nearest, or that cannot take the stem.
    """
    if dim < 1:
        raise UserError(f"dim={dim} must be at least 1; MoCo's is 128")
    backbone = _build_backbone(name)
    _keep_from_strided_pointwise(backbone)
    if stem == "cifar":
        _put_cifar_stem(backbone, name)
    # Some of timm's models put a layer between the pooled features and the classifier; theirs come first.
    num_features = int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore[arg-type]
    return Encoder(backbone, _build_head(head, num_features, dim), num_features=num_features, dim=dim)


def _build_head(head: Head, num_features: int, dim: int) -> nn.Module:
    last = nn.Linear(num_features, dim)
    if head == "linear":
        return last
    return nn.Sequential(nn.Linear(num_features, num_features), nn.ReLU(inplace=True), last)


def _build_backbone(name: str) -> nn.Module:
    if tiny := _TINY.fullmatch(name):
        return _tiny_resnet(int(tiny[1] or _TINY_WIDTH))
    if name in _OURS:
        return _OURS[name]()
    if not timm.is_model(name):
        raise _unknown(name)
    # zero_init_last is timm's default for ResNets, not the paper's: there every BN starts with weight 1.
    options: dict[str, Any] = {"num_classes": 0}
    if timm.models.is_model_in_modules(name, ["resnet"]):
        options["zero_init_last"] = False
    return timm.create_model(name, **options)


def _unknown(name: str) -> UserError:
    # The names are 1,300: only the nearest belong on a line.
    close = difflib.get_close_matches(name, [*_OURS, "tiny-resnet", *timm.list_models()], n=3)
    meant = f"; did you mean {' or '.join(close)}?" if close else "."
    return UserError(
        f"encoder={name} is not known{meant} Give tiny-resnet, {', '.join(_OURS)}, or any name of "
        "timm.list_models(), as resnet50"
    )


def wide_resnet50(width: int) -> ResNet:
    """ResNet-50 with every channel times `width`, the stem's 64 and the 2048 features included.

    timm's and torchvision's plain stems stay 64 wide, and `wide_resnet50_2` widens only the 3x3
    convolutions: neither is the network of MoCo's Table 1.
    """
    channels = tuple(width * c for c in (64, 128, 256, 512))
    return _resnet(Bottleneck, (3, 4, 6, 3), channels, stem_width=64 * width)


def _tiny_resnet(width: int) -> ResNet:
    """One basic block a stage, `width` channels doubling over four stages: 0.69 M parameters at 24."""
    if width < 1:
        raise UserError(f"tiny-resnet-w{width} has no channels; the smallest is tiny-resnet-w1")
    return _resnet(BasicBlock, (1, 1, 1, 1), tuple(width * 2**i for i in range(4)), stem_width=width)


def _resnet(block: Block, layers: tuple[int, ...], channels: tuple[int, ...], *, stem_width: int) -> ResNet:
    """timm's ResNet with a plain stem of any width: stem and stages, which read its width, are made anew."""
    net = ResNet(block, layers, channels=channels, num_classes=0, zero_init_last=False)  # type: ignore[arg-type]
    net.conv1 = nn.Conv2d(3, stem_width, kernel_size=7, stride=2, padding=3, bias=False)  # type: ignore[assignment]
    net.bn1 = nn.BatchNorm2d(stem_width)
    stages, _ = make_blocks(
        (block,) * len(layers), channels, layers, stem_width, act_layer=nn.ReLU, norm_layer=nn.BatchNorm2d
    )
    for name, stage in stages:
        setattr(net, name, stage)
    net.init_weights(zero_init_last=False)
    return net


class _SlicedPointwise(nn.Conv2d):
    """A strided 1x1 convolution as a plain one of every stride-th pixel: the same sums."""

    def forward(self, input: Tensor) -> Tensor:
        down, right = self.stride
        return conv2d(input[..., ::down, ::right], self.weight, self.bias, groups=self.groups)


# oneDNN's vectors hold up to 16 channels. With fewer, its weight gradient of a strided 1x1 convolution over
# channels_last pixels writes past a buffer: wrong gradients, or the process dies (uxlfoundation/oneDNN#6035).
_VECTOR_CHANNELS = 16


def _keep_from_strided_pointwise(backbone: nn.Module) -> None:
    for module in backbone.modules():
        if (
            type(module) is nn.Conv2d
            and module.kernel_size == (1, 1)
            and module.padding in ((0, 0), 0)
            and module.stride != (1, 1)
            and module.in_channels // module.groups < _VECTOR_CHANNELS
        ):
            module.__class__ = _SlicedPointwise


def _put_cifar_stem(backbone: nn.Module, name: str) -> None:
    conv = getattr(backbone, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not isinstance(getattr(backbone, "maxpool", None), nn.Module):
        raise UserError(
            f"encoder={name} has no plain ResNet stem to replace; give stem=imagenet, or a ResNet"
        )
    backbone.conv1 = nn.Conv2d(3, conv.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.maxpool = nn.Identity()


_OURS: dict[str, Callable[[], ResNet]] = {
    "resnet50-w2x": lambda: wide_resnet50(2),
    "resnet50-w4x": lambda: wide_resnet50(4),
    "resnext50-32x8d": lambda: ResNet(
        Bottleneck,  # type: ignore[arg-type]
        (3, 4, 6, 3),
        cardinality=32,
        base_width=8,
        num_classes=0,
        zero_init_last=False,
    ),
}
