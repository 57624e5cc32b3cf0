import io
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from linerate.pipeline.bad_samples import BadSample, BadSamples, KnownBad, Replacements, log_bad_sample
from linerate.pipeline.loader import open_views
from linerate.pipeline.order import EpochOrder
from linerate.pipeline.recipe import v2
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError

STARTS = np.array([0, 4, 4, 7, 10])  # shards of 4, 0, 3 and 3 samples
OPTIONS = {"seed": 1, "global_batch": 8, "num_lanes": 4, "num_threads": 1}


def stand_ins(known: KnownBad, positions: list[int]) -> list[int]:
    return known.stand_ins(np.array(positions), STARTS).tolist()


def test_the_next_good_position_stands_in_and_after_the_last_the_first():
    known = KnownBad(frozenset({2, 3, 9}))
    assert stand_ins(known, [1, 2, 3, 4, 9]) == [1, 4, 4, 4, 0]
    assert stand_ins(KnownBad(), [2, 9]) == [2, 9]


def test_the_same_row_of_the_next_shard_stands_in_for_a_lost_one():
    assert stand_ins(KnownBad(shards=frozenset({0})), [0, 1, 2, 3, 5]) == [4, 5, 6, 4, 5]
    assert stand_ins(KnownBad(frozenset({0}), frozenset({3})), [7, 8, 9]) == [1, 1, 2]


def test_without_any_good_sample_there_is_an_error():
    with pytest.raises(UserError, match="no sample of these shards can be read"):
        stand_ins(KnownBad(frozenset(range(4)), frozenset({2, 3})), [1])


@pytest.fixture
def told(catalog) -> tuple[Replacements, list[BadSample]]:
    found: list[BadSample] = []
    return Replacements(catalog, on_bad=found.append), found


def test_a_finding_is_told_once_with_its_key_and_its_shard(told):
    replacements, found = told
    replacements.learn(BadSamples([13], [13], "torn"), epoch=2, step=5)
    known = replacements.learn(BadSamples([13, 40], [13, 40], "torn"), epoch=2, step=6)
    assert known.positions == {13, 40}
    lines = [(one.sample_id, one.key, one.shard, one.step) for one in found]
    assert lines == [(13, "in/13.jpg", "test-000001.tar", 5), (40, "in/40.jpg", "test-000003.tar", 6)]
    replacements.learn(BadSamples([], [], "gone", shard=2), epoch=2, step=7)
    assert (found[-1].sample_id, found[-1].shard, found[-1].reason) == (None, "test-000002.tar", "gone")


def test_what_is_known_already_is_an_error(told):
    replacements, _ = told
    error = BadSamples([3], [3], "torn")
    replacements.learn(error, epoch=0, step=0)
    with pytest.raises(BadSamples, match="000000000003: torn"):
        replacements.learn(error, epoch=0, step=0)


def test_a_lost_shard_is_asked_for_again_in_the_next_epoch(told):
    replacements, _ = told
    replacements.learn(BadSamples([], [], "gone", shard=2), epoch=0, step=0)
    replacements.learn(BadSamples([3], [3], "torn"), epoch=0, step=0)
    replacements.begin_epoch()
    assert replacements.known == KnownBad(frozenset({3}))


def test_the_budget_is_a_share_of_an_epoch_with_a_floor(told):
    replacements, _ = told
    replacements.count(8, num_rank_samples=100)
    with pytest.raises(
        UserError, match=r"9 samples .* 8 of its 100 may be \(bad_share=0\.001\).*--bad-share"
    ):
        replacements.count(1, num_rank_samples=100)
    replacements.begin_epoch()
    replacements.count(20, num_rank_samples=20_000)
    with pytest.raises(UserError, match="20 of its 20,000 may be"):
        replacements.count(1, num_rank_samples=20_000)
    assert replacements.num_replaced == 30


def test_a_share_of_zero_replaces_nothing(catalog):
    with pytest.raises(BadSamples, match="torn"):
        Replacements(catalog, share=0).learn(BadSamples([3], [3], "torn"), epoch=0, step=0)


def test_a_share_must_be_one(catalog):
    with pytest.raises(UserError, match=r"bad_share=1 is no share .* as 0\.001"):
        Replacements(catalog, share=1)


def test_the_error_survives_pickling():
    error = BadSamples([1], [2], "gone\n away", shard=3)
    again = pickle.loads(pickle.dumps(error))
    assert (again.sample_id, again.position, again.shard, str(again)) == ([1], [2], 3, str(error))
    assert "cannot read a shard: gone away" in str(again)


def test_by_default_a_finding_is_logged(caplog):
    log_bad_sample(BadSample(sample_id=7, key="a/b.jpg", shard="x.tar", reason="torn", epoch=0, step=1))
    log_bad_sample(BadSample(sample_id=None, key=None, shard="x.tar", reason="gone", epoch=0, step=1))
    assert caplog.messages == [
        "replaced sample 000000000007 (a/b.jpg) of x.tar: torn",
        "replaced a whole shard of x.tar: gone",
    ]


@pytest.fixture
def damaged(catalog, tmp_path) -> Catalog:
    """A bit of sample 5 is flipped, shard 1 (12..21) has lost its end (20, 21), shard 2 (22..33) is gone."""
    copy = Catalog.load(shutil.copytree(catalog.root, tmp_path / "damaged"))
    index = copy.shard_index(0)
    with copy.shard_path(0).open("r+b") as file:
        file.seek(int(index.offset[5]) + 100)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))
    os.truncate(copy.shard_path(1), int(copy.shard_index(1).offset[8]))
    copy.shard_path(2).unlink()
    return copy


def expected_positions(catalog: Catalog, step: int, **rank: int) -> list[int]:
    order = EpochOrder(catalog.shard_sizes, seed=1, epoch=0, global_batch=8, num_lanes=4)
    known = KnownBad(frozenset({5, 20, 21}), frozenset({2}))
    return known.stand_ins(order.positions(step, **rank), catalog.starts).tolist()


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_damage_is_replaced_by_neighbours_and_every_step_is_done(damaged, backend):
    found: list[BadSample] = []
    loader = open_views(
        damaged, recipe=v2(size=16), backend=backend, bad_share=0.9, on_bad=found.append, **OPTIONS
    )
    batches = list(loader.epoch(0))
    assert [b.position.tolist() for b in batches] == [expected_positions(damaged, s) for s in range(5)]
    assert {one.sample_id for one in found} <= {5, 20, 21, None}
    assert [one.shard for one in found if one.sample_id is None] == ["test-000002.tar"]
    order = EpochOrder(damaged.shard_sizes, seed=1, epoch=0, global_batch=8, num_lanes=4)
    read = np.concatenate([order.positions(step) for step in range(5)])
    bad = np.isin(read, [5, 20, 21, *range(22, 34)]).sum()
    assert loader.replacements.num_replaced == bad
    resumed = list(loader.epoch(0, start_step=3))
    loader.close()
    for one, again in zip(batches[3:], resumed, strict=True):
        assert torch.equal(one.query, again.query)


def test_every_rank_keeps_step_and_replaces_as_one_rank_would(damaged):
    ranks = [
        open_views(
            damaged, recipe=v2(size=8), backend="torch", bad_share=0.9, rank=r, world_size=2, **OPTIONS
        )
        for r in range(2)
    ]
    for step, shares in enumerate(zip(*(loader.epoch(0) for loader in ranks), strict=True)):
        joined = torch.cat([views.position for views in shares]).tolist()
        assert joined == expected_positions(damaged, step)


def test_more_damage_than_the_budget_stops_the_epoch(damaged):
    loader = open_views(damaged, recipe=v2(size=8), backend="torch", on_bad=lambda _: None, **OPTIONS)
    with pytest.raises(UserError, match=r"\d+ samples of this epoch .* 8 of its 40 may be"):
        list(loader.epoch(0))


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_images_that_do_not_decode_are_replaced(make_shards, make_sample, backend):
    samples = [make_sample(i) for i in range(16)]
    empty = io.BytesIO()
    Image.new("RGB", (64, 48)).save(empty, "JPEG")
    for i in (3, 4, 11):
        samples[i] = type(samples[i])(empty.getvalue()[:300], 48, 64)
    catalog = make_shards([samples[:8], samples[8:]])
    found: list[BadSample] = []
    loader = open_views(catalog, recipe=v2(size=8), backend=backend, on_bad=found.append, **OPTIONS)
    seen = np.concatenate([views.sample_id.numpy() for views in loader.epoch(0)])
    loader.close()
    assert sorted(one.sample_id for one in found) == [3, 4, 11]
    assert {one.key for one in found} == {"in/3.jpg", "in/4.jpg", "in/11.jpg"}
    assert sorted(seen) == sorted([0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10, 12, 12, 13, 14, 15])
