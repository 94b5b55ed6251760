"""Triton kernels of the mixed cell, forward and backward.

A tile is (PIXELS, LANES): consecutive pixels of all maps in row-major order, so that nothing is
wasted whatever the shape of a map, and a lane for each channel of S. The taps of the convolutions
are read from the cache, with masks.

The convolutions stay separable: a depthwise sum of each in registers, then the pointwise mixing as
sums over lanes. That takes 68 + 4c multiplications a pixel and channel, the one c x c convolution
that they fold to takes 41c. Only dL/dz needs that one, as its pointwise part comes first.

A program is one warp, so that sums over pixels and lanes are shuffles and need no shared memory.
"""

import triton
import triton.language as tl

from naslora_kernels.triton_numbers import rounded

# The convolutions, in the order of alpha.
SIZES = tl.constexpr((3, 5, 3, 5))
DILATIONS = tl.constexpr((1, 1, 2, 2))
REACHES = tl.constexpr((1, 2, 2, 4))  # how far the outermost tap lies
TAPS_BEFORE = tl.constexpr((0, 9, 34, 43))  # of the convolutions before

# ---- Pixels, channels, weights -----------------------------------------------------------------


@triton.jit
def _locate(start, shape, PIXELS: tl.constexpr):
    """Map, row and column of the PIXELS pixels from ``start`` (int64) on, and whether there are
    such pixels; each (PIXELS, 1)."""
    pixels, height, width = shape
    area = height * width
    first_map = start // area
    pixel = (start - first_map * area).to(tl.int32) + tl.arange(0, PIXELS)[:, None]
    exists = start + tl.arange(0, PIXELS)[:, None] < pixels
    return first_map + pixel // area, pixel % area // width, pixel % width, exists


@triton.jit
def _offset(image, y, x, strides):
    """Where pixels begin, in elements (int64)."""
    return image * strides[0] + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]


@triton.jit
def _around(position, size):
    """Whether the positions 4 before to 4 after lie in 0..size-1; a tuple."""
    inside = ()
    for step in tl.static_range(-4, 5):
        inside = inside + ((position + step >= 0) & (position + step < size),)
    return inside


@triton.jit
def _window_size(y, x, height, width):
    """How many pixels the 3 x 3 window around a pixel has: what avg_pool divides by."""
    rows = 1 + (y > 0).to(tl.int32) + (y + 1 < height).to(tl.int32)
    columns = 1 + (x > 0).to(tl.int32) + (x + 1 < width).to(tl.int32)
    return rows * columns


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
    """Copies the channels outside S of pixels at (PIXELS, 1) pointers."""
    lanes = tl.arange(0, RANK_LANES)[None, :]
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
def _tap(DY: tl.constexpr, DX: tl.constexpr, I: tl.constexpr):
    """Which tap of the I-th convolution lies (DY, DX) away."""
    return ((DY + REACHES[I]) * SIZES[I] + DX + REACHES[I]) // DILATIONS[I]


@triton.jit
def _convolve(
    z, rows, columns, mask, strides, dw_ptr, lanes, in_lanes, I: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The I-th depthwise convolution at (PIXELS, LANES) pointers z."""
    REACH: tl.constexpr = REACHES[I]
    DILATION: tl.constexpr = DILATIONS[I]
    total = tl.zeros(z.shape, DTYPE)
    for DY in tl.static_range(-REACH, REACH + 1, DILATION):
        for DX in tl.static_range(-REACH, REACH + 1, DILATION):
            inside = mask & rows[DY + 4] & columns[DX + 4]
            value = tl.load(z + (DY * strides[1] + DX * strides[2]), mask=inside, other=0.0)
            dw = dw_ptr + lanes * (SIZES[I] * SIZES[I]) + _tap(DY, DX, I)
            weight = tl.load(dw, mask=in_lanes, other=0.0)
            total += value.to(DTYPE) * weight.to(DTYPE)
    return total


@triton.jit
def _pool(z, y, x, rows, columns, mask, shape, strides, DTYPE: tl.constexpr):
    """The averages and the maxima of the 3 x 3 windows, at (PIXELS, LANES) pointers z."""
    total = tl.zeros(z.shape, DTYPE)
    maximum = tl.full(z.shape, float("-inf"), DTYPE)
    for DY in tl.static_range(-1, 2):
        for DX in tl.static_range(-1, 2):
            inside = mask & rows[DY + 4] & columns[DX + 4]
            value = tl.load(z + (DY * strides[1] + DX * strides[2]), mask=inside, other=0.0)
            value = value.to(DTYPE)
            total += value
            # The first of equals stays, NaN is taken: as in PyTorch.
            maximum = tl.where(inside & ((value > maximum) | (value != value)), value, maximum)
    return total / _window_size(y, x, shape[1], shape[2]).to(DTYPE), maximum


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
    depthwise = (dw_sep3_ptr, dw_sep5_ptr, dw_dil3_ptr, dw_dil5_ptr)
    lanes = tl.arange(0, LANES)[None, :]
    in_lanes = lanes < CHANNELS
    channels = _channel(channels_ptr, lanes, CHANNELS)  # (1, LANES)

    start = tl.program_id(0).to(tl.int64) * PIXELS
    image, y, x, exists = _locate(start, shape, PIXELS)
    rows, columns = _around(y, height), _around(x, width)
    mask = exists & in_lanes
    z_pixels = z_ptr + _offset(image, y, x, strides)  # (PIXELS, 1)
    z = z_pixels + channels * stride_c  # (PIXELS, LANES)

    a = softmax(alpha_ptr, DTYPE)
    average, maximum = _pool(z, y, x, rows, columns, mask, shape, strides, DTYPE)
    skipped = tl.load(z, mask=mask, other=0.0).to(DTYPE)
    mixed = a[4] * average + a[5] * maximum + a[6] * skipped
    convolved = ()
    for i in tl.static_range(4):
        convolution = _convolve(
            z, rows, columns, mask, strides, depthwise[i], lanes, in_lanes, i, DTYPE
        )
        convolved = convolved + (convolution * a[i],)
    for o in range(CHANNELS):
        terms = tl.zeros((PIXELS, LANES), DTYPE)
        for i in tl.static_range(4):
            row = pw_ptr + (i * CHANNELS + o) * CHANNELS + lanes
            terms += convolved[i] * tl.load(row, mask=in_lanes, other=0.0).to(DTYPE)
        mixed += tl.where(lanes == o, tl.sum(terms, axis=1)[:, None], 0.0)

    y_pixels = y_ptr + (start + tl.arange(0, PIXELS)[:, None]) * rank
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

    Each group of STEPS * PIXELS pixels has 4 * BLOCKS + 5 programs: for every convolution one for
    each BLOCK output channels of its pointwise part and one for its depthwise part; and one for the
    poolings and the skip connection. A group's sums lie in ``partials`` as

        dL/dpw / a_i [4, c, c];  dL/ddw / a_i [c, 3, 3], [c, 5, 5], [c, 3, 3], [c, 5, 5];
        dL/da_i of the convolutions, as terms [4, BLOCKS];  dL/da of average, maximum, skip.
    """
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    shape = (pixels, height, width)
    strides = (stride_b, tl.cast(stride_h, tl.int64), tl.cast(stride_w, tl.int64), stride_c)
    grad_strides = (
        grad_stride_b, tl.cast(grad_stride_h, tl.int64), tl.cast(grad_stride_w, tl.int64),
        grad_stride_c,
    )  # fmt: skip
    depthwise = (dw_sep3_ptr, dw_sep5_ptr, dw_dil3_ptr, dw_dil5_ptr)
    program = tl.program_id(0)
    if program < map_programs:
        if grad_z_ptr is not None:
            _gradient_of_maps(
                grad_y_ptr, z_ptr, alpha_ptr, depthwise, pw_ptr, channels_ptr, grad_z_ptr,
                program.to(tl.int64) * PIXELS, shape, rank, grad_strides, strides,
                CHANNELS, LANES, RANK_LANES, PIXELS, BLOCK, DTYPE,
            )  # fmt: skip
    elif partials_ptr is not None:
        BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
        PARTS: tl.constexpr = 4 * BLOCKS + 5
        group = ((program - map_programs) // PARTS).to(tl.int64)
        part = (program - map_programs) % PARTS
        first = group * (STEPS * PIXELS)
        pw_sums = partials_ptr + group * ((4 * CHANNELS + 68) * CHANNELS + 4 * BLOCKS + 3)
        dw_sums = pw_sums + 4 * CHANNELS * CHANNELS
        a_sums = dw_sums + 68 * CHANNELS
        for i in tl.static_range(4):
            pw = pw_ptr + i * CHANNELS * CHANNELS
            if part // BLOCKS == i:
                _pointwise_sums(
                    grad_y_ptr, z_ptr, depthwise[i], pw, channels_ptr,
                    pw_sums + i * CHANNELS * CHANNELS, a_sums + part, part % BLOCKS * BLOCK,
                    first, shape, grad_strides, strides,
                    i, CHANNELS, LANES, PIXELS, BLOCK, STEPS, DTYPE,
                )  # fmt: skip
            if part == 4 * BLOCKS + i:
                _depthwise_sums(
                    grad_y_ptr, z_ptr, pw, channels_ptr, dw_sums + TAPS_BEFORE[i] * CHANNELS,
                    first, shape, grad_strides, strides,
                    i, CHANNELS, LANES, PIXELS, STEPS, DTYPE,
                )  # fmt: skip
        if part == PARTS - 1:
            _pooling_sums(
                grad_y_ptr, z_ptr, channels_ptr, a_sums + 4 * BLOCKS,
                first, shape, grad_strides, strides, CHANNELS, LANES, PIXELS, STEPS, DTYPE,
            )  # fmt: skip


@triton.jit
def _gradient_of_maps(
    grad_y_ptr, z_ptr, alpha_ptr, depthwise, pw_ptr, channels_ptr, grad_z_ptr, start, shape, rank,
    grad_strides, strides,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, RANK_LANES: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dL/dz of PIXELS pixels, gathered from the pixels that they were spread to."""
    lanes = tl.arange(0, LANES)[None, :]
    in_lanes = lanes < CHANNELS
    channels = _channel(channels_ptr, lanes, CHANNELS)
    image, y, x, exists = _locate(start, shape, PIXELS)
    rows, columns = _around(y, shape[1]), _around(x, shape[2])
    mask = exists & in_lanes
    z = z_ptr + _offset(image, y, x, strides) + channels * strides[3]
    grad_pixels = grad_y_ptr + _offset(image, y, x, grad_strides)  # (PIXELS, 1)
    grad_y = grad_pixels + channels * grad_strides[3]  # (PIXELS, LANES)
    a = softmax(alpha_ptr, DTYPE)

    # One bit for each of the 5 x 5 pixels around: whether max_pool would take it rather than this
    # one. It takes the first of equals, and the last NaN.
    centre = tl.load(z, mask=mask, other=0.0).to(DTYPE)
    beaten = tl.zeros((PIXELS, LANES), tl.int32)
    for DY in tl.static_range(-2, 3):
        for DX in tl.static_range(-2, 3):
            inside = mask & rows[DY + 4] & columns[DX + 4]
            value = tl.load(z + (DY * strides[1] + DX * strides[2]), mask=inside, other=0.0)
            value = value.to(DTYPE)
            bit = 1 << ((DY + 2) * 5 + DX + 2)
            if DY < 0 or (DY == 0 and DX < 0):
                beaten |= tl.where(inside & ~((centre > value) | (centre != centre)), bit, 0)
            elif DY > 0 or DX > 0:
                beaten |= tl.where(inside & ((value > centre) | (value != value)), bit, 0)

    grad_z = a[6] * tl.load(grad_y, mask=mask, other=0.0).to(DTYPE)
    for DY in tl.static_range(-1, 2):
        for DX in tl.static_range(-1, 2):  # the windows that this pixel lies in
            inside = mask & rows[DY + 4] & columns[DX + 4]
            offset = DY * grad_strides[1] + DX * grad_strides[2]
            grad = tl.load(grad_y + offset, mask=inside, other=0.0).to(DTYPE)
            size = _window_size(y + DY, x + DX, shape[1], shape[2]).to(DTYPE)
            window = 0b111_00111_00111 << ((DY + 1) * 5 + DX + 1)
            grad_z += a[4] * (grad / size) + tl.where((beaten & window) == 0, a[5] * grad, 0.0)

    for first in range(0, CHANNELS, BLOCK):
        # Of each output channel o in the block: g_o, whether it exists, and a_i pw_i[o] of every i.
        outputs, exist, weights = (), (), ()
        for j in tl.static_range(BLOCK):
            o = tl.full((1, LANES), first + j, tl.int32)
            outputs = outputs + (
                grad_pixels + _channel(channels_ptr, o, CHANNELS) * grad_strides[3],
            )
            exist = exist + (in_lanes & (o < CHANNELS),)
            for i in tl.static_range(4):
                row = pw_ptr + (i * CHANNELS + o) * CHANNELS + lanes
                weights = weights + (a[i] * tl.load(row, mask=exist[j], other=0.0).to(DTYPE),)
        for DY in tl.static_range(-4, 5):
            for DX in tl.static_range(-4, 5):
                if (DY % 2 == 0 and DX % 2 == 0) or (DY >= -2 and DY <= 2 and DX >= -2 and DX <= 2):
                    kernels = ()  # K[o] of every o, at the tap that leads from there to here
                    for _ in tl.static_range(BLOCK):
                        kernels = kernels + (tl.zeros((1, LANES), DTYPE),)
                    for i in tl.static_range(4):
                        if (
                            DY % DILATIONS[i] == 0 and DX % DILATIONS[i] == 0
                            and DY * DY <= REACHES[i] * REACHES[i] and DX * DX <= REACHES[i] * REACHES[i]
                        ):  # fmt: skip
                            dw = depthwise[i] + lanes * (SIZES[i] * SIZES[i]) + _tap(-DY, -DX, i)
                            weight = tl.load(dw, mask=in_lanes, other=0.0).to(DTYPE)
                            sums = ()
                            for j in tl.static_range(BLOCK):
                                sums = sums + (kernels[j] + weights[4 * j + i] * weight,)
                            kernels = sums
                    in_map = exists & rows[DY + 4] & columns[DX + 4]
                    away = DY * grad_strides[1] + DX * grad_strides[2]
                    for j in tl.static_range(BLOCK):
                        g = tl.load(outputs[j] + away, mask=in_map & exist[j], other=0.0)
                        grad_z += g.to(DTYPE) * kernels[j]

    grad_z_pixels = grad_z_ptr + (start + tl.arange(0, PIXELS)[:, None]) * rank
    tl.store(grad_z_pixels + channels, rounded(grad_z, grad_z_ptr.dtype.element_ty), mask=mask)
    if channels_ptr is not None:
        _copy_other_channels(
            grad_pixels, grad_strides[3], grad_z_pixels, channels_ptr, rank, exists,
            CHANNELS, RANK_LANES,
        )  # fmt: skip


@triton.jit
def _pointwise_sums(
    grad_y_ptr, z_ptr, dw_ptr, pw_ptr, channels_ptr, sums_ptr, a_sum_ptr, first_output, first,
    shape, grad_strides, strides,
    I: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """<g_o, dw * z> of the I-th convolution for BLOCK output channels o, and its product with pw."""
    lanes = tl.arange(0, LANES)[None, :]
    in_lanes = lanes < CHANNELS
    channels = _channel(channels_ptr, lanes, CHANNELS)
    outputs, sums = (), ()
    for j in tl.static_range(BLOCK):
        outputs = outputs + (tl.full((1, LANES), first_output + j, tl.int32),)
        sums = sums + (tl.zeros((PIXELS, LANES), DTYPE),)
    for step in range(STEPS):
        image, y, x, exists = _locate(first + step * PIXELS, shape, PIXELS)
        rows, columns = _around(y, shape[1]), _around(x, shape[2])
        mask = exists & in_lanes
        z = z_ptr + _offset(image, y, x, strides) + channels * strides[3]
        convolved = _convolve(z, rows, columns, mask, strides, dw_ptr, lanes, in_lanes, I, DTYPE)
        grad_pixels = grad_y_ptr + _offset(image, y, x, grad_strides)
        new_sums = ()
        for j in tl.static_range(BLOCK):
            grad_y = grad_pixels + _channel(channels_ptr, outputs[j], CHANNELS) * grad_strides[3]
            grad = tl.load(grad_y, mask=mask & (outputs[j] < CHANNELS), other=0.0).to(DTYPE)
            new_sums = new_sums + (sums[j] + grad * convolved,)
        sums = new_sums

    a_sum = tl.zeros((), DTYPE)
    lane = tl.arange(0, LANES)
    for j in tl.static_range(BLOCK):
        at = (first_output + j) * CHANNELS + lane
        mask = (lane < CHANNELS) & (at < CHANNELS * CHANNELS)
        total = tl.sum(sums[j], axis=0)
        tl.store(sums_ptr + at, total, mask=mask)
        a_sum += tl.sum(total * tl.load(pw_ptr + at, mask=mask, other=0.0).to(DTYPE), axis=0)
    tl.store(a_sum_ptr, a_sum)


@triton.jit
def _depthwise_sums(
    grad_y_ptr, z_ptr, pw_ptr, channels_ptr, sums_ptr, first, shape, grad_strides, strides,
    I: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr,
    STEPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """<pw^T g, z at each tap> of the I-th convolution."""
    REACH: tl.constexpr = REACHES[I]
    DILATION: tl.constexpr = DILATIONS[I]
    TAPS: tl.constexpr = SIZES[I] * SIZES[I]
    lanes = tl.arange(0, LANES)[None, :]
    in_lanes = lanes < CHANNELS
    channels = _channel(channels_ptr, lanes, CHANNELS)
    sums = ()
    for _ in tl.static_range(TAPS):
        sums = sums + (tl.zeros((PIXELS, LANES), DTYPE),)
    for step in range(STEPS):
        image, y, x, exists = _locate(first + step * PIXELS, shape, PIXELS)
        rows, columns = _around(y, shape[1]), _around(x, shape[2])
        mask = exists & in_lanes
        z = z_ptr + _offset(image, y, x, strides) + channels * strides[3]
        grad_pixels = grad_y_ptr + _offset(image, y, x, grad_strides)
        mixed = tl.zeros((PIXELS, LANES), DTYPE)
        for o in range(CHANNELS):
            channel = _channel(channels_ptr, tl.full((1, LANES), o, tl.int32), CHANNELS)
            grad = tl.load(grad_pixels + channel * grad_strides[3], mask=mask, other=0.0)
            weights = tl.load(pw_ptr + o * CHANNELS + lanes, mask=in_lanes, other=0.0)
            mixed += grad.to(DTYPE) * weights.to(DTYPE)
        new_sums = ()
        for DY in tl.static_range(-REACH, REACH + 1, DILATION):
            for DX in tl.static_range(-REACH, REACH + 1, DILATION):
                inside = mask & rows[DY + 4] & columns[DX + 4]
                value = tl.load(z + (DY * strides[1] + DX * strides[2]), mask=inside, other=0.0)
                # An infinite gradient must not meet the zero that stands outside of the map.
                term = tl.where(inside, mixed, 0.0) * value.to(DTYPE)
                new_sums = new_sums + (sums[len(new_sums)] + term,)
        sums = new_sums

    lane = tl.arange(0, LANES)
    for tap in tl.static_range(TAPS):
        to = sums_ptr + lane * TAPS + tap
        tl.store(to, tl.sum(sums[tap], axis=0), mask=lane < CHANNELS)


@triton.jit
def _pooling_sums(
    grad_y_ptr, z_ptr, channels_ptr, sums_ptr, first, shape, grad_strides, strides,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """<g, average>, <g, maximum>, <g, z>."""
    lanes = tl.arange(0, LANES)[None, :]
    in_lanes = lanes < CHANNELS
    channels = _channel(channels_ptr, lanes, CHANNELS)
    average_sum = tl.zeros((PIXELS, LANES), DTYPE)
    maximum_sum, skip_sum = average_sum, average_sum
    for step in range(STEPS):
        image, y, x, exists = _locate(first + step * PIXELS, shape, PIXELS)
        rows, columns = _around(y, shape[1]), _around(x, shape[2])
        mask = exists & in_lanes
        z = z_ptr + _offset(image, y, x, strides) + channels * strides[3]
        grad_y = grad_y_ptr + _offset(image, y, x, grad_strides) + channels * grad_strides[3]
        grad = tl.load(grad_y, mask=mask, other=0.0).to(DTYPE)
        average, maximum = _pool(z, y, x, rows, columns, mask, shape, strides, DTYPE)
        average_sum += grad * average
        maximum_sum += grad * tl.where(mask, maximum, 0.0)
        skip_sum += grad * tl.load(z, mask=mask, other=0.0).to(DTYPE)
    tl.store(sums_ptr, tl.sum(average_sum))
    tl.store(sums_ptr + 1, tl.sum(maximum_sum))
    tl.store(sums_ptr + 2, tl.sum(skip_sum))
