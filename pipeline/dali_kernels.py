# DALI exports by tricks that mypy does not follow.
# mypy: disable-error-code="attr-defined,no-untyped-def"
"""`make_view` of cpu_kernels as an operator of DALI's CPU graphs, on DALI's own threads, without the GIL.

DALI's numba operator compiles its wrappers anew in every process, 4 s a start. It needs no more than the
addresses of two C functions, so it is given those of cpu_kernels, which are cached on disk.
"""

from __future__ import annotations

from typing import Any

from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction

from linerate.pipeline import cpu_kernels


class _CachedNumba(NumbaFunction):
    def _get_setup_fn_cpu(self, setup_fn):
        return setup_fn.address

    def _get_run_fn_cpu(self, run_fn, *_):
        return run_fn.address


def make_view(image: Any, draws: Any, place: Any) -> Any:
    """The graph node that makes a view (S, S, 3) of a decoded image and its draws, at that place.

    place: (2,) int64, see `view_memory.places`. The node's output is one byte: that it is done.
    """
    operator = _CachedNumba(
        run_fn=cpu_kernels.view_of_sample,
        setup_fn=cpu_kernels.set_output_shapes,
        in_types=[types.UINT8, types.FLOAT, types.INT64],
        ins_ndim=[3, 1, 1],
        out_types=[types.UINT8],
        outs_ndim=[1],
    )
    return operator(image, draws, place)
