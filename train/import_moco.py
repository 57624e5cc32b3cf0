"""Checkpoints in the layout of the official MoCo v1 and v2 code, as a run that every command here takes.

There `state_dict` holds `module.encoder_q.*` and `module.encoder_k.*` under torchvision's names, the head as
`fc` (v1: one linear layer) or `fc.0`, `fc.2` (v2: two), the queue as (C, K) and its pointer.
Source: reference, moco/builder.py and main_moco.py.
"""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from linerate.shards.errors import UserError
from linerate.train.checkpoint import Checkpoint, save_checkpoint
from linerate.train.config import TrainConfig
from linerate.train.config_json import write_config
from linerate.train.encoder import Encoder, build_encoder
from linerate.train.export import TORCHVISION_NAMES
from linerate.train.recipes import find_recipe

IMAGES_PER_EPOCH = 5004 * 256
_QUERY, _KEY = "module.encoder_q.", "module.encoder_k."


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What was found in the file, and the run that was made of it."""

    encoder: str
    head: str
    dim: int
    num_keys: int | None
    """K of the queue in the file; None: it has none."""
    epoch: int
    num_tensors: int
    """Of the query encoder."""
    recipe: str
    run: Path
    checkpoint: Path


def import_checkpoint(path: Path, *, run: Path, encoder: str | None = None) -> ImportReport:
    """Write the run folder `run` with one checkpoint: both encoders, the queue, and the recipe's config.

    encoder: a name of torchvision's ResNets; None: what the file says under `arch`. A file without the key
    encoder (weights that were published stripped) gets the query encoder's in its place.
    Raises UserError where the file is no such checkpoint, a tensor is missing, too much or of another shape,
    or `run` holds something.
    """
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"--run {run} holds something already; name an empty or new folder")
    state, about = _load(path)
    name = encoder or about.get("arch")
    if not isinstance(name, str):
        raise UserError(f"{path} does not say which encoder it holds; give --encoder, as resnet50")
    if name not in TORCHVISION_NAMES:
        raise UserError(f"encoder={name} is none of torchvision's; there are {', '.join(TORCHVISION_NAMES)}")
    query = _of(state, _QUERY)
    config = _config(query, state, encoder=name, path=path)
    built = build_encoder(name, dim=config.model.dim, head=config.model.head)
    query = _fitted(query, built, encoder_name=name, path=path)
    key = _of(state, _KEY)
    key = _fitted(key, built, encoder_name=name, path=path) if key else query
    epoch = about.get("epoch", 0)
    epoch = epoch if type(epoch) is int and epoch >= 0 else 0
    images = epoch * IMAGES_PER_EPOCH
    checkpoint = Checkpoint(
        step=images // config.optim.global_batch,
        epoch=epoch,
        images=images,
        config=config,
        trained_on=None,
        moco={
            **{f"query_encoder.{name}": tensor for name, tensor in query.items()},
            **{f"key_encoder.{name}": tensor for name, tensor in key.items()},
            **_queue(state, config),
        },
        optimizer={},
        rng={"cpu": torch.get_rng_state()},
    )
    saved = save_checkpoint(run / "checkpoints", checkpoint, keep=1)
    write_config(config, run / "config.json")
    return ImportReport(
        encoder=name,
        head=config.model.head,
        dim=config.model.dim,
        num_keys=_num_keys(state),
        epoch=epoch,
        num_tensors=len(query),
        recipe=config.recipe,
        run=run,
        checkpoint=saved,
    )


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and what else is in the file. No code of the file runs."""
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; name the checkpoint file in it, as moco_v2_200ep_pretrain.pth.tar"
        )
    if not path.is_file():
        raise UserError(f"{path} is not there; name a checkpoint file, as moco_v2_200ep_pretrain.pth.tar")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise UserError(f"{path} is cut short or no checkpoint ({type(error).__name__})") from None
    about = loaded if isinstance(loaded, dict) else {}
    state = about.get("state_dict", about)
    if not isinstance(state, dict) or not any(str(name).startswith(_QUERY) for name in state):
        raise UserError(
            f"{path} has no {_QUERY}* weights, as MoCo's official checkpoints have; weights of another "
            "layout are not known here"
        )
    odd = [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]
    if odd:
        raise UserError(
            f"{path} holds something else than a tensor under {odd[0]}; it is no checkpoint of MoCo"
        )
    return state, about


def _of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _num_keys(state: dict[str, Tensor]) -> int | None:
    queue = state.get("module.queue")
    return queue.shape[1] if queue is not None and queue.ndim == 2 else None


def _config(query: dict[str, Tensor], state: dict[str, Tensor], *, encoder: str, path: Path) -> TrainConfig:
    """The recipe that such a file is of: a head of two layers is v2's."""
    last = "fc.2.weight" if "fc.2.weight" in query else "fc.weight"
    if last not in query or query[last].ndim != 2:
        raise UserError(f"{path} has no {_QUERY}fc: the head to C dimensions is missing")
    config = find_recipe("in1m-v2" if last == "fc.2.weight" else "in1m-v1").build()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, encoder=encoder, dim=query[last].shape[0]),
        dictionary=dataclasses.replace(
            config.dictionary, num_keys=_num_keys(state) or config.dictionary.num_keys
        ),
    )


def _fitted(
    weights: dict[str, Tensor], encoder: Encoder, *, encoder_name: str, path: Path
) -> dict[str, Tensor]:
    """The weights under our names: torchvision's for the backbone, `fc` is the head."""
    ours = {
        f"head{name.removeprefix('fc')}" if name.startswith("fc.") else f"backbone.{name}": tensor
        for name, tensor in weights.items()
    }
    wanted = encoder.state_dict()
    for name in [*wanted, *ours]:
        here, there = wanted.get(name), ours.get(name)
        if here is None or there is None or here.shape != there.shape:
            shown = "absent" if there is None else str(tuple(there.shape))
            needed = "nothing" if here is None else str(tuple(here.shape))
            raise UserError(
                f"{path} does not hold a {encoder_name}: {name} is {shown} there, {needed} is wanted; "
                "give the --encoder that it is of"
            )
    return {name: ours[name].to(tensor.dtype) for name, tensor in wanted.items()}


def _queue(state: dict[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """Our queue's rows and count; of a file without a queue, one that holds no key yet."""
    size, dim = config.dictionary.num_keys, config.model.dim
    queue, pointer = state.get("module.queue"), state.get("module.queue_ptr")
    if queue is None or queue.shape != (dim, size):
        generator = torch.Generator().manual_seed(config.seed)
        return {
            "dictionary.keys": normalize(torch.randn(size, dim, generator=generator)),
            "dictionary.num_enqueued": torch.zeros((), dtype=torch.int64),
        }
    first = int(pointer.flatten()[0]) if pointer is not None and pointer.numel() else 0
    return {
        "dictionary.keys": queue.T.float().contiguous(),
        "dictionary.num_enqueued": torch.tensor(size + first % size),
    }
