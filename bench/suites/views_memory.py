"""Memory of a rank's loader on the CPU when sizes come in the worst order, against what was foreseen.

Run as a module, with ROUNDS as JSON for its argument, it is the child whose memory is measured.
"""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from linerate.bench.contest import Bar, Count, Setting
from linerate.pipeline.bad_samples import KnownBad, Replacements
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.host_memory import SampleSize, predict_host_memory
from linerate.pipeline.loader import ViewLoader, open_backend
from linerate.pipeline.reader import EpochFetch
from linerate.pipeline.recipe import find_recipe
from linerate.shards.catalog import Catalog

MAX_GROWTH = 0.02
"""Of the first epoch's peak of resident memory, the share by which that of a later epoch may lie above it."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """What the loader goes through."""

    side: int
    """Of the largest images: side x 4/3 side pixels."""
    rank_batch: int
    epochs: int
    repeat: int
    """Batches of one kind in a row."""
    num_threads: int
    size: int = 224
    """S of the views."""

    @property
    def kinds(self) -> list[list[tuple[int, int]]]:
        """(height, width) of a batch's samples: tiny ones, then huge, odd, huge among slim, tiny."""
        huge, num = (self.side, self.side * 4 // 3), self.rank_batch
        return [
            [(32, 32)] * num,
            [huge] * num,
            [(self.side // 2 + 7, huge[1] // 2 + 1) if i % 2 else (17, huge[1]) for i in range(num)],
            [huge if i % 3 else (self.side, 31) for i in range(num)],
            [(40, 24 + i) for i in range(num)],
        ]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Bytes."""

    peak: list[int]
    """The most that was resident at any moment of each epoch, by the kernel's count."""
    before: int
    """Resident before the loader was built."""
    predicted: dict[str, int]

    @property
    def growth(self) -> float:
        """The share by which the highest peak after the first epoch lies above the first one's."""
        return max(self.peak[1:]) / self.peak[0] - 1

    @property
    def factor(self) -> float:
        """Foreseen over measured."""
        return self.predicted["total"] / max(self.peak)


class _SizeOrder(EpochFetch):
    """Batches by their sizes alone; the first epoch begins with the tiny ones, the others anywhere."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds, self.epoch = rounds, 0

    @property
    def rank_batch(self) -> int:
        return self.rounds.rank_batch

    def __call__(self, step: int) -> EncodedBatch:
        kinds = self.rounds.kinds
        order = np.arange(len(kinds))
        if self.epoch:
            order = np.random.default_rng(self.epoch).permutation(order)
        sizes = kinds[order[step // self.rounds.repeat]]
        at = np.arange(len(sizes))
        height, width = np.array(sizes, dtype=np.int64).T
        # As the reader does: one buffer for the batch.
        jpegs = [draw_jpeg(*one) for one in sizes]
        ends = np.cumsum([0, *map(len, jpegs)])
        buffer = np.frombuffer(b"".join(jpegs), dtype=np.uint8).copy()
        return EncodedBatch(
            jpegs=[buffer[a:b] for a, b in pairwise(ends)],
            sample_id=at,
            position=at,
            label=np.full(len(at), -1),
            height=height,
            width=width,
        )

    def for_epoch(self, epoch: int) -> "_SizeOrder":
        self.epoch = epoch
        return self

    def without(self, known_bad: KnownBad) -> "_SizeOrder":
        return self

    def close(self) -> None:
        """It holds nothing."""


@cache
def draw_jpeg(height: int, width: int) -> bytes:
    """A photo-like JPEG: coarse random colours blown up."""
    from PIL import Image

    coarse = np.random.default_rng(height * width).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def run_epochs(rounds: Rounds) -> Found:
    """Go through them in this process by DALI on the CPU."""
    import linerate.pipeline.dali_views  # noqa: F401  its import is not the loader's memory

    kinds = rounds.kinds
    every = {one: len(draw_jpeg(*one)) for kind in kinds for one in kind}
    largest = SampleSize(max(every.values()), max(height * width for height, width in every))
    before = status_bytes("VmRSS")
    recipe = find_recipe("v2", size=rounds.size)
    backend = open_backend(
        "dali", recipe=recipe, seed=0, batch=rounds.rank_batch, num_threads=rounds.num_threads, prefetch=2
    )
    loader = ViewLoader(
        backend,
        _SizeOrder(rounds),
        Replacements(cast(Catalog, None)),  # nothing here is bad
        steps_per_epoch=len(kinds) * rounds.repeat,
        num_dropped=0,
    )
    peak = []
    for epoch in range(rounds.epochs):
        forget_peak()
        for views in loader.epoch(epoch):
            assert views.query.shape[0] == rounds.rank_batch
        del views
        peak.append(status_bytes("VmHWM"))
    loader.close()
    predicted = predict_host_memory(
        largest,
        shard_sizes=np.array([rounds.rank_batch]),
        backend="dali",
        on_gpu=False,
        size=rounds.size,
        rank_batch=rounds.rank_batch,
        rank_lanes=1,
        num_threads=rounds.num_threads,
        prefetch=2,
    )
    assert predicted is not None
    return Found(peak=peak, before=before, predicted=predicted)


def forget_peak() -> None:
    """Let the kernel count this process's peak anew; where it does not listen, the peak is of all epochs."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def status_bytes(field: str) -> int:
    """Of this process, now: VmRSS, what is resident; VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def bench_views_rss(setting: Setting) -> Iterator[Count]:
    """Growth over epochs, and the highest peak against the prediction; in a process of its own."""
    rounds = Rounds(
        side=setting.pick(tiny=300, quick=1000, full=1500),
        rank_batch=setting.pick(tiny=4, quick=16, full=16),
        epochs=setting.pick(tiny=2, quick=4, full=8),
        repeat=3,
        num_threads=2,
    )
    # A start of its own, 8 s, is for figures that count.
    found = run_epochs(rounds) if setting.size == "tiny" else run_in_child(rounds)
    work = (
        f"{rounds.epochs} epochs of batches of {rounds.rank_batch}, 32 x 32 to {rounds.side} x "
        f"{rounds.side * 4 // 3} px, {rounds.num_threads} threads, DALI on the CPU"
    )
    yield Count(
        peer=None,
        work=f"growth after the first epoch: {work}",
        unit="%",
        ours=round(100 * found.growth, 2),
        bar=Bar(100 * MAX_GROWTH, of="ours", at_most=True, full_size=setting.size != "tiny"),
        note="peaks of the epochs: " + _mib(found.peak) + "; before the loader: " + _mib([found.before]),
    )
    yield Count(
        peer="what --dry-run foresees",
        work=f"peak: {work}",
        unit="MiB",
        ours=round(max(found.peak) / 2**20),
        theirs=round(found.predicted["total"] / 2**20),
        bar=Bar(1.0, full_size=setting.size != "tiny"),
        note=f"foreseen / measured: {found.factor:.2f}",
    )


def _mib(sizes: Sequence[int]) -> str:
    return " ".join(f"{size / 2**20:.0f}" for size in sizes) + " MiB"


def run_in_child(rounds: Rounds) -> Found:
    """As `run_epochs`, in a process that has done nothing else."""
    command = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(rounds))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Found(**found)


def main(argv: list[str]) -> None:
    """The child: prints what it found as JSON."""
    print(json.dumps(dataclasses.asdict(run_epochs(Rounds(**json.loads(argv[0]))))))


if __name__ == "__main__":
    main(sys.argv[1:])
