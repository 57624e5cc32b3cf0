# numba decorates without types.
# mypy: disable-error-code="attr-defined,call-arg,no-untyped-def,no-untyped-call,untyped-decorator"
"""A decoded image and one row of draws to one view, on one core: crop, resize, flip and all that follows.

Compiled by numba, called by DALI's threads on one view at a time. Images and views are (H, W, 3) uint8;
inside, a view is three planes (3, S, S), because arithmetic on planes vectorises and on interleaved pixels
does not. Every operation returns whole levels, as torchvision's do on uint8.

Milliseconds a 224-pixel view: crop and resize 0.35 (DALI 1.2, Pillow 0.6), the four of the jitter 0.12 (as
interleaved float32 1.15), blur at sigma 1 0.3 (DALI 2.9).
"""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
from numba import carray, cfunc, extending, njit, types
from numba.core import cgutils

from linerate.pipeline.draws import JITTER_ORDERS, Draw

# What compiled code takes from outside, functions included, is frozen into numba's cache on disk, which is
# renewed when the file of the caller changes and at no other time: so all kernels stand in this one file, and
# the columns of Draw as numbers.
_TOP, _LEFT, _BOTTOM, _RIGHT = range(4)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _JITTER_ORDER, _JITTER = range(4, 10)
_GRAY_FIRST, _GRAY, _BLUR_SIGMA, _SOLARIZE, _FLIP = range(10, 15)
_NUM_DRAWS = 15
_JITTER_ORDERS = np.array(list(permutations(range(4))))
assert [c for c in Draw if globals().get(f"_{c.name}", c) != c] == []
assert len(Draw) == _NUM_DRAWS
assert np.array_equal(_JITTER_ORDERS, JITTER_ORDERS)

# contract: a multiplication and an addition may become one instruction; nothing may be reordered.
_options: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "fastmath": {"contract", "nsz"},
    "error_model": "numpy",
    "boundscheck": False,
}

f32 = np.float32


@njit(**_options)
def make_view(out, image, draws):
    """Write into `out` (S, S, 3) what `draws` (P,) make of `image` (H, W, 3)."""
    _finish(out, _crop(image, draws, out.shape[0]), draws)


@njit(**_options)
def finish_view(out, image, draws):
    """Write into `out` (S, S, 3) what `draws` (P,) make of `image` (S, S, 3), the window left aside."""
    planes = np.empty((3, *out.shape[:2]), np.uint8)
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            for c in range(3):
                planes[c, y, x] = image[y, x, c]
    _finish(out, planes, draws)


@njit(**_options)
def _finish(out, planes, draws):
    r, g, b = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    if draws[_GRAY_FIRST] > 0.5:
        grayscale(r, g, b)
    if draws[_JITTER] > 0.5:
        for slot in range(4):
            op = _JITTER_ORDERS[int(draws[_JITTER_ORDER]), slot]
            if op == 0:
                adjust_brightness(planes.reshape(-1), draws[_BRIGHTNESS])
            elif op == 1:
                adjust_contrast(r, g, b, draws[_CONTRAST])
            elif op == 2:
                adjust_saturation(r, g, b, draws[_SATURATION])
            else:
                adjust_hue(r, g, b, draws[_HUE])
    if draws[_GRAY] > 0.5:
        grayscale(r, g, b)
    if draws[_BLUR_SIGMA] > 0:
        planes = gaussian_blur(planes, draws[_BLUR_SIGMA])
    if draws[_SOLARIZE] > 0.5:
        solarize(planes.reshape(-1))
    flip = draws[_FLIP] > 0.5
    for y in range(out.shape[0]):
        _interleave(out[y], planes[0, y], planes[1, y], planes[2, y], flip)


@njit(**_options)
def _interleave(out, r, g, b, flip):
    last = r.size - 1
    if flip:
        for x in range(r.size):
            out[x, 0] = r[last - x]
            out[x, 1] = g[last - x]
            out[x, 2] = b[last - x]
    else:
        for x in range(r.size):
            out[x, 0] = r[x]
            out[x, 1] = g[x]
            out[x, 2] = b[x]


@njit(**_options)
def _crop(image, draws, size):
    # The index and the header agree unless the file was damaged; a window beyond the image would then read
    # beyond its memory.
    height, width, _ = image.shape
    bottom, right = min(int(draws[_BOTTOM]), height), min(int(draws[_RIGHT]), width)
    top, left = min(int(draws[_TOP]), bottom - 1), min(int(draws[_LEFT]), right - 1)
    return resized_crop(image, top, left, bottom, right, size)


@njit(**_options)
def resized_crop(image, top, left, bottom, right, size):
    """(3, S, S): the window, bilinear and antialiased as Pillow and torchvision do it: rows, then columns."""
    first, count, weights = _taps(right - left, size)
    rows = np.empty((3, bottom - top, size), np.uint8)
    for y in range(bottom - top):
        _resize_row(
            rows[0, y], rows[1, y], rows[2, y], image[top + y, left:right].reshape(-1), first, count, weights
        )
    first, count, weights = _taps(bottom - top, size)
    out = np.empty((3, size, size), np.uint8)
    total = np.empty(size, np.float32)
    for c in range(3):
        for y in range(size):
            total[:] = 0.5
            for t in range(count[y]):
                _add(total, weights[y, t], rows[c, first[y] + t])
            _cut(out[c, y], total)
    return out


@njit(**_options)
def _taps(length, size):
    """For each of `size` outputs over `length` inputs: the first input, how many, and their weights."""
    scale = length / size
    support = max(scale, 1.0)
    first = np.empty(size, np.int64)
    count = np.empty(size, np.int64)
    weights = np.empty((size, 2 * math.ceil(support) + 1), np.float32)
    for i in range(size):
        centre = (i + 0.5) * scale
        first[i] = max(int(centre - support + 0.5), 0)
        count[i] = min(int(centre + support + 0.5), length) - first[i]
        total = 0.0
        for t in range(count[i]):
            total += max(0.0, 1 - abs((first[i] + t - centre + 0.5) / support))
        for t in range(count[i]):
            weights[i, t] = max(0.0, 1 - abs((first[i] + t - centre + 0.5) / support)) / total
    return first, count, weights


@njit(**_options)
def _resize_row(red, green, blue, row, first, count, weights):
    for x in range(red.size):
        r, g, b = f32(0.5), f32(0.5), f32(0.5)
        for t in range(count[x]):
            at = 3 * (first[x] + t)
            r += weights[x, t] * f32(row[at])
            g += weights[x, t] * f32(row[at + 1])
            b += weights[x, t] * f32(row[at + 2])
        red[x], green[x], blue[x] = np.uint8(np.int32(r)), np.uint8(np.int32(g)), np.uint8(np.int32(b))


@njit(inline="always", **_options)
def _level(value):
    """A float32 as torchvision makes it a level: clamped, then cut to the whole number below."""
    return np.uint8(np.int32(min(max(value, f32(0)), f32(255))))


@njit(inline="always", **_options)
def _luma(red, green, blue):
    """ITU-R 601 luma as torchvision weighs it (the weights sum to .9999), cut to the whole level below."""
    return f32(np.int32(f32(0.2989) * f32(red) + f32(0.587) * f32(green) + f32(0.114) * f32(blue)))


@njit(**_options)
def grayscale(r, g, b):
    for i in range(r.size):
        gray = np.uint8(np.int32(_luma(r[i], g[i], b[i])))
        r[i] = gray
        g[i] = gray
        b[i] = gray


@njit(**_options)
def adjust_brightness(levels, factor):
    for i in range(levels.size):
        levels[i] = _level(f32(levels[i]) * factor)


@njit(**_options)
def adjust_contrast(r, g, b, factor):
    total = np.int64(0)
    for i in range(r.size):
        total += np.int64(np.int32(f32(0.2989) * f32(r[i]) + f32(0.587) * f32(g[i]) + f32(0.114) * f32(b[i])))
    offset = f32(total / r.size) * f32(1.0 - factor)
    for i in range(r.size):
        r[i] = _level(f32(r[i]) * factor + offset)
        g[i] = _level(f32(g[i]) * factor + offset)
        b[i] = _level(f32(b[i]) * factor + offset)


@njit(**_options)
def adjust_saturation(r, g, b, factor):
    rest = f32(1.0 - factor)
    for i in range(r.size):
        offset = _luma(r[i], g[i], b[i]) * rest
        r[i] = _level(f32(r[i]) * factor + offset)
        g[i] = _level(f32(g[i]) * factor + offset)
        b[i] = _level(f32(b[i]) * factor + offset)


@njit(**_options)
def adjust_hue(r, g, b, turns):
    """Through HSV in float32. A channel is v - v * s * clamp(min(k, 4 - k)), k = (5, 3, 1) + 6h modulo 6."""
    scale = f32(255.999 / 255)  # torchvision's way from [0, 1] to whole levels
    for i in range(r.size):
        red, green, blue = f32(r[i]), f32(g[i]), f32(b[i])
        value = max(red, max(green, blue))
        chroma = value - min(red, min(green, blue))
        divisor = f32(1) / (chroma if chroma > 0 else f32(1))
        h6 = (green - blue) * divisor
        h6 = f32(2) + (blue - red) * divisor if value == green else h6
        h6 = f32(4) + (red - green) * divisor if (value == blue) & (value != green) else h6
        h6 = (green - blue) * divisor if value == red else h6
        h6 = h6 + f32(6) * turns  # -4 .. 8
        r[i] = _hue_channel(h6 + f32(5), value, chroma, scale)
        g[i] = _hue_channel(h6 + f32(3), value, chroma, scale)
        b[i] = _hue_channel(h6 + f32(1), value, chroma, scale)


@njit(inline="always", **_options)
def _hue_channel(k, value, chroma, scale):
    k = k - f32(6) * f32(np.floor(k * f32(1 / 6)))
    share = min(max(min(k, f32(4) - k), f32(0)), f32(1))
    return np.uint8(np.int32((value - chroma * share) * scale))


@njit(**_options)
def gaussian_blur(planes, sigma):
    """A new array. The window ends at 4 sigma (what lies beyond weighs 6e-5), edges are reflected."""
    height, width = planes.shape[1:]
    radius = min(math.ceil(f32(4) * sigma), height - 1, width - 1)
    weights = _gaussian(sigma, radius)
    out = np.empty_like(planes)
    padded = np.empty(width + 2 * radius, np.float32)
    middle = padded[radius : radius + width]
    row = np.empty(width, np.float32)
    for c in range(3):
        for y in range(height):
            middle[:] = 0
            _add(middle, weights[0], planes[c, y])
            for t in range(1, radius + 1):
                below = y + t if y + t < height else 2 * (height - 1) - y - t
                _add_pair(middle, weights[t], planes[c, abs(y - t)], planes[c, below])
            for t in range(radius):
                padded[radius - 1 - t] = padded[radius + 1 + t]
                padded[radius + width + t] = padded[radius + width - 2 - t]
            row[:] = 0.5
            _add(row, weights[0], middle)
            for t in range(1, radius + 1):
                _add_pair(row, weights[t], padded[radius - t : -radius - t], padded[radius + t :])
            _cut(out[c, y], row)
    return out


@njit(**_options)
def _gaussian(sigma, radius):
    """(radius + 1,) the middle weight and one side's."""
    weights = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    return (weights / (2 * weights.sum() - weights[0])).astype(np.float32)


@njit(**_options)
def _add_pair(total, weight, one, other):
    """A loop in a function of its own vectorises: 0.31 ms a view at sigma 1; written in place, 1.4."""
    for x in range(total.size):
        total[x] += weight * (f32(one[x]) + f32(other[x]))


@njit(**_options)
def _add(total, weight, row):
    for x in range(total.size):
        total[x] += weight * f32(row[x])


@njit(**_options)
def _cut(levels, values):
    for x in range(levels.size):
        levels[x] = np.uint8(np.int32(values[x]))


@njit(**_options)
def solarize(levels):
    for i in range(levels.size):
        levels[i] = levels[i] if levels[i] < 128 else 255 - levels[i]


@extending.intrinsic
def _pointer(context, address):
    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


ROOM_BYTES = 1 << 30
"""Of `dali_kernels.make_room`."""


@cfunc("void(uint64, uint64, int32, uint64, uint64, int32, int32)", cache=True)
def set_room_shape(out_shapes, out_ndims, num_outs, in_shapes, in_ndims, num_ins, num_samples):
    """As `set_output_shapes`, of one sample of ROOM_BYTES."""
    outputs = carray(_pointer(out_shapes), (num_outs, num_samples), np.uint64)
    carray(_pointer(outputs[0, 0]), 1, np.int64)[0] = ROOM_BYTES


@cfunc("void(uint64, uint64, uint64, int32, uint64, uint64, uint64, int32)", cache=True)
def touch_nothing(outs, out_shapes, out_ndims, num_outs, ins, in_shapes, in_ndims, num_ins):
    """Memory that is not written is none."""


@cfunc("void(uint64, uint64, int32, uint64, uint64, int32, int32)", cache=True)
def set_output_shapes(out_shapes, out_ndims, num_outs, in_shapes, in_ndims, num_ins, num_samples):
    """DALI's call for a batch: one byte a sample, since the view goes elsewhere.

    Shapes are addresses of (num_outs, num_samples) addresses of (ndim,) int64.
    """
    outputs = carray(_pointer(out_shapes), (num_outs, num_samples), np.uint64)
    for sample in range(num_samples):
        carray(_pointer(outputs[0, sample]), 1, np.int64)[0] = 1


@cfunc("void(uint64, uint64, uint64, int32, uint64, uint64, uint64, int32)", cache=True)
def view_of_sample(outs, out_shapes, out_ndims, num_outs, ins, in_shapes, in_ndims, num_ins):
    """DALI's call for one sample; data and shapes are addresses of (num_ins,) addresses.

    Inputs: the image, its draws, and (2,) int64, the address of the view (S, S, 3) and S.
    """
    inputs = carray(_pointer(ins), num_ins, np.uint64)
    shapes = carray(_pointer(in_shapes), num_ins, np.uint64)
    shape = carray(_pointer(shapes[0]), 3, np.int64)
    image = carray(_pointer(inputs[0]), (shape[0], shape[1], 3), np.uint8)
    draws = carray(_pointer(inputs[1]), _NUM_DRAWS, np.float32)
    place = carray(_pointer(inputs[2]), 2, np.int64)
    make_view(carray(_pointer(place[0]), (place[1], place[1], 3), np.uint8), image, draws)
    carray(_pointer(carray(_pointer(outs), num_outs, np.uint64)[0]), 1, np.uint8)[0] = 1
