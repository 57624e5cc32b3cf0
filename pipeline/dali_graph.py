# DALI exports by tricks that mypy does not follow.
# mypy: disable-error-code="attr-defined,call-overload,untyped-decorator"
"""The DALI graph from JPEG bytes and draws to views, two or one: one function of the device.

Inputs of a batch, by one external source: N JPEGs, and for each view what `graph_inputs` makes of its draws.
Outputs: the query views and the key views, or the only views, (N, S, S, 3) uint8; of "kernels" marks.

From the decoded image on there are two forms of a view:
- "kernels": compiled by numba, on the CPU alone (numba in DALI refuses CUDA 13). They write into memory of
  the caller's, whose `view_memory.places` are further inputs, one for each view;
- "operators": DALI's own, colours by arithmetic, on either device. On the CPU it tests what a GPU will run.
A third, "windows", is for evaluation: it takes (top, left, bottom, right), not only whole pixels, and
resizes that window, nothing else.
DALI's ready-made fn.hue, fn.contrast and color_twist lie 4 to 8 grey levels from torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn, math, pipeline_def, types

from linerate.pipeline.draws import JITTER_ORDERS, Draw, Draws
from linerate.pipeline.host_memory import pool_dali_memory

pool_dali_memory()

Form = Literal["kernels", "operators", "windows"]
Source = Callable[[], tuple[Any, ...]]
"""N JPEGs and a view's inputs for each view, once a batch."""

# The jitter's operators take four steps, each either the hue or x * factor + (1 - factor) * anchor, with
# anchor = mean_share * (mean luma) + luma_share * luma: brightness 0 0, contrast 1 0, saturation 0 1.
_FACTOR, _MEAN_SHARE, _LUMA_SHARE, _IS_HUE = range(4)
_STEPS = len(Draw)
_HUE_OP = 3


def graph_inputs(draws: Draws, *, form: Form) -> npt.NDArray[np.float32]:
    """(N, columns) float32: the draws as the graph of that form wants them."""
    if form == "kernels":
        return draws.array
    num = len(draws)
    ops = JITTER_ORDERS[draws[Draw.JITTER_ORDER].astype(np.int64)]
    steps = np.zeros((num, 4, 4), dtype=np.float32)
    factors = draws.array[:, Draw.BRIGHTNESS : Draw.HUE + 1]
    steps[:, :, _FACTOR] = np.take_along_axis(factors, ops, axis=1)
    steps[:, :, _MEAN_SHARE] = ops == 1
    steps[:, :, _LUMA_SHARE] = ops == 2
    steps[:, :, _IS_HUE] = ops == _HUE_OP
    return np.concatenate([draws.array, steps.reshape(num, 16)], axis=1)


@pipeline_def(enable_conditionals=True, exec_dynamic=True)
def views_graph(
    source: Source, *, num_views: int = 2, size: int, device: str, form: Form, hw_decoder_load: float = 0.65
) -> tuple[Any, ...]:
    """The pipeline. source: called once a batch; StopIteration ends the epoch.

    device: "cpu" or "gpu". hw_decoder_load: the share of a batch that the GPU's JPEG unit decodes.
    On the CPU the inputs are not copied: they must stay as they are until the batch has come out.
    """
    places = num_views if form == "kernels" else 0
    dtypes = [types.UINT8, *[types.FLOAT] * num_views, *[types.INT64] * places]
    jpegs, *rest = fn.external_source(
        source=source,
        num_outputs=len(dtypes),
        batch=True,
        dtype=dtypes,
        ndim=[1] * len(dtypes),
        # DALI would keep its copies, which come between decoded images and leave holes: peaks of 8 images of
        # 25 MB a batch rose by 16 % over 8 epochs with them, by 0.5 % without.
        no_copy=device == "cpu",
    )
    image = decode(jpegs, device=device, hw_decoder_load=hw_decoder_load)
    if form == "kernels":
        from linerate.pipeline.dali_kernels import make_view

        return tuple(make_view(image, rest[view], rest[num_views + view]) for view in range(num_views))
    return tuple(view_by_operators(image, draws, size=size, device=device, form=form) for draws in rest)


@pipeline_def(exec_dynamic=True)
def decode_graph(
    source: Callable[[], list[npt.NDArray[np.uint8]]], *, device: str, hw_decoder_load: float = 0.65
) -> Any:
    """The decoder of `views_graph` alone; the output is N images (H, W, 3) uint8."""
    jpegs = fn.external_source(source=source, batch=True, dtype=types.UINT8, ndim=1)
    return decode(jpegs, device=device, hw_decoder_load=hw_decoder_load)


def decode(jpegs: Any, *, device: str, hw_decoder_load: float) -> Any:
    """(H, W, 3) uint8 RGB on the device; EXIF turns nothing."""
    if device == "cpu":
        return fn.decoders.image(jpegs, device="cpu", output_type=types.RGB, adjust_orientation=False)
    return fn.decoders.image(
        jpegs,
        device="mixed",
        output_type=types.RGB,
        adjust_orientation=False,
        # The CPU's and every other decoder's way of bringing chroma to full size.
        jpeg_fancy_upsampling=True,
        hw_decoder_load=hw_decoder_load,
    )


def view_by_operators(image: Any, draws: Any, *, size: int, device: str, form: Form) -> Any:
    view = resize_window(image, draws, size=size)
    if form == "windows":
        return view
    return finish_by_operators(view, draws, draws.gpu() if device == "gpu" else draws)


def resize_window(image: Any, draws: Any, *, size: int) -> Any:
    """(S, S, 3): the window in the first four of the draws, bilinear and antialiased.

    The pixels around the window count as far as the filter reaches, so that a window is a piece of the whole
    image resized.
    """
    # A window beyond the image ends the process by SIGSEGV. The index and the JPEG's header agree unless the
    # file was damaged; then the window shrinks.
    bounds = fn.cast(image.shape()[0:2], dtype=types.FLOAT)
    return fn.resize(
        image,
        size=[size, size],
        roi_start=math.min(draws[Draw.TOP : Draw.LEFT + 1], bounds - 1.0),
        roi_end=math.min(draws[Draw.BOTTOM : Draw.RIGHT + 1], bounds),
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )


def finish_by_operators(view: Any, draws: Any, factors: Any) -> Any:
    """Flip, gray, jitter, blur, solarize. draws lie on the CPU, where predicates and named arguments must be.

    factors: the same numbers on the view's device.
    """
    view = fn.flip(view, horizontal=fn.cast(draws[Draw.FLIP], dtype=types.INT32))
    if draws[Draw.GRAY_FIRST] > 0.5:
        view = _grayscale(view)
    if draws[Draw.JITTER] > 0.5:
        for step in range(4):
            base = _STEPS + 4 * step
            if draws[base + _IS_HUE] > 0.5:
                view = _adjust_hue(view, factors[base + _FACTOR])
            else:
                view = _blend(
                    view, factors[base + _FACTOR], factors[base + _MEAN_SHARE], factors[base + _LUMA_SHARE]
                )
    if draws[Draw.GRAY] > 0.5:
        view = _grayscale(view)
    if draws[Draw.BLUR_SIGMA] > 0.0:
        view = fn.gaussian_blur(view, sigma=draws[Draw.BLUR_SIGMA])
    if draws[Draw.SOLARIZE] > 0.5:
        high = fn.cast(view >= 128, dtype=types.INT32)
        view = fn.cast(view + high * (255 - 2 * view), dtype=types.UINT8)
    return view


def _levels(value: Any) -> Any:
    """As torchvision makes levels of floats: clamped, then cut to the whole number below."""
    return fn.cast(math.floor(math.clamp(value, 0.0, 255.0)), dtype=types.UINT8)


def _luma(view: Any) -> Any:
    return math.floor(view[:, :, 0:1] * 0.2989 + view[:, :, 1:2] * 0.587 + view[:, :, 2:3] * 0.114)


def _grayscale(view: Any) -> Any:
    luma = _levels(_luma(view))
    return fn.cat(luma, luma, luma, axis=2)


def _blend(view: Any, factor: Any, mean_share: Any, luma_share: Any) -> Any:
    luma = _luma(view)
    mean = fn.reductions.mean(luma, axes=[0, 1, 2], keep_dims=True)
    anchor = mean * mean_share + luma * luma_share
    return _levels(view * factor + anchor * (1.0 - factor))


def _adjust_hue(view: Any, turns: Any) -> Any:
    """Through HSV. A channel is v - chroma * clamp(min(k, 4 - k), 0, 1), k = (5, 3, 1) + 6h modulo 6."""
    view = fn.cast(view, dtype=types.FLOAT)
    red, green, blue = view[:, :, 0:1], view[:, :, 1:2], view[:, :, 2:3]
    value = math.max(red, math.max(green, blue))
    chroma = value - math.min(red, math.min(green, blue))
    divisor = math.max(chroma, 1.0)
    is_red = fn.cast(value == red, dtype=types.FLOAT)
    is_green = fn.cast(value == green, dtype=types.FLOAT) * (1.0 - is_red)
    is_blue = 1.0 - is_red - is_green
    h6 = is_red * (green - blue) / divisor
    h6 = h6 + is_green * (2.0 + (blue - red) / divisor) + is_blue * (4.0 + (red - green) / divisor)
    h6 = h6 + turns * 6.0
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = h6 + offset
        k = k - 6.0 * math.floor(k * (1 / 6))
        channels.append(value - chroma * math.clamp(math.min(k, 4.0 - k), 0.0, 1.0))
    return _levels(fn.cat(*channels, axis=2) * (255.999 / 255))
