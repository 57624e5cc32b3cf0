"""What is watched during a run: how fast it goes, how long it waits for data, and kNN every few epochs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from linerate.pipeline.cache import CacheOptions, open_shards
from linerate.pipeline.evaluation_views import CropBackend
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.config import Watch
from linerate.train.evaluate.features import Encode, Split, open_split
from linerate.train.evaluate.judge import KnnOptions, judge_by_knn

FAILURES = (UserError, OSError, RuntimeError, MemoryError)
"""What can befall an evaluation without a defect of ours: shards that cannot be read, DALI, no memory."""
DEFECTS = (NotImplementedError, RecursionError)
"""RuntimeErrors that are none of these; they end a run, as a TypeError or a KeyError does."""


class StopCame(Exception):
    """The run is to end, and an evaluation with it."""


class Stopwatch:
    """Training time since the last lap, and the share of it that the loop stood waiting for the loader.

    On a GPU the host runs ahead of the device, so the share is an upper bound of what the device waits.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Start a lap now."""
        self._waited_s = self._paused_s = 0.0
        self._started_s = self._clock()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done in here is waiting for a batch, this rank's own or another's."""
        before = self._clock()
        yield
        self._waited_s += self._clock() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluating and saving are not training time."""
        before = self._clock()
        yield
        self._paused_s += self._clock() - before

    def lap(self, *, images: int) -> dict[str, float]:
        """images_per_s and data_wait_share of the lap that ends now; starts the next one."""
        wall_s = max(self._clock() - self._started_s - self._paused_s, 1e-9)
        result = {"images_per_s": images / wall_s, "data_wait_share": min(1.0, self._waited_s / wall_s)}
        self.restart()
        return result


@dataclass(frozen=True)
class KnnMonitor:
    """Judges the encoder of a run by kNN on labelled shards, as `linerate eval knn` does."""

    split: Split
    options: KnnOptions

    def judge(self, encode: Encode) -> dict[str, Any]:
        """knn_top1 in [0, 1] and how many images it stands on. encode: the encoder in eval mode."""
        return judge_by_knn(encode, self.split, self.options)


def open_monitor(
    watch: Watch,
    catalog: Catalog,
    *,
    size: int,
    backend: CropBackend = "dali",
    device: str,
    num_threads: int | None,
    cache: CacheOptions | None = None,
) -> tuple[KnnMonitor | None, str | None]:
    """The monitor, or None and the reason why there is none.

    Training shards without labels switch it off; shards that were named for it must have them (UserError).
    """
    if not watch.knn_epochs:
        return None, None
    train = open_shards(watch.knn_train, cache) if watch.knn_train else catalog
    test = open_shards(watch.knn_test, cache) if watch.knn_test else None
    try:
        split = open_split(train, test, test_share=watch.knn_test_share).first(watch.knn_limit)
    except UserError as error:
        if watch.knn_train or watch.knn_test:
            raise
        return None, f"no kNN monitor: {error}"
    options = KnnOptions(
        size=size,
        k=watch.knn_k,
        temperature=watch.knn_temperature,
        backend=backend,
        device=device,
        num_threads=num_threads,
    )
    return KnnMonitor(split, options), None
