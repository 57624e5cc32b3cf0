"""`linerate tune`: the switches that make a recipe fastest on this machine, and change nothing else.

One switch after another: each candidate is held against the best so far, interleaved, and taken only where
the whole interval of the ratio lies above 1. Switches of the step are judged by the step on views that are
there already, those of the loader by loader and step together; at the end all of them are held against the
recipe's own once more, and given up where they are not faster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from linerate.bench.machine import machine, noise, probe
from linerate.bench.suites.pipeline import Stages
from linerate.bench.timing import MIN_ROUNDS, Interval, Side, interleave, paired_ratio
from linerate.pipeline.cache import open_shards
from linerate.pipeline.cores import usable_cores
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json, stderr
from linerate.train.cli import RecipeCommand, parse_recipe
from linerate.train.config import Speed, TrainConfig
from linerate.train.memory import estimate_memory
from linerate.train.plan import require_one_batch
from linerate.train.speed_profile import TUNABLE, SpeedProfile, made_for

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
        yield "compile", "step", (not speed.compile,)
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
    need = estimate_memory(config, rank_batch=config.optim.global_batch)["total"]
    if need > (room := _room_bytes()):
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


def _room_bytes() -> int:
    """Bytes that this process may still take, on the GPU where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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


@dataclass(frozen=True, kw_only=True)
class TuneCommand(RecipeCommand):
    """Find the fastest switches for a recipe on this machine; nothing that changes results is touched."""

    out: Path | None = None
    """Profile to write, for `linerate train RECIPE --profile OUT`."""
    minutes: float = 3.0
    """About how long the timing takes; start-up and compilation come on top."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.minutes > 0:
            raise UserError(f"--minutes {self.minutes:g} must be above 0, as 3")


def main(argv: list[str]) -> int:
    """`linerate tune RECIPE --shards OUT --out profile.json [flags of the recipe]`."""
    command, config = parse_recipe(TuneCommand, argv, prog="linerate tune")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("linerate tune measures one rank; start it without torchrun or accelerate launch")
    if command.shards is None or command.out is None:
        missing = "--shards" if command.shards is None else "--out"
        raise UserError(f"{missing} is missing: linerate tune {argv[0]} --shards FOLDER --out profile.json")
    if command.out.is_dir():
        raise UserError(f"--out {command.out} is a folder; name a file, as {command.out / 'profile.json'}")
    catalog = open_shards(command.shards, command)
    require_one_batch(config.optim.global_batch, num_images=catalog.num_samples)
    tuned = tune(config, catalog, budget_s=60.0 * command.minutes, on_trial=_show_trial)
    profile = SpeedProfile(
        speed={
            name: getattr(tuned.speed, name)
            for name in TUNABLE
            if getattr(tuned.speed, name) != getattr(config.speed, name)
        },
        made_for=made_for(config),
        report={
            "recipe": config.recipe,
            "trials": [dataclasses.asdict(trial) for trial in tuned.trials],
            "ratio": dataclasses.asdict(tuned.ratio) if tuned.ratio else None,
            "pairs_per_s": tuned.pairs_per_s,
            "machine": {**machine(), "noise": tuned.noise},
        },
    )
    profile.save(command.out)
    if command.json:
        emit_json(dataclasses.asdict(profile))
    else:
        _print_tuned(tuned, profile, out=command.out)
    return 0


def _show_trial(trial: Trial) -> None:
    ratio = (
        f"{trial.ratio.median:.2f}x ({trial.ratio.low:.2f} to {trial.ratio.high:.2f})" if trial.ratio else ""
    )
    stderr.print(f"{trial.name} = {trial.value}: {ratio} {trial.why}", highlight=False, markup=False)


def _print_tuned(tuned: Tuned, profile: SpeedProfile, *, out: Path) -> None:
    console = Console()
    if profile.speed:
        table = Table("switch", "value", title="what differs from the recipe", title_justify="left")
        for name, value in profile.speed.items():
            table.add_row(name, str(value))
        console.print(table)
    if tuned.ratio is None:
        told = (
            f"{tuned.pairs_per_s:,.0f} pairs/s with the recipe's own switches: none of the others is better"
        )
    else:
        r = tuned.ratio
        told = f"{tuned.pairs_per_s:,.0f} pairs/s, {r.median:.2f}x ({r.low:.2f} to {r.high:.2f}) the recipe's"
        told += "" if profile.speed else ": not clearly faster together, so none is taken"
    console.print(told, highlight=False)
    if tuned.noise["noisy"]:
        console.print("other work took part of the machine meanwhile: tune again when it is quiet")
    console.print(
        f"{out}: use it with `linerate train {profile.report['recipe']} --profile {out}`", soft_wrap=True
    )
