"""The peer of our views: Pillow images through torchvision v2's transforms, as lightly has them."""

import itertools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.pillow_recipe import PillowView, decode
from linerate.pipeline.recipe import ViewRecipe


class PillowViews:
    """Two views of every image of a batch, stacked to (N, 3, S, S) uint8."""

    def __init__(self, recipe: ViewRecipe, batches: list[EncodedBatch]) -> None:
        self._batches = batches
        self._views = [PillowView(one, size=recipe.size) for one in (recipe.query, recipe.key)]

    def run_epoch(self) -> None:
        """Make the views of every batch by torchvision's own random numbers."""
        for batch in self._batches:
            images = [decode(jpeg) for jpeg in batch.jpegs]
            for view in self._views:
                torch.stack([view.random(image) for image in images])

    def given(self, batch: EncodedBatch, draws: npt.NDArray[np.float32]) -> Tensor:
        """(N, 3, S, S) uint8 by our draws; view 0 and 1 differ in nothing that the draws do not say."""
        images = (decode(jpeg) for jpeg in batch.jpegs)
        return torch.stack(list(itertools.starmap(self._views[0].given, zip(images, draws, strict=True))))
