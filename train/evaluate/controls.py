"""What an encoder has to beat: the pixels themselves, and the same encoder before it learned anything."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from linerate.train.config import TrainConfig
from linerate.train.encoder import Encoder, build_encoder

PIXEL_SIDE = 32
MID_GREY = 120.0


def raw_pixels(images: Tensor) -> Tensor:
    """(n, 3 * 32 * 32) float32: the images (n, 3, S, S) uint8, shrunk by area, less mid-grey.

    What is subtracted decides how good a control this is, since kNN compares directions. On CIFAR-10 (10,000
    images vote, 2,000 are judged, k 200) nothing gives 27.6 %, each image's own mean colour 34.3 %, mid-grey
    36.3 %: the strongest is taken.
    """
    pixels = images.float() - MID_GREY
    if pixels.shape[-1] > PIXEL_SIDE:
        pixels = functional.interpolate(pixels, size=(PIXEL_SIDE, PIXEL_SIDE), mode="area")
    return pixels.flatten(1)


def untrained_encoder(config: TrainConfig) -> Encoder:
    """The encoder of a run before its first step. Leaves torch's generator as it was."""
    model = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_encoder(model.encoder, dim=model.dim, head=model.head, stem=model.stem)


@torch.no_grad()
def calibrate_bn(encoder: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running BN statistics to the mean over the batches and leave the encoder in eval mode.

    An untrained encoder still has the statistics it was born with, 0 and 1. With them it is a worse control
    than random weights deserve: 35 % against 94 % on three classes of flat, striped and noisy images.
    """
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for the plain mean over all batches
    encoder.train()
    for images in batches:
        encoder(images)
    encoder.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
