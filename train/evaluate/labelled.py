"""Which labelled samples a classifier learns from and which it is judged on, checked before any is read.

Legend: N samples, S shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.evaluate.features import LabelledSet, Split, hash_share

Ints = NDArray[np.int64]
# Keeps the draw of a share of the labels apart from that of the held-out samples, which hashes the ids alone.
_LABEL_SHARE_SALT = 1 << 40


@dataclass(frozen=True)
class LabelTable:
    """The labelled samples of a set of shards: each array (N,), in packed order."""

    position: Ints
    label: Ints
    sample_id: Ints
    xxh3_64: NDArray[np.uint64]
    num_unlabelled: int
    """Samples of the shards that have no label, and are not here."""

    def __len__(self) -> int:
        return len(self.position)

    def take(self, mask: NDArray[np.bool_]) -> LabelTable:
        """The samples where the mask is set."""
        return LabelTable(
            self.position[mask],
            self.label[mask],
            self.sample_id[mask],
            self.xxh3_64[mask],
            self.num_unlabelled,
        )


@dataclass(frozen=True)
class LabelledSplit:
    """What is learned from and what is judged, and what people should know about both."""

    split: Split
    notes: tuple[str, ...]
    num_test_in_train: int
    """Test images whose very bytes are among the training images."""

    @property
    def num_classes(self) -> int:
        return self.split.num_classes


def open_labelled_split(
    train: Catalog, test: Catalog | None, *, test_share: float | None = None, label_share: float = 1.0
) -> LabelledSplit:
    """The samples of both sets. test: None holds out test_share of train, by a hash of the samples' ids.

    label_share: the share of the training samples that is used, by a hash of their ids: a smaller one is part
    of a larger one, and each class keeps at least one. Raises UserError where there is nothing to learn.
    """
    learned = load_labels(train)
    if test is None:
        assert test_share is not None, "ClassifierConfig has one of the two"
        held_out = hash_share(learned.sample_id) < test_share
        judged, learned = learned.take(held_out), learned.take(~held_out)
    else:
        if test.class_names != train.class_names:
            raise UserError(_other_classes(train, test))
        judged = load_labels(test)
    if not len(learned) or not len(judged):
        raise UserError(
            f"{len(learned):,} train and {len(judged):,} test images with labels are too few; give a --test "
            "set, or another --test-share"
        )
    notes = _require_shared_classes(learned, judged, train.class_names)
    num_learned = len(learned)
    learned = learned.take(share_of_labels(learned.label, learned.sample_id, share=label_share))
    if label_share < 1:
        notes.append(f"{label_share:.3g} of the labels: {len(learned):,} of {num_learned:,} train images")
    num_double = int(np.isin(judged.xxh3_64, learned.xxh3_64).sum())
    if num_double:
        notes.append(
            f"{num_double:,} of {len(judged):,} test images are also among the train images (same bytes): "
            "the accuracy is too high by up to as much"
        )
    catalogs = [(train, learned)] if test is None else [(train, learned), (test, judged)]
    notes += [
        f"{table.num_unlabelled:,} of {catalog.num_samples:,} images in {catalog.root} have no label and are "
        "left out"
        for catalog, table in catalogs
        if table.num_unlabelled
    ]
    split = Split(
        LabelledSet(train, learned.position),
        LabelledSet(train if test is None else test, judged.position),
    )
    return LabelledSplit(split, tuple(notes), num_double)


def load_labels(catalog: Catalog) -> LabelTable:
    """The labelled samples of the shards, from their indexes.

    Raises UserError where there is none, or where a label is none of the classes.
    """
    indexes = [catalog.shard_index(shard) for shard in range(catalog.num_shards)]
    label, sample_id, xxh3_64 = (
        np.concatenate([getattr(index, name) for index in indexes])
        for name in ("label", "sample_id", "xxh3_64")
    )
    num_classes = len(catalog.class_names)
    outside = label >= num_classes
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise UserError(
            f"{int(outside.sum()):,} samples of {catalog.root} have a label outside the {num_classes} "
            f"classes of its catalog (sample {sample_id[first]:012d}: {label[first]}); pack them again from "
            "class folders"
        )
    has_label = label >= 0
    if not has_label.any():
        raise UserError(
            f"{catalog.root} has no labels, which a classifier needs; pack a folder of class folders, or "
            "name labelled shards"
        )
    return LabelTable(
        position=np.flatnonzero(has_label).astype(np.int64),
        label=label[has_label].astype(np.int64),
        sample_id=sample_id[has_label],
        xxh3_64=xxh3_64[has_label],
        num_unlabelled=int((~has_label).sum()),
    )


def share_of_labels(label: Ints, sample_id: Ints, *, share: float) -> NDArray[np.bool_]:
    """(N,) which samples a share of the labels takes: those with a small hash, of each class one at least."""
    place = hash_share(sample_id + _LABEL_SHARE_SALT)
    taken = place < share
    by_class = np.lexsort((place, label))
    first = by_class[np.flatnonzero(np.diff(label[by_class], prepend=-1))]
    taken[first] = True
    return taken


def _require_shared_classes(
    learned: LabelTable, judged: LabelTable, class_names: tuple[str, ...]
) -> list[str]:
    """Notes on classes that only one of the sets has. Raises UserError where no answer is possible."""
    in_train, in_test = np.unique(learned.label), np.unique(judged.label)
    if len(in_train) < 2:
        raise UserError(
            f"all {len(learned):,} train images are of the class {class_names[in_train[0]]}: there is "
            "nothing to tell apart; give images of two classes or more"
        )
    if not np.isin(in_test, in_train).any():
        raise UserError(
            f"no class of the test images ({_some(class_names, in_test)}) is among those of the train images "
            f"({_some(class_names, in_train)}); give sets of the same classes"
        )
    unseen = int((~np.isin(judged.label, in_train)).sum())
    notes = []
    if unseen:
        notes.append(
            f"{unseen:,} of {len(judged):,} test images are of classes without a train image "
            f"({_some(class_names, np.setdiff1d(in_test, in_train))}): they count as wrong"
        )
    missing = np.setdiff1d(in_train, in_test)
    if len(missing):
        notes.append(
            f"{len(missing):,} of {len(in_train):,} classes have no test image "
            f"({_some(class_names, missing)})"
        )
    return notes


def _some(class_names: tuple[str, ...], classes: Ints) -> str:
    names = ", ".join(class_names[one] for one in classes[:3].tolist())
    return names + (" ..." if len(classes) > 3 else "")


def _other_classes(train: Catalog, test: Catalog) -> str:
    shown = [_some(one.class_names, np.arange(len(one.class_names))) or "none" for one in (test, train)]
    return (
        f"{test.root} has other classes ({shown[0]}) than {train.root} ({shown[1]}); pack both from folders "
        "with the same class names"
    )
