import numpy as np
import pytest

from linerate.pipeline.order import EpochOrder
from linerate.pipeline.shuffle_quality import measured_steps, shuffle_quality


def test_a_uniform_permutation_measures_as_uniform():
    sizes = np.array([500, 300, 700, 500] * 5)
    rng = np.random.default_rng(0)
    batches = np.stack([rng.permutation(sizes.sum())[:64] for _ in range(300)])
    labels = rng.permutation(np.arange(sizes.sum()) % 10)[batches]
    quality = shuffle_quality(batches, shard_sizes=sizes, labels=labels)
    assert quality.shards_per_batch == pytest.approx(quality.shards_per_batch_uniform, rel=0.02)
    assert quality.same_shard_pairs == pytest.approx(quality.same_shard_pairs_uniform, rel=0.03)
    assert quality.class_run == pytest.approx(quality.class_run_uniform, rel=0.02)


def test_unshuffled_batches_measure_far_from_uniform():
    batches = np.arange(2000).reshape(-1, 50)
    quality = shuffle_quality(batches, shard_sizes=np.full(20, 100), labels=batches // 25)
    assert (quality.shards_per_batch, quality.same_shard_pairs, quality.class_run) == (1, 1, 25)
    assert quality.shards_per_batch_uniform == pytest.approx(18.5, abs=0.2)
    assert quality.class_run_uniform < 1.02


def test_one_shard_without_labels_is_measured_too():
    quality = shuffle_quality(np.arange(20).reshape(2, 10), shard_sizes=np.array([20]), labels=None)
    assert (quality.shards_per_batch, quality.shards_per_batch_uniform) == (1, 1)
    assert quality.class_run is None


def test_the_order_of_many_shards_is_near_uniform():
    sizes = np.full(256, 100)
    order = EpochOrder(sizes, seed=0, epoch=0, global_batch=256, num_lanes=64)
    batches = np.array([order.positions(int(s)) for s in measured_steps(order, num_steps=32)])
    quality = shuffle_quality(batches, shard_sizes=sizes, labels=None)
    assert len(batches) == 32
    assert quality.shards_per_batch > 0.95 * quality.shards_per_batch_uniform


def test_measured_steps_of_a_short_epoch_are_its_steps():
    order = EpochOrder([30], seed=0, epoch=0, global_batch=10, num_lanes=1)
    assert measured_steps(order, num_steps=32).tolist() == [0, 1, 2]
