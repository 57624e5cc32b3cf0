"""What bounds a run: the time of a batch as a function of its stages, and what each would give if free.

The model has two joints, each of two parts that run side by side or take turns:

    loader = join(read, rest of the loader)     where a thread of its own reads ahead; else their sum
    both   = join(loader, step)                 join(a, b) = max(a, b) + share * min(a, b)

share is 0 where the two overlap, so that the rate is the lower one, as on a GPU with cores enough; it is 1
where they want the same cores, so that their times add. It is read off the measured whole, between 0 and 1,
and what is left over (parts that disturb each other) stays as a factor: with nothing free the model gives the
measured time, and `overlap_error` says how far the plain overlap is from that. A step's stages run one after
another; a stage that is free is taken out of its sum.
Seconds are those of one batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["loader", "step", "balanced", "shared"]

READ = "read"
# Sides nearer to each other than this are level.
LEVEL = 0.1
# From this share on, loader and step are told to take turns.
SHARED = 0.5


@dataclass(frozen=True, kw_only=True)
class BatchTimes:
    """Measured seconds of one batch."""

    batch: int
    """Pairs."""
    loader_s: float
    step_s: float
    """Without its log."""
    both_s: float
    """Without the log."""
    loader_stages: Mapping[str, float]
    """Each stage by itself, in the order of a batch's way."""
    step_stages: Mapping[str, float]
    """In one step, so that they add up to it but for the clock's grain."""
    logging_s: float
    """A step's share of one reading of the log's figures."""
    reads_ahead: bool
    """Whether a thread of its own reads."""


def join(a: float, b: float, share: float) -> float:
    """Seconds of two parts of which that share of the shorter one is not hidden behind the longer one."""
    return max(a, b) + share * min(a, b)


def share_not_hidden(whole: float, a: float, b: float) -> float:
    """The share by which `join` comes nearest to the measured whole."""
    shorter = min(a, b)
    return min(1.0, max(0.0, (whole - max(a, b)) / shorter)) if shorter > 0 else 0.0


class BatchModel:
    """The time of a batch with stages as they are, faster or free."""

    def __init__(self, times: BatchTimes) -> None:
        self.times = times
        self.step_s, self.both_s = times.step_s + times.logging_s, times.both_s + times.logging_s
        read, rest = self._read_and_rest(times.loader_stages)
        self.read_share = share_not_hidden(times.loader_s, read, rest) if times.reads_ahead else 1.0
        self._loader_factor = times.loader_s / max(join(read, rest, self.read_share), 1e-12)
        self._step_factor = times.step_s / max(sum(times.step_stages.values()), 1e-12)
        self.run_share = share_not_hidden(self.both_s, times.loader_s, self.step_s)
        self._factor = self.both_s / join(times.loader_s, self.step_s, self.run_share)

    @property
    def overlap_error(self) -> float:
        """By which share the batch takes longer than if loader and step overlapped wholly."""
        return self.both_s / max(self.times.loader_s, self.step_s) - 1

    @property
    def sum_error(self) -> float:
        """By which share the batch takes longer than loader and step one after the other."""
        return self.both_s / (self.times.loader_s + self.step_s) - 1

    def seconds(self, scales: Mapping[str, float] | None = None) -> float:
        """Of a batch in a run whose stages take scales[stage] times what they take now."""
        loader_s, step_s = self.sides(scales)
        return self._factor * join(loader_s, step_s, self.run_share)

    def sides(self, scales: Mapping[str, float] | None = None) -> tuple[float, float]:
        """(loader, step) alone, its log included."""
        scales, times = scales or {}, self.times
        read, rest = self._read_and_rest(
            {stage: s * scales.get(stage, 1.0) for stage, s in times.loader_stages.items()}
        )
        steps = sum(s * scales.get(stage, 1.0) for stage, s in times.step_stages.items())
        log_s = times.logging_s * scales.get("logging", 1.0)
        return self._loader_factor * join(read, rest, self.read_share), self._step_factor * steps + log_s

    def rate(self, scales: Mapping[str, float] | None = None) -> float:
        """Pairs/s of the run."""
        return self.times.batch / max(self.seconds(scales), 1e-12)

    def stages(self) -> dict[str, float]:
        """Every stage in the order of a batch's way."""
        times = self.times
        return {**times.loader_stages, **times.step_stages, "logging": times.logging_s}

    def shares(self) -> dict[str, float]:
        """Stage -> its share of its side's stages added up, so that each side's make 1.

        Not of the side's time: reading runs beside decoding, and the stages were timed apart from the side.
        """
        loader, stages = self.times.loader_stages, self.stages()
        loader_s = sum(loader.values())
        step_s = sum(stages.values()) - loader_s
        return {
            stage: seconds / max(loader_s if stage in loader else step_s, 1e-12)
            for stage, seconds in stages.items()
        }

    def rates_if_free(self) -> dict[str, float]:
        """Stage -> pairs/s of the run if it took no time."""
        return {stage: self.rate({stage: 0.0}) for stage in self.stages()}

    @staticmethod
    def _read_and_rest(stages: Mapping[str, float]) -> tuple[float, float]:
        read = stages.get(READ, 0.0)
        return read, sum(stages.values()) - read


@dataclass(frozen=True)
class Bottleneck:
    """Where a run's time goes."""

    kind: Kind
    """loader or step: the slower side, by more than a tenth, of two that overlap; balanced: neither; shared:
    they take turns on the same cores, so that all of both counts."""
    stage: str
    """The one whose time, taken away, would give most; of the slower side where there is one."""


def find_bottleneck(model: BatchModel) -> Bottleneck:
    """What bounds the run: first the side, then in it the stage that would give most."""
    kind = _find_kind(model)
    times = model.times
    sides: dict[Kind, Mapping[str, float]] = {
        "loader": times.loader_stages,
        "step": {**times.step_stages, "logging": times.logging_s},
    }
    stages = sides.get(kind, model.stages())
    gains = model.rates_if_free()
    # Where two stages are level neither gives much, and the longer one is named.
    return Bottleneck(kind, max(stages, key=lambda stage: (round(gains[stage], 3), stages[stage])))


def _find_kind(model: BatchModel) -> Kind:
    loader_s, step_s = model.times.loader_s, model.step_s
    shorter, longer = sorted((loader_s, step_s))
    if longer - shorter > LEVEL * longer and (model.run_share < SHARED or shorter < LEVEL * longer):
        return "loader" if loader_s > step_s else "step"
    return "shared" if model.run_share >= SHARED else "balanced"
