"""All of a run's state in one file that is either whole or absent.

RUN/checkpoints/step-000001000.pt holds the state after 1,000 steps; the same name with .json is its config.
"""

from __future__ import annotations

import os
import pickle
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from linerate.shards.errors import UserError
from linerate.train.config import TrainConfig
from linerate.train.config_json import first_difference, from_plain, results_part, to_plain, write_config
from linerate.train.encoder import Encoder, build_encoder

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{9})\.pt")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What continues a run: plain data and tensors only, so that no code runs when it is loaded."""

    step: int
    """Steps that are done; the next one has this number."""
    epoch: int
    """The epoch that the next step belongs to."""
    images: int
    """Images seen so far."""
    config: TrainConfig
    """The config of the run that wrote it."""
    moco: dict[str, torch.Tensor]
    """Query encoder, key encoder, queue and pointer."""
    optimizer: dict[str, Any]
    """SGD's buffers."""
    rng: dict[str, torch.Tensor]
    """The states of torch's generators on the CPU and, where there was one, on the GPU."""


def checkpoint_name(step: int) -> str:
    """The file name of the checkpoint after that many steps."""
    return f"step-{step:09d}.pt"


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write the checkpoint, then drop all but the newest `keep`. A kill at any moment loses none of the old.

    Written under a temporary name, fsynced and renamed; the folder is fsynced too. Raises OSError (no disk,
    no permission) with the old checkpoints untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / checkpoint_name(checkpoint.step)
    state = {
        "format_version": FORMAT_VERSION,
        "versions": {name: version(name) for name in ("torch", "timm", "accelerate")},
        **{
            name: getattr(checkpoint, name)
            for name in ("step", "epoch", "images", "moco", "optimizer", "rng")
        },
        "config": to_plain(checkpoint.config),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_config(checkpoint.config, path.with_suffix(".json"))
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(folder)
    _drop_old(folder, keep=keep)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first; files under temporary names are none."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def load_newest(folder: Path) -> tuple[Checkpoint, list[str]] | None:
    """The newest checkpoint that is whole, and one line for each newer one that is not; None: there is none.

    Raises UserError for a checkpoint of a newer linerate.
    """
    broken: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return load_checkpoint(path), broken
        except _BrokenError as error:
            broken.append(str(error))
    if broken:
        raise UserError(f"{'; '.join(broken)}; no older one is whole: start again with another --run")
    return None


class _BrokenError(UserError):
    pass


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file, its tensors on the CPU.

    Raises UserError for a file that is no whole checkpoint, or one of a newer linerate.
    """
    damage = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError)
    with path.open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except damage as error:
            reason = type(error).__name__
            raise _BrokenError(f"{path} is cut short or no checkpoint ({reason})") from None
    if not isinstance(state, dict) or "format_version" not in state:
        raise _BrokenError(f"{path} is no checkpoint of linerate; it has no format_version")
    if state["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {state['format_version']}, this linerate reads {FORMAT_VERSION}; "
            "update linerate"
        )
    return Checkpoint(
        step=state["step"],
        epoch=state["epoch"],
        images=state["images"],
        config=from_plain(state["config"]),
        moco=state["moco"],
        optimizer=state["optimizer"],
        rng=state["rng"],
    )


def require_same_run(checkpoint: Checkpoint, config: TrainConfig, *, run_dir: Path) -> None:
    """Raise UserError, with the first field that differs, where the checkpoint is of another run."""
    difference = first_difference(results_part(config), results_part(checkpoint.config))
    if difference:
        raise UserError(
            f"{run_dir} holds another run: {difference}; name another --run, or give the value it has there"
        )


@dataclass(frozen=True, kw_only=True)
class TrainedEncoder:
    """The query encoder of a run, in eval mode on the CPU, and where it comes from."""

    encoder: Encoder
    config: TrainConfig
    step: int
    images: int
    path: Path
    """The checkpoint."""


def load_trained(run: Path | str) -> TrainedEncoder:
    """The query encoder of a run's newest whole checkpoint, or of the one checkpoint that `run` names.

    Raises UserError where there is none, or where its weights are not those of its config.
    """
    run = Path(run)
    if run.is_file():
        path, checkpoint = run, load_checkpoint(run)
    else:
        found = load_newest(run / "checkpoints")
        if found is None:
            raise UserError(f"{run} has no checkpoint; name a folder that `linerate train ... --run` made")
        checkpoint = found[0]
        path = run / "checkpoints" / checkpoint_name(checkpoint.step)
    model = checkpoint.config.model
    encoder = build_encoder(model.encoder, dim=model.dim, head=model.head, stem=model.stem)
    prefix = "query_encoder."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint.moco.items() if k.startswith(prefix)}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not hold a {model.encoder}: {first}; name another checkpoint") from None
    return TrainedEncoder(
        encoder=encoder.eval(),
        config=checkpoint.config,
        step=checkpoint.step,
        images=checkpoint.images,
        path=path,
    )


def load_encoder(run: Path | str) -> tuple[torch.nn.Module, TrainConfig]:
    """The backbone of a run, (N, 3, S, S) normalised float images -> (N, F), and the run's config."""
    trained = load_trained(run)
    return trained.encoder.backbone, trained.config


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _drop_old(folder: Path, *, keep: int) -> None:
    # What a killed run left half written goes too: one process writes, and it is here.
    for path in [*list_checkpoints(folder)[keep:], *folder.glob(".step-*.pt.*")]:
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
