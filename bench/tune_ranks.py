"""What the ranks of one tuning tell each other between two measurements: on the host, outside every clock.

Every exchange also tells whether a rank ran out of memory: then it ends on all ranks at once, by RankFailed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from linerate.bench.timing import Seconds, synchronize
from linerate.train.config import TrainConfig
from linerate.train.launch import open_accelerator

ValueT = TypeVar("ValueT")

PATIENCE_S = 60.0
"""How long a rank out of memory waits for the others to hear of it, before it ends."""


class RankFailed(Exception):
    """A rank ran out of memory; every rank raises it, each with the same words."""


@dataclass(frozen=True)
class _OutOfMemory:
    """What such a rank tells in place of its value."""

    rank: int


@dataclass(frozen=True)
class Ranks:
    """This process among those that measure; all of them call each method at the same place."""

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    """Of the host; None: alone."""

    @property
    def on_machine(self) -> int:
        """How many of them share this machine, as the launcher says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world_size > 1 else 1

    def gather(self, value: ValueT) -> list[ValueT]:
        """Each rank's value, in rank order. Raises RankFailed on all of them where one ran out of memory."""
        found: list[ValueT | _OutOfMemory] = [value] * self.world_size
        if self.group is not None:
            dist.all_gather_object(found, value, group=self.group)
        full = [one.rank for one in found if isinstance(one, _OutOfMemory)]
        if full:
            of = f" of rank {', '.join(map(str, full))}" if self.world_size > 1 else ""
            raise RankFailed(f"does not fit the memory{of}")
        return [one for one in found if not isinstance(one, _OutOfMemory)]

    @contextlib.contextmanager
    def together(self, what: str, *, leave: Callable[[int], object] = os._exit) -> Iterator[None]:
        """What is done in here ends with an exchange: RankFailed on every rank where one ran out of memory.

        The others hear of it at their next exchange. If they wait for this rank within a step instead, there
        is no way back: after PATIENCE_S it says so in one line and leaves with 2, and the launcher ends them.
        what: the trial, for that line.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            with self._patient(what, leave):
                self.gather(_OutOfMemory(self.rank))
        self.gather(None)

    @contextlib.contextmanager
    def _patient(self, what: str, leave: Callable[[int], object]) -> Iterator[None]:
        def give_up() -> None:
            line = (
                f"linerate: error: {what} does not fit the memory of rank {self.rank}, and other ranks wait "
                "for it in a step; free that rank's memory, or tune with a smaller --micro-batch"
            )
            print(line, file=sys.stderr, flush=True)
            leave(2)

        timer = threading.Timer(PATIENCE_S, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def agree(self, value: ValueT) -> ValueT:
        """Rank 0's value."""
        return self.gather(value)[0]

    def slowest(self, seconds: Seconds) -> Seconds:
        """Round by round the longest time of any rank: a step is over when it is over on all."""
        slowest: Seconds = np.max(self.gather(seconds), axis=0)
        return slowest

    def meet(self) -> None:
        """Wait for each other, device included, so that all clocks start together."""
        synchronize()
        self.gather(None)
        if self.group is not None:
            dist.barrier(self.group)


@contextlib.contextmanager
def open_ranks(config: TrainConfig) -> Iterator[Ranks]:
    """The ranks that torchrun or accelerate started, or this process alone.

    Raises UserError where so many cannot share the batch.
    """
    with tempfile.TemporaryDirectory() as scratch, open_accelerator(config, run_dir=Path(scratch)) as found:
        many = found.num_processes > 1
        group = dist.new_group(backend="gloo") if many else None
        assert group is None or isinstance(group, dist.ProcessGroup)  # every rank is a member
        rank, world_size = found.process_index, found.num_processes
    try:
        yield Ranks(rank, world_size, group)
    finally:
        if many:
            dist.destroy_process_group()
