"""What queries are contrasted with: one protocol for the queue, the batch itself and the memory bank.

Legend: N images on this rank, B in the global batch, C dimensions of a key, K keys in the dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from linerate.train.infonce import InfoNce

Contrast = Callable[[Tensor, int], InfoNce]
"""(n, C) queries of the images from that place of the rank's batch on -> their loss."""


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What a step has for a dictionary to find the keys of this rank's queries."""

    step: int
    """The number of the iteration over the whole run."""
    first: int
    """Place of this rank's first image in the global batch."""
    num: int
    """N."""
    temperature: float
    """tau."""
    keys: Tensor | None
    """(B, C) unit rows in the order of the images, or None where the dictionary encodes none."""
    position: Tensor | None
    """(B,) int64 on the device: the images' places in the data set, or None where nobody asks for them."""


class KeyDictionary(nn.Module):
    """Keys, of which one is the positive of each query; its buffers are this rank's part of its state."""

    has_key_encoder: ClassVar[bool] = True
    """Whether f_k is an encoder of its own, which follows f_q; else f_k is f_q."""
    encodes_keys: ClassVar[bool] = True
    """Whether a step encodes the other view of its images as keys."""
    trains_keys: ClassVar[bool] = False
    """Whether the gradient flows through the keys."""
    needs_position: ClassVar[bool] = False
    """Whether it must know which images these are."""

    def open(self, lookup: Lookup) -> Contrast:
        """The loss of this step's queries against the keys as they are before the step."""
        raise NotImplementedError

    def close(self, lookups: list[Lookup], queries: Tensor) -> None:
        """Take in what the step has made, after the loss.

        lookups: those that were opened; queries: (N, C) unit rows of this rank, without gradient.
        """

    def stats(self) -> dict[str, Tensor]:
        """What the log tells of its state: 0-d float tensors on the device, the same on every rank."""
        return {}

    def full_state(self) -> dict[str, Tensor]:
        """The state over all ranks, complete on rank 0; every rank calls it."""
        return self.state_dict()

    def own_state(self, full: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of what `full_state` gave on any number of ranks. Raises UserError where none."""
        return full
