"""The compiled kernels against torchvision v2 on uint8 tensors."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from linerate.pipeline import cpu_kernels
from linerate.pipeline.draws import JITTER_ORDERS, Draw
from linerate.pipeline.torch_views import reference_view

rng = np.random.default_rng(0)
NOISE = rng.integers(0, 256, (61, 67, 3), dtype=np.uint8)
GRAYS = np.repeat(rng.integers(0, 256, (61, 67, 1), dtype=np.uint8), 3, axis=2)
EXTREMES = rng.choice(np.array([0, 1, 127, 128, 254, 255], dtype=np.uint8), (61, 67, 3))
SMOOTH = F.resize(torch.from_numpy(NOISE[:4, :5].copy()).permute(2, 0, 1), [61, 67]).permute(1, 2, 0).numpy()
IMAGES = {"noise": NOISE, "grays": GRAYS, "extremes": EXTREMES, "smooth": np.ascontiguousarray(SMOOTH)}


def draws_of(image, **changes):
    draws = np.zeros(len(Draw), dtype=np.float32)
    draws[[Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION]] = 1
    draws[[Draw.BOTTOM, Draw.RIGHT]] = image.shape[:2]
    for name, value in changes.items():
        draws[Draw[name]] = value
    return draws


def difference(image, draws, *, size=48):
    """Grey levels between the kernel's view and torchvision's."""
    out = np.empty((size, size, 3), dtype=np.uint8)
    cpu_kernels.make_view(out, image, draws)
    reference = reference_view(torch.from_numpy(image).permute(2, 0, 1), draws, size=size).numpy()
    return np.abs(out.astype(int) - reference)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"FLIP": 1},
        {"GRAY": 1},
        {"GRAY_FIRST": 1, "JITTER": 1, "CONTRAST": 1.4},
        {"SOLARIZE": 1},
        {"JITTER": 1, "BRIGHTNESS": 1.37},
        {"JITTER": 1, "BRIGHTNESS": 0.6},
        {"JITTER": 1, "CONTRAST": 1.4},
        {"JITTER": 1, "CONTRAST": 0.61},
        {"JITTER": 1, "SATURATION": 1.4},
        {"JITTER": 1, "SATURATION": 0.61},
        {"JITTER": 1, "HUE": 0.1},
        {"JITTER": 1, "HUE": -0.37},
        {"JITTER": 1, "HUE": 0.5},
    ],
)
def test_each_operation_is_torchvisions(name, changes):
    image = IMAGES[name]
    # The crop's own difference of at most one level is in it, and stretching may widen that.
    levels = difference(image, draws_of(image, **changes))
    assert levels.mean() < 0.05
    assert levels.max() <= 2


@pytest.mark.parametrize("order", range(len(JITTER_ORDERS)))
def test_the_jitter_keeps_every_order(order):
    image = IMAGES["smooth"]
    draws = draws_of(
        image, JITTER=1, JITTER_ORDER=order, BRIGHTNESS=1.3, CONTRAST=0.7, SATURATION=1.4, HUE=0.08
    )
    levels = difference(image, draws)
    assert levels.mean() < 0.05
    assert levels.max() <= 3


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.0, 1.6, 2.0])
@pytest.mark.parametrize("size", [24, 48, 224])
def test_the_blur_is_torchvisions(sigma, size):
    levels = difference(NOISE, draws_of(NOISE, BLUR_SIGMA=sigma), size=size)
    assert levels.mean() < 0.01
    assert levels.max() <= 1


def test_the_blur_of_a_view_smaller_than_its_window_is_torchvisions():
    levels = difference(NOISE, draws_of(NOISE, BLUR_SIGMA=2.0), size=6)
    assert levels.max() <= 1


@pytest.mark.parametrize(
    "window",
    [(0, 0, 61, 67), (5, 7, 53, 55), (10, 20, 11, 21), (60, 66, 61, 67), (0, 3, 2, 60), (1, 0, 60, 2)],
)
@pytest.mark.parametrize("size", [1, 7, 48, 100])
def test_the_crop_is_torchvisions(window, size):
    draws = draws_of(NOISE)
    draws[Draw.TOP : Draw.RIGHT + 1] = window
    levels = difference(NOISE, draws, size=size)
    assert levels.mean() < 0.05
    assert levels.max() <= 1


def test_a_window_beyond_the_image_shrinks_to_it():
    out = np.empty((8, 8, 3), dtype=np.uint8)
    draws = draws_of(NOISE)
    draws[Draw.TOP : Draw.RIGHT + 1] = (500, 500, 900, 900)
    cpu_kernels.make_view(out, NOISE, draws)
    assert (out == NOISE[-1, -1]).all()


def test_all_operations_at_once_are_torchvisions():
    image = IMAGES["smooth"]
    everything = {"JITTER": 1, "JITTER_ORDER": 13, "BRIGHTNESS": 0.7, "CONTRAST": 1.3, "SATURATION": 0.8}
    everything |= {"HUE": -0.05, "GRAY": 1, "BLUR_SIGMA": 1.1, "FLIP": 1}
    levels = difference(image, draws_of(image, **everything), size=64)
    assert levels.mean() < 0.05
    assert levels.max() <= 3
