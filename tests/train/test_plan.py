import dataclasses
from collections import Counter

import numpy as np
import pytest
from tests.train.small import SMALL

from linerate.pipeline.order import EpochOrder
from linerate.shards.errors import UserError
from linerate.train.config import Optim, ShuffleBN
from linerate.train.plan import ShardTable, plan_rows, plan_run, show_boundaries
from linerate.train.recipes import RECIPES


def test_in1m_has_the_papers_steps() -> None:
    plan = plan_run(RECIPES["in1m-v1"].build(), ShardTable.nominal(1_281_167), world_size=1)
    assert (plan.steps_per_epoch, plan.total_steps, plan.num_dropped) == (5004, 1_000_800, 143)
    assert plan.lr_boundaries == [
        (0, 0.03),
        (120 * 5004, pytest.approx(0.003)),
        (160 * 5004, pytest.approx(0.0003)),
    ]


def test_ig1b_counts_iterations() -> None:
    plan = plan_run(RECIPES["ig1b-v1"].build(), ShardTable.nominal(940_000_000), world_size=64)
    assert (plan.total_steps, plan.total_images, plan.rank_batch) == (1_250_000, 1_280_000_000, 16)
    assert plan.epochs == pytest.approx(1.36, abs=0.005)
    assert dict(plan_rows(plan))["bytes per rank"] == "1.62 TB to 1.62 TB, about"
    assert plan.lr_last == pytest.approx(0.01621, abs=5e-6)


def test_cifar10_has_19400_steps() -> None:
    plan = plan_run(RECIPES["cifar10"].build(), ShardTable.nominal(50_000), world_size=1)
    assert plan.total_steps == 19_400


def test_too_few_images_for_a_batch_are_refused() -> None:
    with pytest.raises(UserError, match="100 images do not fill one global_batch=256"):
        plan_run(RECIPES["in1m-v1"].build(), ShardTable.nominal(100), world_size=1)


def test_many_boundaries_are_told_by_the_first_and_the_last() -> None:
    text = show_boundaries([(step, 0.1) for step in range(200)])
    assert text.splitlines()[0] == "0: 0.1"
    assert "... 192 more ..." in text
    assert text.splitlines()[-1] == "199: 0.1"


def test_a_plan_is_the_orders_word_and_tells_what_two_ranks_share() -> None:
    """Uneven shards on four ranks: what each rank's positions come from, counted one by one."""
    sizes = np.array([40, 7, 33, 21, 50, 12, 29, 8])
    batch = {"optim": Optim(global_batch=16, lr=0.1), "bn": ShuffleBN(bn_group=2)}
    config = dataclasses.replace(SMALL, num_lanes=8, **batch)
    plan = plan_run(config, ShardTable(sizes, sizes * 1000), world_size=4)
    order = EpochOrder(sizes, seed=config.seed, epoch=0, global_batch=16, num_lanes=8)
    assert (plan.steps_per_epoch, plan.num_dropped) == (order.num_steps, order.num_dropped) == (12, 8)
    starts = np.cumsum(sizes)
    read = []
    for rank in range(4):
        seen = np.concatenate([order.positions(step, rank=rank, world_size=4) for step in range(12)])
        read.append(set(np.searchsorted(starts, seen, side="right").tolist()))
    assert [share.num_shards for share in plan.shares.ranks] == [len(shards) for shards in read]
    assert [share.num_samples for share in plan.shares.ranks] == [12 * 4] * 4
    readers = Counter(shard for shards in read for shard in shards)
    assert plan.shares.num_shared == sum(num > 1 for num in readers.values()) > 0
    # Within a sample's rounding of each piece.
    assert sum(share.num_bytes for share in plan.shares.ranks) == pytest.approx(192_000, abs=1000)


def test_shards_that_do_not_exist_yet_are_those_that_pack_would_cut() -> None:
    table = ShardTable.nominal(1_281_167)
    assert int(table.sizes.sum()) == 1_281_167
    assert table.sizes.max() <= 10_000
    assert table.num_bytes.max() <= 1_000_000_000
    assert len(ShardTable.nominal(72).sizes) == 9
