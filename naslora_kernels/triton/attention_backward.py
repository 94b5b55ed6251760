"""The backward kernels of attention with relative positions, without atomics.

P = softmax(S) is computed again from the scores. Then dP = dO V^T and dS = P (dP - delta) with
delta = rowsum(dO O). dV = P^T dO and dK = scale dS^T Q are sums over queries: a program keeps a
tile of keys. dQ = scale dS K and those of the biases are sums over keys: a program keeps queries.
"""

import triton
import triton.language as tl

from naslora_kernels.triton.arithmetic import dot, rounded, whole, widened
from naslora_kernels.triton.attention_parts import (
    head_of,
    key_columns,
    key_rows,
    load_bias,
    load_rows,
    store_rows,
)


@triton.jit
def attention_delta_kernel(
    grad_o_ptr,
    o_ptr,
    delta_ptr,
    heads,
    tokens,
    grad_o_strides,
    o_strides,
    FEATURES: tl.constexpr,
    LANES: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """delta (B, heads, N), the sums of dO O over the features, of QUERIES queries."""
    blocks = tl.cdiv(tokens, QUERIES)
    number = tl.program_id(0) // blocks
    image, head = (number // heads).to(tl.int64), (number % heads).to(tl.int64)
    query = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    mask = query < tokens
    grad_o_ptr = head_of(grad_o_ptr, grad_o_strides, image, head)
    o_ptr = head_of(o_ptr, o_strides, image, head)
    grad_o = load_rows(grad_o_ptr, grad_o_strides, query, mask, LANES, FEATURES, False)
    o = load_rows(o_ptr, o_strides, query, mask, LANES, FEATURES, False)
    delta = tl.sum(widened(grad_o) * widened(o), axis=1)
    tl.store(delta_ptr + number.to(tl.int64) * tokens + query, delta, mask=mask)


@triton.jit
def attention_keys_kernel(
    grad_o_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rel_h_ptr,
    rel_w_ptr,
    softmax_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    scale,
    scale_rest,
    batch,
    heads,
    height,
    width,
    grad_o_strides,
    q_strides,
    k_strides,
    v_strides,
    h_strides,
    w_strides,
    grad_strides,
    FEATURES: tl.constexpr,
    LANES: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """dk and dv of a tile of ROWS x COLUMNS keys; either may be None.

    Scores are (keys, queries), so that no product needs them transposed. Over 60 lines because
    Triton takes the arguments one by one.
    """
    DTYPE: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    scale = whole(scale, scale_rest, DTYPE)
    tokens = height * width
    pieces = tl.cdiv(width, COLUMNS)
    tiles = tl.cdiv(height, ROWS) * pieces
    number, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    image, head = (number // heads).to(tl.int64), (number % heads).to(tl.int64)
    row = key_rows(tile // pieces * ROWS, ROWS, COLUMNS)
    column = key_columns(tile % pieces * COLUMNS, ROWS, COLUMNS)
    key, in_keys = row * width + column, (row < height) & (column < width)
    q_ptr = head_of(q_ptr, q_strides, image, head)
    grad_o_ptr = head_of(grad_o_ptr, grad_o_strides, image, head)
    rel_h_ptr = head_of(rel_h_ptr, h_strides, image, head)
    rel_w_ptr = head_of(rel_w_ptr, w_strides, image, head)
    k_ptr = head_of(k_ptr, k_strides, image, head)
    k = load_rows(k_ptr, k_strides, key, in_keys, LANES, FEATURES, WIDEN)
    if grad_k_ptr is not None:
        v_ptr = head_of(v_ptr, v_strides, image, head)
        v = load_rows(v_ptr, v_strides, key, in_keys, LANES, FEATURES, WIDEN)
        delta_ptr += number.to(tl.int64) * tokens
        grad_k = tl.zeros((ROWS * COLUMNS, LANES), DTYPE)
    if grad_v_ptr is not None:
        grad_v = tl.zeros((ROWS * COLUMNS, LANES), DTYPE)
    softmax_ptr += number.to(tl.int64) * tokens
    rest = tl.cast(batch, tl.int64) * heads * tokens

    for first in range(0, tokens, QUERIES):
        query = first + tl.arange(0, QUERIES)
        in_queries = query < tokens
        q = load_rows(q_ptr, q_strides, query, in_queries, LANES, FEATURES, WIDEN)
        grad_o = load_rows(grad_o_ptr, grad_o_strides, query, in_queries, LANES, FEATURES, WIDEN)
        in_rows = (row < height)[:, None] & in_queries[None, :]
        in_columns = (column < width)[:, None] & in_queries[None, :]
        bias_h = load_bias(rel_h_ptr, h_strides, query[None, :], row[:, None], in_rows)
        bias_w = load_bias(rel_w_ptr, w_strides, query[None, :], column[:, None], in_columns)
        largest = tl.load(softmax_ptr + query, mask=in_queries, other=0.0)
        total = tl.load(softmax_ptr + rest + query, mask=in_queries, other=1.0)
        scores = dot(k, tl.trans(q), DTYPE) * scale + (bias_h.to(DTYPE) + bias_w.to(DTYPE))
        p = tl.exp(scores - largest[None, :]) / total[None, :]
        p = tl.where(in_queries[None, :], p, 0.0)
        if grad_v_ptr is not None:
            grad_v += dot(rounded(p, grad_o.dtype), grad_o, DTYPE)
        if grad_k_ptr is not None:
            delta = tl.load(delta_ptr + query, mask=in_queries, other=0.0)
            grad_scores = p * (dot(v, tl.trans(grad_o), DTYPE) - delta[None, :])
            grad_scores = tl.where(in_queries[None, :], grad_scores, 0.0)
            grad_k += dot(rounded(grad_scores, q.dtype), q, DTYPE)

    if grad_k_ptr is not None:
        grad_k_ptr = head_of(grad_k_ptr, grad_strides, image, head)
        grad_k = rounded(grad_k * scale, grad_k_ptr.dtype.element_ty)
        store_rows(grad_k_ptr, grad_strides, key, in_keys, grad_k, FEATURES)
    if grad_v_ptr is not None:
        grad_v_ptr = head_of(grad_v_ptr, grad_strides, image, head)
        grad_v = rounded(grad_v, grad_v_ptr.dtype.element_ty)
        store_rows(grad_v_ptr, grad_strides, key, in_keys, grad_v, FEATURES)


@triton.jit
def attention_queries_kernel(
    grad_o_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rel_h_ptr,
    rel_w_ptr,
    softmax_ptr,
    delta_ptr,
    grad_q_ptr,
    grad_h_ptr,
    grad_w_ptr,
    scale,
    scale_rest,
    batch,
    heads,
    height,
    width,
    grad_o_strides,
    q_strides,
    k_strides,
    v_strides,
    h_strides,
    w_strides,
    grad_strides,
    FEATURES: tl.constexpr,
    LANES: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS_OUTSIDE: tl.constexpr,
):
    """dq, drel_h and drel_w, contiguous, of QUERIES queries of a head; any may be None.

    ROWS_OUTSIDE chooses the loop outside: over rows of keys, so that drel_h is complete inside, or
    over columns, so that drel_w is. Both are complete if the columns are one piece. Over 60 lines
    because Triton takes the arguments one by one.
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
    grad_o_ptr = head_of(grad_o_ptr, grad_o_strides, image, head)
    grad_o = load_rows(grad_o_ptr, grad_o_strides, query, in_queries, LANES, FEATURES, WIDEN)
    start = number.to(tl.int64) * tokens  # of the head in (B, heads, N)
    largest = tl.load(softmax_ptr + start + query, mask=in_queries, other=0.0)
    rest = tl.cast(batch, tl.int64) * heads * tokens
    total = tl.load(softmax_ptr + rest + start + query, mask=in_queries, other=1.0)
    delta = tl.load(delta_ptr + start + query, mask=in_queries, other=0.0)
    token = start + query

    grad_q = tl.zeros((QUERIES, LANES), DTYPE)
    outside = height if ROWS_OUTSIDE else width
    inside = width if ROWS_OUTSIDE else height
    for first_outside in range(0, outside, ROWS if ROWS_OUTSIDE else COLUMNS):
        row_sums = tl.zeros((QUERIES,), DTYPE)
        sums = tl.zeros((QUERIES, ROWS * COLUMNS), DTYPE)
        for first_inside in range(0, inside, COLUMNS if ROWS_OUTSIDE else ROWS):
            first_row = first_outside if ROWS_OUTSIDE else first_inside
            first_column = first_inside if ROWS_OUTSIDE else first_outside
            row = key_rows(first_row, ROWS, COLUMNS)
            column = key_columns(first_column, ROWS, COLUMNS)
            key, in_keys = row * width + column, (row < height) & (column < width)
            in_rows = in_queries[:, None] & (row < height)[None, :]
            in_columns = in_queries[:, None] & (column < width)[None, :]
            bias_h = load_bias(rel_h_ptr, h_strides, query[:, None], row[None, :], in_rows)
            bias_w = load_bias(rel_w_ptr, w_strides, query[:, None], column[None, :], in_columns)
            k = load_rows(k_ptr, k_strides, key, in_keys, LANES, FEATURES, WIDEN)
            v = load_rows(v_ptr, v_strides, key, in_keys, LANES, FEATURES, WIDEN)
            scores = dot(q, tl.trans(k), DTYPE) * scale + (bias_h.to(DTYPE) + bias_w.to(DTYPE))
            p = tl.exp(scores - largest[:, None]) / total[:, None]
            grad_scores = p * (dot(grad_o, tl.trans(v), DTYPE) - delta[:, None])
            grad_scores = tl.where(in_keys[None, :], grad_scores, 0.0)
            if grad_q_ptr is not None:
                grad_q += dot(rounded(grad_scores, k.dtype), k, DTYPE)
            if grad_w_ptr is not None:
                sums += grad_scores
            if grad_h_ptr is not None:
                if ROWS_OUTSIDE:
                    row_sums += tl.sum(grad_scores, axis=1)
                else:
                    by_row = tl.sum(tl.reshape(grad_scores, (QUERIES, ROWS, COLUMNS)), axis=2)
                    rows = first_row + tl.arange(0, ROWS)
                    at = grad_h_ptr + token[:, None] * height + rows[None, :]
                    by_row = rounded(by_row, grad_h_ptr.dtype.element_ty)
                    tl.store(at, by_row, mask=in_queries[:, None] & (rows < height)[None, :])
        if grad_h_ptr is not None and ROWS_OUTSIDE:
            to = grad_h_ptr + token * height + first_outside
            tl.store(to, rounded(row_sums, grad_h_ptr.dtype.element_ty), mask=in_queries)
        if grad_w_ptr is not None:
            by_column = tl.sum(tl.reshape(sums, (QUERIES, ROWS, COLUMNS)), axis=1)
            columns = first_outside + tl.arange(0, COLUMNS)
            by_column = rounded(by_column, grad_w_ptr.dtype.element_ty)
            to = grad_w_ptr + token[:, None] * width + columns[None, :]
            tl.store(to, by_column, mask=in_queries[:, None] & (columns < width)[None, :])
    if grad_q_ptr is not None:
        grad_q_ptr = head_of(grad_q_ptr, grad_strides, image, head)
        grad_q = rounded(grad_q * scale, grad_q_ptr.dtype.element_ty)
        store_rows(grad_q_ptr, grad_strides, query, in_queries, grad_q, FEATURES)
