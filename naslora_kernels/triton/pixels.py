"""What the Triton kernels of a cell share: how they find pixels, channels and taps.

A tile is a block (PIXELS, LANES, TAPS).

- PIXELS are consecutive pixels of all maps in row-major order. So no thread is idle, whatever the
  shape of a map.
- LANES are the channels of S, one lane each.
- TAPS are some of the 5 x 5 pixels around a pixel, one or two pixels apart. They are read from the
  cache. A program goes through them TAPS at a time, which is one by one on a card: a thread then
  holds few of them in registers, and a sum over taps needs no shuffles, however Triton distributes
  a tile among threads.

Two of the four convolutions have taps one pixel apart (3 x 3 and 5 x 5). The other two have taps
two pixels apart. Each pair works on one tile. The convolutions stay separable: a depthwise sum for
each, then the pointwise mixing as sums over lanes. That takes 68 + 4c multiplications for a pixel
and channel. The one c x c convolution that they fold to takes 41c. Only dL/dz needs the folded one,
because its pointwise part comes first.

A program is one warp, so sums over pixels and lanes are shuffles and need no shared memory.
"""

import triton
import triton.language as tl

from naslora_kernels.triton.arithmetic import INTERPRETED

# The interpreter takes as long for a block of taps as for one of them.
TAPS = tl.constexpr(16 if INTERPRETED else 1)
ALL_TAPS = tl.constexpr(32 if INTERPRETED else 25)  # of 5 x 5, padded to a multiple of TAPS
WINDOW_TAPS = tl.constexpr(16 if INTERPRETED else 9)  # of 3 x 3, in the same way


@triton.jit
def locate(start, shape, PIXELS: tl.constexpr):
    """Finds the PIXELS pixels from ``start`` (int64) on; ``shape`` is (pixels, height, width).

    Returns their map, row and column, and whether they exist; each (PIXELS, 1, 1).
    """
    pixels, height, width = shape
    area = height * width
    first_map = start // area
    step = tl.arange(0, PIXELS)[:, None, None]
    pixel = (start - first_map * area).to(tl.int32) + step
    return first_map + pixel // area, pixel % area // width, pixel % width, start + step < pixels


@triton.jit
def pixel_offset(image, y, x, strides):
    """Returns where pixels begin, in elements (int64)."""
    return image * strides[0] + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]


@triton.jit
def lane_numbers(LANES: tl.constexpr):
    """Returns 0..LANES-1; (1, LANES, 1).

    Contiguity is hidden from Triton so that it does not vectorise parameter loads, which would
    need shuffles between threads.
    """
    return tl.max_contiguous(tl.arange(0, LANES)[None, :, None], (1, 1, 1))


@triton.jit
def channel_numbers(channels_ptr, i, rank, CHANNELS: tl.constexpr):
    """Returns the i-th channels of S (int64) for a block ``i``; some channel of S if i >= c."""
    i = tl.minimum(i, CHANNELS - 1)
    if channels_ptr is None:
        return i.to(tl.int64)
    else:
        return within_rank(tl.load(channels_ptr + i), rank)


@triton.jit
def within_rank(channels, rank):
    """Returns channels inside the map, whatever the tensor of channels holds.

    The host checks the values once. They may change later without its notice.
    """
    return tl.maximum(tl.minimum(channels, rank - 1), 0)


@triton.jit
def copy_other_channels(
    from_ptr,
    stride_c,
    to_ptr,
    channels_ptr,
    rank,
    mask,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Copies the channels outside S of pixels at (PIXELS, 1, 1) pointers; LANES >= rank."""
    lanes = tl.arange(0, LANES)[None, :, None]
    mask = mask & (lanes < rank)
    for i in range(CHANNELS):
        mask = mask & (lanes != tl.load(channels_ptr + i))
    values = tl.load(from_ptr + lanes * stride_c, mask=mask, other=0.0)
    tl.store(to_ptr + lanes, values, mask=mask)


@triton.jit
def tap_positions(first, COUNT: tl.constexpr):
    """Returns row and column, -2..2, of COUNT 5 x 5 taps from ``first`` on; (1, 1, COUNT)."""
    tap = first + tl.arange(0, COUNT)[None, None, :]
    return tap // 5 - 2, tap % 5 - 2


@triton.jit
def within(row, column, REACH: tl.constexpr):
    """Returns whether a kernel with this reach has the tap."""
    return (row >= -REACH) & (row <= REACH) & (column >= -REACH) & (column <= REACH)


@triton.jit
def load_taps(
    pointers,
    y,
    x,
    mask,
    shape,
    strides,
    row,
    column,
    DILATION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Loads the taps (row, column) around pixels at (PIXELS, LANES, 1) pointers.

    Returns the values, zero outside of the map, and whether a tap lies in the map;
    (PIXELS, LANES, TAPS).
    """
    dy, dx = row * DILATION, column * DILATION
    in_rows = (y + dy >= 0) & (y + dy < shape[1])
    in_columns = (x + dx >= 0) & (x + dx < shape[2])
    inside = mask & within(row, column, 2) & in_rows & in_columns
    values = tl.load(pointers + (dy * strides[1] + dx * strides[2]), mask=inside, other=0.0)
    return values.to(DTYPE), inside


@triton.jit
def load_kernels(
    dw_3x3_ptr,
    dw_5x5_ptr,
    in_lanes,
    row,
    column,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Loads taps of the depthwise kernels of a pair of convolutions; (PIXELS, LANES, TAPS) each.

    Every pixel loads them for itself: a broadcast would move them between threads.
    """
    lanes = lane_numbers(LANES)
    at_3x3 = dw_3x3_ptr + lanes * 9 + ((row + 1) * 3 + column + 1)
    at_5x5 = dw_5x5_ptr + lanes * 25 + ((row + 2) * 5 + column + 2)
    at_3x3 = tl.broadcast_to(at_3x3, (PIXELS, LANES, TAPS))
    at_5x5 = tl.broadcast_to(at_5x5, (PIXELS, LANES, TAPS))
    dw_3x3 = tl.load(at_3x3, mask=in_lanes & within(row, column, 1), other=0.0)
    dw_5x5 = tl.load(at_5x5, mask=in_lanes & within(row, column, 2), other=0.0)
    return dw_3x3.to(DTYPE), dw_5x5.to(DTYPE)


@triton.jit
def convolve(
    pointers,
    y,
    x,
    mask,
    shape,
    strides,
    dw_3x3_ptr,
    dw_5x5_ptr,
    in_lanes,
    DILATION: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns a pair of depthwise convolutions of the pixels at (PIXELS, LANES, 1) pointers."""
    by_3x3 = tl.zeros((PIXELS, LANES, 1), DTYPE)
    by_5x5 = by_3x3
    for first in tl.range(0, ALL_TAPS, TAPS, loop_unroll_factor=5, disable_licm=True):
        row, column = tap_positions(first, TAPS)
        values, _ = load_taps(pointers, y, x, mask, shape, strides, row, column, DILATION, DTYPE)
        dw_3x3, dw_5x5 = load_kernels(
            dw_3x3_ptr, dw_5x5_ptr, in_lanes, row, column, LANES, PIXELS, DTYPE
        )
        # An infinite value times the zero of a tap that the kernel lacks would be NaN.
        terms_3x3 = tl.where(within(row, column, 1), values * dw_3x3, 0.0)
        terms_5x5 = tl.where(within(row, column, 2), values * dw_5x5, 0.0)
        by_3x3 += tl.sum(terms_3x3, axis=2, keep_dims=True)
        by_5x5 += tl.sum(terms_5x5, axis=2, keep_dims=True)
    return by_3x3, by_5x5


@triton.jit
def window_positions(first):
    """Returns row and column, -1..1, of TAPS 3 x 3 taps from ``first`` on; (1, 1, TAPS)."""
    tap = first + tl.arange(0, TAPS)[None, None, :]
    return tap // 3 - 1, tap % 3 - 1


@triton.jit
def window_size(y, x, shape):
    """Returns how many valid pixels the 3 x 3 window around a pixel has: avg_pool's divisor."""
    rows = 1 + (y > 0).to(tl.int32) + (y + 1 < shape[1]).to(tl.int32)
    columns = 1 + (x > 0).to(tl.int32) + (x + 1 < shape[2]).to(tl.int32)
    return rows * columns


@triton.jit
def pool(
    pointers,
    y,
    x,
    mask,
    shape,
    strides,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns the averages and the maxima of the 3 x 3 windows around pixels.

    ``pointers`` and the results are (PIXELS, LANES, 1).
    """
    total = tl.zeros((PIXELS, LANES, 1), DTYPE)
    maximum, nans = total - float("inf"), total.to(tl.int32)
    for first in tl.range(0, WINDOW_TAPS, TAPS, loop_unroll_factor=3, disable_licm=True):
        row, column = window_positions(first)
        in_window = mask & (row <= 1)
        values, inside = load_taps(pointers, y, x, in_window, shape, strides, row, column, 1, DTYPE)
        is_nan = values != values
        candidates = tl.where(inside & ~is_nan, values, float("-inf"))
        total += tl.sum(values, axis=2, keep_dims=True)
        maximum = tl.maximum(maximum, tl.max(candidates, axis=2, keep_dims=True))
        nans += tl.sum((inside & is_nan).to(tl.int32), axis=2, keep_dims=True)
    average = total / window_size(y, x, shape).to(DTYPE)
    return average, tl.where(nans > 0, float("nan"), maximum)
