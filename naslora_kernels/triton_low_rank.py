"""Triton kernels of the adapter's skinny products: each reads or writes its rows once.

Up to four ranks, the products are sums of elementwise ones in registers; beyond, matrix products.
"""

import triton
import triton.language as tl

from naslora_kernels.triton_numbers import dot, rounded, widened


@triton.jit
def low_rank_pass_kernel(
    rows_ptr, matrix_ptr, u_ptr, product_ptr, partials_ptr, scale, tokens, columns, row_stride,
    matrix_stride_r, matrix_stride_c, span,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """product = scale rows matrix^T and partials[group] = scale u^T rows, either may be None.

    Program (g, s) takes ROWS rows and ``span`` columns: all of them where it has a product to sum.
    """
    group = tl.program_id(0).to(tl.int64)
    row = group * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    in_rows = row < tokens
    lanes = tl.arange(0, COLUMNS)
    first = tl.program_id(1) * span
    row_ptrs = rows_ptr + row[:, None] * row_stride

    sums, u = (), ()
    for k in tl.static_range(RANK):
        if product_ptr is not None:
            sums = sums + (widened(tl.zeros((ROWS, COLUMNS), rows_ptr.dtype.element_ty)),)
        if partials_ptr is not None:
            u = u + (widened(tl.load(u_ptr + row * RANK + k, mask=in_rows, other=0.0))[:, None],)
    for start in range(first, tl.minimum(first + span, columns), COLUMNS):
        column = start + lanes
        in_columns = column < columns
        mask = in_rows[:, None] & in_columns[None, :]
        values = widened(tl.load(row_ptrs + column[None, :], mask=mask, other=0.0))
        if product_ptr is not None:
            new_sums = ()
            for k in tl.static_range(RANK):
                at = matrix_ptr + k * matrix_stride_r + column.to(tl.int64) * matrix_stride_c
                weights = widened(tl.load(at, mask=in_columns, other=0.0))
                new_sums = new_sums + (sums[k] + values * weights[None, :].to(values.dtype),)
            sums = new_sums
        if partials_ptr is not None:
            for k in tl.static_range(RANK):
                total = tl.sum(values * u[k], axis=0) * scale
                to = partials_ptr + (group * RANK + k) * columns + column
                tl.store(to, total, mask=in_columns)
    if product_ptr is not None:
        for k in tl.static_range(RANK):
            total = tl.sum(sums[k], axis=1) * scale
            total = rounded(total, product_ptr.dtype.element_ty)
            tl.store(product_ptr + row * RANK + k, total, mask=in_rows)


@triton.jit
def low_rank_pass_dot_kernel(
    rows_ptr, matrix_ptr, u_ptr, product_ptr, partials_ptr, scale, tokens, columns, row_stride,
    matrix_stride_r, matrix_stride_c, span,
    RANK: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As ``low_rank_pass_kernel``, by matrix products on RANK ranks padded to LANES."""
    group = tl.program_id(0).to(tl.int64)
    row = group * ROWS + tl.arange(0, ROWS)
    in_rows = row < tokens
    lanes = tl.arange(0, COLUMNS)
    ranks = tl.arange(0, LANES)
    in_ranks = ranks < RANK
    first = tl.program_id(1) * span
    row_ptrs = rows_ptr + row[:, None] * row_stride

    sums = widened(tl.zeros((ROWS, LANES), rows_ptr.dtype.element_ty))
    if partials_ptr is not None:
        u_mask = in_ranks[:, None] & in_rows[None, :]
        u = tl.load(u_ptr + row[None, :] * RANK + ranks[:, None], mask=u_mask, other=0.0)
    for start in range(first, tl.minimum(first + span, columns), COLUMNS):
        column = start + lanes
        in_columns = column < columns
        mask = in_rows[:, None] & in_columns[None, :]
        values = tl.load(row_ptrs + column[None, :], mask=mask, other=0.0)
        if product_ptr is not None:
            at = matrix_ptr + ranks[None, :] * matrix_stride_r + column[:, None] * matrix_stride_c
            weights_mask = in_columns[:, None] & in_ranks[None, :]
            weights = tl.load(at, mask=weights_mask, other=0.0)
            sums = dot(values, weights, sums)
        if partials_ptr is not None:
            total = dot(u, values, tl.zeros((LANES, COLUMNS), sums.dtype)) * scale
            to = partials_ptr + (group * RANK + ranks[:, None]) * columns + column[None, :]
            tl.store(to, total, mask=in_ranks[:, None] & in_columns[None, :])
    if product_ptr is not None:
        to = product_ptr + row[:, None] * RANK + ranks[None, :]
        values = rounded(sums * scale, product_ptr.dtype.element_ty)
        tl.store(to, values, mask=in_rows[:, None] & in_ranks[None, :])


@triton.jit
def low_rank_expand_kernel(
    u_ptr, matrix_ptr, bias_ptr, out_ptr, scale, tokens, columns, matrix_stride_r, matrix_stride_c,
    RANK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = bias + scale u matrix, on a tile of ROWS x COLUMNS; BLOCK ranks, a divisor of RANK, at a
    time."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < tokens, column < columns
    out = widened(tl.zeros((ROWS, COLUMNS), out_ptr.dtype.element_ty))
    for first in range(0, RANK, BLOCK):
        for j in tl.static_range(BLOCK):
            k = first + j
            u = tl.load(u_ptr + row * RANK + k, mask=in_rows, other=0.0)
            at = matrix_ptr + k * matrix_stride_r + column.to(tl.int64) * matrix_stride_c
            weights = tl.load(at, mask=in_columns, other=0.0)
            out += widened(u)[:, None] * widened(weights)[None, :].to(out.dtype)
    out *= scale
    if bias_ptr is not None:
        out += widened(tl.load(bias_ptr + column, mask=in_columns, other=0.0))[None, :].to(
            out.dtype
        )
    to = out_ptr + row[:, None] * columns + column[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(to, rounded(out, out_ptr.dtype.element_ty), mask=mask)
