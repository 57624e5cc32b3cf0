"""The mark of tests that need a CUDA device: without one they skip, and say what stays untested."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


def needs_gpu(untested: str) -> Callable[[Any], Any]:
    """A decorator. untested: what nobody knows where this test was skipped."""
    no_device = pytest.mark.skipif(
        not torch.cuda.is_available(), reason=f"no CUDA device, so untested: {untested}"
    )
    return lambda test: pytest.mark.gpu(no_device(test))
