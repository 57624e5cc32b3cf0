import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from linerate.pipeline.loader import open_training_images
from linerate.pipeline.parity import MEAN_BOUNDS
from linerate.pipeline.recipe import ImageRecipe, OneView, crop_and_flip
from linerate.shards.errors import UserError

CROP = crop_and_flip(size=16)


def open_some(catalog, *, positions=None, backend="torch", **options):
    wanted = np.arange(catalog.num_samples) if positions is None else np.asarray(positions)
    settings = {"recipe": CROP, "seed": 5, "global_batch": 8, "num_threads": 1}
    return open_training_images(catalog, positions=wanted, backend=backend, **settings | options)


def batches_of(loader, *, epoch=0, start_step=0):
    try:
        return [*loader.epoch(epoch, start_step=start_step)]
    finally:
        loader.close()


def test_dali_makes_the_views_that_torchvision_makes_of_the_same_draws(catalog):
    ours, truth = (batches_of(open_some(catalog, backend=name)) for name in ("dali", "torch"))
    assert len(ours) == len(truth) == 5
    for one, other in zip(ours, truth, strict=True):
        assert one.images.shape == (8, 3, 16, 16)
        assert one.images.is_contiguous(memory_format=torch.channels_last)
        assert one.position.tolist() == other.position.tolist()
        assert one.label.tolist() == other.label.tolist() == [p % 3 for p in one.position.tolist()]
        difference = (one.images.int() - other.images.int()).abs().float().mean()
        assert difference <= MEAN_BOUNDS["crop"]


def test_only_the_chosen_samples_come_and_each_but_the_dropped_once_an_epoch(catalog):
    chosen = np.array([0, 3, 4, 5, 6, 9, 10, 11, 17, 20, 23, 24, 30, 31, 33, 38, 39, 40])
    loader = open_some(catalog, positions=chosen)
    assert (loader.steps_per_epoch, loader.num_dropped) == (2, 2)
    seen = {e: [p for b in loader.epoch(e) for p in b.position.tolist()] for e in (0, 1)}
    loader.close()
    for positions in seen.values():
        assert len(set(positions)) == 16
        assert set(positions) <= set(chosen.tolist())
    assert seen[0] != seen[1]


def test_ranks_joined_and_a_later_start_give_the_same_batches(catalog):
    chosen = np.arange(0, 41, 2)
    whole = batches_of(open_some(catalog, positions=chosen), epoch=3)
    (late,) = batches_of(open_some(catalog, positions=chosen), epoch=3, start_step=1)
    assert torch.equal(late.images, whole[1].images)
    ranks = [
        batches_of(open_some(catalog, positions=chosen, rank=rank, world_size=2), epoch=3) for rank in (0, 1)
    ]
    for step, batch in enumerate(whole):
        joined = torch.cat([ranks[0][step].images, ranks[1][step].images])
        assert torch.equal(joined, batch.images)


def test_a_damaged_sample_is_replaced_by_one_that_was_chosen(make_shards, make_sample):
    good = [make_sample(i, label=i % 3) for i in range(12)]
    cut = type(good[0])(good[0].jpeg[:300], good[0].height, good[0].width, 0)
    catalog = make_shards([[*good[:4], cut, good[5]], good[6:]], class_names=("a", "b", "c"))
    chosen = np.array([1, 2, 4, 7, 8, 10, 11])
    found = []
    loader = open_some(catalog, positions=chosen, global_batch=7, on_bad=found.append)
    (batch,) = batches_of(loader)
    assert [one.sample_id for one in found] == [4]
    assert sorted(batch.position.tolist()) == [1, 2, 7, 7, 8, 10, 11]
    assert loader.replacements.num_replaced == 1


def test_the_recipe_of_a_classifier_is_torchvisions_default_crop_and_a_flip():
    image = CROP.image
    crop = v2.RandomResizedCrop(16)
    assert (image.crop_scale, image.crop_ratio) == (tuple(crop.scale), tuple(crop.ratio))
    others = ("jitter", "gray", "blur", "solarize")
    assert [getattr(image, f"{name}_probability") for name in others] == [0, 0, 0, 0]
    assert image.flip_probability == v2.RandomHorizontalFlip().p


def test_what_cannot_work_is_told_before_an_image_is_read(catalog):
    with pytest.raises(UserError, match="at least 1 pixel"):
        ImageRecipe(name="none", size=0, image=OneView())
    with pytest.raises(UserError, match="there is no backend `webdataset`"):
        open_some(catalog, backend="webdataset")
    with pytest.raises(UserError, match="do not fill one global_batch=8"):
        open_some(catalog, positions=np.arange(5))
