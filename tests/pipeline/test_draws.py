import numpy as np
import pytest
import torch
from torchvision.transforms import v2 as transforms

from linerate.pipeline.draws import JITTER_ORDERS, Draw, draw_views
from linerate.pipeline.recipe import OneView, ViewRecipe, find_recipe

NUM = 20_000


def draw(recipe="v2", *, seed=0, epoch=0, sample_id=range(NUM), height=375, width=500, view=0):
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    sample_id = np.asarray(sample_id)
    sizes = {"height": np.full(len(sample_id), height), "width": np.full(len(sample_id), width)}
    return draw_views(recipe, seed=seed, epoch=epoch, sample_id=sample_id, view=view, **sizes)


def ks_distance(ours, theirs):
    """Greatest distance of the two empirical distribution functions (ties counted whole)."""
    values = np.union1d(ours, theirs)
    cdfs = [np.searchsorted(np.sort(one), values, side="right") / len(one) for one in (ours, theirs)]
    return np.abs(cdfs[0] - cdfs[1]).max()


def same_distribution(ours, theirs):
    # 1.95: one comparison in a thousand would fail by chance; the seeds are fixed.
    return ks_distance(ours, theirs) < 1.95 * np.sqrt(1 / len(ours) + 1 / len(theirs))


def test_a_sample_is_drawn_alike_in_any_batch():
    whole = draw(sample_id=range(100)).array
    assert np.array_equal(draw(sample_id=[71, 3]).array, whole[[71, 3]])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"view": 1}, {"sample_id": range(1, 101)}])
def test_seed_epoch_view_and_sample_each_change_every_draw(change):
    base = {"sample_id": range(100)}
    one, other = draw(**base).array, draw(**(base | change)).array
    assert (one[:, Draw.BRIGHTNESS : Draw.HUE + 1] != other[:, Draw.BRIGHTNESS : Draw.HUE + 1]).all()


def test_draws_stay_what_they_were():
    """A change here makes every run that is resumed see other views."""
    row = draw("v3", seed=7, epoch=3, sample_id=[123_456_789], view=1).array[0]
    frozen = [
        1.0,
        5.0,
        366.0,
        342.0,
        0.6763167,
        1.0879974,
        1.1489257,
        -0.0395323,
        20.0,
        1.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]
    assert np.allclose(row, frozen, rtol=0, atol=1e-6), row.tolist()


def test_what_a_recipe_leaves_out_shifts_no_other_draw():
    plain = OneView(blur_probability=0, jitter_probability=0)
    without = draw(ViewRecipe(name="plain", query=plain, key=plain), sample_id=range(50))
    full = draw(sample_id=range(50))
    for column in (Draw.TOP, Draw.RIGHT, Draw.BRIGHTNESS, Draw.HUE, Draw.GRAY, Draw.FLIP, Draw.JITTER_ORDER):
        assert np.array_equal(without[column], full[column])
    assert not without[Draw.BLUR_SIGMA].any()
    assert not without[Draw.JITTER].any()


def test_large_and_negative_seeds_and_ids_are_fine():
    for seed in (-1, 2**63 - 1, -(2**63)):
        array = draw(seed=seed, sample_id=[0, 2**40, 999_999_999_999]).array
        assert np.isfinite(array).all()
        assert len({tuple(row) for row in array.tolist()}) == 3


def test_the_array_is_one_contiguous_block_of_float32():
    array = draw(sample_id=range(5)).array
    assert (array.dtype, array.shape, array.flags.c_contiguous) == (np.float32, (5, len(Draw)), True)


# 375x500 fits at the first or second try; 100x1000 and 90x15 fall back often; 3x2 rounds to few windows.
@pytest.mark.parametrize("size", [(375, 500), (100, 1000), (90, 15), (3, 2)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0)])
def test_crops_are_distributed_as_torchvision_draws_them(size, scale):
    num = NUM if size == (375, 500) and scale == (0.2, 1.0) else 3000
    height, width = size
    one = OneView(crop_scale=scale)
    draws = draw(ViewRecipe(name="r", query=one, key=one), sample_id=range(num), height=height, width=width)
    torch.manual_seed(0)
    crop = transforms.RandomResizedCrop(224, scale=scale)
    image = torch.empty(3, height, width)
    theirs = [crop.make_params([image]) for _ in range(num)]
    top, left, bottom, right = draws.array[:, Draw.TOP : Draw.RIGHT + 1].T.astype(np.float64)
    ours = {"top": top, "left": left, "height": bottom - top, "width": right - left}
    for name, values in ours.items():
        assert same_distribution(values, [one[name] for one in theirs]), name
    areas = [one["height"] * one["width"] for one in theirs]
    assert same_distribution(ours["height"] * ours["width"], areas)
    assert same_distribution(ours["width"] / ours["height"], [one["width"] / one["height"] for one in theirs])


def test_crops_lie_in_the_image():
    rng = np.random.default_rng(0)
    height, width = rng.integers(1, 3000, (2, 5000))
    draws = draw_views(
        find_recipe("v2"), seed=0, epoch=0, sample_id=np.arange(5000), height=height, width=width, view=0
    )
    assert (draws[Draw.TOP] >= 0).all()
    assert (draws[Draw.LEFT] >= 0).all()
    assert (draws[Draw.TOP] < draws[Draw.BOTTOM]).all()
    assert (draws[Draw.LEFT] < draws[Draw.RIGHT]).all()
    assert (draws[Draw.BOTTOM] <= height).all()
    assert (draws[Draw.RIGHT] <= width).all()


def test_jitter_factors_are_distributed_as_torchvision_draws_them():
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = [jitter.make_params([]) for _ in range(NUM)]
    draws = draw()
    for name in ("brightness", "contrast", "saturation", "hue"):
        drawn = [one[f"{name}_factor"] for one in theirs]
        assert same_distribution(draws[Draw[name.upper()]], drawn), name
    orders = JITTER_ORDERS[draws[Draw.JITTER_ORDER].astype(int)]
    their_orders = np.array([one["fn_idx"].tolist() for one in theirs])
    for slot in range(4):
        assert same_distribution(orders[:, slot], their_orders[:, slot])
    counts = np.bincount(draws[Draw.JITTER_ORDER].astype(int), minlength=24)
    # Chi-square with 23 degrees of freedom: 49.7 is exceeded once in a thousand.
    assert ((counts - NUM / 24) ** 2 / (NUM / 24)).sum() < 49.7


def test_blur_sigma_is_even_over_its_range_where_there_is_blur():
    sigma = draw()[Draw.BLUR_SIGMA]
    drawn = sigma[sigma > 0]
    assert same_distribution(drawn, np.linspace(0.1, 2.0, 100_000))
    assert abs(len(drawn) / NUM - 0.5) < 0.015


@pytest.mark.parametrize(
    ("recipe", "view", "column", "probability"),
    [
        ("v1", 0, Draw.JITTER, 1.0),
        ("v1", 0, Draw.GRAY_FIRST, 0.2),
        ("v1", 0, Draw.GRAY, 0.0),
        ("v2", 0, Draw.JITTER, 0.8),
        ("v2", 1, Draw.GRAY, 0.2),
        ("v2", 1, Draw.GRAY_FIRST, 0.0),
        ("v2", 0, Draw.FLIP, 0.5),
        ("v3", 0, Draw.SOLARIZE, 0.0),
        ("v3", 1, Draw.SOLARIZE, 0.2),
        ("v3", 0, Draw.BLUR_SIGMA, 1.0),
        ("v3", 1, Draw.BLUR_SIGMA, 0.1),
    ],
)
def test_each_operation_happens_as_often_as_the_recipe_says(recipe, view, column, probability):
    share = (draw(recipe, view=view)[column] > 0).mean()
    assert abs(share - probability) <= 4 * np.sqrt(probability * (1 - probability) / NUM)


def test_draws_are_independent_of_each_other_and_of_the_other_view():
    query, key = draw(view=0).array, draw(view=1).array
    following = np.roll(query, 1, axis=0)
    columns = [Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION, Draw.HUE, Draw.JITTER, Draw.GRAY, Draw.FLIP]
    both = np.concatenate([one[:, columns] for one in (query, key, following)], axis=1)
    correlation = np.corrcoef(both.T) - np.eye(both.shape[1])
    assert np.abs(correlation).max() < 4.5 / np.sqrt(NUM)
