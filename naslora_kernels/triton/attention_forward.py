"""The forward kernel of attention with relative positions.

The order of the sums is that of FlashAttention (Dao et al., 2022): a program keeps a block of
queries and goes over the keys, with the largest score so far.
"""

import triton
import triton.language as tl

from naslora_kernels.triton.arithmetic import dot, rounded, whole
from naslora_kernels.triton.attention_parts import (
    head_of,
    key_columns,
    key_rows,
    load_bias,
    load_rows,
    store_rows,
)


@triton.jit
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
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """o and softmax of QUERIES queries of a head.

    Over 60 lines because Triton takes the arguments one by one.
    """
    DTYPE: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    scale = whole(scale, scale_rest, DTYPE)
    tokens = height * width
    blocks = tl.cdiv(tokens, QUERIES)
    number = tl.program_id(0) // blocks
    image, head = (number // heads).to(tl.int64), (number % heads).to(tl.int64)
    query = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    in_queries = query < tokens
    k_ptr = head_of(k_ptr, k_strides, image, head)
    v_ptr = head_of(v_ptr, v_strides, image, head)
    rel_h_ptr = head_of(rel_h_ptr, h_strides, image, head)
    rel_w_ptr = head_of(rel_w_ptr, w_strides, image, head)
    q_ptr = head_of(q_ptr, q_strides, image, head)
    q = load_rows(q_ptr, q_strides, query, in_queries, LANES, FEATURES, WIDEN)

    largest = tl.full((QUERIES,), float("-inf"), DTYPE)
    total = tl.zeros((QUERIES,), DTYPE)
    o = tl.zeros((QUERIES, LANES), DTYPE)
    for first_column in range(0, width, COLUMNS):
        column = key_columns(first_column, ROWS, COLUMNS)
        in_columns = in_queries[:, None] & (column < width)[None, :]
        bias_w = load_bias(rel_w_ptr, w_strides, query[:, None], column[None, :], in_columns)
        for first_row in range(0, height, ROWS):
            row = key_rows(first_row, ROWS, COLUMNS)
            key, in_keys = row * width + column, (row < height) & (column < width)
            k = load_rows(k_ptr, k_strides, key, in_keys, LANES, FEATURES, WIDEN)
            in_rows = in_queries[:, None] & (row < height)[None, :]
            bias_h = load_bias(rel_h_ptr, h_strides, query[:, None], row[None, :], in_rows)
            scores = dot(q, tl.trans(k), DTYPE) * scale + (bias_h.to(DTYPE) + bias_w.to(DTYPE))
            scores = tl.where(in_keys[None, :], scores, float("-inf"))
            before = largest
            largest = tl.maximum(before, tl.max(scores, axis=1))
            # A query whose keys so far are all masked has no largest score to subtract.
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            p = tl.exp(scores - shift[:, None])
            decay = tl.exp(before - shift)
            total = total * decay + tl.sum(p, axis=1)
            v = load_rows(v_ptr, v_strides, key, in_keys, LANES, FEATURES, WIDEN)
            o = o * decay[:, None] + dot(rounded(p, v.dtype), v, DTYPE)

    o_ptr = head_of(o_ptr, o_strides, image, head)
    o = rounded(o / total[:, None], o_ptr.dtype.element_ty)
    store_rows(o_ptr, o_strides, query, in_queries, o, FEATURES)
    at = softmax_ptr + number.to(tl.int64) * tokens + query
    tl.store(at, largest, mask=in_queries)
    rest = tl.cast(batch, tl.int64) * heads * tokens
    tl.store(at + rest, total, mask=in_queries)
