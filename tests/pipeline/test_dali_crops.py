"""The windows of centre crops, all of a batch at once, are those that torchvision would find one by one."""

import numpy as np
import pytest

from linerate.pipeline.dali_crops import crop_windows
from linerate.pipeline.recipe import CentreCrop


def place_one(crop: CentreCrop, height: int, width: int) -> tuple[int, int, int, int]:
    """Resize(resize) and CenterCrop(size) as torchvision counts, in Python's own numbers."""
    short, long = sorted((height, width))
    height, width = (
        crop.resize if side == short else crop.resize * long // short for side in (height, width)
    )
    return height, width, round((height - crop.size) / 2), round((width - crop.size) / 2)


def window_of_one(crop: CentreCrop, height: int, width: int) -> list[float]:
    resized_height, resized_width, top, left = place_one(crop, height, width)
    down, across = height / resized_height, width / resized_width
    return [top * down, left * across, (top + crop.size) * down, (left + crop.size) * across]


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (224, 224), (16, 20), (31, 64), (37, 100), (1, 1)])
def test_windows_of_a_batch_are_those_of_its_images_to_the_bit(size: int, resize: int):
    crop = CentreCrop(size=size, resize=resize)
    random = np.random.default_rng(size)
    # Small sides meet every remainder and half; large ones reach 10,000 pixels and an odd shape.
    height, width = (
        np.concatenate([random.integers(1, 40, 300), random.integers(1, 10_000, 700)]) for _ in range(2)
    )
    height[::7] = width[::7]
    sizes = list(zip(height.tolist(), width.tolist(), strict=True))
    placed = np.stack(crop.place(height, width), axis=1)
    assert placed.tolist() == [list(place_one(crop, *one)) for one in sizes]
    expected = np.array([window_of_one(crop, *one) for one in sizes]).astype(np.float32)
    found = crop_windows(crop, height, width)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)


def test_a_single_image_is_placed_by_the_same_rule():
    crop = CentreCrop(size=224, resize=256)
    assert tuple(map(int, crop.place(*np.array([300, 401])))) == place_one(crop, 300, 401)
