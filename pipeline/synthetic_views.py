"""Random pixels that already lie on the device: what a step costs when its data cost nothing."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from linerate.pipeline.reader import EpochFetch
from linerate.pipeline.recipe import ViewRecipe
from linerate.pipeline.two_views import TwoViews


class SyntheticViews:
    """Two batches of random pixels in turn. The positions are the order's own, no image is read.

    sample_id is set to the position and every label to -1: both stand in the shards' indexes.
    """

    num_batches = 2
    own_order = False

    def __init__(
        self, *, recipe: ViewRecipe, seed: int, batch: int, device: str, num_threads: int, prefetch: int
    ) -> None:
        """num_threads and prefetch are there for the sake of the protocol."""
        generator = torch.Generator().manual_seed(seed % 2**63)

        def pixels() -> Tensor:
            shape = (batch, recipe.size, recipe.size, 3)
            nhwc = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            return nhwc.to(device).permute(0, 3, 1, 2)

        self._batches = [(pixels(), pixels()) for _ in range(self.num_batches)]

    def run(self, fetch: EpochFetch, steps: range, *, epoch: int) -> Generator[TwoViews, None, None]:
        for step in steps:
            query, key = self._batches[step % self.num_batches]
            position = torch.from_numpy(fetch.positions(step))
            label = torch.full_like(position, -1)
            yield TwoViews(query=query, key=key, sample_id=position.clone(), position=position, label=label)

    def close(self) -> None:
        self._batches = []
