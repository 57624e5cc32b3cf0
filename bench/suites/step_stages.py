"""One MoCo step by its stages, and its largest kernels. A function of the device, as gpu_step.py."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import linerate.train.step as train
from linerate.bench.contest import Contest, Setting, timed_record
from linerate.bench.machine import noise, probe
from linerate.bench.record import Record
from linerate.bench.suites import step as steps
from linerate.bench.suites.gpu_step import GROUPS, shape_of
from linerate.bench.timing import Side, synchronize
from linerate.train.key_queue import KeyQueue


class StageClock:
    """Seconds between marks, on the device's own clock where there is one."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, stage: str) -> None:
        """What began at the mark before, or at `start`, ends here and is called `stage`."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((stage, event))
        else:
            self._marks.append((stage, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Stage -> seconds since the last call; stages that came twice are added."""
        synchronize()
        found: dict[str, float] = {}
        for (_, before), (stage, after) in zip(self._marks, self._marks[1:], strict=False):
            took = before.elapsed_time(after) / 1e3 if self._on_gpu else after - before
            found[stage] = found.get(stage, 0.0) + took
        self._marks.clear()
        return found


def timed_step(ours: steps.OurStep, clock: StageClock) -> Callable[[Tensor, Tensor], Tensor]:
    """train_step itself, with a mark around each of the stages that it calls."""
    moco = ours.moco

    def around(call: Callable[..., Any], *, before: str, stage: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            clock.mark(before)
            found = call(*args, **kwargs)
            clock.mark(stage)
            return found

        return run

    shuffle = moco.shuffle

    class Shuffle:
        rank = shuffle.rank
        route = staticmethod(shuffle.route)

        def encode_along(self, *args: Any, **kwargs: Any) -> Tensor:
            clock.mark("set up")
            keys = shuffle.encode_along(*args, **kwargs)
            clock.mark("shuffle")
            return keys

    moco.shuffle = Shuffle()  # type: ignore[assignment]
    moco.key_forward = around(moco.key_forward, before="shuffle", stage="key forward")
    moco.query_forward = around(moco.query_forward, before="set up", stage="query forward")
    backward, step = train._backward, ours.optimizer.step
    ours.optimizer.step = around(step, before="backward", stage="SGD")  # type: ignore[method-assign]
    moco.update_key_encoder = around(moco.update_key_encoder, before="SGD", stage="EMA")  # type: ignore[method-assign]
    queue = moco.dictionary
    assert isinstance(queue, KeyQueue)
    queue.enqueue = around(queue.enqueue, before="EMA", stage="enqueue")  # type: ignore[method-assign]
    marked = around(backward, before="loss", stage="backward")

    def run(query_images: Tensor, key_images: Tensor) -> Tensor:
        clock.mark("start")
        return train.train_step(
            moco,
            query_images,
            key_images,
            ours.optimizer,
            step=0,
            autocast=lambda: torch.autocast(query_images.device.type, torch.bfloat16),
            backward=marked,
        ).loss

    return run


def bench_step_stages(setting: Setting) -> Iterator[Record]:
    """One step by stage, as the pairs/s that the stage alone would allow, and its share of the step."""
    shape = shape_of(setting, batch=256)
    clock = StageClock(shape.device)
    ours = steps.our_step(
        *steps.start(shape.encoder, num_keys=shape.num_keys, device=shape.device),
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
