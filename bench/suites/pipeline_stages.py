"""Where a batch's time goes, stage by stage, and what that makes of the run: `linerate bench pipeline`.

The loader's stages are its parts by themselves, the step's come from a clock in the step. All sides are
interleaved with loader, step and both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from linerate.bench.bottleneck import BatchModel, BatchTimes, Bottleneck, find_bottleneck
from linerate.bench.loader_parts import DIVIDED, LoaderParts
from linerate.bench.machine import noise, probe
from linerate.bench.record import Record
from linerate.bench.stage_clock import EMA, OPTIMIZER, OTHER, Spans, StageClock, wrap_step
from linerate.bench.suites.pipeline import Stages, pipeline_records
from linerate.bench.timing import MIN_ROUNDS, Seconds, Side, interleave, synchronize
from linerate.bench.way_out import Surroundings, verdict_sentence
from linerate.pipeline.cores import default_num_threads, usable_cores
from linerate.shards.catalog import Catalog
from linerate.train.config import TrainConfig
from linerate.train.learner import Learner
from linerate.train.run_folder import RunFolder

NAME = "pipeline"
STEP_STAGES = (
    "query forward",
    "key forward",
    "shuffle",
    "loss",
    "backward",
    "optimizer+EMA",
    "enqueue",
    OTHER,
)
NUM_TURNS = 3
HW_LOADS = (0.5, 0.65, 0.8, 0.9, 1.0)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What `linerate bench pipeline` found."""

    records: list[Record]
    """Loader alone, step alone, and both; the last one has stages and verdict."""
    model: BatchModel
    bottleneck: Bottleneck
    verdict: str
    notes: tuple[str, ...]
    """What to know of the stages."""


def measure_stages(
    config: TrainConfig, catalog: Catalog, *, budget_s: float = 60.0, rounds: int = MIN_ROUNDS
) -> Measured:
    """Loader, step, both, and the stages of each; budget_s: about how long, start-up not counted."""
    with contextlib.ExitStack() as opened:
        stages = opened.enter_context(contextlib.closing(Stages(config, catalog)))
        num = stages.fit(budget_s, rounds, num_loads=4, num_steps=3)
        step = MarkedStep(stages)
        sides = {**stages.sides(num), "stages": Side(run=lambda: step.run(num), prepare=stages.settle)}
        parts = None
        if config.views.backend in DIVIDED:
            # Not where the loader reads at that time: what it has read lies in the page cache. But of a cache
            # of shards, which may have room for one window, the shards that are here.
            start = 0 if catalog.bring else stages.loader.steps_per_epoch // 2
            parts = LoaderParts(config, stages.loader, device=stages.device, start_step=start)
            opened.callback(parts.close)
            sides |= _part_sides(parts, stages, num)
        before = probe()
        times = interleave(sides, rounds=rounds, warmup=1, min_round_s=0.0)
        unrest = noise(before, probe())
        found = _batch_times(stages, step, parts, times, num=num, rounds=rounds)
        model = BatchModel(found)
        bottleneck = find_bottleneck(model)
        verdict = verdict_sentence(model, bottleneck, _look_around(stages, parts, bottleneck, num=num))
        batches = {name: seconds / num for name, seconds in times.items()}
        *alone, both = pipeline_records(stages, batches, name=NAME, num_batches=1, unrest=unrest)
        both = dataclasses.replace(both, stages=model.stages(), verdict=verdict)
        return Measured(
            records=[*alone, both],
            model=model,
            bottleneck=bottleneck,
            verdict=verdict,
            notes=tuple(_notes(stages, parts, step)),
        )


class MarkedStep:
    """The run's step with a clock in its stages, and the log's reading by itself."""

    def __init__(self, stages: Stages) -> None:
        self._stages, self.clock = stages, StageClock(stages.device)
        self.learner, switches = stages.learner, stages.learner.switches
        self.opened_up = switches.cuda_graphs or switches.side_stream
        """Whether the stages are those of a step without what would hide them."""
        if self.opened_up:
            speed = dataclasses.replace(stages.config.speed, cuda_graphs=False, side_stream=False)
            config = dataclasses.replace(stages.config, speed=speed)
            self.learner = Learner(config, stages.accelerator, num_samples=stages.catalog.num_samples)
        self._spans = wrap_learner(self.learner)
        self._folder = RunFolder(stages.scratch)
        self.rounds: list[dict[str, float]] = []
        """Of each run: stage -> seconds over all its batches; `logging` of one reading."""

    def run(self, num_batches: int) -> None:
        """So many steps, then one reading of the log's figures."""
        self._spans.watchers = (self.clock,)
        self.clock.mark("start")
        self._stages.learn(num_batches, learner=self.learner)
        self.clock.mark(OTHER)
        self._spans.watchers = ()
        found = self.clock.seconds()
        start = time.perf_counter()
        self._folder.append(self.learner.read_metrics())
        synchronize()
        self.rounds.append({**found, "logging": time.perf_counter() - start})


def wrap_learner(learner: Learner) -> Spans:
    """The stages of a learner's step, for whoever watches."""
    spans = Spans()
    wrap_step(spans, learner.moco, learner.optimizer)
    spans.wrap(learner.accelerator, "backward", "backward")
    return spans


def _part_sides(parts: LoaderParts, stages: Stages, num: int) -> dict[str, Side]:
    def views() -> None:
        parts.clock.seconds()
        parts.view(num)
        parts.to_device_s.append(parts.clock.seconds().get("to-device", 0.0) / num)

    def prepared(warm: Any) -> Any:
        def prepare() -> None:
            stages.settle()
            warm(stages.num_warm)

        return prepare

    return {
        "read": Side(run=lambda: parts.read(num), prepare=stages.settle),
        "decode": Side(run=lambda: parts.decode(num), prepare=prepared(parts.decode)),
        "views": Side(run=views, prepare=prepared(parts.view)),
    }


def _batch_times(
    stages: Stages,
    step: MarkedStep,
    parts: LoaderParts | None,
    times: Mapping[str, Seconds],
    *,
    num: int,
    rounds: int,
) -> BatchTimes:
    whole = {name: float(np.median(seconds)) / num for name, seconds in times.items()}
    marked = [_named(found) for found in step.rounds[-rounds:]]
    # Only what this step has: a memory bank encodes no keys.
    present = [stage for stage in STEP_STAGES if any(stage in found for found in marked)]
    loader = {"loader": whole["loader"]}
    if parts is not None:
        to_device = float(np.median(parts.to_device_s[-rounds:]))
        loader = _loader_stages(whole, to_device_s=to_device, num_workers=parts.num_workers)
    return BatchTimes(
        batch=stages.batch,
        loader_s=whole["loader"],
        step_s=whole["step"],
        both_s=whole["both"],
        loader_stages=loader,
        step_stages={
            stage: float(np.median([found.get(stage, 0.0) for found in marked])) / num for stage in present
        },
        logging_s=float(np.median([found["logging"] for found in marked])) / stages.config.watch.log_steps,
        reads_ahead=stages.config.views.backend == "dali",
    )


def _named(found: Mapping[str, float]) -> dict[str, float]:
    """SGD and EMA as one: on a GPU they are one kernel."""
    rest = {stage: seconds for stage, seconds in found.items() if stage not in (OPTIMIZER, EMA)}
    return {**rest, "optimizer+EMA": found.get(OPTIMIZER, 0.0) + found.get(EMA, 0.0)}


def _loader_stages(whole: Mapping[str, float], *, to_device_s: float, num_workers: int) -> dict[str, float]:
    """Seconds a batch of reading, decoding and augmenting, each by itself.

    Several workers do all of it side by side: there one worker's seconds are shared out over the loader's.
    """
    decode = min(whole["decode"], whole["views"])
    found = {
        "read": whole["read"],
        "decode": decode,
        "augment": max(0.0, whole["views"] - decode - to_device_s),
        "to-device": to_device_s,
    }
    scale = whole["loader"] / sum(found.values()) if num_workers > 1 else 1.0
    return {stage: seconds * scale for stage, seconds in found.items()}


def _look_around(
    stages: Stages, parts: LoaderParts | None, bottleneck: Bottleneck, *, num: int
) -> Surroundings:
    """What a way out depends on; what takes time to find is looked for where it is asked for."""
    catalog, speed = stages.catalog, stages.config.speed
    share, by_load = 1.0, dict[float, float]()
    if parts is not None and stages.config.views.backend == "dali":
        if bottleneck.stage in ("decode", "augment"):
            share = _divided_share(parts, stages, num)
        if bottleneck.stage == "decode" and stages.on_gpu:
            by_load = _decode_by_load(parts, stages, num)
    return Surroundings(
        config=stages.config,
        on_gpu=stages.on_gpu,
        cores=usable_cores(),
        loader_threads=speed.loader_threads or default_num_threads(),
        step_threads=torch.get_num_threads(),
        sample_bytes=int(catalog.shard_bytes.sum()) / catalog.num_samples,
        divided_share=share,
        decode_s_by_load=by_load,
    )


def _divided_share(parts: LoaderParts, stages: Stages, num: int) -> float:
    """Of dali's decoding, what twice the threads halve; by Amdahl's law, from half of them."""
    if parts.num_threads < 2:
        return 1.0
    load, half = stages.config.speed.hw_decoder_load, parts.num_threads // 2
    decoders = [parts.decoder(load), parts.decoder(load, num_threads=half)]
    all_s, half_s = _decode_seconds(decoders, stages, num)
    return min(1.0, max(0.0, (half_s / all_s - 1) / (parts.num_threads / half - 1)))


def _decode_by_load(parts: LoaderParts, stages: Stages, num: int) -> dict[float, float]:
    """Seconds of decoding a batch by each share of a GPU's JPEG unit."""
    loads = sorted({*HW_LOADS, stages.config.speed.hw_decoder_load})
    decoders = [parts.decoder(load) for load in loads]
    return dict(zip(loads, _decode_seconds(decoders, stages, num), strict=True))


def _decode_seconds(decoders: list[Iterator[Any]], stages: Stages, num: int) -> list[float]:
    """Median seconds of a batch of each, in turns."""
    found: list[list[float]] = [[] for _ in decoders]
    for _ in range(NUM_TURNS):
        for decoder, seconds in zip(decoders, found, strict=True):
            stages.settle()
            _take(decoder, stages.num_warm)
            synchronize()
            start = time.perf_counter()
            _take(decoder, num)
            synchronize()
            seconds.append((time.perf_counter() - start) / num)
    return [float(np.median(seconds)) for seconds in found]


def _take(decoder: Iterator[Any], num: int) -> None:
    for _ in itertools.islice(decoder, num):
        pass


def _notes(stages: Stages, parts: LoaderParts | None, step: MarkedStep) -> list[str]:
    notes = []
    if parts is None:
        notes.append(f"the loader is one stage: {stages.config.views.backend} cannot be taken apart")
    elif parts.num_workers > 1:
        notes.append(f"the loader's stages are one worker's, shared out over the time of {parts.num_workers}")
    if step.opened_up:
        notes.append("the step's stages are without --cuda-graphs and --side-stream, which hide them")
    return notes
