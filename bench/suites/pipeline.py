"""Where a run's time goes: its loader alone, its step alone, and both together, in pairs/s.

A pair is one image in its two views. The loader and the step are the run's own, built from its config.
"""

import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from linerate.bench.contest import Bar, Ceiling, Contest, Setting, missing_record, timed_record
from linerate.bench.images import load_images
from linerate.bench.machine import noise, probe
from linerate.bench.record import Record
from linerate.bench.suites.view_work import missing_backend
from linerate.bench.timing import MIN_ROUNDS, Seconds, Side, interleave
from linerate.pipeline.cores import default_num_threads
from linerate.pipeline.loader import ViewLoader, open_views
from linerate.pipeline.two_views import TwoViews
from linerate.shards.catalog import Catalog
from linerate.shards.pack import pack
from linerate.train.config import TrainConfig
from linerate.train.launch import open_accelerator
from linerate.train.learner import Learner
from linerate.train.recipes import find_recipe

NAME = "train"


def measure_pipeline(
    config: TrainConfig, catalog: Catalog, *, budget_s: float = 20.0, rounds: int = MIN_ROUNDS
) -> list[Record]:
    """Three records: the loader alone, the step alone on synthetic views, both together.

    They are interleaved, so that they can be compared; the third one's ratio is to the step alone, its
    ceiling is the slower of the two. Nothing of a run changes: the encoders are new ones.
    budget_s: about how long it may take, start-up not counted; one batch a round is the least, of backends
    with workers one of each.
    """
    with contextlib.closing(Stages(config, catalog)) as stages:
        num_batches = stages.fit(budget_s, rounds)
        before = probe()
        times = interleave(stages.sides(num_batches), rounds=rounds, warmup=1, min_round_s=0.0)
        return pipeline_records(
            stages, times, name=NAME, num_batches=num_batches, unrest=noise(before, probe())
        )


def pipeline_records(
    stages: "Stages", times: dict[str, Seconds], *, name: str, num_batches: int, unrest: dict[str, Any]
) -> list[Record]:
    """The records of loader, step and both. times: what `interleave` gave for `Stages.sides`."""
    sides = stages.sides(num_batches)
    amount, work = float(num_batches * stages.batch), stages.describe()
    alone = {"loader": f"loader alone: {work}", "step": f"step alone on synthetic views: {work}"}
    records = [
        timed_record(
            name,
            Contest(
                peer=None,
                work=what,
                unit="pairs/s",
                amount=amount,
                ours=sides[part],
                no_ceiling="`views` and `step` have those of loader and step",
            ),
            times={"ours": times[part]},
            noise=unrest,
            suite="pipeline",
        )
        for part, what in alone.items()
    ]
    slower = "loader" if np.min(times["loader"]) > np.min(times["step"]) else "step"
    both = Contest(
        peer="our own step on synthetic views",
        work=f"loader and step: {work}",
        unit="pairs/s",
        amount=amount,
        ours=sides["both"],
        theirs=sides["step"],
        bar=Bar(0.95, full_size=stages.on_gpu),
        ceiling=Ceiling(name=f"the {slower} alone, the slower of the two", side=sides[slower]),
        note=None if stages.on_gpu else "loader and step share the CPU: the bar is for a GPU",
    )
    shared = {"ours": times["both"], "theirs": times["step"], "ceiling": times[slower]}
    return [*records, timed_record(name, both, times=shared, noise=unrest, suite="pipeline")]


def bench_train(setting: Setting) -> Iterator[Record | Contest]:
    """The recipe `demo` on generated images; on a GPU `in1m-v2`, whose step a GPU is there for."""
    num_images, batch, budget_s = setting.pick(
        tiny=(40, 8, 0.0),
        quick=(300, 32, 5.0),
        full=(2048, 256, 25.0) if setting.for_gpu else (1000, 128, 60.0),
    )
    images = load_images(setting.images, num_images=num_images)
    catalog = pack(images.root, setting.scratch / "pipeline-shards", num_workers=0)
    config = find_recipe("in1m-v2" if setting.for_gpu else "demo").build()
    if lacking := missing_backend(config.views.backend):
        work = f"loader and step: {config.model.encoder}, --backend {config.views.backend}"
        alone = Contest(peer=None, work=work, unit="pairs/s", amount=1, ours=Side(run=lambda: None))
        yield missing_record(NAME, alone, missing=f"{lacking}; measured by --backend torch instead")
        config = dataclasses.replace(config, views=dataclasses.replace(config.views, backend="torch"))
    if setting.for_gpu and setting.size == "tiny":
        config = dataclasses.replace(
            config,
            views=dataclasses.replace(config.views, size=32),
            model=dataclasses.replace(config.model, encoder="tiny-resnet-w4"),
            dictionary=dataclasses.replace(config.dictionary, num_keys=64),
        )
    if setting.size != "full":
        config = dataclasses.replace(
            config,
            optim=dataclasses.replace(config.optim, global_batch=batch),
            bn=dataclasses.replace(config.bn, bn_group=batch // 2, shuffle_block=batch),
        )
    yield from measure_pipeline(config, catalog, budget_s=budget_s, rounds=setting.rounds)
    # That module imports this one.
    from linerate.bench.suites.train_lightly import against_lightlys_run

    yield from against_lightlys_run(config, catalog, images, setting=setting, budget_s=budget_s / 4)


class Stages:
    """The run's loader and learner on this rank, and views that are there already."""

    def __init__(self, config: TrainConfig, catalog: Catalog) -> None:
        self.config, self.catalog = config, catalog
        self.batch = config.optim.global_batch
        self._open = contextlib.ExitStack()
        scratch = self._open.enter_context(tempfile.TemporaryDirectory())
        self.scratch = Path(scratch)
        self.accelerator = self._open.enter_context(open_accelerator(config, run_dir=self.scratch))
        self.device = self.accelerator.device.type
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.on_gpu = self.device == "cuda"
        self.learner = Learner(config, self.accelerator, num_samples=catalog.num_samples)
        self.loader = self._open_views(config.views.backend)
        self._views = self._endless()
        self._resident = list(itertools.islice(self._open_views("synthetic").epoch(0), 2))
        self._steps = itertools.count()

    def describe(self) -> str:
        """The work in a line."""
        model, views = self.config.model, self.config.views
        kb = int(self.catalog.shard_bytes.sum()) / self.catalog.num_samples / 1000
        return (
            f"{model.encoder}, two {views.size} px {views.augmentation} views by {views.backend}, "
            f"b{self.batch}, samples of {kb:.0f} KB"
        )

    def sides(self, num_batches: int) -> dict[str, Side]:
        """What is timed against each other, so many batches a round."""
        return {
            "loader": Side(run=lambda: self.load(num_batches), prepare=self.warm_loader),
            "step": Side(run=lambda: self.learn(num_batches), prepare=self.settle),
            "both": Side(run=lambda: self.load_and_learn(num_batches), prepare=self.warm_both),
        }

    def fit(self, budget_s: float, rounds: int, *, num_loads: int = 2, num_steps: int = 2) -> int:
        """Batches a round, so that everything takes about budget_s; at least one of every worker.

        num_loads, num_steps: how often a round's sides load a batch, and step on one.
        """
        self.load_and_learn(1)
        self.warm_loader()
        start = time.perf_counter()
        self.load(self.burst)
        loader_s = (time.perf_counter() - start) / self.burst
        start = time.perf_counter()
        self.learn(1)
        step_s = time.perf_counter() - start
        warm_s = self.num_warm * (num_loads * loader_s + step_s)
        each_s = num_loads * loader_s + num_steps * step_s
        fitting = round((budget_s / (rounds + 1) - warm_s) / (each_s * self.burst))
        return max(1, fitting) * self.burst

    def warm_loader(self) -> None:
        """Use up what lies ready: the clock starts as a batch comes out that was waited for."""
        self.load(self.num_warm)

    def warm_both(self) -> None:
        """Bring the queue between loader and step to the fill that it has when both run."""
        self.load_and_learn(self.num_warm)

    def settle(self) -> None:
        """Wait until the loader has filled its queue, since it works on in the background."""
        idle_since, used = time.perf_counter(), _cpu_seconds()
        while time.perf_counter() - idle_since < 0.05:
            time.sleep(0.01)
            if _cpu_seconds() - used > 0.005:
                idle_since, used = time.perf_counter(), _cpu_seconds()

    def load(self, num_batches: int) -> None:
        """Take batches and do nothing with them."""
        for _ in itertools.islice(self._views, num_batches):
            pass

    def learn(self, num_batches: int, *, learner: Learner | None = None) -> None:
        """Steps on views that are there already. learner: another one than the run's."""
        for place in range(num_batches):
            self.step(self._resident[place % len(self._resident)], learner)

    def first_losses(self, num_steps: int) -> list[float]:
        """The loss of each of the next steps on views that are there already; the host waits for each."""
        losses = []
        for place in range(num_steps):
            self.step(self._resident[place % len(self._resident)])
            losses.append(self.learner.read_metrics()["loss"])
        return losses

    def given_up(self) -> dict[str, str]:
        """Switches that were tried and failed, and why."""
        return self.learner.given_up()

    def load_and_learn(self, num_batches: int) -> None:
        """Steps on the loader's batches, as a run does them."""
        for batch in itertools.islice(self._views, num_batches):
            self.step(batch)

    def close(self) -> None:
        self._views.close()
        self.loader.close()
        self._open.close()

    def next_batch(self) -> TwoViews:
        """The loader's next batch, of epochs without end."""
        return next(self._views)

    def step(self, batch: TwoViews, learner: Learner | None = None) -> None:
        """One step of the learner, or of another one than the run's."""
        (learner or self.learner).step(batch, step=next(self._steps), lr=self.config.optim.lr)

    @property
    def burst(self) -> int:
        """Batches that come at once: one of each worker, where each makes whole ones."""
        speed = self.config.speed
        in_processes = self.config.views.backend in ("torch", "webdataset")
        return (speed.loader_threads or default_num_threads()) if in_processes else 1

    @property
    def num_warm(self) -> int:
        """Batches that may lie ready, and one."""
        return math.ceil(self.config.speed.prefetch / self.burst) * self.burst + 1

    def _endless(self) -> Generator[TwoViews, None, None]:
        for epoch in itertools.count():
            yield from self.loader.epoch(epoch)

    def _open_views(self, backend: str) -> ViewLoader:
        config = self.config
        return open_views(
            self.catalog,
            recipe=config.views.recipe(),
            backend=backend,
            device=self.device,
            seed=config.seed,
            global_batch=self.batch,
            rank=self._rank,
            world_size=self._world_size,
            num_lanes=config.lanes,
            num_threads=config.speed.loader_threads,
            prefetch=config.speed.prefetch,
            hw_decoder_load=config.speed.hw_decoder_load,
        )


def _cpu_seconds() -> float:
    """Used so far by this process and its workers; theirs come in ticks of 10 ms."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        # One may end between the listing and this call.
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
