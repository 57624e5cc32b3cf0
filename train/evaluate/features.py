"""Features of a set of labelled shards, and which of its samples are for training and which for testing.

Legend: N samples, D dimensions of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from linerate.pipeline.evaluation_views import CropBackend, LabelledImages, open_images
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError

EVALUATION_BATCH = 256
"""Images that pass the encoder at once, if DALI decodes as many."""
Encode = Callable[[Tensor], Tensor]
"""(n, 3, S, S) uint8 images -> (n, D) features, on one device."""


@dataclass(frozen=True)
class LabelledSet:
    """Some samples of a set of shards, all of them with a label."""

    catalog: Catalog
    positions: NDArray[np.int64]
    """(N,) ascending."""

    def __len__(self) -> int:
        return len(self.positions)

    def first(self, limit: int | None) -> LabelledSet:
        """At most `limit` of the samples: packed shards are shuffled, so the first are a fair draw."""
        return LabelledSet(self.catalog, self.positions[:limit])

    def share(self, *, rank: int, world_size: int) -> LabelledSet:
        """A rank's share of the samples: together each is there once."""
        return LabelledSet(self.catalog, np.array_split(self.positions, world_size)[rank])


@dataclass(frozen=True)
class Split:
    """What votes and what is judged."""

    train: LabelledSet
    test: LabelledSet

    @property
    def num_classes(self) -> int:
        return len(self.train.catalog.class_names)

    def first(self, limit: int | None) -> Split:
        return Split(self.train.first(limit), self.test.first(limit))


def open_split(train: Catalog, test: Catalog | None, *, test_share: float = 0.1) -> Split:
    """Train on one set of shards and test on the other, or on a held-out share of the one.

    The share is held out by a hash of sample_id, so it does not depend on how often or where this runs.
    Raises UserError where labels are missing, classes differ, or a part would be empty.
    """
    if test is None:
        positions, sample_id = _labelled(train)
        held_out = hash_share(sample_id) < test_share
        split = Split(
            LabelledSet(train, positions[~held_out]),
            LabelledSet(train, positions[held_out]),
        )
    else:
        if test.class_names != train.class_names:
            raise UserError(
                f"{test.root} has other classes ({_names(test)}) than {train.root} ({_names(train)}); "
                "pack both from folders with the same class names"
            )
        split = Split(LabelledSet(train, _labelled(train)[0]), LabelledSet(test, _labelled(test)[0]))
    if not len(split.train) or not len(split.test):
        raise UserError(
            f"{len(split.train)} train and {len(split.test)} test images with labels are too few; "
            "give a --test set, or another test share"
        )
    return split


def hash_share(sample_id: NDArray[np.int64]) -> NDArray[np.float64]:
    """(N,) in [0, 1): an even spread that depends on nothing but the ids (splitmix64)."""
    z = sample_id.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def evaluation_resize(catalog: Catalog, size: int) -> int:
    """The short side before the centre crop: 256 for 224, and no more than size for images that small."""
    return size if max(catalog.max_height, catalog.max_width) <= size else round(size * 256 / 224)


def open_evaluation(
    samples: LabelledSet,
    *,
    size: int,
    backend: CropBackend = "dali",
    device: str = "cpu",
    batch: int = EVALUATION_BATCH,
    num_threads: int | None = None,
) -> Iterator[LabelledImages]:
    """The images of the samples, each once, in the order of their positions: short side resized, centre."""
    return open_images(
        samples.catalog,
        size=size,
        resize=evaluation_resize(samples.catalog, size),
        backend=backend,
        device=device,
        num_threads=num_threads,
        batch=batch,
        positions=samples.positions,
    )


@torch.inference_mode()
def extract_features(
    encode: Encode,
    samples: LabelledSet,
    *,
    size: int,
    backend: CropBackend = "dali",
    device: str = "cpu",
    batch: int = EVALUATION_BATCH,
    num_threads: int | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) on the device and labels (N,) int64 of the samples, in the order of their positions.

    advance is told how many images are done, batch by batch.
    """
    features, labels = torch.empty(0), []
    done = 0
    images = open_evaluation(
        samples, size=size, backend=backend, device=device, batch=batch, num_threads=num_threads
    )
    for part in images:
        rows = encode(part.images).float()
        if not done:
            # Filled in place: joined at the end, 1.28 M x 2048 would take twice their 10 GB.
            features = rows.new_empty(len(samples), rows.shape[1])
        features[done : done + len(rows)] = rows
        labels.append(part.label)
        done += len(rows)
        advance(len(rows))
    return features, torch.cat(labels)


def _labelled(catalog: Catalog) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    indices = [catalog.shard_index(shard) for shard in range(catalog.num_shards)]
    label = np.concatenate([index.label for index in indices])
    sample_id = np.concatenate([index.sample_id for index in indices])
    has_label = label >= 0
    if not has_label.any():
        raise UserError(
            f"{catalog.root} has no labels, which kNN needs; pack a folder of class folders, "
            "or name labelled shards"
        )
    if label.max() >= len(catalog.class_names):
        raise UserError(
            f"{catalog.root} has labels up to {label.max()} and {len(catalog.class_names)} classes; pack it "
            "again from class folders"
        )
    return np.flatnonzero(has_label).astype(np.int64), sample_id[has_label]


def _names(catalog: Catalog) -> str:
    return ", ".join(catalog.class_names[:3]) + (" ..." if len(catalog.class_names) > 3 else "")
