"""The forward kernel of attention with relative positions.

The order of the sums is that of FlashAttention (Dao et al., 2022): a program keeps a block of
queries and goes over the keys, with the largest score so far.
"""

import triton
import triton.language as tl

from naslora_kernels.triton.arithmetic import whole
from naslora_kernels.triton.attention_parts import (
    LOG2E,
    add_products,
    head_of,
    key_columns,
    key_rows,
    load_bias,
    load_row_biases,
    load_rows,
    products,
    store_rows,
    zeros,
)


@triton.jit(do_not_specialize=["batch"])  # a last batch of 1 compiles nothing
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    rel_h_ptr,
    rel_w_ptr,
    o_ptr,
    softmax_ptr,
    scale,
    scale_rest,
    batch,
    heads,
    tokens,
    height,
    width,
    q_strides,
    k_strides,
    v_strides,
    h_strides,
    w_strides,
    o_strides,
    FEATURES: tl.constexpr,
    LANES: tl.constexpr,
    REST: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
    FULL: tl.constexpr,
    ONE_PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and softmax of QUERIES queries of a head. FULL: no tile reaches beyond the grid.

    Over 60 lines because Triton takes the arguments one by one.
    """
    DTYPE: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    scale = whole(scale, scale_rest, DTYPE)
    tl.assume(height > 0)
    blocks = tl.cdiv(tokens, QUERIES)
    number = tl.program_id(0) // blocks
    image, head = (number // heads).to(tl.int64), (number % heads).to(tl.int64)
    query = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    in_queries = None if FULL else query < tokens
    in_bias = None if FULL else (query < tokens)[:, None]
    k_ptr = head_of(k_ptr, k_strides, image, head)
    v_ptr = head_of(v_ptr, v_strides, image, head)
    rel_h_ptr = head_of(rel_h_ptr, h_strides, image, head)
    rel_w_ptr = head_of(rel_w_ptr, w_strides, image, head)
    q_ptr = head_of(q_ptr, q_strides, image, head)
    q = load_rows(q_ptr, q_strides, query, in_queries, FEATURES, LANES, REST, WIDEN)

    largest = tl.full((QUERIES,), float("-inf"), DTYPE)
    total = tl.zeros((QUERIES,), DTYPE)
    o = zeros(QUERIES, LANES, REST, DTYPE)
    for first_column in range(0, COLUMNS if ONE_PIECE else width, COLUMNS):
        column = key_columns(first_column, ROWS, COLUMNS)
        bias_w = load_bias(
            rel_w_ptr, w_strides, query[:, None], in_bias, column[None, :], width, DTYPE
        )
        for first_row in range(0, height, ROWS):
            row = key_rows(first_row, ROWS, COLUMNS)
            key = row * width + column
            in_keys = None if FULL else (row < height) & (column < width)
            k = load_rows(k_ptr, k_strides, key, in_keys, FEATURES, LANES, REST, WIDEN)
            scores = products(q, k, DTYPE, PRECISION) * scale + bias_w
            if ROWS == 1:  # one number a query, which need not be added to each score
                bias_h = load_bias(rel_h_ptr, h_strides, query, in_queries, row, height, DTYPE)
            else:
                scores += load_row_biases(
                    rel_h_ptr, h_strides, query, in_bias, first_row, height, ROWS, COLUMNS, DTYPE
                )
                bias_h = tl.zeros((QUERIES,), DTYPE)
            before = largest
            largest = tl.maximum(before, (tl.max(scores, axis=1) + bias_h) * LOG2E)
            # A query whose keys so far are all masked has no largest score to subtract.
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            p = tl.exp2(scores * LOG2E - (shift - bias_h * LOG2E)[:, None])
            decay = tl.exp2(before - shift)
            total = total * decay + tl.sum(p, axis=1)
            v = load_rows(v_ptr, v_strides, key, in_keys, FEATURES, LANES, REST, WIDEN)
            decayed = ()
            for i in tl.static_range(len(o)):
                decayed = decayed + (o[i] * decay[:, None],)
            o = add_products(decayed, p, v, DTYPE, PRECISION)

    o_ptr = head_of(o_ptr, o_strides, image, head)
    inverse = 1 / total
    store_rows(o_ptr, o_strides, query, in_queries, o, inverse[:, None], FEATURES)
    if q_ptr.dtype.element_ty.primitive_bitwidth == 16:
        largest += tl.log2(total)
        inverse = tl.full((QUERIES,), 1.0, DTYPE)
    at = softmax_ptr + number.to(tl.int64) * tokens + query
    tl.store(at, largest, mask=in_queries)
    rest = tl.cast(batch, tl.int64) * heads * tokens
    tl.store(at + rest, inverse, mask=in_queries)
