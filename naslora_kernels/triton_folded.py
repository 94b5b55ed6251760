"""The Triton kernel of the folded cell: what is left of a mixed cell after the search.

Tiles are those of ``triton_cell.py``: consecutive pixels of all maps, a lane for each channel.
"""

import triton
import triton.language as tl

from naslora_kernels.triton_cell import _lanes, _load_taps, _locate, _offset, _pool
from naslora_kernels.triton_numbers import rounded


@triton.jit
def folded_cell_kernel(
    z_ptr, kernel_ptr, y_ptr, average, average_rest, maximum, maximum_rest,
    pixels, height, width, stride_b, stride_h, stride_w, stride_c,
    SIZE: tl.constexpr, AVERAGES: tl.constexpr, MAXIMA: tl.constexpr,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """y = K * z + average avg_pool(z) + maximum max_pool(z), for a K of SIZE x SIZE taps.

    A float argument is passed as float32; the rest to it in float64 is passed beside it.
    """
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    shape = (pixels, height, width)
    strides = (stride_b, tl.cast(stride_h, tl.int64), tl.cast(stride_w, tl.int64), stride_c)
    lanes = _lanes(LANES)
    in_lanes = lanes < CHANNELS
    start = tl.program_id(0).to(tl.int64) * PIXELS
    image, y, x, exists = _locate(start, shape, PIXELS)
    z_pixels = z_ptr + _offset(image, y, x, strides)  # (1, PIXELS, 1)

    mixed = tl.zeros((1, PIXELS, LANES), DTYPE)
    for tap in range(SIZE * SIZE):
        dy, dx = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
        in_rows = (y + dy >= 0) & (y + dy < height)
        inside = exists & in_rows & (x + dx >= 0) & (x + dx < width)
        at_tap = z_pixels + (dy * strides[1] + dx * strides[2])
        for i in range(CHANNELS):
            values = tl.load(at_tap + i * stride_c, mask=inside, other=0.0).to(DTYPE)
            weights = kernel_ptr + (lanes * CHANNELS + i) * (SIZE * SIZE) + tap
            mixed += values * tl.load(weights, mask=in_lanes, other=0.0).to(DTYPE)

    mask = exists & in_lanes
    if AVERAGES or MAXIMA:
        z = z_pixels + lanes * stride_c
        near, near_inside = _load_taps(z, y, x, mask, shape, strides, 1, DTYPE)
        averages, maxima = _pool(near, near_inside, y, x, shape, DTYPE)
        if AVERAGES:
            mixed += (tl.cast(average, DTYPE) + tl.cast(average_rest, DTYPE)) * averages
        if MAXIMA:
            mixed += (tl.cast(maximum, DTYPE) + tl.cast(maximum_rest, DTYPE)) * maxima
    to = y_ptr + (start + tl.arange(0, PIXELS)[None, :, None]) * CHANNELS + lanes
    tl.store(to, rounded(mixed, y_ptr.dtype.element_ty), mask=mask)
