"""Batches for a classifier: crops through the loader of training, or features that are extracted once.

Legend: N images on a rank, S pixels a side, D dimensions of a feature.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from linerate.pipeline.evaluation_views import CropBackend
from linerate.pipeline.loader import ImageLoader, open_training_images
from linerate.pipeline.order import EpochOrder, default_num_lanes
from linerate.pipeline.reader import subset_sizes
from linerate.pipeline.recipe import crop_and_flip
from linerate.shards.catalog import Catalog
from linerate.train.evaluate.classifier_recipes import ClassifierConfig
from linerate.train.evaluate.feature_file import FeatureSource, write_features
from linerate.train.evaluate.features import Encode, LabelledSet, Split, open_evaluation
from linerate.train.evaluate.labelled import load_labels

Batch = tuple[Tensor, Tensor]
"""What the model takes, (N, 3, S, S) uint8 or (N, D) float32 on the device, and labels (N,) int64."""
TestBatches = Callable[[], Iterator[Batch]]
"""Every test image of this rank once."""


class TrainBatches(Protocol):
    """A rank's training batches, epoch by epoch, from any step on."""

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def num_dropped(self) -> int: ...

    @property
    def num_replaced(self) -> int: ...

    def epoch(self, epoch: int, *, start_step: int) -> Generator[Batch, None, None]: ...

    def close(self) -> None: ...


class CropBatches:
    """Random crops, mirrored half the time, by DALI or torch."""

    def __init__(self, loader: ImageLoader) -> None:
        self._loader = loader
        self.steps_per_epoch, self.num_dropped = loader.steps_per_epoch, loader.num_dropped

    @property
    def num_replaced(self) -> int:
        """Damaged samples that others stood in for."""
        return self._loader.replacements.num_replaced

    def epoch(self, epoch: int, *, start_step: int) -> Generator[Batch, None, None]:
        with contextlib.closing(self._loader.epoch(epoch, start_step=start_step)) as batches:
            for batch in batches:
                yield batch.images, batch.label

    def close(self) -> None:
        self._loader.close()


def open_crops(
    config: ClassifierConfig,
    samples: LabelledSet,
    *,
    device: str,
    rank: int,
    world_size: int,
    num_threads: int | None,
) -> CropBatches:
    """The training crops of one rank. Raises UserError before any image is read, for what cannot work."""
    loader = open_training_images(
        samples.catalog,
        recipe=crop_and_flip(size=config.size),
        positions=samples.positions,
        backend=config.backend,
        device=device,
        seed=config.seed,
        global_batch=config.global_batch,
        rank=rank,
        world_size=world_size,
        num_threads=num_threads,
    )
    return CropBatches(loader)


def centre_crops(
    config: ClassifierConfig,
    samples: LabelledSet,
    *,
    device: str,
    rank: int,
    world_size: int,
    num_threads: int | None,
) -> TestBatches:
    """One rank's share of the test images: the short side resized, the centre cut out."""
    share = samples.share(rank=rank, world_size=world_size)

    def batches() -> Iterator[Batch]:
        images = open_evaluation(
            share, size=config.size, backend=config.backend, device=device, num_threads=num_threads
        )
        for part in images:
            yield part.images, part.label

    return batches


class FeatureBatches:
    """Rows of cached features in the order in which an epoch's crops would come."""

    num_replaced = 0

    def __init__(
        self,
        features: Tensor,
        label: Tensor,
        shard_sizes: np.typing.NDArray[np.int64],
        *,
        seed: int,
        global_batch: int,
        device: str,
    ) -> None:
        """features: (N, D) and label (N,) of the training samples, by position; shard_sizes: theirs."""
        self._features, self._label, self._device = features, label, device
        self._sizes, self._seed, self._global_batch = shard_sizes, seed, global_batch
        order = self._order(0)
        self.steps_per_epoch, self.num_dropped = order.num_steps, order.num_dropped

    def epoch(self, epoch: int, *, start_step: int) -> Generator[Batch, None, None]:
        order = self._order(epoch)
        for step in range(start_step, order.num_steps):
            rows = torch.from_numpy(order.positions(step))
            yield self._features[rows].to(self._device), self._label[rows]

    def close(self) -> None:
        """Nothing is open."""

    def _order(self, epoch: int) -> EpochOrder:
        return EpochOrder(
            self._sizes,
            seed=self._seed,
            epoch=epoch,
            global_batch=self._global_batch,
            num_lanes=default_num_lanes(self._global_batch),
        )


def open_cached_features(
    split: Split,
    encode: Encode,
    *,
    weights_xxh3: str,
    size: int,
    backend: CropBackend,
    folder: Path,
    device: str,
    num_threads: int | None,
    advance: Callable[[float], None] = lambda _: None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(features, labels) of the training and of the test samples, by position.

    They are files in the folder, named by weights, shards, size and backend; what is missing is extracted.
    """

    def cached(samples: LabelledSet) -> tuple[Tensor, Tensor]:
        catalog = samples.catalog
        path = folder / f"{weights_xxh3}-{catalog.plan_id[:16]}-{catalog.num_samples}-{size}-{backend}.npy"
        if not path.exists():
            source = _feature_source(catalog, weights_xxh3=weights_xxh3, size=size, backend=backend)
            write_features(
                encode,
                catalog,
                source,
                out=path,
                backend=backend,
                device=device,
                num_threads=num_threads,
                advance=advance,
            )
        # Copy on write: torch wants memory that may be written, the file stays as it is.
        rows = torch.from_numpy(np.load(path, mmap_mode="c"))
        table = load_labels(catalog)
        label = table.label[np.searchsorted(table.position, samples.positions)]
        return rows[torch.from_numpy(samples.positions)], torch.from_numpy(label)

    return cached(split.train), cached(split.test)


def open_feature_batches(
    config: ClassifierConfig, split: Split, train: tuple[Tensor, Tensor], *, device: str
) -> FeatureBatches:
    """The training batches of the fast variant."""
    sizes = subset_sizes(split.train.catalog, split.train.positions)
    return FeatureBatches(*train, sizes, seed=config.seed, global_batch=config.global_batch, device=device)


def feature_tests(test: tuple[Tensor, Tensor], *, device: str, batch: int = 4096) -> TestBatches:
    """The test rows of the fast variant."""

    def batches() -> Iterator[Batch]:
        for features, label in zip(*(torch.split(part, batch) for part in test), strict=True):
            yield features.to(device), label

    return batches


def _feature_source(catalog: Catalog, *, weights_xxh3: str, size: int, backend: CropBackend) -> FeatureSource:
    return FeatureSource(
        checkpoint="",
        weights_xxh3=weights_xxh3,
        plan_id=catalog.plan_id,
        num_samples=catalog.num_samples,
        features="backbone",
        size=size,
        dtype="float32",
        backend=backend,
    )
