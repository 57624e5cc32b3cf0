"""ResNet weights in detectron2's layout: a pickle of arrays under its own names.

`conv1` and `bn1` become `stem.conv1` and its `norm`, `layer1..4` become `res2..5`, a block's BatchNorms the
`norm` of their convolutions, its `downsample` the `shortcut`. Source: reference,
detection/convert-pretrain.py, and detectron2's ResNet.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

# Those of detectron2's build_resnet_backbone; it has no other kind.
DETECTRON2_NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# What the paper's transfer sets (part A.1): BN trained and synchronised, nothing frozen, stride in the 3x3.
CONFIG_LINES = """MODEL:
  WEIGHTS: "{file_name}"
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  BACKBONE:
    FREEZE_AT: 0
  RESNETS:
    DEPTH: {depth}
    NORM: "SyncBN"
    STRIDE_IN_1X1: False
INPUT:
  FORMAT: "RGB"
"""


def detectron2_name(name: str) -> str | None:
    """A backbone's tensor under detectron2's name; None: detectron2 keeps no such tensor."""
    if name.endswith("num_batches_tracked"):
        return None
    stage = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", name)
    place, rest = (f"res{int(stage[1]) + 1}.{stage[2]}", stage[3]) if stage else ("stem", name)
    rest = re.sub(r"^bn(\d)\.", r"conv\1.norm.", rest)
    rest = rest.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return f"{place}.{rest}"


def write_detectron2(weights: dict[str, Tensor], path: Path) -> None:
    """Write the backbone's weights; detectron2 finds them by name."""
    named = {detectron2_name(name): tensor.numpy() for name, tensor in weights.items()}
    named.pop(None, None)
    # matching_heuristics would let detectron2 guess at names; these are exact.
    about = {"model": named, "__author__": "linerate", "matching_heuristics": False}
    with path.open("wb") as file:
        pickle.dump(about, file, protocol=4)


def expected_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of detectron2's own backbone of this depth, written out from its structure."""
    depths = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
    depth = depth_of(name)
    bottleneck = depth >= 50
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(place: str, out: int, into: int, side: int) -> None:
        shapes[f"{place}.weight"] = (out, into, side, side)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{place}.norm.{part}"] = (out,)

    conv("stem.conv1", 64, 3, 7)
    into = 64
    for stage, blocks in enumerate(depths[depth]):
        narrow = 64 * 2**stage
        out = 4 * narrow if bottleneck else narrow
        for block in range(blocks):
            place = f"res{stage + 2}.{block}"
            if bottleneck:
                conv(f"{place}.conv1", narrow, into, 1)
                conv(f"{place}.conv2", narrow, narrow, 3)
                conv(f"{place}.conv3", out, narrow, 1)
            else:
                conv(f"{place}.conv1", out, into, 3)
                conv(f"{place}.conv2", out, out, 3)
            if into != out:
                conv(f"{place}.shortcut", out, into, 1)
            into = out
    return shapes


def depth_of(name: str) -> int:
    """50 of resnet50."""
    return int(name.removeprefix("resnet"))


def load_detectron2(name: str, path: Path) -> nn.Module:
    """torchvision's network with the weights of such a file, read back by a map of its own.

    Raises RuntimeError where a tensor is not one of detectron2's backbone, or one of its is missing.
    """
    # The file was written a moment ago by us: its pickle holds arrays alone.
    with path.open("rb") as file:
        arrays: dict[str, np.ndarray[Any, Any]] = pickle.load(file)["model"]
    found = {key: array.shape for key, array in arrays.items()}
    if found != (wanted := expected_shapes(name)):
        odd = sorted(found.items() ^ wanted.items())[:3]
        raise RuntimeError(f"not the tensors of detectron2's {name}: {odd}; a defect of ours")
    model: nn.Module = getattr(torchvision.models, name)()
    own = model.state_dict()
    for target in own:
        if target.startswith("fc.") or target.endswith("num_batches_tracked"):
            continue
        own[target] = torch.from_numpy(arrays[_source_of(target)])
    model.load_state_dict(own)
    model.fc = nn.Identity()
    return model


def _source_of(target: str) -> str:
    """Where detectron2 keeps torchvision's tensor, word by word."""
    words = target.split(".")
    place = ["stem"]
    if words[0].startswith("layer"):
        place = [f"res{int(words[0][5:]) + 1}", words[1]]
        words = words[2:]
    if words[0] == "downsample":
        module = ["shortcut"] if words[1] == "0" else ["shortcut", "norm"]
    elif words[0].startswith("bn"):
        module = [f"conv{words[0][2:]}", "norm"]
    else:
        module = [words[0]]
    return ".".join([*place, *module, words[-1]])
