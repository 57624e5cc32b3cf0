"""Ranks of a run that step on noise when they are told to.

As a module it is run by torchrun, its argument a folder with a config.

Rank 0 reads a command a line on stdin and answers each with a line on stdout; the others do as it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, Protocol

import torch
import torch.distributed as dist

from linerate.bench.counting import OpCounter
from linerate.bench.timing import synchronize
from linerate.pipeline.two_views import TwoViews
from linerate.shards.errors import UserError
from linerate.train.config import TrainConfig
from linerate.train.config_json import load_config, write_config
from linerate.train.launch import open_accelerator
from linerate.train.learner import Learner

CONFIG = "config.json"
# What DDP needs before its buckets are final, and the optimizer before it has its state.
WARM_STEPS = 3


class Group(Protocol):
    """Ranks that step together when they are told to."""

    def answer(self, ask: str, batch: int) -> dict[str, Any]: ...
    def close(self) -> None: ...


class Rank:
    """The run's own learner on this rank, and views that are there already."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self._config = config
        self._open = contextlib.ExitStack()
        accelerator = self._open.enter_context(open_accelerator(config, run_dir=folder))
        self._device = accelerator.device
        if self._device.type == "cpu":
            threads = torch.get_num_threads()
            self._open.callback(torch.set_num_threads, threads)
            torch.set_num_threads(1)
        # A bank of any size does: a step touches the rows that it draws.
        num_samples = config.optim.global_batch + config.dictionary.num_keys
        self._learner = Learner(config, accelerator, num_samples=num_samples)
        self._done = 0
        self._made: dict[int, TwoViews] = {}

    def answer(self, ask: str, batch: int) -> dict[str, Any]:
        """Do what is asked for with so many images on each rank: `step`, or `count` what a step sends."""
        if ask == "count":
            return self._count(batch)
        self._step(batch)
        return {}

    def close(self) -> None:
        """Give back what the run holds."""
        self._open.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _step(self, batch: int) -> None:
        self._learner.step(self._views(batch), step=self._done, lr=self._config.optim.lr)
        self._done += 1
        synchronize()
        if dist.is_initialized():
            dist.barrier()

    def _count(self, batch: int) -> dict[str, Any]:
        for _ in range(WARM_STEPS):
            self._step(batch)
        with OpCounter() as counter:
            self._learner.step(self._views(batch), step=self._done, lr=self._config.optim.lr)
        self._done += 1
        return {
            "calls": dict(counter.collectives),
            "bytes": dict(counter.filled_bytes),
            "gradient_calls": num_buckets(self._learner.moco.query_forward),
            "gradient_bytes": sum(p.numel() * p.element_size() for p in self._learner.moco.query_params),
        }

    def _views(self, batch: int) -> TwoViews:
        if batch not in self._made:
            self._made[batch] = self._draw_views(batch)
        return self._made[batch]

    def _draw_views(self, batch: int) -> TwoViews:
        generator = torch.Generator().manual_seed(0)
        size, place = self._config.views.size, torch.arange(batch)
        query, key = (
            torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
            .to(self._device)
            .permute(0, 3, 1, 2)
            for _ in range(2)
        )
        return TwoViews(query=query, key=key, sample_id=place, position=place, label=place)


class Launched:
    """Ranks that torchrun started; they answer through the first one."""

    def __init__(self, config: TrainConfig, num: int, folder: Path, *, on_gpu: bool) -> None:
        write_config(config, folder / CONFIG)
        words = ["--standalone", "--nproc-per-node", str(num), "-m", "linerate.bench.suites.scale_rank"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        if not on_gpu:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._said: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words, os.fspath(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._asked, self._answers = self._process.stdin, self._process.stdout
        self._num = num

    def answer(self, ask: str, batch: int) -> dict[str, Any]:
        """What the first rank says when all have done it. Raises UserError where they ended."""
        with contextlib.suppress(BrokenPipeError):
            self._asked.write(json.dumps({"ask": ask, "batch": batch}) + "\n")
            self._asked.flush()
        for line in self._answers:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        self._said.seek(0)
        told = [line for line in self._said.read().splitlines() if "Error" in line]
        why = told[0][:300] if told else "they said nothing"
        raise UserError(f"{self._num} ranks ended: {why}; give fewer --ranks, or a smaller --global-batch")

    def close(self) -> None:
        """Let them end; after 30 s torchrun ends them, after 60 s the system."""
        with contextlib.suppress(BrokenPipeError):
            self._asked.close()
        for end in (self._process.terminate, self._process.kill):
            try:
                self._process.wait(timeout=30)
                break
            except subprocess.TimeoutExpired:
                end()
        self._process.wait()
        self._answers.close()
        self._said.close()


def num_buckets(forward: Any) -> int:
    """All-reduces in which DDP sends the gradients of one step; 0 without DDP."""
    if not isinstance(forward, torch.nn.parallel.DistributedDataParallel):
        return 0
    logged: dict[str, Any] = forward._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    sizes = str(logged.get("rebuilt_bucket_sizes", ""))
    return len([size for size in sizes.split(",") if size.strip()])


def main(folder: Path) -> None:
    """Answer until stdin ends."""
    rank = Rank(load_config(folder / CONFIG), folder)
    # Of its own, so that waiting for a command is no work for a GPU.
    control: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
    first = not dist.is_initialized() or dist.get_rank() == 0
    while True:
        line = [sys.stdin.readline() if first else ""]
        if control is not None:
            dist.broadcast_object_list(line, src=0, group=control)
        if not line[0]:
            break
        answer = rank.answer(**json.loads(line[0]))
        if first:
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    rank.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
