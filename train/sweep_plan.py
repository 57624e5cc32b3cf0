"""The cells of a sweep: for each value and seed a config, and the words of `linerate train` that make it.

Legend: B images in a global batch, K keys in the dictionary, m momentum of the key encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from linerate.shards.errors import UserError
from linerate.train.config import Schedule, TrainConfig, Watch
from linerate.train.plan import require_one_batch
from linerate.train.schedules import total_steps
from linerate.train.sweep_cells import (
    DICTIONARIES,
    PAPER_M_KEYS,
    Over,
    PaperCell,
    paper_cell,
    paper_cells,
)

# The flag that an ablation sets itself, as a field of the config.
SWEPT_FIELD: dict[Over, str] = {
    "K": "num_keys",
    "m": "ema_momentum",
    "dictionary": "dictionary",
    "shuffle-bn": "shuffle",
}
NUM_JUDGED = 8
NUM_LOGGED = 50


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    over: Over
    value: str
    """As --values takes it."""
    config: TrainConfig

    @property
    def dictionary(self) -> str:
        return self.config.dictionary.dictionary

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def key(self) -> tuple[str | None, str]:
        """What cells of other seeds share, and a PaperCell of the same value: its dictionary, its value."""
        return (self.dictionary if self.over == "K" else None), self.value

    @property
    def paper(self) -> PaperCell | None:
        """What the paper reports for this value."""
        return paper_cell(self.over, self.value, dictionary=self.dictionary)

    @property
    def label(self) -> str:
        """What the value is called beside others."""
        return label_of(self.over, self.key)

    @property
    def name(self) -> str:
        """The name of its run folder."""
        dictionary = f"-{self.dictionary}" if self.over == "K" else ""
        return f"{self.over}-{self.value}{dictionary}-seed{self.seed}"


def label_of(over: Over, key: tuple[str | None, str]) -> str:
    """As `queue, K 4096`, `m 0.99`, `end-to-end`, `shuffle-bn off`."""
    dictionary, value = key
    named = value if over == "dictionary" else f"{over} {value}"
    return f"{dictionary}, {named}" if dictionary else named


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What would run, and what a reader of its results must know."""

    over: Over
    cells: list[Cell]
    notes: list[str]


def plan_sweep(
    config: TrainConfig,
    *,
    over: Over,
    num_images: int,
    values: Sequence[str] = (),
    dictionaries: Sequence[str] = (),
    seeds: Sequence[int] = (),
    keep_num_keys: bool = False,
) -> SweepPlan:
    """Every cell, from the config that the recipe and the flags made.

    values: none are the paper's, less those that num_images cannot fill. dictionaries: those whose K is
    swept; none is the config's own. keep_num_keys: leave K as it is in a sweep of m, where the paper's is
    4,096. Raises UserError for a value that is none, or a config that one of them makes impossible.
    """
    _check_axis(config, over, dictionaries)
    notes: list[str] = []
    if over == "m" and not keep_num_keys:
        config = _with_the_papers_keys(config, num_images=num_images, notes=notes)
    config = _watched(config, num_images=num_images)
    kinds = list(dict.fromkeys(dictionaries)) or [config.dictionary.dictionary]
    cells = []
    for kind in kinds if over == "K" else [None]:
        base = config if kind is None else _replace(config, "dictionary", dictionary=kind)
        chosen = list(values) or _default_values(over, base, num_images=num_images, notes=notes)
        for value in dict.fromkeys(normal_value(over, value) for value in chosen):
            cell = _vary(base, over, value)
            require_one_batch(cell.optim.global_batch, num_images=num_images)
            for seed in dict.fromkeys(seeds or (config.seed,)):
                cells.append(Cell(over=over, value=value, config=dataclasses.replace(cell, seed=seed)))
    if any(cell.dictionary == "end-to-end" for cell in cells):
        notes.append(_end_to_end_note(over, config))
    return SweepPlan(over=over, cells=cells, notes=notes)


def cell_flags(config: TrainConfig, *, recipe: TrainConfig) -> list[str]:
    """The flags after `linerate train RECIPE` that make this config of the recipe's."""
    words: list[str] = []
    for field in dataclasses.fields(TrainConfig):
        ours, theirs = getattr(config, field.name), getattr(recipe, field.name)
        if not dataclasses.is_dataclass(ours):
            words += _flag(field.name, ours) if ours != theirs else []
            continue
        for part in dataclasses.fields(ours):
            value = getattr(ours, part.name)
            # Another batch needs a word on lr, even if that stays.
            decides = part.name == "lr" and config.optim.global_batch != recipe.optim.global_batch
            if value != getattr(theirs, part.name) or decides:
                words += _flag(part.name, value)
    return words


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, tuple):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}", str(value)]


def normal_value(over: Over, value: str) -> str:
    """The value as the paper's cells write it. Raises UserError where it is none of this ablation."""
    choices = {"dictionary": DICTIONARIES, "shuffle-bn": ("on", "off")}.get(over)
    if choices is not None:
        if value not in choices:
            raise UserError(f"--values {value} is no {over}; there are {', '.join(choices)}")
        return value
    try:
        return str(int(value)) if over == "K" else f"{float(value):g}"
    except ValueError:
        kind = "a whole number, as 4096" if over == "K" else "a number in [0, 1), as 0.999"
        raise UserError(f"--values {value} is no {over}; give {kind}") from None


def _check_axis(config: TrainConfig, over: Over, dictionaries: Sequence[str]) -> None:
    if dictionaries and over != "K":
        raise UserError(
            f"--dictionaries {' '.join(dictionaries)} goes with --over K, not {over}; give --dictionary for "
            "one that all cells have"
        )
    for name in dictionaries:
        if name not in DICTIONARIES:
            raise UserError(f"--dictionaries {name} is none; there are {', '.join(DICTIONARIES)}")
    kind = config.dictionary.dictionary
    if over == "m" and kind != "queue":
        raise UserError(f"only a queue has a momentum encoder, {kind} has no m; give --dictionary queue")
    if over == "shuffle-bn" and kind == "memory-bank":
        raise UserError(
            "a memory bank encodes no keys that could be shuffled; give --dictionary queue, or end-to-end"
        )


def _with_the_papers_keys(config: TrainConfig, *, num_images: int, notes: list[str]) -> TrainConfig:
    num_keys = min(PAPER_M_KEYS, num_images)
    if num_keys < PAPER_M_KEYS:
        notes.append(
            f"K {num_keys:,} instead of the paper's {PAPER_M_KEYS:,}: the shards hold {num_images:,} images"
        )
    elif num_keys != config.dictionary.num_keys:
        notes.append(f"K {num_keys:,} as in the paper's sweep of m; --num-keys sets another")
    return _replace(config, "dictionary", num_keys=num_keys)


def _watched(config: TrainConfig, *, num_images: int) -> TrainConfig:
    """The config with a kNN monitor, if it has none, and a log that is fine enough for curves."""
    steps_per_epoch = max(1, num_images // config.optim.global_batch)
    steps, watch = total_steps(config.schedule, steps_per_epoch=steps_per_epoch), config.watch
    knn_epochs = watch.knn_epochs or max(1, steps // steps_per_epoch // NUM_JUDGED)
    log_steps = min(watch.log_steps, max(1, steps // NUM_LOGGED))
    return _replace(config, "watch", knn_epochs=knn_epochs, log_steps=log_steps)


def _default_values(over: Over, config: TrainConfig, *, num_images: int, notes: list[str]) -> list[str]:
    kind = config.dictionary.dictionary
    found = [cell.value for cell in paper_cells(over, dictionaries=(kind,))]
    if over != "K":
        return found
    fitting = [value for value in found if int(value) <= num_images]
    if left_out := [f"{int(value):,}" for value in found if value not in fitting]:
        notes.append(
            f"{kind}: the paper's K {', '.join(left_out)} are left out, the shards hold {num_images:,} "
            "images; --values names others"
        )
    if not fitting:
        raise UserError(
            f"{num_images:,} images are fewer than every K of the paper; give --values, as 64 128"
        )
    return fitting


def _vary(config: TrainConfig, over: Over, value: str) -> TrainConfig:
    if over == "m":
        return _replace(config, "model", ema_momentum=float(value))
    if over == "shuffle-bn":
        return _replace(config, "bn", shuffle=value == "on")
    if over == "dictionary":
        # The loss of a memory bank alone would make another dictionary impossible.
        loss = config.dictionary.bank_loss if value == "memory-bank" else "infonce"
        return _replace(config, "dictionary", dictionary=value, bank_loss=loss)
    if config.dictionary.dictionary == "end-to-end":
        return _with_batch(config, int(value))
    return _replace(config, "dictionary", num_keys=int(value))


def _with_batch(config: TrainConfig, batch: int) -> TrainConfig:
    """The config at another batch: lr and BN groups follow it, iterations shrink; as many images are seen."""
    optim, bn, schedule = config.optim, config.bn, config.schedule
    ratio = batch / optim.global_batch
    return dataclasses.replace(
        config,
        num_lanes=None if ratio != 1 else config.num_lanes,
        optim=dataclasses.replace(optim, global_batch=batch, lr=optim.lr * ratio),
        bn=dataclasses.replace(
            bn,
            bn_group=max(1, round(bn.bn_group * ratio)),
            shuffle_block=bn.shuffle_block and max(1, round(bn.shuffle_block * ratio)),
        ),
        schedule=_stretched(schedule, 1 / ratio),
    )


def _stretched(schedule: Schedule, ratio: float) -> Schedule:
    iterations = schedule.iterations and max(1, round(schedule.iterations * ratio))
    decay_steps = max(1, round(schedule.decay_steps * ratio))
    return dataclasses.replace(schedule, iterations=iterations, decay_steps=decay_steps)


def _end_to_end_note(over: Over, config: TrainConfig) -> str:
    batch = config.optim.global_batch
    if over == "K":
        return (
            f"end-to-end: K is the global batch; lr {config.optim.lr:g} at {batch:,} scales linearly with "
            "it, the BN groups stay as many, and every cell sees as many images"
        )
    return f"end-to-end: K is the global batch, {batch:,} here"


def _replace(config: TrainConfig, part: str, **fields: Any) -> TrainConfig:
    changed: dict[str, Any] = {part: dataclasses.replace(getattr(config, part), **fields)}
    return dataclasses.replace(config, **changed)


def judged_by(watch: Watch) -> dict[str, Any]:
    """What kNN depends on; cells that differ in it cannot be compared."""
    names = [field.name for field in dataclasses.fields(Watch) if field.name.startswith("knn_")]
    return {name: getattr(watch, name) for name in names if name != "knn_epochs"}
