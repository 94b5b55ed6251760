"""Triton code of the partial sums of a cell's gradients: three kinds of programs for each group.

A group is steps tiles of PIXELS pixels from ``first`` on. ``maps`` are grad_y and its strides, z
and its strides, and the shape (pixels, height, width). The sums have the dtype of the partial sums.
``partial_sums.py`` states where they lie.
"""

import triton
import triton.language as tl

from naslora_kernels.triton.arithmetic import INTERPRETED
from naslora_kernels.triton.pixels import (
    channel_numbers,
    convolve,
    lane_numbers,
    load_taps,
    locate,
    pixel_offset,
    pool,
    tap_positions,
    within,
)

# Taps whose sums a program holds at once. All of them would take too many registers.
SUMMED = tl.constexpr(16 if INTERPRETED else 8)


@triton.jit
def pointwise_sums(
    maps,
    channels_ptr,
    rank,
    first,
    dw_3x3_ptr,
    dw_5x5_ptr,
    pw_ptr,
    pw_sums,
    a_sums,
    first_output,
    DILATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
    steps,
):
    """Writes <g_o, dw * z> of a pair of convolutions for BLOCK output channels o, and <pw, that>.

    ``pw_ptr`` and ``pw_sums`` point to the first convolution of the pair.
    """
    DTYPE: tl.constexpr = pw_sums.dtype.element_ty
    grad_y_ptr, grad_strides, z_ptr, strides, shape = maps
    lanes = lane_numbers(LANES)
    in_lanes = lanes < CHANNELS
    channels = channel_numbers(channels_ptr, lanes, rank, CHANNELS)
    sums_3x3 = tl.zeros((PIXELS, LANES, BLOCK), DTYPE)
    sums_5x5 = sums_3x3
    for step in tl.range(steps, disable_licm=True):
        image, y, x, exists = locate(first + step * PIXELS, shape, PIXELS)
        mask = exists & in_lanes
        at = z_ptr + pixel_offset(image, y, x, strides) + channels * strides[3]
        by_3x3, by_5x5 = convolve(
            at,
            y,
            x,
            mask,
            shape,
            strides,
            dw_3x3_ptr,
            dw_5x5_ptr,
            in_lanes,
            DILATION,
            LANES,
            PIXELS,
            DTYPE,
        )
        pixels = grad_y_ptr + pixel_offset(image, y, x, grad_strides)
        grads = _load_outputs(
            pixels,
            channels_ptr,
            rank,
            first_output,
            grad_strides[3],
            mask,
            CHANNELS,
            LANES,
            BLOCK,
            DTYPE,
        )
        sums_3x3 += grads * by_3x3
        sums_5x5 += grads * by_5x5

    output = first_output + tl.arange(0, BLOCK)[None, None, :]
    at = output * CHANNELS + lanes
    mask = (output < CHANNELS) & in_lanes
    for i in tl.static_range(2):
        total = tl.sum(sums_5x5 if i else sums_3x3, axis=0, keep_dims=True)  # (1, LANES, BLOCK)
        at_i = at + i * CHANNELS * CHANNELS
        tl.store(pw_sums + at_i, total, mask=mask)
        weights = tl.load(pw_ptr + at_i, mask=mask, other=0.0).to(DTYPE)
        tl.store(a_sums + i, tl.sum(total * weights))


@triton.jit
def depthwise_sums(
    maps,
    channels_ptr,
    rank,
    first,
    pw_ptr,
    sums_3x3_ptr,
    sums_5x5_ptr,
    DILATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
    steps,
):
    """Writes <pw^T g, z at each tap> of a pair of convolutions."""
    DTYPE: tl.constexpr = sums_3x3_ptr.dtype.element_ty
    grad_y_ptr, grad_strides, z_ptr, strides, shape = maps
    lanes = lane_numbers(LANES)
    in_lanes = lanes < CHANNELS
    channels = channel_numbers(channels_ptr, lanes, rank, CHANNELS)
    for first_tap in tl.range(0, 32, SUMMED, disable_licm=True):
        row, column = tap_positions(first_tap, SUMMED)
        sums_3x3 = tl.zeros((PIXELS, LANES, SUMMED), DTYPE)
        sums_5x5 = sums_3x3
        for step in tl.range(steps, disable_licm=True):
            image, y, x, exists = locate(first + step * PIXELS, shape, PIXELS)
            mask = exists & in_lanes
            pixels = grad_y_ptr + pixel_offset(image, y, x, grad_strides)
            grad_3x3, grad_5x5 = _load_depthwise_gradients(
                pixels,
                channels_ptr,
                rank,
                grad_strides[3],
                mask,
                pw_ptr,
                CHANNELS,
                LANES,
                PIXELS,
                BLOCK,
                DTYPE,
            )
            at = z_ptr + pixel_offset(image, y, x, strides) + channels * strides[3]
            values, inside = load_taps(at, y, x, mask, shape, strides, row, column, DILATION, DTYPE)
            # An infinite gradient times a zero outside of the map would be NaN.
            in_3x3 = inside & within(row, column, 1)
            sums_3x3 += tl.where(in_3x3, grad_3x3 * values, 0.0)
            sums_5x5 += tl.where(inside, grad_5x5 * values, 0.0)

        to_3x3 = sums_3x3_ptr + lanes * 9 + ((row + 1) * 3 + column + 1)
        to_5x5 = sums_5x5_ptr + lanes * 25 + ((row + 2) * 5 + column + 2)
        total_3x3 = tl.sum(sums_3x3, axis=0, keep_dims=True)  # (1, LANES, SUMMED)
        total_5x5 = tl.sum(sums_5x5, axis=0, keep_dims=True)
        tl.store(to_3x3, total_3x3, mask=in_lanes & within(row, column, 1))
        tl.store(to_5x5, total_5x5, mask=in_lanes & within(row, column, 2))


@triton.jit
def pooling_sums(
    maps,
    channels_ptr,
    rank,
    first,
    sums_ptr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    steps,
):
    """Writes <g, average>, <g, maximum>, <g, z>."""
    DTYPE: tl.constexpr = sums_ptr.dtype.element_ty
    grad_y_ptr, grad_strides, z_ptr, strides, shape = maps
    lanes = lane_numbers(LANES)
    in_lanes = lanes < CHANNELS
    channels = channel_numbers(channels_ptr, lanes, rank, CHANNELS)
    average_sum = tl.zeros((PIXELS, LANES, 1), DTYPE)
    maximum_sum, skip_sum = average_sum, average_sum
    for step in tl.range(steps, disable_licm=True):
        image, y, x, exists = locate(first + step * PIXELS, shape, PIXELS)
        mask = exists & in_lanes
        at = z_ptr + pixel_offset(image, y, x, strides) + channels * strides[3]
        grad_at = grad_y_ptr + pixel_offset(image, y, x, grad_strides) + channels * grad_strides[3]
        grad = tl.load(grad_at, mask=mask, other=0.0).to(DTYPE)
        average, maximum = pool(at, y, x, mask, shape, strides, LANES, PIXELS, DTYPE)
        skipped = tl.load(at, mask=mask, other=0.0).to(DTYPE)
        average_sum += grad * average
        maximum_sum += grad * tl.where(mask, maximum, 0.0)
        skip_sum += grad * skipped
    tl.store(sums_ptr, tl.sum(average_sum))
    tl.store(sums_ptr + 1, tl.sum(maximum_sum))
    tl.store(sums_ptr + 2, tl.sum(skip_sum))


@triton.jit
def _load_depthwise_gradients(
    grad_pixels,
    channels_ptr,
    rank,
    stride_c,
    mask,
    pw_ptr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns pw^T g of a pair of convolutions, (PIXELS, LANES, 1) each."""
    grad_3x3 = tl.zeros((PIXELS, LANES, 1), DTYPE)
    grad_5x5 = grad_3x3
    for o in range(0, CHANNELS, BLOCK):
        grads = _load_outputs(
            grad_pixels, channels_ptr, rank, o, stride_c, mask, CHANNELS, LANES, BLOCK, DTYPE
        )
        pw_3x3 = _load_pointwise(pw_ptr, o, CHANNELS, LANES, PIXELS, BLOCK, DTYPE)
        pw_5x5_ptr = pw_ptr + CHANNELS * CHANNELS
        pw_5x5 = _load_pointwise(pw_5x5_ptr, o, CHANNELS, LANES, PIXELS, BLOCK, DTYPE)
        grad_3x3 += tl.sum(grads * pw_3x3, axis=2, keep_dims=True)
        grad_5x5 += tl.sum(grads * pw_5x5, axis=2, keep_dims=True)
    return grad_3x3, grad_5x5


@triton.jit
def _load_outputs(
    grad_pixels,
    channels_ptr,
    rank,
    first_output,
    stride_c,
    mask,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Loads the gradients of BLOCK output channels, the same in all lanes.

    (PIXELS, LANES, BLOCK)
    """
    output = first_output + tl.arange(0, BLOCK)[None, None, :] + tl.zeros((1, LANES, 1), tl.int32)
    at = grad_pixels + channel_numbers(channels_ptr, output, rank, CHANNELS) * stride_c
    return tl.load(at, mask=mask & (output < CHANNELS), other=0.0).to(DTYPE)


@triton.jit
def _load_pointwise(
    pw_ptr,
    first_output,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Loads rows of pw for BLOCK output channels; every pixel loads its own.

    (PIXELS, LANES, BLOCK)
    """
    output = first_output + tl.arange(0, BLOCK)[None, None, :]
    lanes = lane_numbers(LANES)
    at = tl.broadcast_to(pw_ptr + output * CHANNELS + lanes, (PIXELS, LANES, BLOCK))
    mask = (output < CHANNELS) & (lanes < CHANNELS)
    return tl.load(at, mask=mask, other=0.0).to(DTYPE)
