"""One MoCo step by its stages, and its largest kernels. A function of the device, as gpu_step.py."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import linerate.train.step as train
from linerate.bench.contest import Contest, Setting, timed_record
from linerate.bench.machine import noise, probe
from linerate.bench.record import Record
from linerate.bench.stage_clock import OTHER, Spans, StageClock, wrap_step
from linerate.bench.suites import step as steps
from linerate.bench.suites.gpu_step import GROUPS, shape_of
from linerate.bench.suites.step_start import start
from linerate.bench.timing import Side, synchronize


def timed_step(ours: steps.OurStep, clock: StageClock) -> Callable[[Tensor, Tensor], Tensor]:
    """train_step itself, with the clock in each of the stages that it calls."""
    spans = Spans()
    wrap_step(spans, ours.moco, ours.optimizer)
    spans.watchers = (clock,)
    backward = spans.around(train._backward, "backward")

    def run(query_images: Tensor, key_images: Tensor) -> Tensor:
        clock.mark("start")
        loss = train.train_step(
            ours.moco,
            query_images,
            key_images,
            ours.optimizer,
            step=0,
            autocast=lambda: torch.autocast(query_images.device.type, torch.bfloat16),
            backward=backward,
        ).loss
        clock.mark(OTHER)
        return loss

    return run


def bench_step_stages(setting: Setting) -> Iterator[Record]:
    """One step by stage, as the pairs/s that the stage alone would allow, and its share of the step."""
    shape = shape_of(setting, batch=256)
    clock = StageClock(shape.device)
    ours = steps.our_step(
        *start(shape.encoder, num_keys=shape.num_keys, device=shape.device),
        autocast=True,
        bn_group=shape.batch // GROUPS,
    )
    run, views = timed_step(ours, clock), shape.views()
    for _ in range(3):
        run(*views)
    clock.seconds()
    before = probe()
    rounds = []
    for _ in range(setting.rounds):
        run(*views)
        rounds.append(clock.seconds())
    unrest = noise(before, probe())
    whole = np.array([sum(found.values()) for found in rounds])
    kernels = top_kernels(lambda: run(*views), device=shape.device)
    work = f"eager: {shape}, groups={GROUPS}"
    for stage in ("whole step", *rounds[0]):
        seconds = whole if stage == "whole step" else np.array([found[stage] for found in rounds])
        share = (
            f"{100 * float(np.median(seconds / whole)):.1f} % of the step, {1e3 * np.median(seconds):.2f} ms"
        )
        record = timed_record(
            "step-stages",
            Contest(
                peer=None,
                work=f"{stage}: {work}",
                unit="pairs/s",
                amount=shape.batch,
                ours=Side(run=lambda: None),
                no_ceiling="`step` has one for the whole step",
                note=f"most time: {kernels}" if stage == "whole step" else share,
            ),
            times={"ours": np.maximum(seconds, 1e-9)},
            noise=unrest,
            suite="",
        )
        yield record


def top_kernels(run: Callable[[], object], *, device: str, num: int = 8) -> str:
    """The kernels (on a CPU: operations) that took most of one call's time, with their times in ms."""
    on_gpu = device == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiled:
        run()
        synchronize()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = sorted(profiled.key_averages(), key=lambda one: -getattr(one, name))
    return ", ".join(
        f"{one.key[:60]} {getattr(one, name) / 1e3:.2f} ms x{one.count}" for one in averages[:num]
    )
