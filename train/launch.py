"""One rank's place in the run: accelerate, its device, its arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from linerate.pipeline.cores import default_num_threads, usable_cores
from linerate.train.config import Speed, TrainConfig
from linerate.train.switches import resolve_precision
from linerate.train.trackers import require_trackers


@contextlib.contextmanager
def open_accelerator(config: TrainConfig, *, run_dir: Path) -> Iterator[Accelerator]:
    """Accelerate for this process: one of `torchrun`'s or `accelerate launch`'s ranks, or alone.

    Raises UserError where the world size does not fit the batch, or a tracker does not exist.
    """
    require_trackers(config.watch.trackers)
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


def launch_note(world_size: int, *, command: list[str]) -> str | None:
    """What to tell where the launcher was asked for more processes than there are; None: all is well.

    command: the words of the parent process. `accelerate launch --cpu --num_processes 2` starts one process
    and says nothing (accelerate 1.15).
    """
    if world_size > 1 or not any("accelerate" in word for word in command[:3]):
        return None
    words = [part for word in command for part in word.split("=", 1)]
    for flag, value in pairwise(words):
        if flag in ("--num_processes", "--num-processes") and value.isdigit() and int(value) > 1:
            return (
                f"accelerate launch was asked for {value} processes and started one, as it does on CPUs; "
                f"torchrun --nproc-per-node {value} -m linerate ... does"
            )
    return None


def parent_command() -> list[str]:
    """The words of the process that started this one; none where the system does not tell."""
    try:
        text = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return text.decode(errors="replace").split("\0")
