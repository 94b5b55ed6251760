"""Triton kernels of the mixed cell, forward and backward, and of the folded cell.

A tile is (TAPS, PIXELS, LANES): consecutive pixels of all maps in row-major order, so that nothing
is wasted whatever the shape of a map; a lane for each channel of S; and in front the 5 x 5 pixels
around, one or two apart, which a thread keeps in its registers. They are read from the cache.

Of the four convolutions, two have taps that lie one apart (3 x 3 and 5 x 5), two have them two
apart, so each pair works on one tile. They stay separable: a depthwise sum of each, then the
pointwise mixing as sums over lanes. That takes 68 + 4c multiplications a pixel and channel, where
the one c x c convolution that they fold to takes 41c. Only dL/dz needs that one, as its pointwise
part comes first.

A program is one warp, so that sums over pixels and lanes are shuffles and need no shared memory.
"""

import triton
import triton.language as tl

from naslora_kernels.triton_numbers import rounded, whole

# ---- Pixels, channels, taps --------------------------------------------------------------------


@triton.jit
def _locate(start, shape, PIXELS: tl.constexpr):
    """Map, row and column of the PIXELS pixels from ``start`` (int64) on, and whether there are
    such pixels; each (1, PIXELS, 1)."""
    pixels, height, width = shape
    area = height * width
    first_map = start // area
    step = tl.arange(0, PIXELS)[None, :, None]
    pixel = (start - first_map * area).to(tl.int32) + step
    return first_map + pixel // area, pixel % area // width, pixel % width, start + step < pixels


@triton.jit
def _offset(image, y, x, strides):
    """Where pixels begin, in elements (int64)."""
    return image * strides[0] + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]


@triton.jit
def _lanes(LANES: tl.constexpr):
    """0..LANES-1; (1, 1, LANES). Not told to be contiguous, so that no thread takes several lanes
    where a parameter could be loaded as a vector: values would have to move between threads."""
    return tl.max_contiguous(tl.arange(0, LANES)[None, None, :], (1, 1, 1))


@triton.jit
def _channel(channels_ptr, i, CHANNELS: tl.constexpr):
    """The i-th channels of S (int64), for a block ``i``; some channel where it is beyond S."""
    i = tl.minimum(i, CHANNELS - 1)
    if channels_ptr is None:
        return i.to(tl.int64)
    else:
        return tl.load(channels_ptr + i)


@triton.jit
def _copy_other_channels(
    from_ptr, stride_c, to_ptr, channels_ptr, rank, mask, CHANNELS: tl.constexpr,
    RANK_LANES: tl.constexpr,
):  # fmt: skip
    """Copies the channels outside S of pixels at (1, PIXELS, 1) pointers."""
    lanes = tl.arange(0, RANK_LANES)[None, None, :]
    mask = mask & (lanes < rank)
    for i in range(CHANNELS):
        mask = mask & (lanes != tl.load(channels_ptr + i))
    values = tl.load(from_ptr + lanes * stride_c, mask=mask, other=0.0)
    tl.store(to_ptr + lanes, values, mask=mask)


@triton.jit
def softmax(alpha_ptr, DTYPE: tl.constexpr):
    """The operations' weights, a tuple of eight scalars."""
    logits = ()
    for i in tl.static_range(8):
        logits = logits + (tl.load(alpha_ptr + i).to(DTYPE),)
    largest = logits[0]
    for i in tl.static_range(1, 8):
        largest = tl.maximum(largest, logits[i])
    total = largest * 0
    exponentials = ()
    for i in tl.static_range(8):
        exponentials = exponentials + (tl.exp(logits[i] - largest),)
        total += exponentials[i]
    weights = ()
    for i in tl.static_range(8):
        weights = weights + (exponentials[i] / total,)
    return weights


@triton.jit
def _taps():
    """Row and column of the 5 x 5 taps, -2..2, padded to 32; (TAPS, 1, 1)."""
    tap = tl.arange(0, 32)[:, None, None]
    return tap // 5 - 2, tap % 5 - 2


@triton.jit
def _within(row, column, REACH: tl.constexpr):
    """Whether a kernel that reaches so far has the tap."""
    return (row >= -REACH) & (row <= REACH) & (column >= -REACH) & (column <= REACH)


@triton.jit
def _load_taps(
    pointers, y, x, mask, shape, strides, DILATION: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The values at all taps around pixels at (1, PIXELS, LANES) pointers, zero outside of the map;
    and whether a tap lies in the map; (TAPS, PIXELS, LANES)."""
    row, column = _taps()
    dy, dx = row * DILATION, column * DILATION
    in_rows = (y + dy >= 0) & (y + dy < shape[1])
    in_columns = (x + dx >= 0) & (x + dx < shape[2])
    inside = mask & _within(row, column, 2) & in_rows & in_columns
    values = tl.load(pointers + (dy * strides[1] + dx * strides[2]), mask=inside, other=0.0)
    return values.to(DTYPE), inside


@triton.jit
def _load_kernels(
    dw_3x3_ptr, dw_5x5_ptr, in_lanes, MIRRORED: tl.constexpr,
    LANES: tl.constexpr, PIXELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The depthwise weights of a pair of convolutions, (TAPS, PIXELS, LANES).

    Every pixel loads them for itself: a broadcast would have to move them between threads.
    """
    row, column = _taps()
    if MIRRORED:
        row, column = -row, -column
    lanes = _lanes(LANES)
    at_3x3 = dw_3x3_ptr + lanes * 9 + ((row + 1) * 3 + column + 1)
    at_5x5 = dw_5x5_ptr + lanes * 25 + ((row + 2) * 5 + column + 2)
    at_3x3 = tl.broadcast_to(at_3x3, (32, PIXELS, LANES))
    at_5x5 = tl.broadcast_to(at_5x5, (32, PIXELS, LANES))
    dw_3x3 = tl.load(at_3x3, mask=in_lanes & _within(row, column, 1), other=0.0)
    dw_5x5 = tl.load(at_5x5, mask=in_lanes & _within(row, column, 2), other=0.0)
    return dw_3x3.to(DTYPE), dw_5x5.to(DTYPE)


@triton.jit
def _convolve(
    values, dw_3x3_ptr, dw_5x5_ptr, in_lanes,
    LANES: tl.constexpr, PIXELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A pair of depthwise convolutions, (1, PIXELS, LANES) each."""
    dw_3x3, dw_5x5 = _load_kernels(dw_3x3_ptr, dw_5x5_ptr, in_lanes, False, LANES, PIXELS, DTYPE)
    row, column = _taps()
    # An infinite value must not meet the zero of a tap that the kernel has not.
    by_3x3 = tl.sum(tl.where(_within(row, column, 1), values * dw_3x3, 0.0), axis=0, keep_dims=True)
    by_5x5 = tl.sum(tl.where(_within(row, column, 2), values * dw_5x5, 0.0), axis=0, keep_dims=True)
    return by_3x3, by_5x5


@triton.jit
def _window_size(y, x, shape):
    """How many pixels the 3 x 3 window around a pixel has: what avg_pool divides by."""
    rows = 1 + (y > 0).to(tl.int32) + (y + 1 < shape[1]).to(tl.int32)
    columns = 1 + (x > 0).to(tl.int32) + (x + 1 < shape[2]).to(tl.int32)
    return rows * columns


@triton.jit
def _pool(values, inside, y, x, shape, DTYPE: tl.constexpr):
    """The averages and the maxima of the 3 x 3 windows, (1, PIXELS, LANES) each."""
    row, column = _taps()
    in_3x3 = _within(row, column, 1)
    total = tl.sum(tl.where(in_3x3, values, 0.0), axis=0, keep_dims=True)
    in_window = inside & in_3x3
    is_nan = values != values
    candidates = tl.where(in_window & ~is_nan, values, float("-inf"))
    maximum = tl.max(candidates, axis=0, keep_dims=True)
    nans = tl.sum((in_window & is_nan).to(tl.int32), axis=0, keep_dims=True)
    average = total / _window_size(y, x, shape).to(DTYPE)
    return average, tl.where(nans > 0, float("nan"), maximum)


# ---- Forward -----------------------------------------------------------------------------------


@triton.jit
def cell_forward_kernel(
    z_ptr, alpha_ptr, dw_sep3_ptr, dw_sep5_ptr, dw_dil3_ptr, dw_dil5_ptr, pw_ptr, channels_ptr,
    y_ptr, pixels, height, width, rank, stride_b, stride_h, stride_w, stride_c,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, RANK_LANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """y = the mixed cell of z on the channels S, and z on the others."""
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    shape = (pixels, height, width)
    strides = (stride_b, tl.cast(stride_h, tl.int64), tl.cast(stride_w, tl.int64), stride_c)
    lanes = _lanes(LANES)
    in_lanes = lanes < CHANNELS
    # Written out, as PyTorch takes a pointer for written to if a store's address comes from a call
    # that had it.
    if channels_ptr is None:
        channels = lanes.to(tl.int64)
    else:
        channels = tl.load(channels_ptr + tl.minimum(lanes, CHANNELS - 1))  # (1, 1, LANES)
    start = tl.program_id(0).to(tl.int64) * PIXELS
    image, y, x, exists = _locate(start, shape, PIXELS)
    mask = exists & in_lanes
    z_pixels = z_ptr + _offset(image, y, x, strides)  # (1, PIXELS, 1)
    z = z_pixels + channels * stride_c  # (1, PIXELS, LANES)
    a = softmax(alpha_ptr, DTYPE)

    near, near_inside = _load_taps(z, y, x, mask, shape, strides, 1, DTYPE)
    average, maximum = _pool(near, near_inside, y, x, shape, DTYPE)
    sep3, sep5 = _convolve(near, dw_sep3_ptr, dw_sep5_ptr, in_lanes, LANES, PIXELS, DTYPE)
    far, _ = _load_taps(z, y, x, mask, shape, strides, 2, DTYPE)
    dil3, dil5 = _convolve(far, dw_dil3_ptr, dw_dil5_ptr, in_lanes, LANES, PIXELS, DTYPE)
    skipped = tl.load(z, mask=mask, other=0.0).to(DTYPE)
    mixed = a[4] * average + a[5] * maximum + a[6] * skipped
    convolved = (a[0] * sep3, a[1] * sep5, a[2] * dil3, a[3] * dil5)
    for o in range(CHANNELS):
        terms = tl.zeros((1, PIXELS, LANES), DTYPE)
        for i in tl.static_range(4):
            row = pw_ptr + (i * CHANNELS + o) * CHANNELS + lanes
            terms += convolved[i] * tl.load(row, mask=in_lanes, other=0.0).to(DTYPE)
        mixed += tl.where(lanes == o, tl.sum(terms, axis=2, keep_dims=True), 0.0)

    y_pixels = y_ptr + (start + tl.arange(0, PIXELS)[None, :, None]) * rank
    tl.store(y_pixels + channels, rounded(mixed, y_ptr.dtype.element_ty), mask=mask)
    if channels_ptr is not None:
        _copy_other_channels(
            z_pixels, stride_c, y_pixels, channels_ptr, rank, exists, CHANNELS, RANK_LANES
        )


# ---- Backward ----------------------------------------------------------------------------------


@triton.jit
def cell_backward_kernel(
    grad_y_ptr, z_ptr, alpha_ptr, dw_sep3_ptr, dw_sep5_ptr, dw_dil3_ptr, dw_dil5_ptr, pw_ptr,
    channels_ptr, grad_z_ptr, partials_ptr, pixels, height, width, rank,
    grad_stride_b, grad_stride_h, grad_stride_w, grad_stride_c,
    stride_b, stride_h, stride_w, stride_c, map_programs,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, RANK_LANES: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dL/dz, by the first ``map_programs`` programs, and partial sums of the parameters' gradients,
    by the others.

    Each group of STEPS * PIXELS pixels has 2 * BLOCKS + 3 programs: for each pair of convolutions
    one for every BLOCK output channels of their pointwise parts, and one for their depthwise parts;
    and one for the poolings and the skip connection. A group's sums lie in ``partials`` as

        dL/dpw / a_i [4, c, c];  dL/ddw / a_i [c, 3, 3], [c, 5, 5], [c, 3, 3], [c, 5, 5];
        dL/da_i of the convolutions, as terms [BLOCKS, 4];  dL/da of average, maximum, skip.
    """
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    PARTS: tl.constexpr = 2 * BLOCKS + 3
    SIZE: tl.constexpr = (4 * CHANNELS + 68) * CHANNELS + 4 * BLOCKS + 3
    shape = (pixels, height, width)
    strides = (stride_b, tl.cast(stride_h, tl.int64), tl.cast(stride_w, tl.int64), stride_c)
    grad_strides = (
        grad_stride_b, tl.cast(grad_stride_h, tl.int64), tl.cast(grad_stride_w, tl.int64),
        grad_stride_c,
    )  # fmt: skip
    program = tl.program_id(0)
    if program < map_programs:
        if grad_z_ptr is not None:
            _gradient_of_maps(
                grad_y_ptr, z_ptr, alpha_ptr, dw_sep3_ptr, dw_sep5_ptr, dw_dil3_ptr, dw_dil5_ptr,
                pw_ptr, channels_ptr, grad_z_ptr, program.to(tl.int64) * PIXELS, shape, rank,
                grad_strides, strides, CHANNELS, LANES, RANK_LANES, PIXELS, DTYPE,
            )  # fmt: skip
    elif partials_ptr is not None:
        group = ((program - map_programs) // PARTS).to(tl.int64)
        part = (program - map_programs) % PARTS
        first = group * (STEPS * PIXELS)
        pw_sums = partials_ptr + group * SIZE
        dw_sums = pw_sums + 4 * CHANNELS * CHANNELS
        a_sums = dw_sums + 68 * CHANNELS
        for pair in tl.static_range(2):
            pw = pw_ptr + 2 * pair * CHANNELS * CHANNELS
            if part // BLOCKS == pair:
                block = part % BLOCKS
                _pointwise_sums(
                    grad_y_ptr, z_ptr, dw_dil3_ptr if pair else dw_sep3_ptr,
                    dw_dil5_ptr if pair else dw_sep5_ptr, pw, channels_ptr,
                    pw_sums + 2 * pair * CHANNELS * CHANNELS, a_sums + 4 * block + 2 * pair,
                    block * BLOCK, first, shape, grad_strides, strides,
                    pair + 1, CHANNELS, LANES, PIXELS, BLOCK, STEPS, DTYPE,
                )  # fmt: skip
            if part == 2 * BLOCKS + pair:
                _depthwise_sums(
                    grad_y_ptr, z_ptr, pw, channels_ptr, dw_sums + 34 * pair * CHANNELS,
                    first, shape, grad_strides, strides,
                    pair + 1, CHANNELS, LANES, PIXELS, BLOCK, STEPS, DTYPE,
                )  # fmt: skip
        if part == PARTS - 1:
            _pooling_sums(
                grad_y_ptr, z_ptr, channels_ptr, a_sums + 4 * BLOCKS,
                first, shape, grad_strides, strides, CHANNELS, LANES, PIXELS, STEPS, DTYPE,
            )  # fmt: skip


@triton.jit
def _gradient_of_maps(
    grad_y_ptr, z_ptr, alpha_ptr, dw_sep3_ptr, dw_sep5_ptr, dw_dil3_ptr, dw_dil5_ptr, pw_ptr,
    channels_ptr, grad_z_ptr, start, shape, rank, grad_strides, strides,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, RANK_LANES: tl.constexpr, PIXELS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """dL/dz of PIXELS pixels, gathered from the pixels that they were spread to."""
    lanes = _lanes(LANES)
    in_lanes = lanes < CHANNELS
    if channels_ptr is None:  # written out, as in the forward
        channels = lanes.to(tl.int64)
    else:
        channels = tl.load(channels_ptr + tl.minimum(lanes, CHANNELS - 1))
    image, y, x, exists = _locate(start, shape, PIXELS)
    mask = exists & in_lanes
    z = z_ptr + _offset(image, y, x, strides) + channels * strides[3]
    grad_pixels = grad_y_ptr + _offset(image, y, x, grad_strides)  # (1, PIXELS, 1)
    grad_y = grad_pixels + channels * grad_strides[3]  # (1, PIXELS, LANES)
    a = softmax(alpha_ptr, DTYPE)
    row, column = _taps()

    # One bit for each of the 5 x 5 pixels around: whether max_pool would take it rather than this
    # one. It takes the first of equals, and the last NaN.
    centre = tl.load(z, mask=mask, other=0.0).to(DTYPE)
    values, inside = _load_taps(z, y, x, mask, shape, strides, 1, DTYPE)
    is_earlier = (row < 0) | ((row == 0) & (column < 0))
    takes_later = (values > centre) | (values != values)
    takes_earlier = ~((centre > values) | (centre != centre))
    takes = tl.where(is_earlier, takes_earlier, takes_later) & ((row != 0) | (column != 0))
    bit = tl.arange(0, 32)[:, None, None]
    beaten = tl.sum(tl.where(inside & takes, 1 << bit, 0), axis=0, keep_dims=True)

    # Of the 3 x 3 windows that this pixel lies in, the gradients of their poolings.
    grads, inside = _load_taps(grad_y, y, x, mask, shape, grad_strides, 1, DTYPE)
    size = _window_size(y + row, x + column, shape).to(DTYPE)
    window = 0b111_00111_00111 << tl.maximum((row + 1) * 5 + column + 1, 0)
    pooled = a[4] * (grads / size) + tl.where((beaten & window) == 0, a[5] * grads, 0.0)
    pooled = tl.where(_within(row, column, 1) & inside, pooled, 0.0)
    grad_z = a[6] * tl.load(grad_y, mask=mask, other=0.0).to(DTYPE)
    grad_z += tl.sum(pooled, axis=0, keep_dims=True)

    # The convolutions, folded: for each output channel a kernel from there to here.
    for pair in tl.static_range(2):
        dw_3x3, dw_5x5 = _load_kernels(
            dw_dil3_ptr if pair else dw_sep3_ptr, dw_dil5_ptr if pair else dw_sep5_ptr, in_lanes,
            True, LANES, PIXELS, DTYPE,
        )  # fmt: skip
        for o in range(CHANNELS):
            pw = pw_ptr + (2 * pair * CHANNELS + o) * CHANNELS + lanes
            pw_3x3 = tl.load(pw, mask=in_lanes, other=0.0).to(DTYPE)
            pw_5x5 = tl.load(pw + CHANNELS * CHANNELS, mask=in_lanes, other=0.0).to(DTYPE)
            kernel = (a[2 * pair] * pw_3x3) * dw_3x3 + (a[2 * pair + 1] * pw_5x5) * dw_5x5
            channel = _channel(channels_ptr, tl.full((1, 1, LANES), o, tl.int32), CHANNELS)
            output = grad_pixels + channel * grad_strides[3]
            grads, _ = _load_taps(output, y, x, mask, shape, grad_strides, pair + 1, DTYPE)
            terms = tl.where(_within(row, column, 2), grads * kernel, 0.0)
            grad_z += tl.sum(terms, axis=0, keep_dims=True)

    grad_z_pixels = grad_z_ptr + (start + tl.arange(0, PIXELS)[None, :, None]) * rank
    tl.store(grad_z_pixels + channels, rounded(grad_z, grad_z_ptr.dtype.element_ty), mask=mask)
    if channels_ptr is not None:
        _copy_other_channels(
            grad_pixels, grad_strides[3], grad_z_pixels, channels_ptr, rank, exists,
            CHANNELS, RANK_LANES,
        )  # fmt: skip


@triton.jit
def _load_outputs(
    grad_pixels, channels_ptr, first_output, stride_c, mask,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK output channels, the same in all lanes; (BLOCK, PIXELS, LANES)."""
    output = first_output + tl.arange(0, BLOCK)[:, None, None] + tl.zeros((1, 1, LANES), tl.int32)
    at = grad_pixels + _channel(channels_ptr, output, CHANNELS) * stride_c
    return tl.load(at, mask=mask & (output < CHANNELS), other=0.0).to(DTYPE)


@triton.jit
def _load_pointwise(
    pw_ptr, first_output, CHANNELS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows of pw for BLOCK output channels, (BLOCK, PIXELS, LANES): every pixel loads its own."""
    output = first_output + tl.arange(0, BLOCK)[:, None, None]
    lanes = _lanes(LANES)
    at = tl.broadcast_to(pw_ptr + output * CHANNELS + lanes, (BLOCK, PIXELS, LANES))
    mask = (output < CHANNELS) & (lanes < CHANNELS)
    return tl.load(at, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _pointwise_sums(
    grad_y_ptr, z_ptr, dw_3x3_ptr, dw_5x5_ptr, pw_ptr, channels_ptr, pw_sums, a_sums, first_output,
    first, shape, grad_strides, strides,
    DILATION: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """<g_o, dw * z> of a pair of convolutions for BLOCK output channels o, and <pw, that>."""
    lanes = _lanes(LANES)
    in_lanes = lanes < CHANNELS
    channels = _channel(channels_ptr, lanes, CHANNELS)
    sums_3x3 = tl.zeros((BLOCK, PIXELS, LANES), DTYPE)
    sums_5x5 = sums_3x3
    for step in tl.range(STEPS, disable_licm=True):
        image, y, x, exists = _locate(first + step * PIXELS, shape, PIXELS)
        mask = exists & in_lanes
        z = z_ptr + _offset(image, y, x, strides) + channels * strides[3]
        values, _ = _load_taps(z, y, x, mask, shape, strides, DILATION, DTYPE)
        by_3x3, by_5x5 = _convolve(values, dw_3x3_ptr, dw_5x5_ptr, in_lanes, LANES, PIXELS, DTYPE)
        grad_pixels = grad_y_ptr + _offset(image, y, x, grad_strides)
        grads = _load_outputs(
            grad_pixels, channels_ptr, first_output, grad_strides[3], mask,
            CHANNELS, LANES, BLOCK, DTYPE,
        )  # fmt: skip
        sums_3x3 += grads * by_3x3
        sums_5x5 += grads * by_5x5

    output = first_output + tl.arange(0, BLOCK)[:, None, None]
    at = output * CHANNELS + lanes
    mask = (output < CHANNELS) & in_lanes
    for i in tl.static_range(2):
        total = tl.sum(sums_5x5 if i else sums_3x3, axis=1, keep_dims=True)  # (BLOCK, 1, LANES)
        at_i = at + i * CHANNELS * CHANNELS
        tl.store(pw_sums + at_i, total, mask=mask)
        weights = tl.load(pw_ptr + at_i, mask=mask, other=0.0).to(DTYPE)
        tl.store(a_sums + i, tl.sum(total * weights))


@triton.jit
def _depthwise_sums(
    grad_y_ptr, z_ptr, pw_ptr, channels_ptr, dw_sums, first, shape, grad_strides, strides,
    DILATION: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """<pw^T g, z at each tap> of a pair of convolutions."""
    row, column = _taps()
    lanes = _lanes(LANES)
    in_lanes = lanes < CHANNELS
    channels = _channel(channels_ptr, lanes, CHANNELS)
    sums_3x3 = tl.zeros((32, PIXELS, LANES), DTYPE)
    sums_5x5 = sums_3x3
    for step in tl.range(STEPS, disable_licm=True):
        image, y, x, exists = _locate(first + step * PIXELS, shape, PIXELS)
        mask = exists & in_lanes
        grad_pixels = grad_y_ptr + _offset(image, y, x, grad_strides)
        grad_3x3 = tl.zeros((1, PIXELS, LANES), DTYPE)
        grad_5x5 = grad_3x3
        for output in range(0, CHANNELS, BLOCK):
            grads = _load_outputs(
                grad_pixels, channels_ptr, output, grad_strides[3], mask,
                CHANNELS, LANES, BLOCK, DTYPE,
            )  # fmt: skip
            pw_3x3 = _load_pointwise(pw_ptr, output, CHANNELS, LANES, PIXELS, BLOCK, DTYPE)
            pw_5x5 = _load_pointwise(
                pw_ptr + CHANNELS * CHANNELS, output, CHANNELS, LANES, PIXELS, BLOCK, DTYPE
            )
            grad_3x3 += tl.sum(grads * pw_3x3, axis=0, keep_dims=True)
            grad_5x5 += tl.sum(grads * pw_5x5, axis=0, keep_dims=True)
        z = z_ptr + _offset(image, y, x, strides) + channels * strides[3]
        values, inside = _load_taps(z, y, x, mask, shape, strides, DILATION, DTYPE)
        # An infinite gradient must not meet the zero that stands outside of the map.
        in_3x3 = inside & _within(row, column, 1)
        sums_3x3 += tl.where(in_3x3, grad_3x3 * values, 0.0)
        sums_5x5 += tl.where(inside, grad_5x5 * values, 0.0)

    to_3x3 = dw_sums + lanes * 9 + ((row + 1) * 3 + column + 1)
    to_5x5 = dw_sums + 9 * CHANNELS + lanes * 25 + ((row + 2) * 5 + column + 2)
    total_3x3 = tl.sum(sums_3x3, axis=1, keep_dims=True)  # (TAPS, 1, LANES)
    total_5x5 = tl.sum(sums_5x5, axis=1, keep_dims=True)
    tl.store(to_3x3, total_3x3, mask=in_lanes & _within(row, column, 1))
    tl.store(to_5x5, total_5x5, mask=in_lanes & _within(row, column, 2))


@triton.jit
def _pooling_sums(
    grad_y_ptr, z_ptr, channels_ptr, sums_ptr, first, shape, grad_strides, strides,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """<g, average>, <g, maximum>, <g, z>."""
    lanes = _lanes(LANES)
    in_lanes = lanes < CHANNELS
    channels = _channel(channels_ptr, lanes, CHANNELS)
    average_sum = tl.zeros((1, PIXELS, LANES), DTYPE)
    maximum_sum, skip_sum = average_sum, average_sum
    for step in tl.range(STEPS, disable_licm=True):
        image, y, x, exists = _locate(first + step * PIXELS, shape, PIXELS)
        mask = exists & in_lanes
        z = z_ptr + _offset(image, y, x, strides) + channels * strides[3]
        grad_y = grad_y_ptr + _offset(image, y, x, grad_strides) + channels * grad_strides[3]
        grad = tl.load(grad_y, mask=mask, other=0.0).to(DTYPE)
        values, inside = _load_taps(z, y, x, mask, shape, strides, 1, DTYPE)
        average, maximum = _pool(values, inside, y, x, shape, DTYPE)
        skipped = tl.load(z, mask=mask, other=0.0).to(DTYPE)
        average_sum += grad * average
        maximum_sum += grad * tl.where(mask, maximum, 0.0)
        skip_sum += grad * skipped
    tl.store(sums_ptr, tl.sum(average_sum))
    tl.store(sums_ptr + 1, tl.sum(maximum_sum))
    tl.store(sums_ptr + 2, tl.sum(skip_sum))


# ---- After the search --------------------------------------------------------------------------


@triton.jit
def folded_cell_kernel(
    z_ptr, kernel_ptr, y_ptr, average, average_rest, maximum, maximum_rest,
    pixels, height, width, stride_b, stride_h, stride_w, stride_c,
    AVERAGE: tl.constexpr, MAXIMUM: tl.constexpr, SIZE: tl.constexpr,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """y = kernel * z, of (CHANNELS, CHANNELS, SIZE, SIZE) weights, plus what pooling is due.

    Here a lane is an output channel, and the input channels come one after the other, 32 of a
    kernel's taps at a time.
    """
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    shape = (pixels, height, width)
    strides = (stride_b, tl.cast(stride_h, tl.int64), tl.cast(stride_w, tl.int64), stride_c)
    lanes = _lanes(LANES)
    in_lanes = lanes < CHANNELS
    start = tl.program_id(0).to(tl.int64) * PIXELS
    image, y, x, exists = _locate(start, shape, PIXELS)
    mask = exists & in_lanes
    z_pixels = z_ptr + _offset(image, y, x, strides)  # (1, PIXELS, 1)

    result = tl.zeros((1, PIXELS, LANES), DTYPE)
    if AVERAGE or MAXIMUM:
        z = z_pixels + lanes.to(tl.int64) * stride_c
        values, inside = _load_taps(z, y, x, mask, shape, strides, 1, DTYPE)
        averages, maxima = _pool(values, inside, y, x, shape, DTYPE)
        if AVERAGE:
            result += whole(average, average_rest, DTYPE) * averages
        if MAXIMUM:
            result += whole(maximum, maximum_rest, DTYPE) * maxima
    for channel in tl.range(CHANNELS, disable_licm=True):
        # Every lane loads it for itself, as in _load_kernels.
        z = z_pixels + tl.full((1, 1, LANES), channel, tl.int64) * stride_c
        for first in tl.range(0, SIZE * SIZE, 32, disable_licm=True):
            tap = first + tl.arange(0, 32)[:, None, None]
            row, column = tap // SIZE, tap % SIZE
            dy, dx = row - SIZE // 2, column - SIZE // 2
            in_rows = (row < SIZE) & (y + dy >= 0) & (y + dy < height)
            in_columns = (x + dx >= 0) & (x + dx < width)
            at = z + (dy * strides[1] + dx * strides[2])
            values = tl.load(at, mask=mask & in_rows & in_columns, other=0.0).to(DTYPE)
            at = (lanes * CHANNELS + channel) * (SIZE * SIZE) + (row * SIZE + column)
            at = tl.broadcast_to(kernel_ptr + at, (32, PIXELS, LANES))
            weights = tl.load(at, mask=in_lanes & (row < SIZE), other=0.0).to(DTYPE)
            terms = tl.where(row < SIZE, values * weights, 0.0)
            result += tl.sum(terms, axis=0, keep_dims=True)

    to = y_ptr + (start + tl.arange(0, PIXELS)[None, :, None]) * CHANNELS + lanes
    tl.store(to, rounded(result, y_ptr.dtype.element_ty), mask=mask)
