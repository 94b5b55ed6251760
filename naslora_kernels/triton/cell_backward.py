"""Triton kernel of the mixed cell's backward. ``pixels.py`` describes its tiles."""

import triton
import triton.language as tl

from naslora_kernels.triton.map_gradient import map_gradient
from naslora_kernels.triton.parameter_sums import depthwise_sums, pointwise_sums, pooling_sums


# A last batch of another size compiles nothing.
@triton.jit(do_not_specialize=["pixels", "map_programs", "steps"])
def cell_backward_kernel(
    grad_y_ptr,
    z_ptr,
    alpha_ptr,
    dw_sep3_ptr,
    dw_sep5_ptr,
    dw_dil3_ptr,
    dw_dil5_ptr,
    pw_ptr,
    channels_ptr,
    grad_z_ptr,
    partials_ptr,
    pixels,
    height,
    width,
    rank,
    grad_stride_b,
    grad_stride_h,
    grad_stride_w,
    grad_stride_c,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    map_programs,
    steps,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    RANK_LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    PW: tl.constexpr,
    DW_SEP3: tl.constexpr,
    DW_SEP5: tl.constexpr,
    DW_DIL3: tl.constexpr,
    DW_DIL5: tl.constexpr,
    A_CONVOLUTIONS: tl.constexpr,
    A_OTHERS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Writes dL/dz and partial sums of the parameters' gradients.

    The first ``map_programs`` programs write dL/dz. The others write partial sums. Each group of
    steps * PIXELS pixels has PARTS = 2 * BLOCKS + 3 programs:

        BLOCKS for the pointwise parts of the first pair, BLOCK output channels each
        BLOCKS for those of the second pair
        two for the depthwise parts, one for each pair
        one for the poolings and the skip connection

    PW, ..., SIZE are the layout of a group's sums: ``partial_sums.py``.

    Over 60 lines because Triton and torch.compile take the arguments one by one.
    """
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    shape = (pixels, height, width)
    strides = (stride_b, tl.cast(stride_h, tl.int64), tl.cast(stride_w, tl.int64), stride_c)
    grad_row, grad_column = tl.cast(grad_stride_h, tl.int64), tl.cast(grad_stride_w, tl.int64)
    grad_strides = (grad_stride_b, grad_row, grad_column, grad_stride_c)
    maps = (grad_y_ptr, grad_strides, z_ptr, strides, shape)
    depthwise = (dw_sep3_ptr, dw_sep5_ptr, dw_dil3_ptr, dw_dil5_ptr)
    program = tl.program_id(0)
    if program < map_programs:
        if grad_z_ptr is not None:
            start = program.to(tl.int64) * PIXELS
            weights = (alpha_ptr, depthwise, pw_ptr)
            map_gradient(
                maps,
                channels_ptr,
                start,
                weights,
                grad_z_ptr,
                rank,
                CHANNELS,
                LANES,
                RANK_LANES,
                PIXELS,
                DTYPE,
            )
    elif partials_ptr is not None:
        group = ((program - map_programs) // PARTS).to(tl.int64)
        part = (program - map_programs) % PARTS
        first = group * (steps * PIXELS)
        sums = partials_ptr + group * SIZE
        for pair in tl.static_range(2):
            pw = 2 * pair * CHANNELS * CHANNELS
            if part // BLOCKS == pair:
                block = part % BLOCKS
                pointwise_sums(
                    maps,
                    channels_ptr,
                    rank,
                    first,
                    depthwise[2 * pair],
                    depthwise[2 * pair + 1],
                    pw_ptr + pw,
                    sums + PW + pw,
                    sums + A_CONVOLUTIONS + 4 * block + 2 * pair,
                    block * BLOCK,
                    pair + 1,
                    CHANNELS,
                    LANES,
                    PIXELS,
                    BLOCK,
                    steps,
                )
            if part == 2 * BLOCKS + pair:
                sums_3x3 = sums + (DW_DIL3 if pair else DW_SEP3)
                sums_5x5 = sums + (DW_DIL5 if pair else DW_SEP5)
                depthwise_sums(
                    maps,
                    channels_ptr,
                    rank,
                    first,
                    pw_ptr + pw,
                    sums_3x3,
                    sums_5x5,
                    pair + 1,
                    CHANNELS,
                    LANES,
                    PIXELS,
                    BLOCK,
                    steps,
                )
        if part == PARTS - 1:
            others = sums + A_OTHERS
            pooling_sums(maps, channels_ptr, rank, first, others, CHANNELS, LANES, PIXELS, steps)
