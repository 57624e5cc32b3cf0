"""One rank's place in the run: accelerate, its device, its arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

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
        mixed_precision=_precision_of_accelerate(config.speed),
        log_with=list(config.watch.trackers) or None,
        project_dir=str(run_dir),
        # By default every forward would send the queue and all BN statistics again.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if resolve_precision(config.speed) == "fp16" and accelerator.scaler is None:
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
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


def _precision_of_accelerate(speed: Speed) -> str:
    """accelerate knows fp16 on a GPU alone; on a CPU we scale and cast ourselves, as its twin."""
    precision = resolve_precision(speed)
    on_cpu = not torch.cuda.is_available()
    return "no" if precision == "fp32" or (precision == "fp16" and on_cpu) else precision


def open_autocast(
    accelerator: Accelerator, speed: Speed
) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """What opens autocast to the run's precision."""
    if resolve_precision(speed) == "fp16":
        return partial(torch.autocast, accelerator.device.type, torch.float16)
    opened: Callable[[], contextlib.AbstractContextManager[object]] = accelerator.autocast
    return opened


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
    """As `cpu, 2 ranks, fp32`."""
    ranks = accelerator.num_processes
    name = accelerator.device.type
    return f"{name}, {ranks} rank{'s' if ranks > 1 else ''}, {resolve_precision(speed)}"


@contextlib.contextmanager
def quiet_ddp() -> Iterator[None]:
    """torch 2.15 calls broadcast_buffers deprecated; accelerate has no other name for it yet."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        yield


def with_lanes(config: TrainConfig) -> TrainConfig:
    """The config with the number of lanes written out, as it is kept beside the checkpoints."""
    return dataclasses.replace(config, num_lanes=config.lanes)
