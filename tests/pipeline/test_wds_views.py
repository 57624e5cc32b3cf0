import shutil

import pytest
import torch

from linerate.pipeline.loader import open_views
from linerate.pipeline.recipe import v1, v2
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError


def webdataset_views(catalog, **options):
    settings = {"recipe": v2(size=16), "seed": 1, "global_batch": 4, "num_lanes": 2, "num_threads": 1}
    return open_views(catalog, backend="webdataset", **settings | options)


def ids(batches):
    return [batch.sample_id.tolist() for batch in batches]


def test_every_batch_is_full_and_knows_its_samples(catalog):
    batches = list(webdataset_views(catalog).epoch(0))
    assert len(batches) == 10
    for views in batches:
        assert views.query.shape == views.key.shape == (4, 3, 16, 16)
        assert views.query.dtype == torch.uint8
        assert views.query.is_contiguous(memory_format=torch.channels_last)
        assert not torch.equal(views.query, views.key)
        assert views.position.tolist() == views.sample_id.tolist()
        assert views.label.tolist() == (views.sample_id % 3).tolist()
    # One worker reads every shard once before it begins anew.
    assert len({one for batch in ids(batches) for one in batch}) == 40


def test_a_seed_repeats_the_views_and_an_epoch_brings_others(catalog):
    first, again = (list(webdataset_views(catalog).epoch(2)) for _ in range(2))
    assert ids(first) == ids(again)
    assert all(torch.equal(a.query, b.query) for a, b in zip(first, again, strict=True))
    assert ids(first) != ids(webdataset_views(catalog).epoch(3))
    assert ids(first) != ids(webdataset_views(catalog, seed=9).epoch(2))


def test_torchs_own_random_numbers_are_left_alone(catalog):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    views = webdataset_views(catalog).epoch(0)
    state = torch.get_rng_state()
    for _ in range(3):
        next(views)
    # A DataLoader takes one number when it starts, on every backend that has one.
    torch.set_rng_state(state)
    assert torch.equal(torch.rand(3), expected)


def test_ranks_share_no_shard_and_do_as_many_steps(catalog):
    ranks = [list(webdataset_views(catalog, rank=r, world_size=2).epoch(0)) for r in range(2)]
    assert [len(batches) for batches in ranks] == [10, 10]
    left, right = ({one for batch in ids(batches) for one in batch} for batches in ranks)
    assert left.isdisjoint(right)


def test_more_ranks_than_shards_are_refused(make_shards, make_sample):
    catalog = make_shards([[make_sample(i) for i in range(8)]])
    loader = webdataset_views(catalog, rank=1, world_size=2)
    with pytest.raises(UserError, match="deals whole shards: 1 are too few for 2 ranks; take as many"):
        next(loader.epoch(0))


def test_the_recipe_is_kept(catalog):
    """v1 grays one view in five, and with all other colours off a gray view stays gray."""
    loader = webdataset_views(catalog, recipe=v1(size=8))
    views = torch.cat([torch.cat([v.query, v.key]) for v in loader.epoch(0)])
    gray = (views[:, 0] == views[:, 1]).flatten(1).all(1).float().mean()
    assert 0.05 < gray < 0.4


def test_what_does_not_decode_is_left_out_and_counted(make_shards, make_sample):
    samples = [make_sample(i) for i in range(12)]
    samples[5] = type(samples[5])(samples[5].jpeg[:80], 48, 64)
    found = []
    loader = webdataset_views(make_shards([samples[:6], samples[6:]]), on_bad=found.append)
    batches = list(loader.epoch(0))
    assert len(batches) == 3
    assert 5 not in {one for batch in ids(batches) for one in batch}
    assert [one.key for one in found] == ["in/5.jpg"]
    assert loader.replacements.num_replaced == 1


def test_a_missing_shard_is_left_out(catalog, tmp_path):
    copy = Catalog.load(shutil.copytree(catalog.root, tmp_path / "copy"))
    copy.shard_path(3).unlink()
    found = []
    loader = webdataset_views(copy, on_bad=found.append)
    batches = list(loader.epoch(0))
    assert len(batches) == 10
    assert max(one for batch in ids(batches) for one in batch) < 34
    assert [one.shard for one in found] == ["test-000003.tar"]
    assert loader.replacements.num_replaced == 7


def test_without_any_shard_left_there_is_an_error(catalog, tmp_path):
    copy = Catalog.load(shutil.copytree(catalog.root, tmp_path / "copy"))
    for shard in range(4):
        copy.shard_path(shard).unlink()
    with pytest.raises(UserError, match=r"none of this rank's shards is left|had to be replaced"):
        list(webdataset_views(copy, bad_share=0.99, on_bad=lambda _: None).epoch(0))


def test_workers_make_whole_epochs(catalog):
    batches = list(webdataset_views(catalog, num_threads=2).epoch(0))
    assert len(batches) == 10
    assert len({one for batch in ids(batches) for one in batch}) > 20
