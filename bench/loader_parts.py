"""A run's loader in parts: reading alone, decoding alone, and decoding with all that follows.

Each part works with the settings of the run's own loader, on bytes that were read before. For dali that is
its reader in one thread, its decoder as a pipeline of its own, and its whole pipeline; for torch, whose
workers do all of it one after another, it is what one worker does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from linerate.bench.stage_clock import Spans, StageClock
from linerate.pipeline.bad_samples import BadSamples
from linerate.pipeline.cores import default_num_threads
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.loader import ViewLoader, open_backend
from linerate.train.config import TrainConfig

DIVIDED = ("dali", "torch")
"""Backends whose parts can be had by themselves; the others' pipelines are their own."""
_FOR_EVER = range(2**40)


class Resident:
    """Batches that were read before, in turn: what a loader fetches if reading is free."""

    def __init__(self, batches: list[EncodedBatch]) -> None:
        self.batches = batches

    def __call__(self, step: int) -> EncodedBatch:
        return self.batches[step % len(self.batches)]


class LoaderParts:
    """Does each part for as many batches as it is asked for, and goes on where it stopped."""

    def __init__(self, config: TrainConfig, loader: ViewLoader, *, device: str, start_step: int) -> None:
        """loader: the run's, which has given the first batches of epoch 0 and so knows their damage.

        start_step: where in the epoch reading by itself begins.
        """
        backend, speed = config.views.backend, config.speed
        if backend not in DIVIDED:
            raise ValueError(f"the loader of {backend} cannot be divided; {' and '.join(DIVIDED)} can")
        threads = speed.loader_threads or default_num_threads()
        self.num_workers = threads if backend == "torch" and threads > 1 else 1
        """Processes that do all of it side by side."""
        self._backend, self._device, self.num_threads = backend, device, threads
        self._batch, self._prefetch = loader.rank_batch, speed.prefetch
        self._fetch = loader.own_fetch().for_epoch(0)
        num_steps = loader.steps_per_epoch
        self._steps = itertools.islice(itertools.cycle(range(num_steps)), start_step, None)
        self.resident = Resident([self._fetch(step) for step in range(min(2, num_steps))])
        self.clock, spans = StageClock(device), Spans()
        self._makes = open_backend(
            backend,
            recipe=config.views.recipe(),
            seed=config.seed,
            batch=self._batch,
            device=device,
            num_threads=1 if backend == "torch" else threads,
            prefetch=self._prefetch,
            hw_decoder_load=speed.hw_decoder_load,
        )
        spans.wrap(self._makes, "to_device", "to-device")
        spans.watchers = (self.clock,)
        self.to_device_s: list[float] = []
        """Seconds a batch of bringing views to the device, of each timed run."""
        run: Callable[..., Any] = self._makes.run
        self._views: Iterator[Any] = run(self.resident, _FOR_EVER, epoch=0)
        self._decoded = self.decoder(speed.hw_decoder_load)

    def read(self, num_batches: int) -> None:
        """Bytes of the shards, each checked, in one thread."""
        for _ in range(num_batches):
            for step in self._steps:
                try:
                    self._fetch(step)
                    break
                except BadSamples:  # the run's loader replaces and counts them
                    continue

    def decode(self, num_batches: int) -> None:
        """Images of bytes at hand."""
        for _ in itertools.islice(self._decoded, num_batches):
            pass

    def view(self, num_batches: int) -> None:
        """Views of bytes at hand, on the device."""
        for _ in itertools.islice(self._views, num_batches):
            pass

    def close(self) -> None:
        for stream in (self._views, self._decoded):
            getattr(stream, "close", lambda: None)()
        self._makes.close()
        self._fetch.close()

    def decoder(self, hw_decoder_load: float, *, num_threads: int | None = None) -> Iterator[Any]:
        """Decoded batches without end, with that share of them in a GPU's JPEG unit.

        num_threads: None takes the run's.
        """
        batches = map(self.resident, itertools.count())
        if self._backend == "torch":
            from linerate.pipeline import torch_views

            return (torch_views.decode_all(batch) for batch in batches)
        from linerate.pipeline.dali_views import decoded

        return decoded(
            (batch.jpegs for batch in batches),
            batch=self._batch,
            device=self._device,
            num_threads=num_threads or self.num_threads,
            prefetch=self._prefetch,
            hw_decoder_load=hw_decoder_load,
        )
