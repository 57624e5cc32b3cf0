import dataclasses

import pytest

from linerate.pipeline.recipe import RECIPES, OneView, ViewRecipe, find_recipe
from linerate.shards.errors import UserError


def test_v1_is_the_published_one():
    recipe = RECIPES["v1"]()
    assert recipe.query == recipe.key
    one = recipe.query
    assert one.crop_scale == (0.2, 1.0)
    assert one.crop_ratio == (3 / 4, 4 / 3)
    assert (one.brightness, one.contrast, one.saturation, one.hue) == (0.4, 0.4, 0.4, 0.4)
    assert (one.jitter_probability, one.gray_probability, one.flip_probability) == (1.0, 0.2, 0.5)
    assert (one.gray_first, one.blur_probability, one.solarize_probability) == (True, 0.0, 0.0)


def test_v2_is_the_published_one():
    recipe = RECIPES["v2"]()
    assert recipe.query == recipe.key
    one = recipe.query
    assert (one.brightness, one.contrast, one.saturation, one.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (one.jitter_probability, one.gray_probability, one.flip_probability) == (0.8, 0.2, 0.5)
    assert (one.blur_probability, one.blur_sigma, one.gray_first) == (0.5, (0.1, 2.0), False)


def test_v3_blurs_the_query_and_solarizes_the_key():
    recipe = RECIPES["v3"]()
    assert (recipe.query.blur_probability, recipe.key.blur_probability) == (1.0, 0.1)
    assert (recipe.query.solarize_probability, recipe.key.solarize_probability) == (0.0, 0.2)
    for one in (recipe.query, recipe.key):
        assert (one.brightness, one.contrast, one.saturation, one.hue) == (0.4, 0.4, 0.2, 0.1)
        assert one.crop_scale == (0.2, 1.0)
    assert RECIPES["v3"](crop_min=0.08).query.crop_scale == (0.08, 1.0)


def test_the_size_can_be_another():
    assert find_recipe("v2").size == 224
    assert find_recipe("v2", size=32).size == 32
    assert dataclasses.replace(find_recipe("v2"), size=32) == find_recipe("v2", size=32)


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(UserError, match="there is no recipe `v22`; did you mean `v2`"):
        find_recipe("v22")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"gray_probability": 1.5}, "gray_probability=1.5 is no probability"),
        ({"blur_probability": -0.1}, "blur_probability=-0.1 is no probability"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale=.* must be"),
        ({"crop_scale": (0.2, 1.1)}, "more than the whole image"),
        ({"crop_ratio": (0.0, 1.0)}, "both above 0"),
        ({"blur_sigma": (0.0, 1.0)}, "both above 0"),
        ({"contrast": -1.0}, "contrast=-1.0 must not be negative"),
        ({"hue": 0.6}, "from 0 to 0.5"),
    ],
)
def test_a_view_that_cannot_be_is_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        OneView(**settings)


def test_a_recipe_without_pixels_is_refused():
    with pytest.raises(UserError, match="size=0"):
        ViewRecipe(name="none", size=0, query=OneView(), key=OneView())
