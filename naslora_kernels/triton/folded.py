"""Triton kernel of the folded cell, for inference after the search."""

# Not named folded_cell.py: importing it would replace the function of that name in the package.

import triton
import triton.language as tl

from naslora_kernels.triton.arithmetic import rounded, whole
from naslora_kernels.triton.pixels import lane_numbers, locate, pixel_offset, pool


@triton.jit(do_not_specialize=["pixels"])  # a last batch of another size compiles nothing
def folded_cell_kernel(
    z_ptr,
    kernel_ptr,
    y_ptr,
    average,
    average_rest,
    maximum,
    maximum_rest,
    pixels,
    height,
    width,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    AVERAGE: tl.constexpr,
    MAXIMUM: tl.constexpr,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """y = kernel * z plus the poolings whose flags AVERAGE and MAXIMUM are set.

    kernel is (CHANNELS, CHANNELS, SIZE, SIZE). A lane is an output channel. A program goes through
    the input channels one by one, and through 32 taps of a kernel at a time.

    Over 60 lines because Triton and torch.compile take the arguments one by one.
    """
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    shape = (pixels, height, width)
    strides = (stride_b, tl.cast(stride_h, tl.int64), tl.cast(stride_w, tl.int64), stride_c)
    lanes = lane_numbers(LANES)
    in_lanes = lanes < CHANNELS
    start = tl.program_id(0).to(tl.int64) * PIXELS
    image, y, x, exists = locate(start, shape, PIXELS)
    mask = exists & in_lanes
    z_pixels = z_ptr + pixel_offset(image, y, x, strides)  # (PIXELS, 1, 1)

    result = tl.zeros((PIXELS, LANES, 1), DTYPE)
    if AVERAGE or MAXIMUM:
        z = z_pixels + lanes.to(tl.int64) * stride_c
        averages, maxima = pool(z, y, x, mask, shape, strides, LANES, PIXELS, DTYPE)
        if AVERAGE:
            result += whole(average, average_rest, DTYPE) * averages
        if MAXIMUM:
            result += whole(maximum, maximum_rest, DTYPE) * maxima
    for channel in tl.range(CHANNELS, disable_licm=True):
        # Every lane loads the values for itself, for the reason in load_kernels.
        z = z_pixels + tl.full((1, LANES, 1), channel, tl.int64) * stride_c
        for first in tl.range(0, SIZE * SIZE, 32, disable_licm=True):
            tap = first + tl.arange(0, 32)[None, None, :]
            row, column = tap // SIZE, tap % SIZE
            dy, dx = row - SIZE // 2, column - SIZE // 2
            in_rows = (row < SIZE) & (y + dy >= 0) & (y + dy < height)
            in_columns = (x + dx >= 0) & (x + dx < width)
            at = z + (dy * strides[1] + dx * strides[2])
            values = tl.load(at, mask=mask & in_rows & in_columns, other=0.0).to(DTYPE)
            at = (lanes * CHANNELS + channel) * (SIZE * SIZE) + (row * SIZE + column)
            at = tl.broadcast_to(kernel_ptr + at, (PIXELS, LANES, 32))
            weights = tl.load(at, mask=in_lanes & (row < SIZE), other=0.0).to(DTYPE)
            terms = tl.where(row < SIZE, values * weights, 0.0)
            result += tl.sum(terms, axis=2, keep_dims=True)

    to = y_ptr + (start + tl.arange(0, PIXELS)[:, None, None]) * CHANNELS + lanes
    tl.store(to, rounded(result, y_ptr.dtype.element_ty), mask=mask)
