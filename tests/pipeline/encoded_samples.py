"""JPEGs as a reader hands them to a backend."""

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from linerate.pipeline.encoded import EncodedBatch


def encoded(jpegs: Sequence[bytes], *, first: int = 0) -> EncodedBatch:
    """One batch; positions count from `first`, and sample_id is 100 more, to tell the two apart."""
    sizes = [Image.open(io.BytesIO(jpeg)).size for jpeg in jpegs]
    rows = first + np.arange(len(jpegs))
    return EncodedBatch(
        jpegs=[np.frombuffer(jpeg, dtype=np.uint8) for jpeg in jpegs],
        sample_id=100 + rows,
        position=rows,
        label=rows % 3,
        height=np.array([height for _, height in sizes]),
        width=np.array([width for width, _ in sizes]),
    )


def image_fetch(jpegs: Sequence[bytes], batch: int) -> Callable[[int], EncodedBatch]:
    """Steps of `batch` samples in order."""
    return lambda step: encoded(jpegs[step * batch : (step + 1) * batch], first=step * batch)


def cut(jpegs: Sequence[bytes], *rows: int) -> list[bytes]:
    """The same JPEGs, those at `rows` with the second half of their bytes gone."""
    return [one[: len(one) // 2] if row in rows else one for row, one in enumerate(jpegs)]
