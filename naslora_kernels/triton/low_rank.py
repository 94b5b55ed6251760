"""Triton kernels of the products with lora_A and lora_B. Each reads or writes its rows once."""

import triton
import triton.language as tl

from naslora_kernels.triton.arithmetic import dot, rounded, whole, widened


@triton.jit(do_not_specialize=["tokens"])  # a last batch of another size compiles nothing
def low_rank_pass_kernel(
    rows_ptr,
    factor_ptr,
    u_ptr,
    product_ptr,
    partials_ptr,
    scale,
    scale_rest,
    tokens,
    columns,
    row_stride,
    factor_stride_r,
    factor_stride_c,
    span,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """product = scale rows factor^T and partials[group] = scale u^T rows; either may be None.

    Program (g, s) takes ROWS rows and ``span`` columns. If there is a product, ``span`` is all
    columns. This kernel is for few ranks: a thread keeps its terms of the product for each rank and
    adds them up at the end.

    Over 60 lines because Triton and torch.compile take the arguments one by one.
    """
    DTYPE: tl.constexpr = tl.float64 if rows_ptr.dtype.element_ty == tl.float64 else tl.float32
    scale = whole(scale, scale_rest, DTYPE)
    factor_stride_r = tl.cast(factor_stride_r, tl.int64)
    group = tl.program_id(0).to(tl.int64)
    row = group * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    in_rows = row < tokens
    first = tl.program_id(1) * span
    rows_ptr += row[:, None] * row_stride

    sums, u = (), ()
    for k in tl.static_range(RANK):
        if product_ptr is not None:
            sums = sums + (tl.zeros((ROWS, COLUMNS), DTYPE),)
        if partials_ptr is not None:
            u = u + (tl.load(u_ptr + row * RANK + k, mask=in_rows, other=0.0).to(DTYPE)[:, None],)
    for start in range(first, tl.minimum(first + span, columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)  # (COLUMNS,)
        in_columns = column < columns
        mask = in_rows[:, None] & in_columns[None, :]
        values = tl.load(rows_ptr + column[None, :], mask=mask, other=0.0).to(DTYPE)
        if product_ptr is not None:
            at = factor_ptr + column.to(tl.int64) * factor_stride_c
            new_sums = ()
            for k in tl.static_range(RANK):
                weights = tl.load(at + k * factor_stride_r, mask=in_columns, other=0.0).to(DTYPE)
                new_sums = new_sums + (sums[k] + values * weights[None, :],)
            sums = new_sums
        if partials_ptr is not None:
            for k in tl.static_range(RANK):
                to = partials_ptr + (group * RANK + k) * columns + column
                tl.store(to, tl.sum(values * u[k], axis=0) * scale, mask=in_columns)
    if product_ptr is not None:
        for k in tl.static_range(RANK):
            total = rounded(tl.sum(sums[k], axis=1) * scale, product_ptr.dtype.element_ty)
            tl.store(product_ptr + row * RANK + k, total, mask=in_rows)


@triton.jit(do_not_specialize=["tokens"])  # a last batch of another size compiles nothing
def low_rank_pass_dot_kernel(
    rows_ptr,
    factor_ptr,
    u_ptr,
    product_ptr,
    partials_ptr,
    scale,
    scale_rest,
    tokens,
    columns,
    row_stride,
    factor_stride_r,
    factor_stride_c,
    span,
    RANK: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Computes what ``low_rank_pass_kernel`` computes, by matrix products.

    A group is STEPS tiles of ROWS rows. RANK ranks are padded to LANES. WIDEN: the card has no
    16-bit products.

    Over 60 lines because both products share one loop over the columns, which reads the rows once.
    """
    DTYPE: tl.constexpr = tl.float64 if rows_ptr.dtype.element_ty == tl.float64 else tl.float32
    scale = whole(scale, scale_rest, DTYPE)
    factor_stride_r = tl.cast(factor_stride_r, tl.int64)
    group = tl.program_id(0).to(tl.int64)
    row = group * (ROWS * STEPS) + tl.arange(0, ROWS)
    rank = tl.arange(0, LANES)
    in_ranks = rank < RANK
    first = tl.program_id(1) * span

    sums, u = (), ()
    for step in tl.static_range(STEPS):
        if product_ptr is not None:
            sums = sums + (tl.zeros((ROWS, LANES), DTYPE),)
        if partials_ptr is not None:
            u_token = row[None, :] + step * ROWS
            in_u = in_ranks[:, None] & (u_token < tokens)
            some_u = tl.load(u_ptr + u_token * RANK + rank[:, None], mask=in_u, other=0.0)
            u = u + (widened(some_u) if WIDEN else some_u,)
    for start in range(first, tl.minimum(first + span, columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        in_columns = column < columns
        if product_ptr is not None:
            at = factor_ptr + column[:, None].to(tl.int64) * factor_stride_c
            mask = in_columns[:, None] & in_ranks[None, :]
            weights = tl.load(at + rank[None, :] * factor_stride_r, mask=mask, other=0.0)
            weights = widened(weights) if WIDEN else weights
        if partials_ptr is not None:
            total = tl.zeros((LANES, COLUMNS), DTYPE)
        new_sums = ()
        for step in tl.static_range(STEPS):
            token = row[:, None] + step * ROWS
            mask = (token < tokens) & in_columns[None, :]
            at = rows_ptr + token * row_stride + column[None, :]
            values = tl.load(at, mask=mask, other=0.0)
            values = widened(values) if WIDEN else values
            if product_ptr is not None:
                new_sums = new_sums + (sums[step] + dot(values, weights, DTYPE),)
            if partials_ptr is not None:
                total += dot(u[step], values, DTYPE)
        sums = new_sums
        if partials_ptr is not None:
            to = partials_ptr + (group * RANK + rank[:, None]) * columns + column[None, :]
            tl.store(to, total * scale, mask=in_ranks[:, None] & in_columns[None, :])
    if product_ptr is not None:
        for step in tl.static_range(STEPS):
            token = row[:, None] + step * ROWS
            values = rounded(sums[step] * scale, product_ptr.dtype.element_ty)
            to = product_ptr + token * RANK + rank[None, :]
            tl.store(to, values, mask=(token < tokens) & in_ranks[None, :])


@triton.jit(do_not_specialize=["tokens"])  # a last batch of another size compiles nothing
def low_rank_expand_kernel(
    u_ptr,
    factor_ptr,
    bias_ptr,
    out_ptr,
    scale,
    scale_rest,
    tokens,
    columns,
    factor_stride_r,
    factor_stride_c,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out = bias + scale u factor, on a tile of ROWS x COLUMNS, BLOCK ranks at a time.

    BLOCK divides RANK.
    """
    DTYPE: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < tokens, column < columns
    factor_ptr += column.to(tl.int64) * factor_stride_c
    factor_stride_r = tl.cast(factor_stride_r, tl.int64)
    out = tl.zeros((ROWS, COLUMNS), DTYPE)
    for first in range(0, RANK, BLOCK):
        for j in tl.static_range(BLOCK):
            k = first + j
            u = tl.load(u_ptr + row * RANK + k, mask=in_rows, other=0.0).to(DTYPE)
            weights = tl.load(factor_ptr + k * factor_stride_r, mask=in_columns, other=0.0)
            out += u[:, None] * weights.to(DTYPE)[None, :]
    out *= whole(scale, scale_rest, DTYPE)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(DTYPE)[None, :]
    to = out_ptr + row[:, None] * columns + column[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(to, rounded(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])  # a last batch of another size compiles nothing
def low_rank_expand_dot_kernel(
    u_ptr,
    factor_ptr,
    bias_ptr,
    out_ptr,
    scale,
    scale_rest,
    tokens,
    columns,
    factor_stride_r,
    factor_stride_c,
    RANK: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Computes what ``low_rank_expand_kernel`` computes, by a matrix product of 16-bit maps.

    RANK ranks are padded to LANES.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, LANES)
    in_rows, in_columns, in_ranks = row < tokens, column < columns, rank < RANK
    mask = in_rows[:, None] & in_ranks[None, :]
    u = tl.load(u_ptr + row[:, None] * RANK + rank[None, :], mask=mask, other=0.0)
    at = factor_ptr + rank[:, None] * tl.cast(factor_stride_r, tl.int64)
    at += column[None, :].to(tl.int64) * factor_stride_c
    weights = tl.load(at, mask=in_ranks[:, None] & in_columns[None, :], other=0.0)
    out = dot(u, weights, tl.float32) * whole(scale, scale_rest, tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    to = out_ptr + row[:, None] * columns + column[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(to, rounded(out, out_ptr.dtype.element_ty), mask=mask)
