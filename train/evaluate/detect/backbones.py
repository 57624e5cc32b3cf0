"""A trained ResNet, cut into the stages that detectors and segmenters take."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from linerate.shards.errors import UserError
from linerate.train.checkpoint import TrainedEncoder
from linerate.train.evaluate.controls import untrained_encoder


def initial_backbone(trained: TrainedEncoder, init: str, *, seed: int) -> ResNet:
    """The run's network with the weights that `init` names.

    init: run, random (drawn anew by the seed), or a file with torchvision's names, as of a supervised
    ResNet. Raises UserError for an encoder that is no ResNet, or a file that does not fit it.
    """
    name = trained.config.model.encoder
    if init == "run":
        backbone = copy.deepcopy(trained.encoder.backbone)
    else:
        backbone = untrained_encoder(dataclasses.replace(trained.config, seed=seed)).backbone
        if init != "random":
            load_torchvision(backbone, Path(init), encoder=name)
    if not isinstance(backbone, ResNet):
        raise UserError(
            f"encoder={name} is no ResNet, whose stages conv2 .. conv5 detectors take; name a run of one"
        )
    return backbone


def load_torchvision(backbone: nn.Module, path: Path, *, encoder: str) -> None:
    """Fill the backbone from a state dict with torchvision's names; its classifier is left out.

    Raises UserError where there is no file, it is no state dict, or it is of another network.
    """
    if not path.is_file():
        raise UserError(
            f"--init {path} is neither `run`, `random` nor a file; name a state dict of torchvision"
        )
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise UserError(
            f"--init {path} cannot be read ({type(error).__name__}); save a state dict there"
        ) from None
    except Exception as error:  # safetensors has an error class of its own, below Exception
        if type(error).__module__.partition(".")[0] not in ("safetensors", "safetensors_rust"):
            raise
        raise UserError(f"--init {path} is no file of safetensors; save a state dict there") from None
    if not isinstance(state, dict):
        raise UserError(f"--init {path} is no state dict; save model.state_dict() there")
    weights = {k: v for k, v in state.items() if not k.startswith("fc.")}
    try:
        backbone.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(
            f"--init {path} is not of a {encoder}: {first}; name the same network's weights"
        ) from None


class Stages(nn.Module):
    """forward: (N, 3, H, W) -> the maps of the stages from `first` to `last`, of 1 .. 4, as "0", "1" ..."""

    def __init__(self, backbone: ResNet, *, first: int, last: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(backbone.conv1, backbone.bn1, backbone.act1, backbone.maxpool)
        self.stages = nn.ModuleList(getattr(backbone, f"layer{nth}") for nth in range(1, last + 1))
        self.first = first

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = OrderedDict()
        rows = self.stem(images)
        for nth, stage in enumerate(self.stages, start=1):
            rows = stage(rows)
            if nth >= self.first:
                maps[str(nth - self.first)] = rows
        return maps


def dilate(stage: nn.Module, *, dilation: int = 2) -> None:
    """Make a stage of stride 2 one of stride 1 that sees as far: its 3x3 convolutions are dilated, in place.

    Raises UserError where it shrinks by something other than a convolution or a mean, as by a blur.
    """
    for name, child in list(stage.named_modules()):
        if isinstance(child, nn.AvgPool2d):
            parent, _, last = name.rpartition(".")
            setattr(stage.get_submodule(parent), last, nn.Identity())
        elif isinstance(child, nn.Conv2d):
            child.stride = (1, 1)
            if child.kernel_size == (3, 3):
                child.dilation, child.padding = (dilation, dilation), (dilation, dilation)
        elif getattr(child, "stride", 1) not in (1, (1, 1)) and not list(child.children()):
            raise UserError(
                f"this ResNet shrinks its last stage by {type(child).__name__}, which cannot be dilated; "
                "give --network c4 or fpn, or a plain ResNet"
            )


def channels_of(body: nn.Module) -> list[int]:
    """The channels of each map that the body gives, found by one small image."""
    training = body.training
    body.eval()
    with torch.no_grad():
        maps: Iterable[Tensor] = body(torch.zeros(1, 3, 64, 64)).values()
    body.train(training)
    return [int(one.shape[1]) for one in maps]
