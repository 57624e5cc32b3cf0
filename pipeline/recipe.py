"""Augmentation recipes as data: what may happen to a view, in which order, how strongly.

A recipe holds no randomness and no code that touches pixels: `draws` turns it into numbers, and each
backend applies those numbers. So one recipe means the same on every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from linerate.shards.errors import UserError
from linerate.shards.terminal import nearest

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class OneView:
    """What may happen to one view, in this order: crop, jitter, gray, blur, solarize, flip."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Least and greatest share of the image's area that a crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width over height of a crop, drawn evenly in the logarithm."""
    jitter_probability: float = 0.8
    brightness: float = 0.4
    """The factor is drawn from [1 - x, 1 + x], and not below 0."""
    contrast: float = 0.4
    """As brightness, about the mean luma of the view."""
    saturation: float = 0.4
    """As brightness, about each pixel's luma."""
    hue: float = 0.1
    """The shift is drawn from [-x, x], in turns of the colour circle; at most 0.5."""
    gray_probability: float = 0.2
    gray_first: bool = False
    """True: gray comes before the jitter (v1), not after it."""
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Least and greatest standard deviation of the Gaussian, in pixels of the view."""
    solarize_probability: float = 0.0
    """Levels of 128 and above are inverted."""
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_probability") and not 0 <= value <= 1:
                raise UserError(f"{field.name}={value} is no probability; give a number from 0 to 1")
            if isinstance(value, tuple) and not 0 < value[0] <= value[1]:
                raise UserError(f"{field.name}={value} must be (least, greatest), both above 0")
        if self.crop_scale[1] > 1:
            raise UserError(f"crop_scale={self.crop_scale} asks for more than the whole image; end at 1")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative; 0 switches it off")
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"hue={self.hue} is in turns of the colour circle; give a number from 0 to 0.5")


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """What may happen to the two views of an image."""

    num_views: ClassVar[int] = 2
    name: str
    size: int = 224
    """Height and width of a view in pixels."""
    query: OneView
    """The view that the query encoder sees."""
    key: OneView
    """The view that the key encoder sees."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"recipe {self.name}: size={self.size} must be at least 1 pixel")

    def view(self, view: int) -> OneView:
        """The part for view 0 (query) or 1 (key)."""
        return (self.query, self.key)[view]


@dataclass(frozen=True, kw_only=True)
class ImageRecipe:
    """What may happen to the one view of an image that a classifier learns from."""

    num_views: ClassVar[int] = 1
    name: str
    size: int = 224
    """Height and width of a view in pixels."""
    image: OneView

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"recipe {self.name}: size={self.size} must be at least 1 pixel")

    def view(self, view: int) -> OneView:
        """The part for view 0, the only one."""
        return (self.image,)[view]


@dataclass(frozen=True, kw_only=True)
class CentreCrop:
    """What evaluation sees of an image, without any chance: its short side resized, its centre cut out."""

    num_views: ClassVar[int] = 1
    size: int
    """Height and width of the crop in pixels."""
    resize: int
    """The image's short side before it."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.resize:
            raise UserError(f"size={self.size}, resize={self.resize} must obey 1 <= size <= resize")

    def place(self, height: Ints, width: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Height and width of each resized image, and the crop's top and left in it, as torchvision rounds.

        height, width: (N,), or 0-d of one image, as is what comes back.
        """
        short = np.minimum(height, width)
        height, width = (self.resize * side // short for side in (height, width))
        top, left = (np.rint((side - self.size) / 2).astype(np.int64) for side in (height, width))
        return height, width, top, left


def v1(*, size: int = 224) -> ViewRecipe:
    """MoCo v1: gray before the jitter, jitter on every view with hue 0.4, no blur.

    Source: facebookresearch/moco.
    """
    one = OneView(hue=0.4, jitter_probability=1.0, gray_first=True, blur_probability=0.0)
    return ViewRecipe(name="v1", size=size, query=one, key=one)


def v2(*, size: int = 224) -> ViewRecipe:
    """MoCo v2 ("aug+"): weaker hue, jitter on 80 % of the views, blur on half.

    Source: facebookresearch/moco.
    """
    one = OneView()
    return ViewRecipe(name="v2", size=size, query=one, key=one)


def v3(*, size: int = 224, crop_min: float = 0.2) -> ViewRecipe:
    """MoCo v3 and BYOL: the query view is always blurred; the key view seldom, but it may be solarized.

    crop_min: 0.2 is what v3 uses for ResNets (0.08 for vision transformers).
    Source: facebookresearch/moco-v3.
    """
    crop = (crop_min, 1.0)
    return ViewRecipe(
        name="v3",
        size=size,
        query=OneView(crop_scale=crop, saturation=0.2, blur_probability=1.0),
        key=OneView(crop_scale=crop, saturation=0.2, blur_probability=0.1, solarize_probability=0.2),
    )


def crop_and_flip(*, size: int = 224) -> ImageRecipe:
    """What a classifier is trained on: a crop of 8 % of the area or more, mirrored half the time.

    Source: facebookresearch/moco, main_lincls.py.
    """
    one = OneView(crop_scale=(0.08, 1.0), jitter_probability=0.0, gray_probability=0.0, blur_probability=0.0)
    return ImageRecipe(name="crop-and-flip", size=size, image=one)


RECIPES: dict[str, Callable[..., ViewRecipe]] = {"v1": v1, "v2": v2, "v3": v3}


def find_recipe(name: str, *, size: int = 224) -> ViewRecipe:
    """The recipe of that name. Raises UserError with the nearest name where there is none."""
    if name not in RECIPES:
        raise nearest(name, list(RECIPES), what="recipe")
    return RECIPES[name](size=size)
