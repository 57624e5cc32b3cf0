"""The switches that make a recipe fastest on this machine and change nothing else: of `linerate tune`.

One switch after another: each candidate is held against the best so far, interleaved, and taken only where
the whole interval of the ratio lies above 1. Switches of the step are judged by the step on views that are
there already, those of the loader by loader and step together; at the end all of them are held against the
recipe's own once more, and given up where they are not faster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from linerate.bench.machine import noise, probe
from linerate.bench.suites.pipeline import Stages
from linerate.bench.timing import MIN_ROUNDS, Interval, Side, interleave, paired_ratio
from linerate.pipeline.cores import usable_cores
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.config import Speed, TrainConfig
from linerate.train.memory import estimate_memory
from linerate.train.memory_bank import free_bytes

Part = Literal["step", "run"]

# Losses of the first steps under a switch and without it: sums in another order, no more.
LOSS_BOUND = 2e-3
NUM_CHECKED_STEPS = 3
# What is gained by less is not worth a line in a profile.
LEAST_GAIN = 1.01


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate against the best so far."""

    name: str
    """Field of config.Speed."""
    value: Any
    part: Part
    ratio: Interval | None
    """How many times as fast as the best so far; None: it was not timed."""
    kept: bool
    why: str
    """In words."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was found."""

    speed: Speed
    trials: tuple[Trial, ...]
    ratio: Interval | None
    """All switches together against the recipe's own, loader and step; None: nothing was changed."""
    pairs_per_s: float
    """Of the recipe's own switches where nothing was changed, else of those found."""
    noise: dict[str, Any]
    """The machine's unrest meanwhile, as in a benchmark's record."""


def candidates(
    config: TrainConfig, *, on_gpu: bool, cores: int
) -> Iterator[tuple[str, Part, tuple[Any, ...]]]:
    """Each switch with the values to try besides its own, in the order in which they are tried."""
    speed = config.speed
    yield "channels_last", "step", (not speed.channels_last,)
    if on_gpu:
        yield "compile", "step", tuple(x for x in ("encoders", "step") if x != speed.compile)
        yield "side_stream", "step", (not speed.side_stream,)
        yield "cuda_graphs", "step", (not speed.cuda_graphs,)
        if config.views.backend == "dali":
            loads = (0.0, 0.5, 0.65, 0.8, 0.9, 1.0)
            yield "hw_decoder_load", "run", tuple(x for x in loads if x != speed.hw_decoder_load)
    now = speed.loader_threads or cores
    threads = {max(1, cores // 4), max(1, cores // 2), max(1, cores - 1), cores, cores + cores // 2}
    yield "loader_threads", "run", tuple(sorted(threads - {now}))
    yield "prefetch", "run", tuple(x for x in (1, 2, 4) if x != speed.prefetch)


def tune(
    config: TrainConfig,
    catalog: Catalog,
    *,
    budget_s: float,
    rounds: int = MIN_ROUNDS,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> Tuned:
    """Try every candidate. budget_s: about how long the timing takes; start-up and compilation come on top.

    Raises UserError where not even the smallest micro-batch fits the memory.
    """
    on_gpu, cores, before = torch.cuda.is_available(), usable_cores(), probe()
    start, trials = _fitting(config, catalog, on_trial)
    listed = [
        (name, part, value)
        for name, part, values in candidates(start, on_gpu=on_gpu, cores=cores)
        for value in values
    ]
    seconds = budget_s / (len(listed) + 1)
    best = start
    for name, part, value in listed:
        trial = _try(best, catalog, name, value, part, budget_s=seconds, rounds=rounds)
        if trial.kept:
            best = _with(best, name, value)
        trials.append(trial)
        on_trial(trial)
    ratio = None
    if best == start:
        rate, _ = _time(start, start, catalog, "run", budget_s=seconds, rounds=rounds)
    else:
        rate, ratio = _time(best, start, catalog, "run", budget_s=seconds, rounds=rounds)
        if ratio.low <= 1.0:
            best = start
    return Tuned(
        speed=best.speed,
        trials=tuple(trials),
        ratio=ratio,
        pairs_per_s=rate,
        noise=noise(before, probe()),
    )


def _fitting(
    config: TrainConfig, catalog: Catalog, on_trial: Callable[[Trial], None]
) -> tuple[TrainConfig, list[Trial]]:
    """The config with the largest micro-batch that fits the memory: by count, then by a step."""
    batch, group = config.optim.global_batch, config.bn.bn_group
    sizes = [batch // n for n in range(1, batch // group + 1) if batch % n == 0 and batch // n % group == 0]
    trials: list[Trial] = []
    for size in sizes:
        fitted = _with(config, "micro_batch", None if size == batch else size)
        if (why := _overflow(fitted, catalog)) is None:
            return fitted, trials
        trials.append(Trial(name="micro_batch", value=size, part="step", ratio=None, kept=False, why=why))
        on_trial(trials[-1])
    raise UserError(
        f"one BN group ({group} images) of {config.model.encoder} at {config.views.size} pixels "
        f"{trials[-1].why}; choose a smaller encoder or size"
    )


def _overflow(config: TrainConfig, catalog: Catalog) -> str | None:
    """Why a step does not fit the memory of this process; None: it does."""
    batch, device = config.optim.global_batch, "cuda" if torch.cuda.is_available() else "cpu"
    need = estimate_memory(config, rank_batch=batch, num_samples=catalog.num_samples)["total"]
    if need > (room := free_bytes(torch.device(device))):
        return f"needs {need / 2**30:,.1f} GiB, {room / 2**30:,.1f} are free"
    if not torch.cuda.is_available():
        return None
    try:
        with contextlib.closing(Stages(config, catalog)) as stages:
            stages.first_losses(1)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return f"needs more than the {room / 2**30:,.1f} GiB that are free"
    return None


def _try(
    best: TrainConfig,
    catalog: Catalog,
    name: str,
    value: Any,
    part: Part,
    *,
    budget_s: float,
    rounds: int,
) -> Trial:
    """The candidate against the best so far: first that it computes the same, then how fast."""
    other = _with(best, name, value)
    try:
        if part == "step" and (difference := loss_difference(best, other, catalog)) > LOSS_BOUND:
            why = f"moves the loss by {difference:.2g}: refused"
            return Trial(name=name, value=value, part=part, ratio=None, kept=False, why=why)
        _, ratio = _time(other, best, catalog, part, budget_s=budget_s, rounds=rounds)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return Trial(name=name, value=value, part=part, ratio=None, kept=False, why="does not fit the memory")
    kept = ratio.low > 1.0 and ratio.median >= LEAST_GAIN
    why = "faster: kept" if kept else "slower" if ratio.high < 1.0 else "no clear gain"
    return Trial(name=name, value=value, part=part, ratio=ratio, kept=kept, why=why)


def loss_difference(a: TrainConfig, b: TrainConfig, catalog: Catalog) -> float:
    """Largest difference of the losses of the first steps, on the same views; infinite where one is NaN."""
    losses = []
    for config in (a, b):
        with contextlib.closing(Stages(config, catalog)) as stages:
            losses.append(stages.first_losses(NUM_CHECKED_STEPS))
    differences = [abs(x - y) for x, y in zip(*losses, strict=True)]
    return max(math.inf if math.isnan(d) else d for d in differences)


def _time(
    ours: TrainConfig, theirs: TrainConfig, catalog: Catalog, part: Part, *, budget_s: float, rounds: int
) -> tuple[float, Interval]:
    """Pairs/s of ours, and how many times as fast it is as theirs."""
    with (
        contextlib.closing(Stages(ours, catalog)) as mine,
        contextlib.closing(Stages(theirs, catalog)) as other,
    ):
        num = mine.fit(budget_s / 2, rounds)
        sides = {name: _side(stages, part, num) for name, stages in (("ours", mine), ("theirs", other))}
        times = interleave(sides, rounds=rounds, warmup=1, min_round_s=0.0)
        rate = num * ours.optim.global_batch / float(sorted(times["ours"])[rounds // 2])
        return rate, paired_ratio(times["theirs"], times["ours"])


def _side(stages: Stages, part: Part, num: int) -> Side:
    if part == "step":
        return Side(run=lambda: stages.learn(num), prepare=stages.settle)
    return Side(run=lambda: stages.load_and_learn(num), prepare=stages.warm_both)


def _with(config: TrainConfig, name: str, value: Any) -> TrainConfig:
    return dataclasses.replace(config, speed=dataclasses.replace(config.speed, **{name: value}))
