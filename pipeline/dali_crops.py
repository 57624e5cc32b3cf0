"""Centre crops by DALI: the window of the image that the crop of the resized image is made of, resized.

Only the window is resized, so a long image costs no more than a square one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from linerate.pipeline.dali_views import DaliImages
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.recipe import CentreCrop


class DaliCrops(DaliImages):
    """The centre crop of an image, with its label; on the CPU or on a GPU by the same operators."""

    def __init__(self, crop: CentreCrop, *, batch: int, device: str, num_threads: int, prefetch: int) -> None:
        super().__init__(
            recipe=crop,
            seed=0,  # nothing is drawn
            batch=batch,
            device=device,
            num_threads=num_threads,
            prefetch=prefetch,
            form="windows",
        )
        self._crop = crop

    def _view_inputs(self, batch: EncodedBatch, *, epoch: int) -> list[npt.NDArray[np.float32]]:
        return [crop_windows(self._crop, batch.height, batch.width)]


def crop_windows(
    crop: CentreCrop, height: npt.NDArray[np.int64], width: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """(N, 4) top, left, bottom and right of each crop, in pixels of the image as it is stored."""
    resized_height, resized_width, top, left = crop.place(height, width)
    down, across = height / resized_height, width / resized_width
    edges = (top * down, left * across, (top + crop.size) * down, (left + crop.size) * across)
    return np.stack(edges, axis=1).astype(np.float32)
