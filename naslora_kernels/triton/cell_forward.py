"""Triton kernel of the mixed cell's forward. ``pixels.py`` describes its tiles."""

import triton
import triton.language as tl

from naslora_kernels.triton.arithmetic import rounded, softmax
from naslora_kernels.triton.pixels import (
    convolve,
    copy_other_channels,
    lane_numbers,
    locate,
    pixel_offset,
    pool,
    within_rank,
)


@triton.jit(do_not_specialize=["pixels"])  # a last batch of another size compiles nothing
def cell_forward_kernel(
    z_ptr,
    alpha_ptr,
    dw_sep3_ptr,
    dw_sep5_ptr,
    dw_dil3_ptr,
    dw_dil5_ptr,
    pw_ptr,
    channels_ptr,
    y_ptr,
    pixels,
    height,
    width,
    rank,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    RANK_LANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """y = the mixed cell of z on the channels S, and z on the others (Eq. 3).

    Over 60 lines because Triton and torch.compile take the arguments one by one.
    """
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    shape = (pixels, height, width)
    strides = (stride_b, tl.cast(stride_h, tl.int64), tl.cast(stride_w, tl.int64), stride_c)
    lanes = lane_numbers(LANES)
    in_lanes = lanes < CHANNELS
    # channel_numbers is not called: torch.compile would take channels_ptr for written to, because
    # the address of a store would come from a call that has it.
    if channels_ptr is None:
        channels = lanes.to(tl.int64)
    else:
        channels = tl.load(channels_ptr + tl.minimum(lanes, CHANNELS - 1))  # (1, LANES, 1)
        channels = within_rank(channels, rank)
    start = tl.program_id(0).to(tl.int64) * PIXELS
    image, y, x, exists = locate(start, shape, PIXELS)
    mask = exists & in_lanes
    z_pixels = z_ptr + pixel_offset(image, y, x, strides)  # (PIXELS, 1, 1)
    z = z_pixels + channels * stride_c  # (PIXELS, LANES, 1)
    a = softmax(alpha_ptr, DTYPE)

    average, maximum = pool(z, y, x, mask, shape, strides, LANES, PIXELS, DTYPE)
    sep3, sep5 = convolve(
        z, y, x, mask, shape, strides, dw_sep3_ptr, dw_sep5_ptr, in_lanes, 1, LANES, PIXELS, DTYPE
    )
    dil3, dil5 = convolve(
        z, y, x, mask, shape, strides, dw_dil3_ptr, dw_dil5_ptr, in_lanes, 2, LANES, PIXELS, DTYPE
    )
    skipped = tl.load(z, mask=mask, other=0.0).to(DTYPE)
    mixed = a[4] * average + a[5] * maximum + a[6] * skipped
    convolved = (a[0] * sep3, a[1] * sep5, a[2] * dil3, a[3] * dil5)
    for o in range(CHANNELS):
        terms = tl.zeros((PIXELS, LANES, 1), DTYPE)
        for i in tl.static_range(4):
            row = pw_ptr + (i * CHANNELS + o) * CHANNELS + lanes
            terms += convolved[i] * tl.load(row, mask=in_lanes, other=0.0).to(DTYPE)
        mixed += tl.where(lanes == o, tl.sum(terms, axis=1, keep_dims=True), 0.0)

    y_pixels = y_ptr + (start + tl.arange(0, PIXELS)[:, None, None]) * rank
    tl.store(y_pixels + channels, rounded(mixed, y_ptr.dtype.element_ty), mask=mask)
    if channels_ptr is not None:
        copy_other_channels(
            z_pixels, stride_c, y_pixels, channels_ptr, rank, exists, CHANNELS, RANK_LANES
        )
