"""The benchmarks by name. A new one is a generator function in suites/ and a line here.

A benchmark takes a Setting and yields contests, one for each peer or size; what it opened stays open until
its contest was run, so it may hold folders, loaders and pinned cores in `with` blocks around a yield.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from linerate.bench.contest import Contest, Count, Setting, Size, run_contest
from linerate.bench.machine import machine
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
    "ceilings": Benchmark(
        "ceilings:bench_ceilings",
        "what this machine can do at most: memory, matmul, disk, host to GPU, `cat`, JPEG decode",
    ),
    "pack": Benchmark(
        "shards:bench_pack",
        "folder of 110 KB JPEGs -> shards; also against `cat`, and two processes against one",
        ("webdataset", "streaming", "litdata"),
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
        "read:bench_read",
        "an epoch of samples in shuffled order from local shards, no decode",
        ("webdataset", "streaming", "litdata"),
    ),
    "read-rss": Benchmark(
        "read_memory:bench_read_rss", "memory of one rank's order and indexes at 940 M samples"
    ),
    "views": Benchmark(
        "views:bench_views",
        "JPEG bytes -> two 224 px views, one core; with --backends each of them against torch",
        ("torchvision", "PIL", "webdataset", "ffcv"),
    ),
    "views-rss": Benchmark(
        "views_memory:bench_views_rss",
        "memory of a rank's loader over epochs of an adversarial size order, against what --dry-run foresees",
    ),
    "draws": Benchmark("views:bench_draws", "drawing the augmentation's parameters, as a share of `views`"),
    "ema": Benchmark("step_parts:bench_ema", "the key encoder's update of ResNet-50, 161 tensors"),
    "sgd-ema": Benchmark(
        "sgd_ema:bench_sgd_ema",
        "SGD, weight decay and EMA on a GPU, with and without bf16 copies; launches counted",
    ),
    "enqueue": Benchmark(
        "step_parts:bench_enqueue", "one step's keys into the queue; copies and host syncs counted"
    ),
    "infonce": Benchmark(
        "step_parts:bench_infonce", "loss and gradient over 65,536 negatives; memory counted"
    ),
    "shuffle-bn": Benchmark("shuffle_bn:bench_shuffle_bn", "bytes that shuffling BN sends, 4 ranks"),
    "step": Benchmark(
        "step:bench_step", "the whole MoCo step; operations, bytes and host syncs counted", ("lightly",)
    ),
    "step-small": Benchmark("gpu_step:bench_step_small", "the step at batch 32, where launches count"),
    "step-stages": Benchmark(
        "step_stages:bench_step_stages", "one step by its stages, and its largest kernels"
    ),
    "views-sweep": Benchmark(
        "gpu_views:bench_views_sweep", "DALI's views over hw_decoder_load x threads x prefetch"
    ),
    "train": Benchmark(
        "pipeline:bench_train",
        "loader alone, step alone, and both together, also against lightly's run; the recipe `demo`",
        ("lightly",),
    ),
    "scale": Benchmark(
        "scale:bench_scale",
        "the step on 1, 2 (4) ranks: weak and strong, collectives and their bytes; the recipe `demo`",
    ),
}


@dataclass(frozen=True)
class Suite:
    """Which benchmarks, how large and how often."""

    about: str
    size: Size
    rounds: int
    only_by_name: tuple[str, ...] = ()
    """what takes too long to run with the others, or says little here"""
    limits_s: Mapping[str, float] = field(default_factory=dict)
    """benchmark -> seconds that it may take in a process of its own; none: all share this one"""
    device: str = "cpu"
    max_ranks: int = 2

    @property
    def names(self) -> list[str]:
        """What runs where no name is given; in the order of the limits, where there are such."""
        if self.limits_s:
            return [name for name in self.limits_s if name in BENCHMARKS]
        return [name for name in BENCHMARKS if name not in self.only_by_name]


# Those whose paths are for a GPU; on a CPU they run where they are named.
FOR_A_GPU = ("step-small", "step-stages", "views-sweep")

# What is known soonest comes first.
GPU_LIMITS_S = {
    "ceilings": 40.0,
    "enqueue": 60.0,
    "ema": 60.0,
    "sgd-ema": 60.0,
    "infonce": 60.0,
    "step-stages": 45.0,
    "views": 75.0,
    "train": 75.0,
    "views-sweep": 100.0,
    "step": 180.0,
    "step-small": 90.0,
}

SUITES: dict[str, Suite] = {
    "quick": Suite("smaller work, about a minute", "quick", 7, FOR_A_GPU),
    "cpu": Suite(
        "the work that the bars name, minutes; `plan`, which takes most of an hour, only where it is named",
        "full",
        9,
        ("plan", *FOR_A_GPU),
    ),
    "gpu": Suite(
        "views, step and its parts on a CUDA device, each in a process of its own under a time limit",
        "full",
        7,
        limits_s=GPU_LIMITS_S,
        device="cuda",
    ),
    "full": Suite(
        "all of `cpu` and `plan`, more rounds and ranks, hours; then `gpu` where there is a CUDA device",
        "full",
        15,
        FOR_A_GPU,
        max_ranks=4,
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
    # Read once for the process, so before a benchmark pins it to one core.
    machine()
    contests = BENCHMARKS[name].load()(setting)
    try:
        for contest in contests:
            yield run_contest(name, contest, setting=setting, suite=suite)
    finally:
        # Leaving early (Ctrl-C) must still close what the benchmark holds open.
        getattr(contests, "close", lambda: None)()
