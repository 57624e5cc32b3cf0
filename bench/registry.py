"""The benchmarks by name. A new one is a generator function in suites/ and a line here.

A benchmark takes a Setting and yields contests, one for each peer or size; what it opened stays open until
its contest was run, so it may hold folders, loaders and pinned cores in `with` blocks around a yield.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from linerate.bench.contest import Contest, Count, Setting, Size, run_contest
from linerate.bench.record import Record
from linerate.shards.terminal import nearest

Run = Callable[[Setting], Iterator[Contest | Count | Record]]


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lives, imported when it runs: the list costs nothing."""

    where: str
    """module:function, under linerate.bench.suites"""
    about: str
    """one line: the work, and against what"""
    peers: tuple[str, ...] = ()
    """modules of other projects that it needs; a missing one is named in the output"""

    def load(self) -> Run:
        """The benchmark's generator function."""
        module, _, function = self.where.partition(":")
        run: Run = getattr(importlib.import_module(f"linerate.bench.suites.{module}"), function)
        return run


BENCHMARKS: dict[str, Benchmark] = {
    "pack": Benchmark(
        "shards:bench_pack",
        "folder of 110 KB JPEGs -> shards; also against `cat`, and two processes against one",
        ("webdataset",),
    ),
    "pack-small": Benchmark("shards:bench_pack_small", "the same with JPEGs of 5 KB", ("webdataset",)),
    "pack-full": Benchmark(
        "pack_pixels:bench_pack_full",
        "pack with a strict decode check of each image",
        ("webdataset", "PIL", "img2dataset"),
    ),
    "pack-256": Benchmark(
        "pack_pixels:bench_pack_256",
        "pack with every image shrunk to a short side of 256",
        ("webdataset", "PIL", "img2dataset"),
    ),
    "plan": Benchmark(
        "plan:bench_plan", "filter, shuffle and task lists of 50 M rows; also with dedup; memory counted"
    ),
    "read": Benchmark(
        "shards:bench_read",
        "an epoch of samples in shuffled order from local shards, no decode",
        ("webdataset",),
    ),
    "read-rss": Benchmark(
        "read_memory:bench_read_rss", "memory of one rank's order and indexes at 940 M samples"
    ),
    "views": Benchmark(
        "views:bench_views", "JPEG bytes -> two 224 px views, one core", ("torchvision", "PIL")
    ),
    "draws": Benchmark("views:bench_draws", "drawing the augmentation's parameters, as a share of `views`"),
    "ema": Benchmark("step_parts:bench_ema", "the key encoder's update of ResNet-50, 161 tensors"),
    "sgd-ema": Benchmark(
        "sgd_ema:bench_sgd_ema", "SGD, weight decay, EMA and bf16 copies on a GPU; launches counted"
    ),
    "enqueue": Benchmark(
        "step_parts:bench_enqueue", "one step's keys into the queue; copies and host syncs counted"
    ),
    "infonce": Benchmark(
        "step_parts:bench_infonce", "loss and gradient over 65,536 negatives; memory counted"
    ),
    "shuffle-bn": Benchmark("shuffle_bn:bench_shuffle_bn", "bytes that shuffling BN sends, 4 ranks"),
    "step": Benchmark("step:bench_step", "the whole MoCo step; operations, bytes and host syncs counted"),
    "train": Benchmark(
        "pipeline:bench_train", "loader alone, step alone, and both together; the recipe `demo`"
    ),
}


@dataclass(frozen=True)
class Suite:
    """Which benchmarks, how large and how often."""

    about: str
    size: Size
    rounds: int
    only_by_name: tuple[str, ...] = ()
    """what takes too long to run with the others"""


SUITES: dict[str, Suite] = {
    "quick": Suite("smaller work, about a minute", "quick", 7),
    "cpu": Suite(
        "the work that the bars name, minutes; `plan`, which takes most of an hour, only where it is named",
        "full",
        9,
        ("plan",),
    ),
}


def select(names: list[str]) -> list[str]:
    """The names to run, each once, in the order of the table; all where none is given.

    Raises UserError for a name that does not exist, with the nearest that does.
    """
    for name in names:
        if name not in BENCHMARKS:
            raise nearest(name, list(BENCHMARKS), what="benchmark")
    return [name for name in BENCHMARKS if not names or name in names]


def run_benchmark(name: str, *, setting: Setting, suite: str) -> Iterator[Record]:
    """One record for each contest of a benchmark, as it is measured."""
    contests = BENCHMARKS[name].load()(setting)
    try:
        for contest in contests:
            yield run_contest(name, contest, setting=setting, suite=suite)
    finally:
        # Leaving early (Ctrl-C) must still close what the benchmark holds open.
        getattr(contests, "close", lambda: None)()
