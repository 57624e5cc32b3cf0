from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.evaluate.features import hash_share
from linerate.train.evaluate.labelled import load_labels, open_labelled_split, share_of_labels


def _catalog(labels: list[int], *, first_hash: int = 0, classes: tuple[str, ...] = ("a", "b", "c")) -> Any:
    """What is read of a catalog: one shard with these labels, its images' hashes counting from first_hash."""
    num = len(labels)
    index = SimpleNamespace(
        label=np.array(labels, dtype=np.int32),
        sample_id=np.arange(num, dtype=np.int64),
        xxh3_64=np.arange(first_hash, first_hash + num, dtype=np.uint64),
    )
    return SimpleNamespace(
        root=Path(f"shards-{first_hash}"),
        class_names=classes,
        num_shards=1,
        num_samples=num,
        shard_index=lambda shard: index,
    )


def test_two_labelled_sets_need_no_notes(shards: Catalog, test_shards: Catalog) -> None:
    found = open_labelled_split(shards, test_shards)
    assert (len(found.split.train), len(found.split.test), found.num_classes) == (72, 30, 3)
    assert found.notes == ()
    assert found.num_test_in_train == 0


def test_without_a_test_set_a_share_is_held_out(shards: Catalog) -> None:
    split = open_labelled_split(shards, None, test_share=0.25).split
    joined = np.concatenate([split.train.positions, split.test.positions])
    assert sorted(joined.tolist()) == list(range(72))
    assert 5 <= len(split.test) <= 30


def test_unlabelled_samples_are_counted_and_left_out() -> None:
    train, test = _catalog([0, -1, 1, 2, -1]), _catalog([0, 1, 2], first_hash=90)
    found = open_labelled_split(train, test)
    assert found.split.train.positions.tolist() == [0, 2, 3]
    assert found.notes == ("2 of 5 images in shards-0 have no label and are left out",)
    with pytest.raises(UserError, match="has no labels, which a classifier needs"):
        load_labels(_catalog([-1, -1]))


def test_a_label_outside_the_classes_is_named() -> None:
    with pytest.raises(UserError, match=r"2 samples of shards-0 .* outside the 3 classes .*000000000001: 7"):
        load_labels(_catalog([0, 7, 3]))


def test_test_images_that_are_also_train_images_are_counted() -> None:
    found = open_labelled_split(_catalog([0, 1, 2, 0]), _catalog([0, 1, 2], first_hash=2))
    assert found.num_test_in_train == 2
    assert "2 of 3 test images are also among the train images" in found.notes[0]


def test_classes_of_one_set_alone_are_told() -> None:
    found = open_labelled_split(_catalog([0, 0, 1]), _catalog([1, 2, 2], first_hash=9))
    assert found.notes == (
        "2 of 3 test images are of classes without a train image (c): they count as wrong",
        "1 of 2 classes have no test image (a)",
    )


def test_what_leaves_nothing_to_learn_is_refused() -> None:
    with pytest.raises(UserError, match="all 2 train images are of the class b: there is nothing to tell"):
        open_labelled_split(_catalog([1, 1]), _catalog([0, 1], first_hash=9))
    with pytest.raises(UserError, match=r"no class of the test images \(c\) is among .* \(a, b\)"):
        open_labelled_split(_catalog([0, 1]), _catalog([2], first_hash=9))
    with pytest.raises(UserError, match="0 test images with labels are too few"):
        open_labelled_split(_catalog([0, 1]), None, test_share=1e-9)
    with pytest.raises(UserError, match=r"has other classes \(x\) than shards-0 \(a, b, c\)"):
        open_labelled_split(_catalog([0, 1]), _catalog([0], classes=("x",)))


def test_a_share_of_the_labels_is_nested_and_keeps_one_of_each_class() -> None:
    label = np.repeat(np.arange(50), 40)
    ids = np.arange(len(label))
    tenth, hundredth = (share_of_labels(label, ids, share=share) for share in (0.1, 0.01))
    assert 150 <= tenth.sum() <= 250
    assert set(label[hundredth].tolist()) == set(range(50))
    assert 50 <= hundredth.sum() <= 75
    assert not (hundredth & ~tenth).any()
    assert share_of_labels(label, ids, share=1.0).all()


def test_a_share_of_the_labels_does_not_follow_the_held_out_share() -> None:
    ids = np.arange(20_000)
    kept = ids[hash_share(ids) >= 0.1]
    share = share_of_labels(np.zeros(len(kept), dtype=np.int64), kept, share=0.1).mean()
    assert abs(float(share) - 0.1) < 0.01


def test_a_share_is_told(shards: Catalog, test_shards: Catalog) -> None:
    found = open_labelled_split(shards, test_shards, label_share=0.25)
    assert found.notes == (f"0.25 of the labels: {len(found.split.train)} of 72 train images",)
