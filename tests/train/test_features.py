import numpy as np
import pytest
import torch
from torch import Tensor

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.evaluate.controls import raw_pixels
from linerate.train.evaluate.features import (
    LabelledSet,
    evaluation_resize,
    extract_features,
    hash_share,
    open_split,
)
from linerate.train.evaluate.knn import knn_accuracy


def _mean_colour(images: Tensor) -> Tensor:
    return images.float().mean(dim=(2, 3))


def test_a_split_of_one_set_is_disjoint_whole_and_the_same_every_time(shards: Catalog) -> None:
    split = open_split(shards, None, test_share=0.25)
    again = open_split(shards, None, test_share=0.25)
    joined = np.concatenate([split.train.positions, split.test.positions])
    assert sorted(joined.tolist()) == list(range(shards.num_samples))
    assert 5 <= len(split.test) <= 30
    assert np.array_equal(split.test.positions, again.test.positions)
    assert split.num_classes == 3


def test_hash_shares_are_even_and_known() -> None:
    shares = hash_share(np.arange(100_000))
    assert abs(float((shares < 0.1).mean()) - 0.1) < 0.003
    # splitmix64 of seed 0, its first output: 0xE220A8397B1DCDAF.
    assert shares[0] == pytest.approx(0xE220A8397B1DCDAF / 2**64)


def test_two_sets_are_train_and_test(shards: Catalog, test_shards: Catalog) -> None:
    split = open_split(shards, test_shards)
    assert (len(split.train), len(split.test)) == (72, 30)
    assert len(split.first(7).train) == 7


def test_unlabelled_shards_are_refused(shards: Catalog, unlabelled_shards: Catalog) -> None:
    with pytest.raises(UserError, match="has no labels, which kNN needs"):
        open_split(unlabelled_shards, None)
    with pytest.raises(UserError, match="has other classes"):
        open_split(shards, unlabelled_shards)


def test_a_share_that_leaves_nothing_is_refused(shards: Catalog) -> None:
    with pytest.raises(UserError, match="0 test images with labels are too few"):
        open_split(shards, None, test_share=1e-9)


def test_features_come_in_the_order_of_positions_whatever_the_batch(shards: Catalog) -> None:
    samples = LabelledSet(shards, np.array([3, 9, 10, 40, 71]))
    done: list[float] = []
    whole, labels = extract_features(_mean_colour, samples, size=24, num_threads=1)
    parts, same = extract_features(
        _mean_colour, samples, size=24, batch=2, num_threads=1, advance=done.append
    )
    assert whole.shape == (5, 3)
    assert torch.equal(whole, parts)
    assert torch.equal(labels, same)
    assert done == [2, 2, 1]
    expected = np.concatenate([shards.shard_index(s).label for s in range(shards.num_shards)])
    assert labels.tolist() == expected[samples.positions].tolist()


def test_small_images_are_not_cropped_away(shards: Catalog) -> None:
    assert evaluation_resize(shards, 24) == 24
    assert evaluation_resize(shards, 14) == 16


def test_raw_pixels_tell_noise_from_stripes(shards: Catalog, test_shards: Catalog) -> None:
    images = torch.full((4, 3, 64, 48), 120, dtype=torch.uint8)
    images[:, :, :2, :3] = 130
    assert raw_pixels(images).shape == (4, 3 * 32 * 32)
    assert raw_pixels(images).count_nonzero() == 4 * 3 * 2
    split = open_split(shards, test_shards)
    train, train_labels = extract_features(raw_pixels, split.train, size=24, num_threads=1)
    test, test_labels = extract_features(raw_pixels, split.test, size=24, num_threads=1)
    assert train.shape[1] == 3 * 24 * 24
    # Chance is 1/3: flat and striped images are near each other, noise is near nothing.
    assert knn_accuracy(train, train_labels, test, test_labels, k=3, num_classes=3) > 0.5
