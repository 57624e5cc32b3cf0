import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.parity import (
    MEAN_BOUNDS,
    RECIPE_MEAN_BOUND,
    Difference,
    measure_ffcv_decoder,
    measure_parity,
)
from linerate.pipeline.recipe import find_recipe
from linerate.pipeline.undecodable import UndecodableImages

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"


def encoded(jpegs):
    sizes = [Image.open(io.BytesIO(jpeg)).size for jpeg in jpegs]
    rows = np.arange(len(jpegs))
    return EncodedBatch(
        jpegs=[np.frombuffer(jpeg, dtype=np.uint8) for jpeg in jpegs],
        sample_id=rows,
        position=rows,
        label=rows,
        height=np.array([height for _, height in sizes]),
        width=np.array([width for width, _ in sizes]),
    )


@pytest.fixture(scope="module")
def made(make_sample):
    modes = ("RGB", "RGB", "L", "CMYK")
    samples = [make_sample(i, height=90 + i, width=120 - i, mode=mode) for i, mode in enumerate(modes)]
    return encoded([one.jpeg for one in samples])


@pytest.mark.parametrize("form", ["kernels", "operators"])
@pytest.mark.parametrize("recipe", ["v1", "v2", "v3"])
def test_every_operation_and_the_recipe_keep_their_bounds(made, recipe, form):
    found = measure_parity(made, recipe=find_recipe(recipe, size=64), form=form)
    assert [one.name for one in found] == [*MEAN_BOUNDS, recipe]
    assert [one for one in found if not one.met] == []
    assert found[-1].num_views == 2 * len(made.jpegs)


def test_a_difference_beyond_its_bound_is_not_met():
    assert Difference(name="hue", num_views=1, mean=0.2, p99=1, max=3, mean_bound=0.2).met
    assert not Difference(name="hue", num_views=1, mean=0.3, p99=1, max=3, mean_bound=0.2).met


def test_parity_sees_a_wrong_operation(made, monkeypatch):
    """With the hue of the reference left out, the hue and the jitter must fail, and the others not."""
    from linerate.pipeline import torch_views

    ops = (*torch_views._JITTER_OPS[:3], lambda view, turns: view)
    monkeypatch.setattr(torch_views, "_JITTER_OPS", ops)
    found = {one.name: one.met for one in measure_parity(made, recipe=find_recipe("v2", size=64))}
    assert not found["hue"]
    assert not found["jitter"]
    assert found["crop"]
    assert found["blur"]


def test_broken_images_are_named(made):
    broken = EncodedBatch(
        jpegs=[made.jpegs[0], made.jpegs[1][:200]],
        sample_id=np.array([7, 8]),
        position=np.array([5, 6]),
        label=made.label[:2],
        height=made.height[:2],
        width=made.width[:2],
    )
    with pytest.raises(UndecodableImages) as error:
        measure_parity(broken, recipe=find_recipe("v2", size=64))
    assert (error.value.sample_id, error.value.position) == ([8], [6])


@pytest.mark.filterwarnings("ignore")
def test_ffcvs_decoder_gives_pillows_pixels_nearly(made):
    if importlib.util.find_spec("ffcv") is None:
        pytest.skip("ffcv is not installed, so its decoder stays untested")
    found = measure_ffcv_decoder(made)
    assert found.num_views == 3  # of four one is CMYK
    assert found.mean < 2
    assert found.met


def test_without_ffcv_nothing_is_said_of_its_decoder(made, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert measure_ffcv_decoder(made) is None


@pytest.mark.data
@pytest.mark.parametrize("form", ["kernels", "operators"])
def test_v2_on_real_photos_lies_within_half_a_grey_level(form):
    if not PHOTOS.is_dir():
        pytest.skip("needs shared/data/photos beside the repository; parity on real photos stays untested")
    photos = sorted(PHOTOS.rglob("*.[jJ]*"))[:: 130 if form == "operators" else 50]
    assert len(photos) > 5
    found = measure_parity(
        encoded([photo.read_bytes() for photo in photos]), recipe=find_recipe("v2"), form=form
    )
    assert [one for one in found if not one.met] == []
    assert found[-1].mean <= RECIPE_MEAN_BOUND
