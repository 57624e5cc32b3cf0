"""Which stage of a step the clock stands in: spans around the very functions that a step calls.

A span inside another one stops the outer one meanwhile, so stages add up to the whole; what is in no span is
`other`. The functions are wrapped on the one object at hand, never in their modules.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from linerate.bench.timing import synchronize
from linerate.train.step import MoCo

OTHER = "other"
OPTIMIZER, EMA = "optimizer", "EMA"


class Watcher(Protocol):
    """Is told of every span as it begins and ends."""

    def enter(self, stage: str, *, outer: str) -> None: ...
    def leave(self, stage: str, *, outer: str) -> None: ...


class Spans:
    """Wraps functions as stages, and tells watchers when one runs. Of one thread."""

    def __init__(self) -> None:
        self.watchers: Sequence[Watcher] = ()
        """None of them: a wrapped function costs half a microsecond more."""
        self._open = [OTHER]

    def around(self, call: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """The same function as a stage."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.watchers:
                return call(*args, **kwargs)
            outer = self._open[-1]
            self._open.append(stage)
            for watcher in self.watchers:
                watcher.enter(stage, outer=outer)
            try:
                return call(*args, **kwargs)
            finally:
                self._open.pop()
                for watcher in self.watchers:
                    watcher.leave(stage, outer=outer)

        return run

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Have the owner's function of that name be a stage from now on."""
        object.__setattr__(owner, name, self.around(getattr(owner, name), stage))


class StageClock:
    """Seconds in each stage, on the device's own clock where there is one."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, stage: str) -> None:
        """What began at the mark before, or at `start`, ends here and is called `stage`."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((stage, event))
        else:
            self._marks.append((stage, time.perf_counter()))

    def enter(self, stage: str, *, outer: str) -> None:
        self.mark(outer)

    def leave(self, stage: str, *, outer: str) -> None:
        self.mark(stage)

    def seconds(self) -> dict[str, float]:
        """Stage -> seconds since the last call; stages that came twice are added."""
        synchronize()
        found: dict[str, float] = {}
        for (_, before), (stage, after) in zip(self._marks, self._marks[1:], strict=False):
            took = before.elapsed_time(after) / 1e3 if self._on_gpu else after - before
            found[stage] = found.get(stage, 0.0) + took
        self._marks.clear()
        return found


def wrap_step(spans: Spans, moco: MoCo, optimizer: torch.optim.Optimizer) -> None:
    """Make stages of what train_step calls on these two; backward is the caller's to wrap."""
    for name in ("route", "encode_along"):
        spans.wrap(moco.shuffle, name, "shuffle")
    spans.wrap(moco, "key_forward", "key forward")
    spans.wrap(moco, "query_forward", "query forward")
    spans.wrap(moco, "compare", "loss")
    spans.wrap(moco.dictionary, "open", "loss")
    spans.wrap(optimizer, "step", OPTIMIZER)
    spans.wrap(moco, "update_key_encoder", EMA)
    spans.wrap(moco.dictionary, "close", "enqueue")
