"""Triton code of dL/dz: each pixel gathers from the pixels that it contributed to."""

import triton
import triton.language as tl

from naslora_kernels.triton.arithmetic import rounded, softmax
from naslora_kernels.triton.pixels import (
    ALL_TAPS,
    TAPS,
    WINDOW_TAPS,
    channel_numbers,
    copy_other_channels,
    lane_numbers,
    load_kernels,
    load_taps,
    locate,
    pixel_offset,
    tap_positions,
    window_positions,
    window_size,
    within,
    within_rank,
)


@triton.jit
def map_gradient(
    maps,
    channels_ptr,
    start,
    weights,
    grad_z_ptr,
    rank,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    RANK_LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Writes dL/dz of PIXELS pixels from ``start`` on.

    ``maps`` are those of ``parameter_sums.py``; ``weights`` are the pointers of alpha, of the four
    depthwise kernels, and of pw.
    """
    grad_y_ptr, grad_strides, z_ptr, strides, shape = maps
    alpha_ptr, depthwise, pw_ptr = weights
    lanes = lane_numbers(LANES)
    in_lanes = lanes < CHANNELS
    if channels_ptr is None:  # not channel_numbers, for the reason in cell_forward_kernel
        channels = lanes.to(tl.int64)
    else:
        channels = tl.load(channels_ptr + tl.minimum(lanes, CHANNELS - 1))
        channels = within_rank(channels, rank)
    image, y, x, exists = locate(start, shape, PIXELS)
    mask = exists & in_lanes
    z = z_ptr + pixel_offset(image, y, x, strides) + channels * strides[3]
    grad_pixels = grad_y_ptr + pixel_offset(image, y, x, grad_strides)  # (PIXELS, 1, 1)
    grad_y = grad_pixels + channels * grad_strides[3]  # (PIXELS, LANES, 1)
    a = softmax(alpha_ptr, DTYPE)

    beaten = _beaten(z, y, x, mask, shape, strides, LANES, PIXELS, DTYPE)
    grad_z = a[6] * tl.load(grad_y, mask=mask, other=0.0).to(DTYPE)
    grad_z += _pooling_gradient(
        grad_y, y, x, mask, shape, grad_strides, beaten, a, LANES, PIXELS, DTYPE
    )

    # The folded convolution: for each output channel a kernel from there to here.
    for pair in tl.static_range(2):
        for first in tl.range(0, ALL_TAPS, TAPS, loop_unroll_factor=5, disable_licm=True):
            row, column = tap_positions(first, TAPS)
            dw_3x3, dw_5x5 = load_kernels(
                depthwise[2 * pair],
                depthwise[2 * pair + 1],
                in_lanes,
                -row,
                -column,
                LANES,
                PIXELS,
                DTYPE,
            )
            for o in range(CHANNELS):
                pw = pw_ptr + (2 * pair * CHANNELS + o) * CHANNELS + lanes
                pw_3x3 = tl.load(pw, mask=in_lanes, other=0.0).to(DTYPE)
                pw_5x5 = tl.load(pw + CHANNELS * CHANNELS, mask=in_lanes, other=0.0).to(DTYPE)
                kernel = (a[2 * pair] * pw_3x3) * dw_3x3 + (a[2 * pair + 1] * pw_5x5) * dw_5x5
                output = tl.full((1, LANES, 1), o, tl.int32)
                channel = channel_numbers(channels_ptr, output, rank, CHANNELS)
                at = grad_pixels + channel * grad_strides[3]
                grads, _ = load_taps(
                    at, y, x, mask, shape, grad_strides, row, column, pair + 1, DTYPE
                )
                terms = tl.where(within(row, column, 2), grads * kernel, 0.0)
                grad_z += tl.sum(terms, axis=2, keep_dims=True)

    grad_z_pixels = grad_z_ptr + (start + tl.arange(0, PIXELS)[:, None, None]) * rank
    tl.store(grad_z_pixels + channels, rounded(grad_z, grad_z_ptr.dtype.element_ty), mask=mask)
    if channels_ptr is not None:
        stride_c = grad_strides[3]
        copy_other_channels(
            grad_pixels, stride_c, grad_z_pixels, channels_ptr, rank, exists, CHANNELS, RANK_LANES
        )


@triton.jit
def _beaten(
    z,
    y,
    x,
    mask,
    shape,
    strides,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns which of the 5 x 5 pixels around max_pool would take rather than this pixel.

    One bit each, (PIXELS, LANES, 1), in the order of the taps; 12 is this pixel:

         0  1  2  3  4
         5  6  7  8  9
        10 11 12 13 14
        15 16 17 18 19
        20 21 22 23 24

    max_pool takes the largest value of a window. Of equal ones it takes the first. If there are
    NaN, it takes the last NaN.
    """
    centre = tl.load(z, mask=mask, other=0.0).to(DTYPE)
    beaten = tl.zeros((PIXELS, LANES, 1), tl.int32)
    for first in tl.range(0, ALL_TAPS, TAPS, loop_unroll_factor=5, disable_licm=True):
        row, column = tap_positions(first, TAPS)
        values, inside = load_taps(z, y, x, mask, shape, strides, row, column, 1, DTYPE)
        is_earlier = (row < 0) | ((row == 0) & (column < 0))
        takes_later = (values > centre) | (values != values)
        takes_earlier = ~((centre > values) | (centre != centre))
        takes = tl.where(is_earlier, takes_earlier, takes_later) & ((row != 0) | (column != 0))
        bit = first + tl.arange(0, TAPS)[None, None, :]
        beaten += tl.sum(tl.where(inside & takes, 1 << bit, 0), axis=2, keep_dims=True)
    return beaten


@triton.jit
def _pooling_gradient(
    grad_y,
    y,
    x,
    mask,
    shape,
    grad_strides,
    beaten,
    a,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns what this pixel gets from the poolings of the 3 x 3 windows that it lies in."""
    result = tl.zeros((PIXELS, LANES, 1), DTYPE)
    for first in tl.range(0, WINDOW_TAPS, TAPS, loop_unroll_factor=3, disable_licm=True):
        row, column = window_positions(first)
        in_window = mask & (row <= 1)
        grads, inside = load_taps(
            grad_y, y, x, in_window, shape, grad_strides, row, column, 1, DTYPE
        )
        size = window_size(y + row, x + column, shape).to(DTYPE)
        # The bits 0, 1, 2, 5, 6, 7, 10, 11, 12 are the window whose first pixel is bit 0. The
        # window around a tap begins one row above and one column to the left of the tap.
        window = 0b111_00111_00111 << tl.maximum((row + 1) * 5 + column + 1, 0)
        pooled = a[4] * (grads / size) + tl.where((beaten & window) == 0, a[5] * grads, 0.0)
        pooled = tl.where(inside, pooled, 0.0)
        result += tl.sum(pooled, axis=2, keep_dims=True)
    return result
