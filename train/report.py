"""What a run tells while it goes on, and at its end: events, alarms, the last figures."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from linerate.shards.errors import UserError
from linerate.shards.inspect_image import one_line
from linerate.train.alarms import Alarm, Alarms
from linerate.train.config import TrainConfig
from linerate.train.run_folder import Damage, RunFolder

OnEvent = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Where a run stands when pretrain() returns."""

    step: int
    """Steps done."""
    total_steps: int
    """Steps of the whole run."""
    images: int
    """Images seen."""
    world_size: int
    """Ranks that took part in this part of the run."""
    loss: float | None
    """Mean InfoNCE of the last logged steps; None: nothing was logged."""
    pretext_top1: float | None
    """Share of queries that found their key, of the same steps."""
    knn_top1: float | None
    """The monitor's last figure; None: it did not run."""
    alarms: tuple[str, ...]
    """Names of the alarms that were given, as collapse."""
    given_up: tuple[str, ...]
    """Speed switches that were on at the start and had to be given up, as `cuda_graphs off: why`."""
    stopped_by: str | None
    """The signal that ended it early, as SIGINT; None: it is finished."""
    checkpoint: str
    """The last checkpoint."""
    replaced: int
    """Samples that had to be replaced by neighbours, on all ranks, over the whole run."""
    damage: tuple[Damage, ...]
    """Why: what was found bad, by shard and reason."""
    bad_sample_logs: tuple[str, ...]
    """The files that name every one of them."""

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps


class Report:
    """Gives every event to the log, the trackers and a listener, on rank 0; keeps the last figures on all."""

    def __init__(
        self, config: TrainConfig, folder: RunFolder, accelerator: Accelerator, on_event: OnEvent | None
    ) -> None:
        self._folder, self._accelerator, self._on_event = folder, accelerator, on_event
        self._trackers = bool(config.watch.trackers)
        self._alarms = Alarms(
            config.watch,
            chance_loss=config.chance_loss,
            global_batch=config.optim.global_batch,
            num_keys=config.dictionary.num_keys,
        )
        self.last: dict[str, float] = {}
        """The newest loss, pretext_top1, replaced and knn_top1, over restarts."""
        self.given_up: list[str] = []

    @property
    def alarms(self) -> tuple[str, ...]:
        """The names of the alarms that were given, over restarts."""
        return self._alarms.names

    def go_on(self, log: Sequence[Mapping[str, Any]]) -> None:
        """Take over what the log of the steps that are done tells: figures, alarms, the best kNN."""
        self._alarms.go_on(log)
        for line in log:
            if line["event"] in ("step", "knn"):
                kept = ("loss", "pretext_top1", "replaced", "knn_top1")
                self.last |= {name: line[name] for name in kept if name in line}

    def emit(self, kind: str, *, step: int, **fields: Any) -> None:
        """One event; step: how many are done."""
        if not self._accelerator.is_main_process:
            return
        event = {"event": kind, "step": step, **fields}
        self._folder.append(event)
        if self._on_event is not None:
            self._on_event(event)
        if self._trackers and kind in ("step", "knn"):
            self._track({k: v for k, v in fields.items() if isinstance(v, int | float)}, step)

    def _track(self, numbers: dict[str, float], step: int) -> None:
        try:
            self._accelerator.log(numbers, step=step)
        except Exception as error:  # of any kind: it is theirs
            self._trackers = False
            self.emit(
                "note",
                step=step,
                text=f"trackers off ({type(error).__name__}: {one_line(error)}); log.jsonl goes on",
            )

    def tell_steps(self, step: int, means: Mapping[str, float], *, steps: int, **fields: Any) -> None:
        """A line of the log, with the alarms that it gives. means: over that many steps."""
        self.last |= means
        self.emit("step", step=step, **fields, **means)
        self._tell(step, self._alarms.after_log(step, {**fields, **means}, steps=steps))

    def tell_knn(self, step: int, found: Mapping[str, Any], *, epoch: int) -> None:
        """A result of the monitor, with the alarm that it may give."""
        self.last["knn_top1"] = found["knn_top1"]
        self.emit("knn", step=step, epoch=epoch, **found)
        self._tell(step, self._alarms.after_knn(found["knn_top1"]))

    def tell_no_knn(self, step: int, error: Exception, *, epoch: int) -> None:
        """A monitor that failed: an alarm at first, a note afterwards; the log has the traceback, too."""
        why, about = f"no kNN after epoch {epoch}: {error}", {}
        if not isinstance(error, UserError):
            # DALI tells first where in its graph, then what it encountered.
            *_, words = str(error).rpartition("encountered:")
            why = f"no kNN after epoch {epoch}: {type(error).__name__}: {' '.join(words.split())[:300]}"
            about = {"traceback": "".join(traceback.format_exception(error))}
        new = list(self._alarms.after_no_knn(why))
        self._tell(step, new, **about)
        if not new:
            self.emit("note", step=step, text=why, **about)

    def tell_given_up(self, step: int, switches: Mapping[str, str]) -> None:
        """Switches that are off after all, each once. switches: name -> why."""
        for name, why in switches.items():
            text = f"{name} off: {why}"
            if text not in self.given_up:
                self.given_up.append(text)
                self.emit("note", step=step, text=text)

    def _tell(self, step: int, alarms: Iterable[Alarm], **fields: Any) -> None:
        for alarm in alarms:
            self.emit("alarm", step=step, alarm=alarm.name, text=alarm.text, fatal=False, **fields)
