"""One rank's place in the run: accelerate, its device, its arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from linerate.pipeline.cores import default_num_threads, usable_cores
from linerate.shards.errors import UserError
from linerate.train.config import Speed, TrainConfig
from linerate.train.config_json import to_plain

TRACKERS = ("tensorboard",)


@contextlib.contextmanager
def open_accelerator(config: TrainConfig, *, run_dir: Path) -> Iterator[Accelerator]:
    """Accelerate for this process: one of `torchrun`'s or `accelerate launch`'s ranks, or alone.

    Raises UserError where the world size does not fit the batch, or a tracker does not exist.
    """
    for name in config.watch.trackers:
        if name not in TRACKERS:
            raise UserError(f"trackers={name} is not there; there are {', '.join(TRACKERS)}")
    # accelerate keeps the first run's precision for the whole process; a second run may want another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if resolve_precision(config.speed) == "bf16" else "no",
        log_with=list(config.watch.trackers) or None,
        project_dir=str(run_dir),
        # By default every forward would send the queue and all BN statistics again.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    config.rank_batch(accelerator.num_processes)
    try:
        yield accelerator
    finally:
        accelerator.free_memory()


def resolve_precision(speed: Speed) -> str:
    """fp32 or bf16; auto is bf16 where there is a GPU."""
    if speed.precision != "auto":
        return speed.precision
    return "bf16" if torch.cuda.is_available() else "fp32"


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Open the trackers, with the config as their flat table of numbers and words."""
    if not config.watch.trackers:
        return
    plain = to_plain(config)
    flat: dict[str, object] = {}
    for part in ("views", "model", "dictionary", "loss", "bn", "optim", "schedule"):
        flat |= {f"{part}.{name}": value for name, value in plain[part].items()}
    scalars = {k: v for k, v in flat.items() if isinstance(v, int | float | str | bool)}
    accelerator.init_trackers("tensorboard", config=scalars)


def describe_device(accelerator: Accelerator, speed: Speed) -> str:
    """As `cpu, 2 ranks, fp32, 1 loader thread a rank, 2 cores`, those of this process."""
    ranks, threads, cores = accelerator.num_processes, loader_threads(speed), usable_cores()
    counts = [(ranks, "rank"), (threads, "loader thread"), (cores, "core")]
    told = [f"{num} {what}{'s' if num > 1 else ''}" for num, what in counts]
    return f"{accelerator.device.type}, {told[0]}, {resolve_precision(speed)}, {told[1]} a rank, {told[2]}"


def loader_threads(speed: Speed) -> int:
    """Threads that decode on this rank."""
    return speed.loader_threads or default_num_threads()


@contextlib.contextmanager
def quiet_ddp() -> Iterator[None]:
    """torch 2.15 calls broadcast_buffers deprecated; accelerate has no other name for it yet."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        yield


def with_lanes(config: TrainConfig) -> TrainConfig:
    """The config with the number of lanes written out, as it is kept beside the checkpoints."""
    return dataclasses.replace(config, num_lanes=config.lanes)
