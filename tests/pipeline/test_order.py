import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linerate.pipeline.order import EpochOrder, default_num_lanes, rank_lanes
from linerate.shards.errors import UserError


@st.composite
def orders(draw: st.DrawFn) -> tuple[EpochOrder, np.ndarray]:
    """Uneven shards, empty ones, fewer than lanes, one alone; any batch that fits."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(sum))
    lane_batch = draw(st.integers(1, 4))
    num_lanes = draw(st.sampled_from([n for n in (1, 2, 4, 6, 8, 12) if n * lane_batch <= sum(sizes)] or [1]))
    order = EpochOrder(
        sizes,
        seed=draw(st.integers(0, 2**64 - 1)),
        epoch=draw(st.integers(0, 3)),
        global_batch=num_lanes * (lane_batch if num_lanes * lane_batch <= sum(sizes) else 1),
        num_lanes=num_lanes,
        window_shards=draw(st.integers(1, 5)),
    )
    return order, np.array(sizes)


def world_sizes(order: EpochOrder) -> list[int]:
    return [w for w in range(1, order.num_lanes + 1) if order.num_lanes % w == 0]


def all_steps(order: EpochOrder, *, world_size: int = 1) -> np.ndarray:
    """(num_steps, global_batch): ranks side by side."""
    return np.array(
        [
            np.concatenate([order.positions(s, rank=r, world_size=world_size) for r in range(world_size)])
            for s in range(order.num_steps)
        ]
    )


@given(orders())
@settings(max_examples=60, deadline=None)
def test_an_epoch_reads_no_sample_twice_and_drops_less_than_one_batch(case):
    order, sizes = case
    read = all_steps(order).ravel()
    assert len(np.unique(read)) == len(read)
    assert read.min() >= 0
    assert read.max() < sizes.sum()
    assert len(read) + order.num_dropped == sizes.sum()
    assert order.num_dropped < order.global_batch


@given(orders())
@settings(max_examples=60, deadline=None)
def test_every_world_size_reads_the_same_global_batches_in_equal_shares(case):
    order, _ = case
    alone = all_steps(order)
    for world_size in world_sizes(order):
        shares = [len(order.positions(0, rank=r, world_size=world_size)) for r in range(world_size)]
        assert shares == [order.global_batch // world_size] * world_size
        np.testing.assert_array_equal(all_steps(order, world_size=world_size), alone)


@given(orders(), st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_seek_gives_what_iterating_gives(case, random):
    order, sizes = case
    steps = list(range(order.num_steps))
    random.shuffle(steps)
    expected = all_steps(order)
    fresh = EpochOrder(
        sizes,
        seed=order.seed,
        epoch=order.epoch,
        global_batch=order.global_batch,
        num_lanes=order.num_lanes,
        window_shards=order.window_shards,
    )
    for step in steps[:5]:
        np.testing.assert_array_equal(fresh.positions(step), expected[step])


@given(orders())
@settings(max_examples=60, deadline=None)
def test_pieces_are_what_the_rank_reads(case):
    order, sizes = case
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for world_size in world_sizes(order):
        for rank in range(world_size):
            shard, row, num = order.pieces(rank=rank, world_size=world_size)
            from_pieces = np.concatenate(
                [np.arange(a, a + n) for a, n in zip(starts[shard] + row, num, strict=True)]
            )
            read = [order.positions(s, rank=rank, world_size=world_size) for s in range(order.num_steps)]
            assert sorted(from_pieces.tolist()) == sorted(np.concatenate(read).tolist())
            assert (row + num <= sizes[shard]).all()


@given(orders())
@settings(max_examples=60, deadline=None)
def test_at_most_lanes_minus_one_shards_are_read_by_two_ranks(case):
    order, sizes = case
    if len(sizes) < order.num_lanes:
        return
    world_size = order.num_lanes
    readers = np.zeros(len(sizes), dtype=int)
    for rank in range(world_size):
        readers[np.unique(order.pieces(rank=rank, world_size=world_size)[0])] += 1
    assert (readers > 1).sum() <= order.num_lanes - 1


def test_equal_shards_that_fill_the_lanes_are_read_by_one_rank_each():
    order = EpochOrder([10] * 16, seed=0, epoch=0, global_batch=8, num_lanes=4)
    read = [set(order.pieces(rank=r, world_size=4)[0].tolist()) for r in range(4)]
    assert [len(shards) for shards in read] == [4] * 4
    assert set.union(*read) == set(range(16))


def test_one_shard_feeds_every_lane():
    order = EpochOrder([1000], seed=0, epoch=0, global_batch=64, num_lanes=32)
    assert (order.num_steps, order.num_dropped) == (15, 40)
    assert len(np.unique(all_steps(order))) == 960


def test_a_window_mixes_its_shards():
    order = EpochOrder([100] * 8, seed=0, epoch=0, global_batch=50, num_lanes=1, window_shards=4)
    assert order.num_dropped == 0
    shards = all_steps(order) // 100
    assert all(len(set(batch)) == 4 for batch in shards)
    assert set(shards[:8].ravel()).isdisjoint(shards[8:].ravel())


@pytest.mark.parametrize("sizes", [[1003], [100] * 10 + [3]])
def test_every_sample_is_read_over_the_epochs(sizes):
    dropped = [
        set(range(1003))
        - set(all_steps(EpochOrder(sizes, seed=1, epoch=e, global_batch=100, num_lanes=4)).ravel().tolist())
        for e in range(40)
    ]
    assert {len(d) for d in dropped} == {3}
    assert not set.intersection(*dropped[:2])
    assert len(set.union(*dropped)) > 60


def test_seed_and_epoch_change_the_order():
    def first(seed: int, epoch: int) -> list[int]:
        order = EpochOrder([50] * 20, seed=seed, epoch=epoch, global_batch=16, num_lanes=4)
        return order.positions(0).tolist()

    assert first(0, 0) == first(0, 0)
    assert len({tuple(first(0, 0)), tuple(first(0, 1)), tuple(first(1, 0)), tuple(first(2**64 - 1, 0))}) == 4


def test_the_order_of_a_version_is_the_order_for_ever():
    # A resumed run must go on in the order that it began with: a change here is a change of format.
    order = EpochOrder([7, 5, 9, 4], seed=3, epoch=2, global_batch=6, num_lanes=3, window_shards=2)
    assert all_steps(order).tolist() == [
        [13, 15, 7, 20, 2, 3],
        [12, 16, 10, 23, 4, 24],
        [17, 19, 22, 21, 1, 0],
        [18, 14, 9, 11, 5, 6],
    ]


@pytest.mark.parametrize(
    ("global_batch", "num_lanes"),
    [(256, 64), (4096, 64), (96, 32), (120, 40), (100, 20), (48, 48), (97, 1), (7, 7), (1, 1)],
)
def test_default_lanes(global_batch, num_lanes):
    assert default_num_lanes(global_batch) == num_lanes


def test_a_world_size_that_does_not_fit_names_those_that_do():
    with pytest.raises(UserError, match=r"world_size=3 does not divide num_lanes=64.* are 2 and 4, or set"):
        rank_lanes(64, rank=0, world_size=3)
    with pytest.raises(UserError, match=r"rank=4 is not in 0\.\.3"):
        rank_lanes(64, rank=4, world_size=4)


def test_lanes_that_do_not_divide_the_batch_name_those_that_do():
    with pytest.raises(UserError, match=r"num_lanes=5 does not divide global_batch=256; .* are 4 and 8"):
        EpochOrder([1000], seed=0, epoch=0, global_batch=256, num_lanes=5)


def test_too_few_samples_or_none_at_all_are_errors():
    with pytest.raises(UserError, match="9 samples do not fill one global_batch=16; a batch of 9 or less"):
        EpochOrder([4, 5], seed=0, epoch=0, global_batch=16, num_lanes=4)
    with pytest.raises(UserError, match="window_shards=0 must each be 1 or more"):
        EpochOrder([4, 5], seed=0, epoch=0, global_batch=4, num_lanes=4, window_shards=0)


def test_a_step_outside_the_epoch_is_an_index_error():
    with pytest.raises(IndexError, match=r"step 2 is not in 0\.\.1"):
        EpochOrder([9], seed=0, epoch=0, global_batch=4, num_lanes=2).positions(2)


def test_memory_grows_with_shards_not_with_samples():
    def peak_bytes(samples_per_shard: int) -> int:
        sizes = np.full(20_000, samples_per_shard)
        tracemalloc.start()
        order = EpochOrder(sizes, seed=0, epoch=0, global_batch=4096, num_lanes=64)
        order.positions(order.num_steps - 1, rank=63, world_size=64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    # 200 million samples: a permutation of them would take 1.6 GB.
    assert peak_bytes(10_000) < peak_bytes(10) + 3 * 4 * 10_000 * 8 < 8e6
