import importlib.util

import pytest
import torch

from linerate.pipeline.loader import BACKENDS, open_backend, open_views
from linerate.pipeline.order import EpochOrder
from linerate.pipeline.recipe import v2
from linerate.shards.errors import UserError


def synthetic(catalog, **options):
    settings = {"recipe": "v2", "backend": "synthetic", "seed": 1, "global_batch": 8, "num_lanes": 4}
    return open_views(catalog, **settings | options)


def test_synthetic_views_have_the_shapes_and_positions_of_an_epoch(catalog):
    loader = synthetic(catalog, recipe=v2(size=16), rank=1, world_size=2)
    assert (loader.steps_per_epoch, loader.rank_batch, loader.num_dropped) == (5, 4, 1)
    order = EpochOrder(catalog.shard_sizes, seed=1, epoch=7, global_batch=8, num_lanes=4)
    batches = list(loader.epoch(7))
    assert len(batches) == 5
    for step, views in enumerate(batches):
        assert views.query.shape == views.key.shape == (4, 3, 16, 16)
        assert views.query.dtype == torch.uint8
        assert views.key.is_contiguous(memory_format=torch.channels_last)
        assert not torch.equal(views.query, views.key)
        assert views.position.tolist() == order.positions(step, rank=1, world_size=2).tolist()
        assert views.label.tolist() == [-1] * 4
    loader.close()


def test_a_start_step_leaves_out_what_came_before(catalog):
    loader = synthetic(catalog, recipe=v2(size=8))
    whole = [views.position.tolist() for views in loader.epoch(2)]
    assert [views.position.tolist() for views in loader.epoch(2, start_step=3)] == whole[3:]
    assert list(loader.epoch(2, start_step=5)) == []


def test_a_catalog_may_be_given_by_its_folder(catalog):
    assert synthetic(catalog.root, recipe=v2(size=8)).steps_per_epoch == 5
    with pytest.raises(UserError, match="there is no catalog"):
        synthetic(catalog.root / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "dalli"}, "no backend `dalli`; did you mean `dali`"),
        ({"recipe": "v22"}, "no recipe `v22`; did you mean `v2`"),
        ({"world_size": 3}, "global_batch=8 does not divide over 3 ranks; the nearest that do are 6 and 9"),
        ({"world_size": 8}, "world_size=8 does not divide num_lanes=4; .* are 4, or set num_lanes"),
        ({"num_lanes": 3}, "num_lanes=3 does not divide global_batch=8; the nearest that do are 2 and 4"),
        ({"global_batch": 64, "num_lanes": None}, "41 samples do not fill one global_batch=64"),
        ({"rank": 2, "world_size": 2}, r"rank=2 is not in 0\.\.1"),
    ],
)
def test_what_cannot_work_is_said_before_an_image_is_read(catalog, options, message):
    with pytest.raises(UserError, match=message):
        synthetic(catalog, **options)


def test_a_start_step_past_the_end_is_an_error(catalog):
    with pytest.raises(UserError, match=r"start_step=6 is not in 0\.\.5"):
        next(synthetic(catalog, recipe=v2(size=8)).epoch(0, start_step=6))


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_every_backend_of_the_list_has_its_module(name):
    if name == "ffcv" and importlib.util.find_spec("ffcv") is None:
        pytest.skip("ffcv is not installed (make ffcv): whether its backend opens stays untested")
    open_backend(name, recipe=v2(size=8), seed=0, batch=2, num_threads=1).close()


def real(catalog, backend, **options):
    settings = {"recipe": v2(size=16), "seed": 1, "global_batch": 8, "num_lanes": 4, "num_threads": 1}
    return open_views(catalog, backend=backend, **settings | options)


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_every_world_size_and_restart_gives_the_same_views(catalog, backend):
    loader = real(catalog, backend)
    alone = list(loader.epoch(1))
    resumed = list(loader.epoch(1, start_step=3))
    loader.close()
    for views, again in zip(alone[3:], resumed, strict=True):
        assert torch.equal(views.query, again.query)
        assert torch.equal(views.key, again.key)
    ranks = [list(real(catalog, backend, rank=r, world_size=2).epoch(1)) for r in range(2)]
    for whole, left, right in zip(alone, *ranks, strict=True):
        for name in ("query", "key", "sample_id", "position", "label"):
            shares = torch.cat([getattr(left, name), getattr(right, name)])
            assert torch.equal(shares, getattr(whole, name)), name


def test_a_run_that_goes_on_with_two_and_then_four_ranks_sees_the_same_views(catalog):
    whole = list(real(catalog, "dali").epoch(1))
    for world_size, steps in ((1, range(1)), (2, range(1, 3)), (4, range(3, 5))):
        for rank in range(world_size):
            loader = real(catalog, "dali", rank=rank, world_size=world_size)
            share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
            for step, views in zip(steps, loader.epoch(1, start_step=steps.start), strict=False):
                for name in ("query", "key", "sample_id", "position", "label"):
                    assert torch.equal(getattr(views, name), getattr(whole[step], name)[share]), name
            loader.close()


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_an_epoch_left_early_does_not_disturb_the_next(catalog, backend):
    expected = [views.query.clone() for views in real(catalog, backend).epoch(2)]
    loader = real(catalog, backend)
    first = loader.epoch(1)
    next(first)
    first.close()
    assert [torch.equal(a.query, b) for a, b in zip(loader.epoch(2), expected, strict=True)] == [True] * 5
    loader.close()


def test_backends_agree_on_samples_and_labels(catalog):
    for ours, truth in zip(real(catalog, "dali").epoch(0), real(catalog, "torch").epoch(0), strict=True):
        assert ours.sample_id.tolist() == truth.sample_id.tolist()
        assert ours.label.tolist() == truth.label.tolist() == (truth.sample_id % 3).tolist()
        assert (ours.query.int() - truth.query.int()).abs().float().mean() < 1.5
