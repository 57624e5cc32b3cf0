"""What Pillow, torchvision and DALI make of a JPEG: its size, or a word on why not."""

import functools
import io
import warnings
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image

Size = tuple[int, int]


@functools.cache
def sizes(jpeg: bytes) -> dict[str, Size | str]:
    """Decoder -> (height, width) of the whole decoded image, or `refused`."""
    found: dict[str, Size | str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for decode in (pillow, torchvision_, dali):
            try:
                found[decode.__name__.rstrip("_")] = decode(jpeg)
            except Exception:
                found[decode.__name__.rstrip("_")] = "refused"
    return found


def pillow(jpeg: bytes) -> Size:
    return pillow_pixels(jpeg).shape[:2]


def pillow_pixels(jpeg: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(jpeg)) as image:
            return np.array(image)


def torchvision_(jpeg: bytes) -> Size:
    data = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
    height, width = torchvision.io.decode_image(data, mode="RGB").shape[1:]
    return height, width


def dali(jpeg: bytes) -> Size:
    pipeline = _pipeline()
    try:
        pipeline.feed_input("jpegs", [np.frombuffer(jpeg, np.uint8)])
        height, width, _ = np.asarray(pipeline.run()[0][0]).shape
    except Exception:
        _pipeline.cache_clear()  # the one that raised is of no more use
        raise
    return height, width


@functools.cache
def _pipeline() -> Any:
    from nvidia import dali as library

    pipeline = library.Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        jpegs = library.fn.external_source(name="jpegs", dtype=library.types.UINT8, ndim=1)
        pipeline.set_outputs(library.fn.decoders.image(jpegs, device="cpu", adjust_orientation=False))
    pipeline.build()
    return pipeline
