"""What the kernels of attention share: rows of operands in parts, tiles of keys, biases, products.

Rows of operands are tuples of parts, each a power of two wide: 80 features are 64 and 16, where one
part would compute the products of 128. A tile of keys is ROWS rows x COLUMNS columns of the grid,
so the bias of a tile needs few numbers: with one row, rel_h is one number a query. Outside of the
grid the bias is -inf, so keys there get the weight 0. An exponential is computed as
exp2(score * LOG2E - shift), which takes two instructions. Strides are those of the images, the
heads and the tokens. Features are contiguous. The offsets in a head have 32 bits.
"""

import triton
import triton.language as tl

from naslora_kernels.triton.arithmetic import dot, rounded, widened

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_of(pointer, strides, image, head):
    """Returns the address of a head's first token."""
    return pointer + image * tl.cast(strides[0], tl.int64) + head * tl.cast(strides[1], tl.int64)


@triton.jit
def part_mask(inside, lane, FEATURES: tl.constexpr):
    """Returns the mask of a part of rows. Triton 3.6 cannot return None, where all are inside."""
    if inside is None:
        return lane < FEATURES
    else:
        return inside[:, None] & (lane < FEATURES)


@triton.jit
def load_part(
    at,
    inside,
    FIRST: tl.constexpr,
    LANES: tl.constexpr,
    FEATURES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    lane = FIRST + tl.arange(0, LANES)[None, :]
    if inside is None and FEATURES >= FIRST + LANES:
        values = tl.load(at + lane)
    else:
        values = tl.load(at + lane, mask=part_mask(inside, lane, FEATURES), other=0.0)
    return widened(values) if WIDEN else values


@triton.jit
def load_rows(
    pointer,
    strides,
    token,
    inside,
    FEATURES: tl.constexpr,
    LANES: tl.constexpr,
    REST: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Returns the features of tokens, zero outside: (tokens, LANES) and, if any, (tokens, REST).

    ``inside`` says which tokens are of the grid; None if all are.
    """
    at = pointer + token[:, None] * tl.cast(strides[2], tl.int32)
    parts = (load_part(at, inside, 0, LANES, FEATURES, WIDEN),)
    if REST:
        parts = parts + (load_part(at, inside, LANES, REST, FEATURES, WIDEN),)
    return parts


@triton.jit
def store_part(at, inside, values, FIRST: tl.constexpr, FEATURES: tl.constexpr):
    lane = FIRST + tl.arange(0, values.shape[1])[None, :]
    values = rounded(values, at.dtype.element_ty)
    full: tl.constexpr = inside is None and FIRST + values.shape[1] <= FEATURES
    tl.store(at + lane, values, mask=None if full else part_mask(inside, lane, FEATURES))


@triton.jit
def store_rows(pointer, strides, token, inside, parts, factor, FEATURES: tl.constexpr):
    """Stores the features of tokens, times ``factor``, in the dtype of ``pointer``."""
    at = pointer + token[:, None] * tl.cast(strides[2], tl.int32)
    store_part(at, inside, parts[0] * factor, 0, FEATURES)
    if len(parts) > 1:
        store_part(at, inside, parts[1] * factor, parts[0].shape[1], FEATURES)


@triton.jit
def zeros(TOKENS: tl.constexpr, LANES: tl.constexpr, REST: tl.constexpr, DTYPE: tl.constexpr):
    """Returns sums of rows: (TOKENS, LANES) and, if any, (TOKENS, REST)."""
    if REST:
        return (tl.zeros((TOKENS, LANES), DTYPE), tl.zeros((TOKENS, REST), DTYPE))
    else:
        return (tl.zeros((TOKENS, LANES), DTYPE),)


@triton.jit
def products(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Returns a b^T of two tuples of parts."""
    total = dot(a[0], tl.trans(b[0]), DTYPE, PRECISION)
    for i in tl.static_range(1, len(a)):
        total += dot(a[i], tl.trans(b[i]), DTYPE, PRECISION)
    return total


@triton.jit
def add_products(sums, weights, rows, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Returns sums + weights rows, weights rounded to the dtype of ``rows``."""
    new_sums = ()
    for i in tl.static_range(len(sums)):
        product = dot(rounded(weights, rows[i].dtype), rows[i], DTYPE, PRECISION)
        new_sums = new_sums + (sums[i] + product,)
    return new_sums


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
def load_bias(pointer, strides, query, in_queries, place, size, DTYPE: tl.constexpr):
    """Returns rel_h or rel_w at rows or columns of the grid, -inf outside.

    ``query`` and ``place`` broadcast. ``in_queries`` is None if all are inside.
    """
    at = pointer + query * tl.cast(strides[2], tl.int32) + place
    if in_queries is None:
        bias = tl.load(at)
    else:
        bias = tl.load(at, mask=in_queries & (place < size), other=float("-inf"))
    return bias.to(DTYPE)


@triton.jit
def load_row_biases(
    pointer,
    strides,
    query,
    in_queries,
    first,
    height,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns rel_h of queries at the keys of a tile; each number is loaded once, then repeated."""
    row = first + tl.arange(0, ROWS)[None, :]
    bias = load_bias(pointer, strides, query[:, None], in_queries, row, height, DTYPE)
    QUERIES: tl.constexpr = query.shape[0]
    bias = tl.broadcast_to(bias[:, :, None], (QUERIES, ROWS, COLUMNS))
    return tl.reshape(bias, (QUERIES, ROWS * COLUMNS))
