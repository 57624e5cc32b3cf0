"""What a kind of transfer gives the loop: a network, images, and how its predictions are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from linerate.train.evaluate.detect.batches import Item, Source


@dataclass(frozen=True, kw_only=True)
class Job:
    """One kind of transfer on one data set."""

    build: Callable[[int], nn.Module]
    """seed -> the network before its first iteration; (images, targets) -> losses when it trains."""
    train: Source
    test: Source
    record: Callable[[Any, Item], Any]
    """What is kept of the network's prediction for one image, small and picklable."""
    judge: Callable[[dict[int, Any]], dict[str, float]]
    """Records by place in `test` -> numbers in percent."""
    norm_decay: float
    """Weight decay of normalisation layers; of all else it is 1e-4."""
