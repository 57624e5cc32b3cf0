"""The switches that make a recipe fastest on this machine and change nothing else: of `linerate tune`.

One switch after another: each candidate is held against the best so far, interleaved, and taken only where
the whole interval of the ratio lies above 1. Switches of the step are judged by the step on views that are
there already, those of the loader by loader and step together; at the end all of them are held against the
recipe's own once more, and given up where they are not faster. Under a launcher all ranks take part in every
trial; the slowest one's time counts, and rank 0 decides.
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
from linerate.bench.tune_ranks import RankFailed, Ranks
from linerate.pipeline.cores import default_num_threads
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.config import Speed, TrainConfig
from linerate.train.graphs import WARM_UP_STEPS
from linerate.train.memory import estimate_memory
from linerate.train.memory_bank import free_bytes
from linerate.train.switches import resolve_switches

Part = Literal["step", "run"]

# Losses of the first steps under a switch and without it: sums in another order, no more.
LOSS_BOUND = 2e-3
NUM_CHECKED_STEPS = 3
# A recording is made and replayed only after its warm-up.
NUM_RECORDED_STEPS = WARM_UP_STEPS + 2
# What is gained by less is not worth a line in a profile.
LEAST_GAIN = 1.01
ALONE = Ranks()


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
    """Each switch with the values to try besides its own, in the order in which they are tried.

    cores: those of one rank.
    """
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
    ranks: Ranks = ALONE,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> Tuned:
    """Try every candidate. budget_s: about how long the timing takes; start-up and compilation come on top.

    ranks: all call this together and find the same. Raises UserError where not even the smallest micro-batch
    fits the memory.
    """
    on_gpu, before = torch.cuda.is_available(), probe()
    # What is tried where, so that nodes of different kinds try the same.
    cores = ranks.agree(default_num_threads())
    start, trials = _fitting(config, catalog, on_trial, ranks=ranks)
    listed = [
        (name, part, value)
        for name, part, values in candidates(start, on_gpu=on_gpu, cores=cores)
        for value in values
    ]
    seconds = budget_s / (len(listed) + 1)
    best = start
    for name, part, value in listed:
        trial = _try(best, catalog, name, value, part, budget_s=seconds, rounds=rounds, ranks=ranks)
        if trial.kept:
            best = _with(best, name, value)
        trials.append(trial)
        on_trial(trial)
    ratio = None
    if best == start:
        rate, _ = _time(start, start, catalog, "run", budget_s=seconds, rounds=rounds, ranks=ranks)
    else:
        rate, ratio = _time(best, start, catalog, "run", budget_s=seconds, rounds=rounds, ranks=ranks)
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
    config: TrainConfig, catalog: Catalog, on_trial: Callable[[Trial], None], *, ranks: Ranks
) -> tuple[TrainConfig, list[Trial]]:
    """The config with the largest micro-batch that fits the memory: by count, then by a step."""
    batch, group = config.rank_batch(ranks.world_size), config.bn.bn_group
    sizes = [batch // n for n in range(1, batch // group + 1) if batch % n == 0 and batch // n % group == 0]
    trials: list[Trial] = []
    for size in sizes:
        fitted = _with(config, "micro_batch", None if size == batch else size)
        why = _overflow(fitted, catalog, ranks=ranks)
        if why is None:
            return fitted, trials
        trials.append(Trial(name="micro_batch", value=size, part="step", ratio=None, kept=False, why=why))
        on_trial(trials[-1])
    raise UserError(
        f"one BN group ({group} images) of {config.model.encoder} at {config.views.size} pixels "
        f"{trials[-1].why}; choose a smaller encoder or size"
    )


def _overflow(config: TrainConfig, catalog: Catalog, *, ranks: Ranks) -> str | None:
    """Why a step does not fit the memory of some rank; None: it does. The same on every rank."""
    # First by count, on every rank: no step may begin that one of them would not take part in.
    counted = [why for why in ranks.gather(_counted_overflow(config, catalog, ranks=ranks)) if why]
    if counted:
        return counted[0]
    if not torch.cuda.is_available():
        return None
    try:
        with (
            ranks.together(f"micro_batch = {config.speed.micro_batch}"),
            contextlib.closing(Stages(config, catalog)) as stages,
        ):
            stages.first_losses(1)
    except RankFailed as failed:
        return str(failed)
    return None


def _counted_overflow(config: TrainConfig, catalog: Catalog, *, ranks: Ranks) -> str | None:
    batch, device = config.rank_batch(ranks.world_size), "cuda" if torch.cuda.is_available() else "cpu"
    need = estimate_memory(config, rank_batch=batch, num_samples=catalog.num_samples)["total"]
    if device == "cpu":
        need *= ranks.on_machine
    room = free_bytes(torch.device(device))
    return f"needs {need / 2**30:,.1f} GiB, {room / 2**30:,.1f} are free" if need > room else None


def _try(
    best: TrainConfig,
    catalog: Catalog,
    name: str,
    value: Any,
    part: Part,
    *,
    budget_s: float,
    rounds: int,
    ranks: Ranks,
) -> Trial:
    """The candidate against the best so far: first that it computes the same, then how fast."""
    other = _with(best, name, value)
    refused, ratio = None, None
    try:
        with ranks.together(f"{name} = {value}"):
            # One rank's refusal holds for all, before any of them times a step that needs the others.
            told = ranks.gather(_refusal(best, other, catalog, name, part, ranks=ranks))
            refused = next((why for why in told if why is not None), None)
            if refused is None:
                _, ratio = _time(other, best, catalog, part, budget_s=budget_s, rounds=rounds, ranks=ranks)
    except RankFailed as failed:
        refused, ratio = str(failed), None
    kept = ratio is not None and ratio.low > 1.0 and ratio.median >= LEAST_GAIN
    why = "faster: kept" if kept else "slower" if ratio and ratio.high < 1.0 else "no clear gain"
    return ranks.agree(Trial(name=name, value=value, part=part, ratio=ratio, kept=kept, why=refused or why))


def _refusal(
    best: TrainConfig, other: TrainConfig, catalog: Catalog, name: str, part: Part, *, ranks: Ranks
) -> str | None:
    """Why the candidate is not timed: it cannot be had here, or computes something else; None: it is."""
    if part == "run":
        return None
    resolved = resolve_switches(other, world_size=ranks.world_size)
    if name in resolved.reasons and getattr(other.speed, name) and not getattr(resolved, name):
        return f"off: {resolved.reasons[name]}"
    num_steps = NUM_RECORDED_STEPS if name == "cuda_graphs" else NUM_CHECKED_STEPS
    difference, given_up = compare_losses(best, other, catalog, num_steps=num_steps)
    if name in given_up:
        return f"off: {given_up[name]}"
    return f"moves the loss by {difference:.2g}: refused" if difference > LOSS_BOUND else None


def compare_losses(
    a: TrainConfig, b: TrainConfig, catalog: Catalog, *, num_steps: int = NUM_CHECKED_STEPS
) -> tuple[float, dict[str, str]]:
    """(largest difference of the losses of the first steps, switches that failed under b and why).

    On the same views; the difference is infinite where a loss is NaN.
    """
    losses, given_up = [], {}
    for config in (a, b):
        with contextlib.closing(Stages(config, catalog)) as stages:
            losses.append(stages.first_losses(num_steps))
            given_up = stages.given_up()
    differences = [abs(x - y) for x, y in zip(*losses, strict=True)]
    return max(math.inf if math.isnan(d) else d for d in differences), given_up


def _time(
    ours: TrainConfig,
    theirs: TrainConfig,
    catalog: Catalog,
    part: Part,
    *,
    budget_s: float,
    rounds: int,
    ranks: Ranks,
) -> tuple[float, Interval]:
    """Pairs/s of ours over all ranks, and how many times as fast it is as theirs."""
    with (
        contextlib.closing(Stages(ours, catalog)) as mine,
        contextlib.closing(Stages(theirs, catalog)) as other,
    ):
        num = min(ranks.gather(mine.fit(budget_s / 2, rounds)))
        sides = {
            name: _side(stages, part, num, ranks) for name, stages in (("ours", mine), ("theirs", other))
        }
        times = interleave(sides, rounds=rounds, warmup=1, min_round_s=0.0)
        ours_s, theirs_s = (ranks.slowest(times[name]) for name in ("ours", "theirs"))
        rate = num * ours.optim.global_batch / float(sorted(ours_s)[rounds // 2])
        return rate, paired_ratio(theirs_s, ours_s)


def _side(stages: Stages, part: Part, num: int, ranks: Ranks) -> Side:
    run, ready = (
        (stages.learn, stages.settle) if part == "step" else (stages.load_and_learn, stages.warm_both)
    )

    def prepare() -> None:
        ready()
        ranks.meet()

    return Side(run=lambda: run(num), prepare=prepare)


def _with(config: TrainConfig, name: str, value: Any) -> TrainConfig:
    return dataclasses.replace(config, speed=dataclasses.replace(config.speed, **{name: value}))
