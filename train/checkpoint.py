"""All of a run's state in one file that is either whole or absent.

RUN/checkpoints/step-000001000.pt holds the state after 1,000 steps; the same name with .json is its config.
One with a file .milestone beside it is never dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError, show_bytes
from linerate.train.config import TrainConfig
from linerate.train.config_json import first_difference, from_plain, results_part, to_plain, write_config
from linerate.train.encoder import Encoder, build_encoder

FORMAT_VERSION = 1
MILESTONE = ".milestone"
_NAME = re.compile(r"step-(\d{9})\.pt")


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """The shards of a run: with the seed and the batch they decide which image is seen when."""

    plan_id: str
    """The catalog's hash of its options and its planned list of samples."""
    num_samples: int
    """Samples that were packed: rejects may differ under one plan."""
    folder: str
    """Where they lay; they may be moved."""

    @classmethod
    def of(cls, catalog: Catalog) -> TrainedOn:
        """What is kept of a catalog."""
        folder = str(catalog.root.absolute())
        return cls(plan_id=catalog.plan_id, num_samples=catalog.num_samples, folder=folder)

    def holds(self, catalog: Catalog) -> bool:
        """Whether the catalog is of these samples, in this order."""
        return (self.plan_id, self.num_samples) == (catalog.plan_id, catalog.num_samples)


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
    trained_on: TrainedOn | None
    """The shards of that run; None: it was written before they were kept."""
    moco: dict[str, torch.Tensor]
    """Query encoder, key encoder, queue and pointer."""
    optimizer: dict[str, Any]
    """SGD's buffers; empty where the weights were imported: such a run is not continued."""
    rng: dict[str, torch.Tensor]
    """The states of torch's generators on the CPU and, where there was one, on the GPU."""
    scaler: dict[str, Any] | None = None
    """The gradient scaler's scale and counters; None: the run has none, as every one but fp16's."""


def checkpoint_name(step: int) -> str:
    """The file name of the checkpoint after that many steps."""
    return f"step-{step:09d}.pt"


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int, milestone: bool = False) -> Path:
    """Write the checkpoint, then drop all but the newest `keep`. A kill at any moment loses none of the old.

    A milestone, of this save or another, is never dropped, and counts as none of the `keep`.
    Written under a temporary name, fsynced and renamed; the folder is fsynced too. Raises UserError (no
    space, no permission) with the old checkpoints untouched and nothing half written left.
    """
    path = folder / checkpoint_name(checkpoint.step)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write_state(_plain_state(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        write_config(checkpoint.config, path.with_suffix(".json"))
        if milestone:
            path.with_suffix(MILESTONE).touch()
        temporary.replace(path)
    except OSError as error:
        raise _not_written(path, checkpoint, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(folder)
    _drop_old(path, keep=keep)
    return path


def _plain_state(checkpoint: Checkpoint) -> dict[str, Any]:
    names = ("step", "epoch", "images", "moco", "optimizer", "rng", "scaler")
    return {
        "format_version": FORMAT_VERSION,
        "versions": {name: version(name) for name in ("torch", "timm", "accelerate")},
        **{name: getattr(checkpoint, name) for name in names},
        "config": to_plain(checkpoint.config),
        "trained_on": dataclasses.asdict(checkpoint.trained_on) if checkpoint.trained_on else None,
    }


class _Output:
    """A file that remembers why a write failed: torch's writer tells of it in its own words, or in none."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_state(state: dict[str, Any], file: IO[bytes]) -> None:
    """torch.save, whose RuntimeError after a failed write becomes that write's OSError."""
    output = _Output(file)
    try:
        torch.save(state, output)  # type: ignore[arg-type]
    except RuntimeError:
        if output.error is None:
            raise
        raise output.error from None


def _not_written(path: Path, checkpoint: Checkpoint, error: OSError) -> UserError:
    """The error of a save: what failed, what is kept, and what to do."""
    kept = [found.name for found in list_checkpoints(path.parent)]
    stay = f"{kept[0]} is kept: --resume continues from it" if kept else "there is no older one"
    why = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or not path.parent.is_dir():
        return UserError(f"{path} cannot be written ({why}); mend that; {stay}")
    size = show_bytes(sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.moco.values()))
    free = show_bytes(shutil.disk_usage(path.parent).free)
    return UserError(
        f"{path} cannot be written ({why}): it takes more than {size}, the disk has {free} free; free some, "
        f"or keep fewer by --keep-checkpoints; {stay}"
    )


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

    Raises UserError for a file that is no whole checkpoint, lacks a part, or is of a newer linerate.
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
    format_version = state["format_version"]
    if type(format_version) is not int or format_version < 1:
        raise _BrokenError(f"{path} is no checkpoint of linerate; its format_version is {format_version!r}")
    if format_version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {format_version}, this linerate reads {FORMAT_VERSION}; update linerate"
        )
    try:
        return _from_state(state)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise _BrokenError(f"{path} is no whole checkpoint of linerate ({reason})") from None


def _from_state(state: dict[str, Any]) -> Checkpoint:
    """The checkpoint in what was loaded; raises one of Python's errors where a part is missing or odd."""
    for name, kind in _PARTS.items():
        if not isinstance(state[name], kind):
            raise TypeError(f"{name} is {type(state[name]).__name__}, not {kind.__name__}")
    for name, tensor in {**state["moco"], "rng.cpu": state["rng"]["cpu"]}.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is no tensor")
    trained_on = state.get("trained_on")
    return Checkpoint(
        config=from_plain(state["config"]),
        trained_on=TrainedOn(**trained_on) if trained_on else None,
        scaler=state.get("scaler"),
        **{name: state[name] for name in _PARTS if name != "config"},
    )


_PARTS: dict[str, type] = {
    **{"step": int, "epoch": int, "images": int},
    **{"config": dict, "moco": dict, "optimizer": dict, "rng": dict},
}


def require_same_run(checkpoint: Checkpoint, config: TrainConfig, catalog: Catalog, *, run_dir: Path) -> None:
    """Raise UserError, with what differs first, where the checkpoint is of another config or other shards.

    One that was written before the shards were kept in it passes.
    """
    if not checkpoint.optimizer:
        raise UserError(
            f"{run_dir} was imported: it can be judged and exported, not continued, since the state of its "
            "optimizer is not there; name another --run"
        )
    before = checkpoint.trained_on
    if before is not None and not before.holds(catalog):
        raise UserError(
            f"{run_dir} was trained on other shards: {before.num_samples:,} samples, plan {before.plan_id}, "
            f"then in {before.folder}; those in {catalog.root} hold {catalog.num_samples:,}, plan "
            f"{catalog.plan_id}; give the shards of before, or another --run to start anew on these"
        )
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
    trained_on: TrainedOn | None = None
    """The shards that it saw; None: weights from elsewhere, which do not say."""


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
        trained_on=checkpoint.trained_on,
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


def _drop_old(newest: Path, *, keep: int) -> None:
    """Keep the one just written, the keep - 1 before it, and the milestones.

    One of a later step is a broken one that this run did not begin at: it takes no place of a whole one.
    """
    folder = newest.parent
    passing = [
        path
        for path in list_checkpoints(folder)
        if path.name <= newest.name and not path.with_suffix(MILESTONE).exists()
    ]
    # What a killed run left half written goes too: one process writes, and it is here.
    for path in [*passing[keep:], *folder.glob(".step-*.pt.*")]:
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
