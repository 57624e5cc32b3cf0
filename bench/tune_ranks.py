"""What the ranks of one tuning tell each other between two measurements: on the host, outside every clock."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch.distributed as dist

from linerate.bench.timing import Seconds, synchronize
from linerate.train.config import TrainConfig
from linerate.train.launch import open_accelerator

ValueT = TypeVar("ValueT")


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
        """Each rank's value, in rank order."""
        if self.group is None:
            return [value]
        found: list[ValueT] = [value] * self.world_size
        dist.all_gather_object(found, value, group=self.group)
        return found

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
