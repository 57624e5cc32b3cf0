# DALI exports by tricks that mypy does not follow.
# mypy: disable-error-code="attr-defined,call-overload,no-untyped-call,no-untyped-def,untyped-decorator"
"""`make_view` of cpu_kernels as an operator of DALI's CPU graphs, on DALI's own threads, without the GIL.

DALI's numba operator compiles its wrappers anew in every process, 4 s a start. It needs no more than the
addresses of two C functions, so it is given those of cpu_kernels, which are cached on disk.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

from nvidia.dali import fn, pipeline_def, types
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


@cache
def make_room() -> None:
    """Have DALI's pool take its memory in one piece, once a process: addresses, which are free until used.

    Otherwise it grows piece by piece, and what lies on the border of two serves no image. Where addresses are
    limited (ulimit -v), it does so all the same.
    """

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    def room() -> Any:
        operator = _CachedNumba(
            run_fn=cpu_kernels.touch_nothing,
            setup_fn=cpu_kernels.set_room_shape,
            in_types=[types.UINT8],
            ins_ndim=[1],
            out_types=[types.UINT8],
            outs_ndim=[1],
        )
        return operator(fn.constant(idata=0, shape=[1], dtype=types.UINT8))

    with contextlib.suppress(RuntimeError, MemoryError):
        room().run()
