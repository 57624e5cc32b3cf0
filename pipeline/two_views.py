"""One step's two views of every sample, with where each came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Origin = tuple[Tensor, Tensor, Tensor]
"""Of N samples on the CPU: sample_id, position, label, each (N,) int64."""


@dataclass(frozen=True)
class TwoViews:
    """A rank's share of one global batch, seen twice.

    `query` and `key` have shape (N, 3, S, S), dtype uint8 and channels_last strides, on the
    pipeline's device. Where each sample came from has shape (N,) and dtype int64, on the CPU.
    Row i of every tensor is the same sample.
    """

    query: Tensor
    """(N, 3, S, S) uint8: the view the query encoder sees."""
    key: Tensor
    """(N, 3, S, S) uint8: the view the key encoder sees."""
    sample_id: Tensor
    """(N,) int64: the planned place of the sample, stable for the life of the shards."""
    position: Tensor
    """(N,) int64: the place of the sample in packed order, 0..num_samples-1."""
    label: Tensor
    """(N,) int64: the index of its class, -1 where it has none."""

    @classmethod
    def of(cls, pixels: Sequence[Tensor], origin: Origin) -> TwoViews:
        """pixels: the query and the key views."""
        query, key = pixels
        sample_id, position, label = origin
        return cls(query=query, key=key, sample_id=sample_id, position=position, label=label)
