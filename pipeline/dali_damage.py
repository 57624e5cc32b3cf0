# DALI exports by tricks that mypy does not follow.
# mypy: disable-error-code="attr-defined,call-overload,untyped-decorator,no-untyped-call"
"""Which JPEGs of a batch DALI does not take."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from nvidia import nvimgcodec
from nvidia.dali import fn, pipeline_def, types

from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.undecodable import UndecodableImages


def rows_with_broken_header(batch: EncodedBatch) -> list[int]:
    """Which rows DALI must not be given: it does not parse their header, or not to the size in the index.

    DALI parses the headers of 32 images and more in several tasks, and ends the process by SIGSEGV when one
    of them fails (DALI 2.4). Its own parser asked beforehand takes 4 us an image.
    """
    bad = []
    for row, jpeg in enumerate(batch.jpegs):
        try:
            image = nvimgcodec.CodeStream(jpeg)
            if (image.height, image.width) == (batch.height[row], batch.width[row]):
                continue
        except (RuntimeError, ValueError):
            pass
        bad.append(row)
    return bad


def undecodable_rows(jpegs: list[npt.NDArray[np.uint8]]) -> list[int]:
    """Which of the JPEGs DALI's CPU decoder makes no image of."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    def decode(first: int) -> Any:
        rest = iter(jpegs[first:])
        data = fn.external_source(source=lambda: [next(rest)], batch=True, dtype=types.UINT8, ndim=1)
        return fn.decoders.image(data, device="cpu", output_type=types.RGB, adjust_orientation=False)

    bad = []
    one_by_one = decode(0)
    for row in range(len(jpegs)):
        try:
            one_by_one.run()
        except RuntimeError:
            bad.append(row)
            one_by_one = decode(row + 1)
    return bad


def diagnose(batches: Iterable[EncodedBatch], error: RuntimeError) -> Exception:
    """UndecodableImages of the first of these batches that has any behind DALI's error; else the error."""
    for batch in batches:
        if bad := undecodable_rows(batch.jpegs):
            return undecodable(batch, bad, _reason(str(error)))
    return error


def undecodable(batch: EncodedBatch, rows: list[int], reason: str) -> UndecodableImages:
    """These rows of a batch, as the error that the loader replaces samples by."""
    return UndecodableImages(batch.sample_id[rows].tolist(), batch.position[rows].tolist(), reason)


def _reason(message: str) -> str:
    """DALI's own words on what went wrong, without the traceback and the row that stand around them."""
    text = message.partition("encountered:")[2] or message
    text = re.sub(r"Failed to decode sample #\d+ *:|Current pipeline object is no longer valid\.", "", text)
    return next((line.strip() for line in text.splitlines() if line.strip()), "DALI's decoder refuses it")
