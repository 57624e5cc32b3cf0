"""What the reader hands to a backend: encoded images, with where each came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class EncodedBatch:
    """The JPEG bytes of N samples; row i of every member is the same sample."""

    jpegs: list[NDArray[np.uint8]]
    """N arrays of shape (num_bytes,): the bytes as they stand in the tar."""
    sample_id: NDArray[np.int64]
    """(N,): the planned place of the sample, stable for the life of the shards."""
    position: NDArray[np.int64]
    """(N,): the place of the sample in packed order, 0..num_samples-1."""
    label: NDArray[np.int64]
    """(N,): the index of its class, -1 where it has none."""
    height: NDArray[np.int64]
    """(N,) in pixels, as the index has it (the header of the JPEG says the same)."""
    width: NDArray[np.int64]
    """(N,) in pixels."""
