"""A rank's part of whole runs, one after another, and what a step of them sends; see rank_server.py.

Each rank writes OUT/rank-N.json.
"""

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from tests.train.small import SMALL, small

from linerate.pipeline.loader import Loader
from linerate.pipeline.two_views import TwoViews
from linerate.train.checkpoint import list_checkpoints
from linerate.train.learner import Learner
from linerate.train.monitor import KnnMonitor
from linerate.train.pretrain import pretrain

COLLECTIVES = (
    *("all_to_all_single", "all_gather_into_tensor", "all_gather", "all_reduce", "broadcast", "reduce"),
    *("_broadcast_coalesced", "reduce_scatter_tensor", "barrier", "broadcast_object_list"),
)
WAIT_S = 60.0


def count_calls(calls: list[str]) -> None:
    """Note the name of every collective that Python asks for; DDP's gradients go another way."""

    def counted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return collective(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name)))


def patched(owner: type, name: str, replace: Callable[[Any], Any]) -> Callable[[], None]:
    """Put replace(before) in a method's place; returns what puts it back."""
    before = getattr(owner, name)
    setattr(owner, name, replace(before))
    return lambda: setattr(owner, name, before)


def stop_me() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def wait_until(done: Callable[[], Any]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < end_s, "nobody came"
        time.sleep(0.02)


def whole(shards: str, run: Path, rank: int) -> dict[str, Any]:
    """A run to its end; what each step but the first, which opens things, sends besides gradients."""
    calls: list[str] = []
    by_step: list[list[str]] = []
    count_calls(calls)

    def counting(taught: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> None:
            by_step.append(list(calls))
            calls.clear()
            taught(*args, **kwargs)

        return step

    undo = patched(Learner, "step", counting)
    config = small(log_steps=4, checkpoint_steps=100)
    summary = pretrain(config, shards=shards, run_dir=run)
    undo()
    return {**dataclasses.asdict(summary), "calls": by_step[1:]}


def moved(shards: str, run: Path, rank: int) -> dict[str, Any]:
    """Continues what another number of ranks began; the last rank alone is told to stop, after step 8."""

    def stopping(taught: Any) -> Any:
        def step(self: Learner, batch: TwoViews, *, step: int, **rates: float) -> None:
            taught(self, batch, step=step, **rates)
            if step == 7 and rank == dist.get_world_size() - 1:
                stop_me()

        return step

    undo = patched(Learner, "step", stopping)
    summary = pretrain(SMALL, shards=shards, run_dir=run, resume=True)
    undo()
    return dataclasses.asdict(summary)


def waiting(shards: str, run: Path, rank: int) -> dict[str, Any]:
    """Rank 0's sixth batch does not come; rank 1, which has its own, is told to stop."""

    def starved(epoch_views: Any) -> Any:
        def epoch(self: Loader[TwoViews], epoch: int, **kwargs: Any) -> Generator[TwoViews, None, None]:
            for step, batch in enumerate(epoch_views(self, epoch, **kwargs)):
                if (epoch, step) == (1, 1):
                    if rank:
                        stop_me()
                    else:
                        wait_until(lambda: list_checkpoints(run / "checkpoints"))
                yield batch

        return epoch

    undo = patched(Loader, "epoch", starved)
    summary = pretrain(small(checkpoint_steps=100), shards=shards, run_dir=run)
    undo()
    return dataclasses.asdict(summary)


def judging(shards: str, run: Path, rank: int) -> dict[str, Any]:
    """Rank 0 judges by kNN without end; rank 1, which waits for it, is told to stop."""

    def endless(judge: Any) -> Any:
        def again(self: KnnMonitor, encode: Any) -> Any:
            wait_until(lambda: encode(torch.zeros(4, 3, 16, 16, dtype=torch.uint8)) is None)

        return again

    told = threading.Timer(0.2, stop_me)

    def stopping(average: Any) -> Any:
        def average_bn(self: Learner) -> None:
            average(self)
            if rank and not told.ident:
                told.start()

        return average_bn

    undo = patched(KnnMonitor, "judge", endless), patched(Learner, "average_bn", stopping)
    config = small(knn_epochs=1, checkpoint_steps=100)
    summary = pretrain(config, shards=shards, run_dir=run)
    for one in undo:
        one()
    return dataclasses.asdict(summary)


def saving(shards: str, run: Path, rank: int) -> dict[str, Any]:
    """Rank 1 is told to stop in the midst of a checkpoint."""

    def stopping(is_finite: Any) -> Any:
        def finite(self: Learner) -> bool:
            if rank:
                stop_me()
            return bool(is_finite(self))

        return finite

    undo = patched(Learner, "is_finite", stopping)
    summary = pretrain(SMALL, shards=shards, run_dir=run)
    undo()
    return dataclasses.asdict(summary)


SCENARIOS = {"whole": whole, "moved": moved, "waiting": waiting, "judging": judging, "saving": saving}


def main(shards: str, folder: str, *names: str) -> None:
    out = Path(folder)
    torch.set_num_threads(1)
    # It ends the process group with the run; here the next run needs it.
    Accelerator.end_training = lambda self: None
    rank = int(os.environ["RANK"])
    found = {name: SCENARIOS[name](shards, out / name, rank) for name in names}
    (out / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
