"""The query encoder's weights for other libraries, each checked by loading it there again.

`torchvision`, `timm` and `detectron2` get the backbone under their own names, `safetensors` the whole encoder
under ours. detectron2 itself is not needed: its file is read back into torchvision's network.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from linerate.shards.errors import UserError
from linerate.shards.terminal import make_parent
from linerate.train.checkpoint import TrainedEncoder, write_state
from linerate.train.detectron2_names import (
    DETECTRON2_NAMES,
    detectron2_name,
    load_detectron2,
    write_detectron2,
)
from linerate.train.encoder import build_encoder
from linerate.train.model_card import model_card

Target = Literal["torchvision", "timm", "detectron2", "safetensors"]
TOLERANCE = 1e-5

TORCHVISION_NAMES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written, and how far the other library's features are from ours."""

    target: str
    out: Path
    card: Path
    num_tensors: int
    num_parameters: int
    max_difference: float
    """Largest difference of a feature, relative to the largest feature; at most TOLERANCE."""


def export_encoder(trained: TrainedEncoder, *, target: Target, out: Path) -> ExportReport:
    """Write the weights and a model card; check that the target's library gives the same features.

    `out` exists only if the check passed. Raises UserError where the target has no such network.
    """
    load = _loader(trained, target)
    as_safetensors = out.suffix == ".safetensors"
    if target == "safetensors" and not as_safetensors:
        raise UserError(f"--out {out} does not end in .safetensors; name it {out.stem}.safetensors")
    if target == "detectron2" and out.suffix != ".pkl":
        raise UserError(
            f"--out {out} does not end in .pkl, by which detectron2 knows it; name it {out.stem}.pkl"
        )
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it")
    weights = (
        trained.encoder.state_dict() if target == "safetensors" else trained.encoder.backbone.state_dict()
    )
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    num_tensors = len(weights)
    if target == "detectron2":
        num_tensors = sum(detectron2_name(name) is not None for name in weights)
    make_parent(out)
    temporary = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        try:
            _write(weights, temporary, trained, target=target, as_safetensors=as_safetensors)
        except OSError as error:
            why = error.strerror or str(error)
            raise UserError(f"--out {out} cannot be written ({why}); name another") from error
        difference = _difference(trained, load(temporary))
        if not difference <= TOLERANCE:  # NaN is no small difference
            raise RuntimeError(f"{target} gives features that differ by {difference:.2e}: a defect of ours")
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    report = ExportReport(
        target=target,
        out=out,
        card=out.with_name(f"{out.name}.md"),
        num_tensors=num_tensors,
        num_parameters=sum(parameter.numel() for parameter in trained.encoder.backbone.parameters()),
        max_difference=difference,
    )
    card = model_card(
        trained,
        target=target,
        file_name=out.name,
        num_parameters=report.num_parameters,
        max_difference=difference,
    )
    report.card.write_text(card, encoding="utf-8")
    return report


def _loader(trained: TrainedEncoder, target: Target) -> Callable[[Path], nn.Module]:
    """Builds the target library's network, its weights from a file: normalised images -> features."""
    model = trained.config.model
    name, stem = model.encoder, model.stem
    if target == "safetensors":
        return lambda path: _load_own(trained, path)
    if stem != "imagenet":
        raise UserError(f"{target} has no {name} with stem={stem}; export it with --to safetensors")
    if target == "torchvision":
        if name not in TORCHVISION_NAMES:
            raise UserError(
                f"torchvision has no {name}; it has {', '.join(TORCHVISION_NAMES)}: "
                f"use --to {'timm' if timm.is_model(name) else 'safetensors'}"
            )
        return lambda path: _load_torchvision(name, path)
    if target == "detectron2":
        if name not in DETECTRON2_NAMES:
            raise UserError(
                f"detectron2 has no {name}; it has {', '.join(DETECTRON2_NAMES)}: use --to safetensors"
            )
        return lambda path: load_detectron2(name, path)
    if not timm.is_model(name):
        raise UserError(f"timm has no {name}; export it with --to safetensors")
    return lambda path: timm.create_model(name, num_classes=0, checkpoint_path=str(path))


def _load_torchvision(name: str, path: Path) -> nn.Module:
    model: nn.Module = getattr(torchvision.models, name)()
    missing, unexpected = model.load_state_dict(_read(path), strict=False)
    if unexpected or missing != ["fc.weight", "fc.bias"]:
        raise RuntimeError(f"torchvision's {name} lacks {unexpected} and misses {missing}: a defect of ours")
    model.fc = nn.Identity()
    return model


def _load_own(trained: TrainedEncoder, path: Path) -> nn.Module:
    model = trained.config.model
    encoder = build_encoder(model.encoder, dim=model.dim, head=model.head, stem=model.stem)
    encoder.load_state_dict(_read(path))
    return encoder.backbone


def _write(
    weights: dict[str, Tensor], path: Path, trained: TrainedEncoder, *, target: Target, as_safetensors: bool
) -> None:
    if target == "detectron2":
        write_detectron2(weights, path)
    elif as_safetensors:
        about = {"format": "pt", "encoder": trained.config.model.encoder, "recipe": trained.config.recipe}
        path.write_bytes(safetensors.torch.save(weights, metadata={**about, "step": str(trained.step)}))
    else:
        with path.open("wb") as file:
            write_state(weights, file)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return dict(safetensors.torch.load_file(path))
    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


@torch.inference_mode()
def _difference(trained: TrainedEncoder, other: nn.Module) -> float:
    generator = torch.Generator().manual_seed(0)
    # The size of training: some of timm's networks take images of one size alone.
    size = trained.config.views.size
    images = torch.randn(2, 3, size, size, generator=generator)
    ours, theirs = trained.encoder.backbone.eval()(images), other.eval()(images)
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12))
