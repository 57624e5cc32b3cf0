"""Accelerate's trackers beside log.jsonl. One that fails in the middle of a run is switched off, no more."""

from __future__ import annotations

import importlib.util
import os
import uuid
from pathlib import Path

from accelerate import Accelerator

from linerate.shards.errors import UserError
from linerate.shards.inspect_image import one_line
from linerate.shards.terminal import stderr
from linerate.train.config import TrainConfig
from linerate.train.config_json import to_plain

TRACKERS = ("tensorboard", "wandb")


def require_trackers(names: tuple[str, ...]) -> None:
    """Raise UserError where there is no such tracker, or its package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"trackers={name} is not there; there are {', '.join(TRACKERS)}")
        # accelerate leaves a tracker out in silence where its package is missing.
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers={name} needs the package {name}: pip install {name}")


def start_trackers(accelerator: Accelerator, config: TrainConfig, *, run_dir: Path, done_steps: int) -> None:
    """Open the trackers, with the config as their flat table of numbers and words. Raises UserError.

    A resumed run goes on in the same ones: TensorBoard hides what was logged after done_steps, and the run of
    Weights & Biases is found by the id that RUN/wandb-id.txt keeps. WANDB_MODE and the like are its own.
    """
    if not config.watch.trackers:
        return
    plain = to_plain(config)
    flat: dict[str, object] = {}
    for part in ("views", "model", "dictionary", "loss", "bn", "optim", "schedule"):
        flat |= {f"{part}.{name}": value for name, value in plain[part].items()}
    scalars = {k: v for k, v in flat.items() if isinstance(v, int | float | str | bool)}
    # One name for both: TensorBoard's folder in the run, and the project on the server.
    project = (
        os.environ.get("WANDB_PROJECT", "linerate") if "wandb" in config.watch.trackers else "tensorboard"
    )
    init: dict[str, dict[str, object]] = {"tensorboard": {"purge_step": done_steps + 1}}
    if "wandb" in config.watch.trackers:
        init["wandb"] = {
            "id": _wandb_id(run_dir),
            "resume": "allow",
            "name": run_dir.name,
            "dir": str(run_dir),
        }
    try:
        accelerator.init_trackers(project, config=scalars | {"recipe": config.recipe}, init_kwargs=init)
    except Exception as error:
        if not _is_of_wandb(error):
            raise
        raise UserError(
            f"trackers=wandb cannot start ({one_line(error)}): log in by `wandb login`, or set "
            "WANDB_MODE=offline; the same command with --resume begins the run"
        ) from error


def _is_of_wandb(error: Exception) -> bool:
    return any(kind.__module__.partition(".")[0] == "wandb" for kind in type(error).__mro__)


def finish_trackers(accelerator: Accelerator) -> None:
    """Have them write what they hold; what fails is told, for the run itself is over."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # of any kind: it is theirs
            stderr.print(
                f"note: {tracker.name} did not finish ({type(error).__name__}: {one_line(error)})",
                markup=False,
            )
    accelerator.trackers = []


def _wandb_id(run_dir: Path) -> str:
    """The id of this run at Weights & Biases: drawn once, then kept beside the log."""
    path = run_dir / "wandb-id.txt"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
