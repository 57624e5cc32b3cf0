"""What training costs on a machine: images per dollar, hours and dollars of the paper's two runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from linerate.bench.fleet import Machine
from linerate.bench.record import Record
from linerate.shards.errors import UserError
from linerate.train.recipes import RECIPES


@dataclass(frozen=True)
class Run:
    """A run that is paid for."""

    name: str
    images: int
    """source images over the whole run; a pair is one"""


def paper_runs() -> tuple[Run, Run]:
    """200 epochs of IN-1M, and IG-1B, which is counted in iterations; both as the recipes define them."""
    small, large = RECIPES["in1m-v2"], RECIPES["ig1b-v1"].build()
    epochs, iterations = small.build().schedule.epochs, large.schedule.iterations
    assert small.num_images is not None
    assert epochs is not None
    assert iterations is not None
    return (
        Run(f"IN-1M, {epochs} epochs", small.num_images * epochs),
        Run("IG-1B", iterations * large.optim.global_batch),
    )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What training at a measured rate costs."""

    machine: str
    record: Record
    basis: str
    """which part of training the rate is of"""
    pairs_per_s: float
    usd_per_hour: float | None
    paper_work: bool
    """ResNet-50 at 224 px, which the paper's runs are of; else the hours are those of a smaller work"""
    chosen: bool = False
    """the one of its machine to quote"""

    @property
    def images_per_usd(self) -> float | None:
        """Source images a dollar."""
        return None if self.usd_per_hour is None else 3600 * self.pairs_per_s / self.usd_per_hour

    def hours(self, run: Run) -> float:
        """Of training alone: evaluation and loading of checkpoints come on top."""
        return run.images / self.pairs_per_s / 3600

    def usd(self, run: Run) -> float | None:
        """Dollars of the whole run."""
        return None if self.usd_per_hour is None else self.hours(run) * self.usd_per_hour


def costs_of(machines: Sequence[Machine], prices: dict[str, float]) -> list[Cost]:
    """Every rate of training on every machine, the one to quote first. prices: machine -> dollars an hour."""
    found = []
    for machine in machines:
        # One work may be held against several peers; the newest of its rates counts.
        rates = {(r.name, r.work): r for r in machine.newest if cost_basis(r) and (r.ours or 0) > 0}
        costs = [_cost(machine.name, record, prices.get(machine.name)) for record in rates.values()]
        costs.sort(key=_preference)
        found += [dataclasses.replace(cost, chosen=number == 0) for number, cost in enumerate(costs)]
    return found


LOADED, UNLOADED = "loader and step", "step alone, no loading"


def cost_basis(record: Record) -> str | None:
    """Which part of training a record's rate is of; None where it is none's."""
    if record.unit != "pairs/s" or record.kind != "time" or record.refused or record.ours is None:
        return None
    if (record.note or "").lower().startswith("projection"):
        return None
    part = record.work.partition(":")[0].lower()
    if record.name == "step" or (record.name in ("train", "pipeline") and part.startswith("step")):
        return UNLOADED
    if record.name in ("train", "pipeline") and part.startswith(("loader and", "both")):
        return LOADED
    return None


def _cost(machine: str, record: Record, price: float | None) -> Cost:
    assert record.ours is not None
    words = record.work.lower()
    return Cost(
        machine=machine,
        record=record,
        basis=cost_basis(record) or "",
        pairs_per_s=record.ours,
        usd_per_hour=price,
        paper_work=bool(re.search(r"\bresnet50\b", words) and re.search(r"\b224 px", words)),
    )


def _preference(cost: Cost) -> tuple[bool, bool, float]:
    """The paper's work before a smaller one, with its loader before without, the faster one first."""
    return (not cost.paper_work, cost.basis != LOADED, -cost.pairs_per_s)


def usd(value: float | None) -> str:
    """Dollars: cents where they count."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


def prices_of(words: Sequence[str], machines: Sequence[Machine]) -> dict[str, float]:
    """Machine name -> dollars an hour. words: `2.5` for all machines, `NAME=2.5` for one; NAME may be a part.

    Raises UserError for what is no price, and for a name that is of no machine here, or of several.
    """
    for_all: float | None = None
    named: dict[str, float] = {}
    for word in words:
        name, equals, price = word.rpartition("=")
        if equals:
            named[_named(name.strip(), machines)] = _usd(price, word)
        else:
            for_all = _usd(word, word)
    prices = {} if for_all is None else {machine.name: for_all for machine in machines}
    return {**prices, **named}


def _usd(price: str, word: str) -> float:
    try:
        usd = float(price)
    except ValueError:
        usd = math.nan
    if not (math.isfinite(usd) and usd > 0):
        raise UserError(
            f"--price-per-hour {word} is no price; give dollars above 0 an hour, as 2.5, "
            "or NAME=2.5 for one machine"
        )
    return usd


def _named(name: str, machines: Sequence[Machine]) -> str:
    names, wanted = [machine.name for machine in machines], name.lower()
    listed = "; ".join(names)
    # `H200` is the one card where `8x H200` is there, too.
    found = [one for one in names if one.lower() == wanted]
    found = found or [one for one in names if one.lower().startswith(wanted)]
    found = found or [one for one in names if wanted in one.lower()]
    if not name or not found:
        raise UserError(
            f"--price-per-hour {name}=...: no machine of these files has that name; there are {listed}"
        )
    if len(found) > 1:
        raise UserError(f"--price-per-hour {name}=... fits several machines; write more of one of {listed}")
    return found[0]
