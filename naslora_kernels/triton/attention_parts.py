"""What the kernels of attention share: tiles of keys, rows of operands, scores.

A tile of keys is ROWS rows x COLUMNS columns of the grid, so the bias of a tile needs few numbers:
with one row, rel_h is one number a query. Rows and columns outside of the grid are masked.
Strides are those of the images, the heads and the tokens. Features are contiguous.
"""

import triton
import triton.language as tl

from naslora_kernels.triton.arithmetic import widened


@triton.jit
def head_of(pointer, strides, image, head):
    """Returns the address of a head's first token."""
    return pointer + image * tl.cast(strides[0], tl.int64) + head * tl.cast(strides[1], tl.int64)


@triton.jit
def load_rows(
    pointer, strides, token, in_tokens, LANES: tl.constexpr, SIZE: tl.constexpr, WIDEN: tl.constexpr
):
    """Returns the SIZE features of tokens, (tokens, LANES), zero outside."""
    lane = tl.arange(0, LANES)[None, :]
    at = pointer + token[:, None].to(tl.int64) * tl.cast(strides[2], tl.int64) + lane
    rows = tl.load(at, mask=in_tokens[:, None] & (lane < SIZE), other=0.0)
    return widened(rows) if WIDEN else rows


@triton.jit
def store_rows(pointer, strides, token, in_tokens, values, SIZE: tl.constexpr):
    """Stores SIZE features of tokens, in the dtype of ``values``."""
    lane = tl.arange(0, values.shape[1])[None, :]
    at = pointer + token[:, None].to(tl.int64) * tl.cast(strides[2], tl.int64) + lane
    tl.store(at, values, mask=in_tokens[:, None] & (lane < SIZE))


@triton.jit
def key_columns(first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the column in the grid of every key of a tile."""
    return first + tl.arange(0, ROWS * COLUMNS) % COLUMNS


@triton.jit
def key_rows(first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the row in the grid of every key of a tile; one number for all if ROWS is 1."""
    if ROWS == 1:
        return tl.full((1,), first, tl.int32)
    else:
        return first + tl.arange(0, ROWS * COLUMNS) // COLUMNS


@triton.jit
def load_bias(pointer, strides, query, place, mask):
    """Returns rel_h or rel_w at rows or columns of the grid. ``query`` and ``place`` broadcast."""
    at = pointer + query.to(tl.int64) * tl.cast(strides[2], tl.int64) + place
    return tl.load(at, mask=mask, other=0.0)
