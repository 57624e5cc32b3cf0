"""What goes wrong in a run that goes on: each alarm is told once, with its figures and a way out.

Thresholds are config.Watch's alarm_* fields. What ends a run (a loss that is not finite, a rank that starves)
is an error or the watchdog's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from linerate.train.config import Watch
from linerate.train.key_queue import KeyQueue
from linerate.train.moco import MoCo


@dataclass(frozen=True)
class Alarm:
    """Something that people should look at."""

    name: str
    """chance-loss, bn-cheating, still-queue, collapse, data-wait or no-knn."""
    text: str
    """The figures, and what to do."""


class Vitals:
    """Figures of the features and of the dictionary, on the device: read with the log's others or never."""

    NAMES = ("feature_std", "turnover")

    def __init__(self, moco: MoCo) -> None:
        """Keeps a reference to each step's queries, which costs nothing."""
        self._queries: Tensor | None = None
        forward = moco.query_forward
        assert isinstance(forward, nn.Module)
        forward.register_forward_hook(self._take)
        self._keys: Tensor | None = moco.dictionary.keys if isinstance(moco.dictionary, KeyQueue) else None
        self._before = self._fingerprints()

    def read(self) -> Tensor:
        """(2,) float32 on the device: feature_std of the last step's queries, turnover since the last call.

        turnover: share of the queue's rows that hold another key than before; 1 where there is no queue.
        """
        assert self._queries is not None
        now, before = self._fingerprints(), self._before
        self._before = now
        std = feature_std(self._queries)
        if now is None or before is None:
            return torch.stack((std, torch.ones_like(std)))
        return torch.stack((std, (now != before).float().mean()))

    def _take(self, module: nn.Module, images: Any, projected: Tensor) -> None:
        self._queries = projected.detach()

    @torch.no_grad()
    def _fingerprints(self) -> Tensor | None:
        """(K,) one number a row, from which another key differs: one pass over the keys, no copy of them."""
        if self._keys is None:
            return None
        weights = torch.linspace(1.0, 2.0, self._keys.shape[1], device=self._keys.device)
        return torch.mv(self._keys, weights.to(self._keys.dtype)).float()


@torch.no_grad()
def feature_std(projected: Tensor) -> Tensor:
    """0-d: standard deviation over the batch of unit features, mean over dimensions, times sqrt(C).

    projected: (N, C). 1 where the directions are spread evenly, 0 where all images have one feature.
    Source: SimSiam, 4.1, whose std is this over sqrt(C).
    """
    unit = normalize(projected.float())
    return unit.std(dim=0, correction=0).mean() * math.sqrt(unit.shape[1])


class Alarms:
    """Takes every line of the log and every kNN; gives each alarm once."""

    def __init__(self, watch: Watch, *, chance_loss: float, global_batch: int, num_keys: int) -> None:
        """chance_loss: ln(K + 1) of InfoNCE. num_keys: K of a queue."""
        self._watch, self._chance_loss = watch, chance_loss
        self._batch, self._num_keys = global_batch, num_keys
        self._told: set[str] = set()
        self._chance_since: int | None = None
        self._best_knn = 0.0
        self._top1 = 0.0
        self._num_laps = self._num_waits = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The alarms that were given, in alphabetical order."""
        return tuple(sorted(self._told))

    def go_on(self, log: Iterable[Mapping[str, Any]]) -> None:
        """Take over what the log of a run tells that goes on now: it is one run, with one set of alarms.

        Waiting for data is counted anew, since the loader starts anew.
        """
        for line in log:
            if line["event"] == "step":
                self._top1 = line["pretext_top1"]
                self._chance(line["step"], line["loss"])
            elif line["event"] == "knn":
                self._best_knn = max(self._best_knn, line["knn_top1"])
            elif line["event"] == "alarm":
                self._told.add(line["alarm"])

    def after_log(self, step: int, numbers: Mapping[str, float], *, steps: int) -> Iterator[Alarm]:
        """The alarms that this line of the log gives, if they are new. steps: what it is the mean of."""
        self._top1 = numbers["pretext_top1"]
        checks = (
            self._chance(step, numbers["loss"]),
            self._collapse(step, numbers["feature_std"]),
            self._still_queue(numbers["turnover"], steps=steps),
            self._data_wait(numbers["data_wait_share"]),
        )
        return self._new(*checks)

    def after_knn(self, knn_top1: float) -> Iterator[Alarm]:
        """The alarms that this kNN gives, if they are new."""
        best, self._best_knn = self._best_knn, max(self._best_knn, knn_top1)
        watch = self._watch
        if self._top1 <= watch.alarm_top1 or knn_top1 >= best - watch.alarm_knn_fall:
            return iter(())
        return self._new(
            Alarm(
                "bn-cheating",
                f"pretext top-1 is {self._top1:.1%} while kNN fell from {best:.1%} to {knn_top1:.1%}: the "
                "encoder may tell keys by their BN group; --shuffle, or a larger --num-keys",
            )
        )

    def after_no_knn(self, why: str) -> Iterator[Alarm]:
        """The alarm that a kNN gives which failed, if it is the first."""
        way = "the run goes on and tries again; `linerate eval knn RUN` judges its checkpoints"
        return self._new(Alarm("no-knn", f"{why}; {way}"))

    def _new(self, *found: Alarm | None) -> Iterator[Alarm]:
        for alarm in found:
            if alarm is not None and alarm.name not in self._told:
                self._told.add(alarm.name)
                yield alarm

    def _chance(self, step: int, loss: float) -> Alarm | None:
        """Source: InfoNCE of equal logits is ln(K + 1), MoCo part 3.1."""
        watch, chance = self._watch, self._chance_loss
        if abs(loss - chance) > watch.alarm_chance_share * chance:
            self._chance_since = None
            return None
        since = self._chance_since = step if self._chance_since is None else self._chance_since
        if step - since < watch.alarm_steps:
            return None
        return Alarm(
            "chance-loss",
            f"the loss has been {loss:.3f}, chance being {chance:.3f}, for {step - since:,} steps: "
            "nothing is learned; try another --lr, a lower --temperature, or look at `linerate views`",
        )

    def _collapse(self, step: int, std: float) -> Alarm | None:
        """Source: SimSiam, 4.1: a collapsed encoder's std is 0, a healthy one's near 1 in this unit."""
        if step < self._watch.alarm_steps or std >= self._watch.alarm_feature_std:
            return None
        return Alarm(
            "collapse",
            f"all images have nearly the same feature: their std is {std:.4f} of 1 (limit "
            f"{self._watch.alarm_feature_std:g}); try a lower --lr or --weight-decay, or an --ema-momentum "
            "nearer to 1",
        )

    def _still_queue(self, turnover: float, *, steps: int) -> Alarm | None:
        """Source: MoCo part 3.2: each step's keys replace the oldest, so B of K rows change a step."""
        due = min(1.0, steps * self._batch / self._num_keys)
        if turnover >= self._watch.alarm_turnover * due:
            return None
        return Alarm(
            "still-queue",
            f"{turnover:.1%} of the dictionary's keys changed in {steps:,} steps, {due:.1%} were due: keys "
            "are not enqueued, or are all the same; look for an alarm of collapse",
        )

    def _data_wait(self, share: float) -> Alarm | None:
        """Twice in a row, and not in the first line, in which the loader starts.

        Source: none; a tenth of the time is what tuning the loader can give back.
        """
        self._num_laps += 1
        over = self._num_laps > 1 and share > self._watch.alarm_data_wait
        self._num_waits = self._num_waits + 1 if over else 0
        if self._num_waits < 2:
            return None
        return Alarm(
            "data-wait",
            f"{share:.0%} of the time no batch was ready (limit {self._watch.alarm_data_wait:.0%}): the "
            "loader is the slower part; more --loader-threads or --prefetch, smaller images, a faster disk",
        )
