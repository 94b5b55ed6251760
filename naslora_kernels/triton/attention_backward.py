"""The backward kernels of attention with relative positions, without atomics.

P = softmax(S) is computed again from the scores. Then dP = dO V^T and dS = P (dP - delta) with
delta = rowsum(dO O). dV = P^T dO and dK = scale dS^T Q are sums over queries: a program keeps a
tile of keys. dQ = scale dS K and those of the biases are sums over keys: a program keeps queries.
"""

import triton
import triton.language as tl

from naslora_kernels.triton.arithmetic import rounded, whole, widened
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
    REST: tl.constexpr,
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
    grad_o = load_rows(grad_o_ptr, grad_o_strides, query, mask, FEATURES, LANES, REST, False)
    o = load_rows(o_ptr, o_strides, query, mask, FEATURES, LANES, REST, False)
    delta = tl.sum(widened(grad_o[0]) * widened(o[0]), axis=1)
    for i in tl.static_range(1, len(o)):
        delta += tl.sum(widened(grad_o[i]) * widened(o[i]), axis=1)
    tl.store(delta_ptr + number.to(tl.int64) * tokens + query, delta, mask=mask)


@triton.jit(do_not_specialize=["batch"])  # a last batch of 1 compiles nothing
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
    tokens,
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
    REST: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
    FULL: tl.constexpr,
    ONE_PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of a tile of ROWS x COLUMNS keys; either may be None.

    Scores are (keys, queries), so that no product needs them transposed. Over 60 lines because
    Triton takes the arguments one by one.
    """
    DTYPE: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    scale = whole(scale, scale_rest, DTYPE)
    EXACT: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth > 16
    tl.assume(tokens > 0)
    pieces = tl.cdiv(width, COLUMNS)
    tiles = tl.cdiv(height, ROWS) * pieces
    number, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    image, head = (number // heads).to(tl.int64), (number % heads).to(tl.int64)
    row = key_rows(tile // pieces * ROWS, ROWS, COLUMNS)
    column = key_columns(tile % pieces * COLUMNS, ROWS, COLUMNS)
    key = row * width + column
    in_keys = None if FULL else (row < height) & (column < width)
    q_ptr = head_of(q_ptr, q_strides, image, head)
    grad_o_ptr = head_of(grad_o_ptr, grad_o_strides, image, head)
    rel_h_ptr = head_of(rel_h_ptr, h_strides, image, head)
    rel_w_ptr = head_of(rel_w_ptr, w_strides, image, head)
    k_ptr = head_of(k_ptr, k_strides, image, head)
    k = load_rows(k_ptr, k_strides, key, in_keys, FEATURES, LANES, REST, WIDEN)
    if grad_k_ptr is not None:
        v_ptr = head_of(v_ptr, v_strides, image, head)
        v = load_rows(v_ptr, v_strides, key, in_keys, FEATURES, LANES, REST, WIDEN)
        delta_ptr += number.to(tl.int64) * tokens
        grad_k = zeros(ROWS * COLUMNS, LANES, REST, DTYPE)
    if grad_v_ptr is not None:
        grad_v = zeros(ROWS * COLUMNS, LANES, REST, DTYPE)
    softmax_ptr += number.to(tl.int64) * tokens
    rest = tl.cast(batch, tl.int64) * heads * tokens

    for first in range(0, tokens, QUERIES):
        query = first + tl.arange(0, QUERIES)
        in_queries = None if FULL else query < tokens
        in_bias = None if FULL else (query < tokens)[:, None]
        if grad_k_ptr is not None:
            delta = tl.load(delta_ptr + query, mask=in_queries, other=None if FULL else 0.0)
        q = load_rows(q_ptr, q_strides, query, in_queries, FEATURES, LANES, REST, WIDEN)
        scores = products(k, q, DTYPE, PRECISION) * scale
        columns = tile % pieces * COLUMNS + tl.arange(0, COLUMNS)
        bias_w = load_bias(
            rel_w_ptr, w_strides, query[:, None], in_bias, columns[None, :], width, DTYPE
        )
        bias_w = tl.broadcast_to(bias_w[:, None, :], (QUERIES, ROWS, COLUMNS))
        scores += tl.trans(tl.reshape(bias_w, (QUERIES, ROWS * COLUMNS)))
        shift = tl.load(softmax_ptr + query, mask=in_queries, other=None if FULL else 0.0)
        if ROWS == 1:  # one number a query, which need not be added to each score
            bias_h = load_bias(rel_h_ptr, h_strides, query, in_queries, row, height, DTYPE)
            shift -= bias_h * LOG2E
        else:
            first_row = tile // pieces * ROWS
            bias_h = load_row_biases(
                rel_h_ptr, h_strides, query, in_bias, first_row, height, ROWS, COLUMNS, DTYPE
            )
            scores += tl.trans(bias_h)
        p = tl.exp2(scores * LOG2E - shift[None, :])
        if EXACT:
            factor = tl.load(
                softmax_ptr + rest + query, mask=in_queries, other=None if FULL else 0.0
            )
            p *= factor[None, :]
        grad_o = load_rows(
            grad_o_ptr, grad_o_strides, query, in_queries, FEATURES, LANES, REST, WIDEN
        )
        if grad_v_ptr is not None:
            grad_v = add_products(grad_v, p, grad_o, DTYPE, PRECISION)
        if grad_k_ptr is not None:
            grad_scores = p * (products(v, grad_o, DTYPE, PRECISION) - delta[None, :])
            grad_k = add_products(grad_k, grad_scores, q, DTYPE, PRECISION)

    if grad_k_ptr is not None:
        grad_k_ptr = head_of(grad_k_ptr, grad_strides, image, head)
        store_rows(grad_k_ptr, grad_strides, key, in_keys, grad_k, scale, FEATURES)
    if grad_v_ptr is not None:
        grad_v_ptr = head_of(grad_v_ptr, grad_strides, image, head)
        store_rows(grad_v_ptr, grad_strides, key, in_keys, grad_v, 1.0, FEATURES)


@triton.jit(do_not_specialize=["batch"])  # a last batch of 1 compiles nothing
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
    row_sums_ptr,
    scale,
    scale_rest,
    batch,
    heads,
    tokens,
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
    REST: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
    FULL: tl.constexpr,
    ONE_PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, drel_h and drel_w, contiguous, of QUERIES queries of a head; any may be None.

    drel_w of a piece of columns is complete after a loop over rows. drel_h is complete after all
    pieces: with several, row_sums, in the dtype of sums, keeps what came before. Over 60 lines
    because Triton takes the arguments one by one.
    """
    DTYPE: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    scale = whole(scale, scale_rest, DTYPE)
    EXACT: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth > 16
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
    grad_o_ptr = head_of(grad_o_ptr, grad_o_strides, image, head)
    grad_o = load_rows(grad_o_ptr, grad_o_strides, query, in_queries, FEATURES, LANES, REST, WIDEN)
    start = number.to(tl.int64) * tokens  # of the head in (B, heads, N)
    shift = tl.load(softmax_ptr + start + query, mask=in_queries)
    rest = tl.cast(batch, tl.int64) * heads * tokens
    factor = tl.load(softmax_ptr + rest + start + query, mask=in_queries)
    delta = tl.load(delta_ptr + start + query, mask=in_queries)
    token = start + query

    grad_q = zeros(QUERIES, LANES, REST, DTYPE)
    for first_column in range(0, COLUMNS if ONE_PIECE else width, COLUMNS):
        column = key_columns(first_column, ROWS, COLUMNS)
        bias_w = load_bias(
            rel_w_ptr, w_strides, query[:, None], in_bias, column[None, :], width, DTYPE
        )
        sums = tl.zeros((QUERIES, ROWS * COLUMNS), DTYPE)
        tl.debug_barrier()  # row_sums of the last columns are written
        for first_row in range(0, height, ROWS):
            row = key_rows(first_row, ROWS, COLUMNS)
            key = row * width + column
            in_keys = None if FULL else (row < height) & (column < width)
            k = load_rows(k_ptr, k_strides, key, in_keys, FEATURES, LANES, REST, WIDEN)
            v = load_rows(v_ptr, v_strides, key, in_keys, FEATURES, LANES, REST, WIDEN)
            scores = products(q, k, DTYPE, PRECISION) * scale + bias_w
            if ROWS == 1:  # one number a query, which need not be added to each score
                bias_h = load_bias(rel_h_ptr, h_strides, query, in_queries, row, height, DTYPE)
                row_shift = shift - bias_h * LOG2E
            else:
                scores += load_row_biases(
                    rel_h_ptr, h_strides, query, in_bias, first_row, height, ROWS, COLUMNS, DTYPE
                )
                row_shift = shift
            p = tl.exp2(scores * LOG2E - row_shift[:, None])
            if EXACT:
                p *= factor[:, None]
            grad_scores = p * (products(grad_o, v, DTYPE, PRECISION) - delta[:, None])
            if grad_q_ptr is not None:
                grad_q = add_products(grad_q, grad_scores, k, DTYPE, PRECISION)
            if grad_w_ptr is not None:
                sums += grad_scores
            if grad_h_ptr is not None:
                if ROWS == 1:
                    by_row = tl.sum(grad_scores, axis=1)
                    at = token * height + first_row
                    mask = in_queries
                else:
                    by_row = tl.sum(tl.reshape(grad_scores, (QUERIES, ROWS, COLUMNS)), axis=2)
                    rows = first_row + tl.arange(0, ROWS)
                    at = token[:, None] * height + rows[None, :]
                    mask = (query < tokens)[:, None] & (rows < height)[None, :]
                if not ONE_PIECE:
                    before = tl.full(by_row.shape, first_column, tl.int32) > 0
                    if mask is not None:
                        before = before & mask
                    by_row += tl.load(row_sums_ptr + at, mask=before, other=0.0)
                    tl.store(row_sums_ptr + at, by_row, mask=mask)
                tl.store(grad_h_ptr + at, rounded(by_row, grad_h_ptr.dtype.element_ty), mask=mask)
        if grad_w_ptr is not None:
            by_column = tl.sum(tl.reshape(sums, (QUERIES, ROWS, COLUMNS)), axis=1)
            columns = first_column + tl.arange(0, COLUMNS)
            by_column = rounded(by_column, grad_w_ptr.dtype.element_ty)
            to = grad_w_ptr + token[:, None] * width + columns[None, :]
            mask = (query < tokens)[:, None] & (columns < width)[None, :]
            tl.store(to, by_column, mask=mask)
    if grad_q_ptr is not None:
        grad_q_ptr = head_of(grad_q_ptr, grad_strides, image, head)
        store_rows(grad_q_ptr, grad_strides, query, in_queries, grad_q, scale, FEATURES)
