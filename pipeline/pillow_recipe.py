"""A recipe as torchvision v2's transforms of Pillow images, by their own random numbers, as others train."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import v2

from linerate.pipeline.draws import JITTER_ORDERS, Draw
from linerate.pipeline.recipe import OneView


class PillowBlur(nn.Module):
    """Pillow's Gaussian blur with a radius drawn from `sigma`, as in MoCo v2's own loader."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        return self.blur(image, float(torch.empty(1).uniform_(*self.sigma)))

    @staticmethod
    def blur(image: Image.Image, sigma: float) -> Image.Image:
        """By a given radius."""
        return image.filter(ImageFilter.GaussianBlur(radius=sigma))


class PillowView:
    """One view of a recipe: by torchvision's own random numbers, or by given draws."""

    def __init__(self, recipe: OneView, *, size: int) -> None:
        self.crop = v2.RandomResizedCrop(
            size, scale=recipe.crop_scale, ratio=recipe.crop_ratio, antialias=True
        )
        self.jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
        self.gray = v2.Grayscale(num_output_channels=3)
        self.blur = PillowBlur(recipe.blur_sigma)
        self.solarize = v2.RandomSolarize(threshold=128, p=1.0)
        jitter = _sometimes(self.jitter, recipe.jitter_probability)
        gray = [v2.RandomGrayscale(recipe.gray_probability)]
        steps = [*gray, *jitter] if recipe.gray_first else [*jitter, *gray]
        self.random = v2.Compose(
            [
                self.crop,
                *steps,
                *_sometimes(self.blur, recipe.blur_probability),
                *(
                    [v2.RandomSolarize(128, recipe.solarize_probability)]
                    if recipe.solarize_probability
                    else []
                ),
                v2.RandomHorizontalFlip(recipe.flip_probability),
                v2.PILToTensor(),
            ]
        )

    def given(self, image: Image.Image, draws: npt.NDArray[np.float32]) -> Tensor:
        """(3, S, S) uint8 by one row of our draws, through the same transforms that are timed."""
        top, left, bottom, right = (int(edge) for edge in draws[Draw.TOP : Draw.RIGHT + 1])
        image = self.crop.transform(
            image, {"top": top, "left": left, "height": bottom - top, "width": right - left}
        )
        if draws[Draw.GRAY_FIRST]:
            image = self.gray(image)
        if draws[Draw.JITTER]:
            image = self.jitter.transform(image, _jitter_params(draws))
        if draws[Draw.GRAY]:
            image = self.gray(image)
        if draws[Draw.BLUR_SIGMA]:
            image = self.blur.blur(image, float(draws[Draw.BLUR_SIGMA]))
        if draws[Draw.SOLARIZE]:
            image = self.solarize(image)
        if draws[Draw.FLIP]:
            image = v2.functional.horizontal_flip(image)
        pixels: Tensor = v2.functional.pil_to_tensor(image)
        return pixels


def decode(jpeg: npt.NDArray[np.uint8]) -> Image.Image:
    """The RGB image, decoded in full."""
    return Image.open(io.BytesIO(jpeg.data)).convert("RGB")


def _sometimes(step: nn.Module, probability: float) -> list[nn.Module]:
    if probability == 0:
        return []
    return [step] if probability == 1 else [v2.RandomApply([step], probability)]


def _jitter_params(draws: npt.NDArray[np.float32]) -> dict[str, object]:
    return {
        "fn_idx": torch.from_numpy(JITTER_ORDERS[int(draws[Draw.JITTER_ORDER])]),
        "brightness_factor": float(draws[Draw.BRIGHTNESS]),
        "contrast_factor": float(draws[Draw.CONTRAST]),
        "saturation_factor": float(draws[Draw.SATURATION]),
        "hue_factor": float(draws[Draw.HUE]),
    }
