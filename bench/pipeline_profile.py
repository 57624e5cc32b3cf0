"""Some steps of a run under torch's profiler: a trace to open, the largest kernels, memory by stage.

Stages are named ranges: of torch's profiler in the trace, and on a GPU of NVTX too, for `nsys profile`.
What DALI does in its own threads is not in torch's trace; on a GPU its kernels are, and nsys shows more.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from linerate.bench.stage_clock import EMA, OPTIMIZER, OTHER, Watcher
from linerate.bench.suites.pipeline import Stages
from linerate.bench.suites.pipeline_stages import wrap_learner
from linerate.bench.timing import synchronize
from linerate.shards.catalog import Catalog
from linerate.shards.errors import show_bytes
from linerate.shards.terminal import make_parent
from linerate.train.config import TrainConfig

NUM_STEPS = 3
NUM_KERNELS = 25
WAIT = "wait for the loader"
STAGES = (
    WAIT,
    "to-device",
    "query forward",
    "key forward",
    "shuffle",
    "loss",
    "backward",
    OPTIMIZER,
    EMA,
    "enqueue",
    "logging",
    OTHER,
)


class Nvtx(Protocol):
    """As torch.cuda.nvtx."""

    def range_push(self, msg: str) -> object: ...
    def range_pop(self) -> object: ...


class RangeWatcher:
    """Every stage as a range of torch's profiler, and of NVTX where there is one."""

    def __init__(self, nvtx: Nvtx | None) -> None:
        self._nvtx = nvtx
        self._open: list[Any] = []

    def enter(self, stage: str, *, outer: str) -> None:
        self._open.append(torch.profiler.record_function(stage))
        self._open[-1].__enter__()
        if self._nvtx is not None:
            self._nvtx.range_push(stage)

    def leave(self, stage: str, *, outer: str) -> None:
        if self._nvtx is not None:
            self._nvtx.range_pop()
        self._open.pop().__exit__(None, None, None)


class PeakMemoryWatcher:
    """Peak bytes of torch's allocator on a GPU while the host stood in each stage."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    def enter(self, stage: str, *, outer: str) -> None:
        self.take(outer)

    def leave(self, stage: str, *, outer: str) -> None:
        self.take(stage)

    def take(self, stage: str) -> None:
        """What was allocated at most since the last call belongs to the stage."""
        peak = torch.cuda.max_memory_allocated()
        self.peaks[stage] = max(peak, self.peaks.get(stage, 0))
        torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel, on a CPU one operation, over the profiled steps."""

    name: str
    ms_a_step: float
    calls_a_step: float
    share: float
    """Of the time of all of them."""


def profile_pipeline(
    config: TrainConfig, catalog: Catalog, *, folder: Path, num_steps: int = NUM_STEPS
) -> dict[str, Path]:
    """What each file is that it leaves in the folder. Raises UserError where the folder cannot be made."""
    trace = folder / "trace.json"
    make_parent(trace)
    # Read when the profiler first starts: it tells what it does, line by line, on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    with contextlib.closing(Stages(config, catalog)) as stages:
        stages.load_and_learn(stages.num_warm)
        profiled, peaks = _profiled_steps(stages, num_steps)
        profiled.export_chrome_trace(str(trace))
        on_gpu = stages.on_gpu
    if peaks is None:
        peaks = peaks_in_trace(trace)
    kernels = largest_kernels(profiled.key_averages(), on_gpu=on_gpu, num_steps=num_steps)
    of = "torch.cuda.max_memory_allocated" if on_gpu else "torch's CPU allocator, above where it began"
    (folder / "kernels.txt").write_text(_kernels_text(kernels, on_gpu=on_gpu), encoding="utf-8")
    (folder / "memory.txt").write_text(_memory_text(peaks, of=of), encoding="utf-8")
    summary = {
        "num_steps": num_steps,
        "peak_bytes": peaks,
        "peak_bytes_of": of,
        "kernels": [vars(kernel) for kernel in kernels],
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return {
        f"{num_steps} steps, for https://ui.perfetto.dev": trace,
        f"the {len(kernels)} largest {'kernels' if on_gpu else 'operations'}": folder / "kernels.txt",
        "peak memory by stage": folder / "memory.txt",
        "both as JSON": folder / "summary.json",
    }


def _profiled_steps(stages: Stages, num_steps: int) -> tuple[Any, dict[str, int] | None]:
    """The profiler after these steps, and on a GPU the stages' peaks."""
    spans = wrap_learner(stages.learner)
    spans.wrap(stages.learner, "read_metrics", "logging")
    if hasattr(stages.loader.backend, "to_device"):
        spans.wrap(stages.loader.backend, "to_device", "to-device")
    memory = PeakMemoryWatcher() if stages.on_gpu else None
    watchers: list[Watcher] = [RangeWatcher(torch.cuda.nvtx if stages.on_gpu else None)]
    activities = [torch.profiler.ProfilerActivity.CPU]
    if memory is not None:
        watchers.append(memory)
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.reset_peak_memory_stats()
    next_batch: Callable[[], Any] = spans.around(stages.next_batch, WAIT)
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiled:
        spans.watchers = watchers
        for _ in range(num_steps):
            stages.step(next_batch())
        stages.learner.read_metrics()
        synchronize()
        spans.watchers = ()
    if memory is not None:
        memory.take(OTHER)
    return profiled, None if memory is None else _ordered(memory.peaks)


def peaks_in_trace(trace: Path) -> dict[str, int]:
    """Stage -> the most bytes that torch's CPU allocator held, above where it began, while it ran."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    ranges = [
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] in STAGES
    ]
    peaks: dict[str, int] = {}
    for event in events:
        if event.get("name") != "[memory]" or event["args"]["Device Type"] != 0:
            continue
        # Of nested ranges the shortest is the innermost.
        inside = [(end - start, name) for start, end, name in ranges if start <= event["ts"] <= end]
        stage = min(inside)[1] if inside else OTHER
        peaks[stage] = max(int(event["args"]["Total Allocated"]), peaks.get(stage, 0))
    return _ordered(peaks)


def largest_kernels(averages: Any, *, on_gpu: bool, num_steps: int) -> list[Kernel]:
    """Those that took most time by themselves, the first one most."""
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    ours = [one for one in averages if one.key not in STAGES and getattr(one, name) > 0]
    total = sum(getattr(one, name) for one in ours)
    return [
        Kernel(
            name=one.key,
            ms_a_step=getattr(one, name) / 1e3 / num_steps,
            calls_a_step=one.count / num_steps,
            share=getattr(one, name) / total,
        )
        for one in sorted(ours, key=lambda one: -getattr(one, name))[:NUM_KERNELS]
    ]


def _ordered(peaks: Mapping[str, int]) -> dict[str, int]:
    return {stage: peaks[stage] for stage in STAGES if stage in peaks}


def _kernels_text(kernels: list[Kernel], *, on_gpu: bool) -> str:
    what = "kernel" if on_gpu else "operation"
    lines = [f"{'ms a step':>10} {'share':>6} {'calls a step':>13}  {what}"]
    for one in kernels:
        lines.append(
            f"{one.ms_a_step:>10.3f} {100 * one.share:>4.1f} % {one.calls_a_step:>13.1f}  {one.name[:120]}"
        )
    return "\n".join(lines) + "\n"


def _memory_text(peaks: Mapping[str, int], *, of: str) -> str:
    lines = [f"peak by stage, of {of}"]
    lines += [f"{stage:<20} {show_bytes(peak):>12}" for stage, peak in peaks.items()]
    return "\n".join(lines) + "\n"
