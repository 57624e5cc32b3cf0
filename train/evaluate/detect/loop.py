"""Fine-tuning: SGD by iterations, checkpoints, BN statistics made precise, then the metric."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor, nn

from linerate.shards.errors import UserError
from linerate.train.evaluate.controls import calibrate_bn
from linerate.train.evaluate.detect.batches import BatchOrder, Item, judged_items, train_batches
from linerate.train.evaluate.detect.job import Job
from linerate.train.evaluate.detect.schedules import StepSchedule
from linerate.train.evaluate.detect.synced_bn import sync_batch_norms
from linerate.train.evaluate.detect.transfer_folder import (
    append_log,
    cut_log,
    load_state,
    save_state,
    write_whole,
)
from linerate.train.launch import quiet_ddp

_DECAY = 1e-4
_SGD_MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How long and how fast; the second half changes no result."""

    schedule: StepSchedule
    batch: int
    """Images an iteration, over all ranks."""
    seed: int
    precise_bn: int
    """Batches that the BN statistics are the mean over, before judging."""
    checkpoint_iterations: int = 1000
    log_iterations: int = 20
    workers: int = 0
    """Processes that load images; 0: this one."""


@dataclass
class _State:
    """What is trained, on this rank."""

    network: nn.Module
    """As it is saved and judged."""
    wrapped: nn.Module
    """The same, whose backward averages over ranks."""
    optimizer: torch.optim.Optimizer
    done: int
    """Iterations that are done."""


def open_ranks() -> Accelerator:
    """This process's rank and device, alone or under torchrun."""
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def run_job(
    job: Job,
    options: LoopOptions,
    *,
    folder: Path,
    accelerator: Accelerator,
    advance: Callable[[float], None] = lambda _: None,
) -> dict[str, float]:
    """The numbers of one run in percent; what a killed run left in `folder` is taken over.

    Raises UserError where the batch does not divide over the ranks, or the loss is no number.
    """
    result = folder / "result.json"
    if result.exists():
        numbers: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
        advance(options.schedule.iterations)
        return numbers
    world_size = accelerator.num_processes
    if options.batch % world_size:
        raise UserError(
            f"--batch {options.batch} does not divide over {world_size} ranks; "
            f"give {options.batch // world_size * world_size or world_size}"
        )
    state = _start(job, options, folder, accelerator)
    advance(state.done)
    _train(job, options, state, folder, accelerator, advance)
    _make_norms_precise(job, options, state, accelerator)
    numbers = _judge(job, options, state, folder, accelerator)
    if accelerator.is_main_process:
        write_whole(result, json.dumps(numbers, indent=1).encode())
    accelerator.wait_for_everyone()
    return numbers


def _start(job: Job, options: LoopOptions, folder: Path, accelerator: Accelerator) -> _State:
    """The network and its optimizer as the last checkpoint has them, or before the first iteration."""
    network = job.build(options.seed).to(accelerator.device)
    if accelerator.num_processes > 1:
        sync_batch_norms(network)
    optimizer = torch.optim.SGD(
        parameter_groups(network, norm_decay=job.norm_decay), lr=options.schedule.lr, momentum=_SGD_MOMENTUM
    )
    done = 0
    if (saved := load_state(folder)) is not None:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["iteration"]
    if accelerator.is_main_process:
        cut_log(folder, done=done)
    with quiet_ddp():
        wrapped = accelerator.prepare_model(network)
    return _State(network, wrapped, optimizer, done)


def parameter_groups(network: nn.Module, *, norm_decay: float) -> list[dict[str, Any]]:
    """SGD's groups: normalisation layers with a decay of their own, all else with 1e-4."""
    norms = [
        parameter
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in module.parameters(recurse=False)
    ]
    known = set(map(id, norms))
    others = [parameter for parameter in network.parameters() if id(parameter) not in known]
    return [{"params": others, "weight_decay": _DECAY}, {"params": norms, "weight_decay": norm_decay}]


def _train(
    job: Job,
    options: LoopOptions,
    state: _State,
    folder: Path,
    accelerator: Accelerator,
    advance: Callable[[float], None],
) -> None:
    schedule = options.schedule
    sums: dict[str, Tensor] = {}
    since, since_done = time.perf_counter(), state.done
    for items in _batches(job, options, accelerator, start=state.done, stop=schedule.iterations):
        state.wrapped.train()
        _tell_damage(items, folder, iteration=state.done + 1)
        for group in state.optimizer.param_groups:
            group["lr"] = schedule.lr_at(state.done)
        losses = _losses(state.wrapped, items, options, accelerator, iteration=state.done)
        total = torch.stack(list(losses.values())).sum()
        state.optimizer.zero_grad(set_to_none=True)
        accelerator.backward(total)
        state.optimizer.step()
        state.done += 1
        advance(1)
        for name, value in {"loss": total, **losses}.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach()
        last = state.done == schedule.iterations
        saves = last or state.done % options.checkpoint_iterations == 0
        if saves or state.done % options.log_iterations == 0:
            means = _means(sums, state.done - since_done, accelerator)
            seconds = time.perf_counter() - since
            if accelerator.is_main_process:
                line = {
                    "event": "train",
                    "iteration": state.done,
                    "lr": schedule.lr_at(state.done - 1),
                    **means,
                }
                images_per_s = (state.done - since_done) * options.batch / seconds
                append_log(folder, {**line, "images_per_s": round(images_per_s, 3)})
            _require_finite(means, state.done, options)
            sums, since, since_done = {}, time.perf_counter(), state.done
        if saves and accelerator.is_main_process:
            weights, buffers = state.network.state_dict(), state.optimizer.state_dict()
            save_state(folder, {"iteration": state.done, "network": weights, "optimizer": buffers})


def _batches(
    job: Job, options: LoopOptions, accelerator: Accelerator, *, start: int, stop: int
) -> Iterator[list[Item]]:
    return train_batches(
        job.train,
        BatchOrder(len(job.train), batch=options.batch, seed=options.seed),
        start=start,
        stop=stop,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        workers=options.workers,
    )


def _losses(
    network: nn.Module, items: list[Item], options: LoopOptions, accelerator: Accelerator, *, iteration: int
) -> dict[str, Tensor]:
    # The network draws sizes and RoIs from torch's generator: seeded so, a resumed run draws the same.
    key = (options.seed, 2, iteration, accelerator.process_index)
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
    device = accelerator.device
    images = [item.image.to(device) for item in items]
    targets = [{name: value.to(device) for name, value in item.target.items()} for item in items]
    losses: dict[str, Tensor] = network(images, targets)
    return losses


def _means(sums: dict[str, Tensor], count: int, accelerator: Accelerator) -> dict[str, float]:
    """The mean of each loss over the iterations since the last line, and over ranks."""
    stacked = torch.stack(list(sums.values())) / count
    values = accelerator.reduce(stacked, reduction="mean").tolist()
    return {name: round(value, 6) for name, value in zip(sums, values, strict=True)}


def _require_finite(means: dict[str, float], done: int, options: LoopOptions) -> None:
    if not np.isfinite(means["loss"]):
        raise UserError(
            f"the loss is {means['loss']} at iteration {done:,}; give a lower --lr than "
            f"{options.schedule.lr:g}, and another --out, since this one holds the run that diverged"
        )


def _tell_damage(items: list[Item], folder: Path, *, iteration: int) -> None:
    for item in items:
        if item.damage:
            append_log(folder, {"event": "damage", "iteration": iteration, "reason": item.damage})


class _OnItems(nn.Module):
    def __init__(self, network: nn.Module, losses: Callable[[nn.Module, Any], object]) -> None:
        super().__init__()
        self.network, self.losses = network, losses

    def forward(self, at: Any) -> None:
        self.losses(self.network, at)


def _make_norms_precise(job: Job, options: LoopOptions, state: _State, accelerator: Accelerator) -> None:
    """BN's running means, taken while the weights moved, made those of the final weights."""
    stop = options.schedule.iterations
    count = min(options.precise_bn, stop)
    if not count:
        return
    batches = enumerate(_batches(job, options, accelerator, start=stop, stop=stop + count), start=stop)

    def forward(network: nn.Module, at: Any) -> None:
        _losses(network, at[1], options, accelerator, iteration=at[0])

    calibrate_bn(_OnItems(state.network, forward), batches)  # type: ignore[arg-type]


@torch.no_grad()
def _judge(
    job: Job, options: LoopOptions, state: _State, folder: Path, accelerator: Accelerator
) -> dict[str, float]:
    """The metric over all test images, those that cannot be decoded counted and logged."""
    state.network.eval()
    mine = range(accelerator.process_index, len(job.test), accelerator.num_processes)
    rows: list[tuple[int, Any]] = []
    for item in judged_items(job.test, mine, workers=options.workers):
        if item.damage:
            _tell_damage([item], folder, iteration=state.done)
            continue
        prediction = state.network([item.image.to(accelerator.device)])[0]
        rows.append((item.index, job.record(prediction, item)))
    gathered = dict(gather_object(rows) if accelerator.num_processes > 1 else rows)
    numbers = {**job.judge(gathered), "images_judged": len(gathered)}
    numbers["images_undecodable"] = len(job.test) - len(gathered)
    if accelerator.is_main_process:
        append_log(folder, {"event": "result", "iteration": state.done, **_no_nan(numbers)})
    return _no_nan(numbers)


def _no_nan(numbers: dict[str, float]) -> dict[str, Any]:
    """NaN, of a figure that no object counts for, is null in JSON."""
    return {name: None if value != value else round(value, 4) for name, value in numbers.items()}
