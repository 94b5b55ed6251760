"""Triton kernel of the second stage: sums over groups, in order, to the gradients of parameters."""

import triton
import triton.language as tl

from naslora_kernels.triton_cell import softmax
from naslora_kernels.triton_numbers import rounded


@triton.jit
def reduce_gradients_kernel(
    cell_ptr, cell_groups, alpha_ptr, grad_alpha_ptr, grad_sep3_ptr, grad_sep5_ptr, grad_dil3_ptr,
    grad_dil5_ptr, grad_pw_ptr, A_ptr, A_groups, grad_A_ptr, A_columns, B_ptr, B_groups, grad_B_ptr,
    B_columns, rank, weight_programs, alpha_programs, A_programs,
    CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds up partial sums column by column: first programs for the cell's weights, then one for
    alpha, then those for grad_A (rank, A_columns) and grad_B (B_columns, rank).

    ``cell_backward_kernel`` tells how a group of the cell lies in memory.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    WEIGHTS: tl.constexpr = (4 * CHANNELS + 68) * CHANNELS
    SIZE: tl.constexpr = WEIGHTS + 4 * BLOCKS + 3
    if program < weight_programs:
        if grad_pw_ptr is not None:
            column = program * COLUMNS + columns
            total = _sum_groups(cell_ptr, cell_groups, SIZE, column, WEIGHTS, GROUPS, COLUMNS)
            grad_depthwise = (grad_sep3_ptr, grad_sep5_ptr, grad_dil3_ptr, grad_dil5_ptr)
            _store_weights(
                total,
                column,
                softmax(alpha_ptr, cell_ptr.dtype.element_ty),
                grad_depthwise,
                grad_pw_ptr,
                CHANNELS,
            )
    elif program < weight_programs + alpha_programs:
        if grad_alpha_ptr is not None:
            total = _sum_groups(
                cell_ptr + WEIGHTS, cell_groups, SIZE, columns, SIZE - WEIGHTS, GROUPS, COLUMNS
            )
            _store_alpha(
                total,
                columns,
                softmax(alpha_ptr, cell_ptr.dtype.element_ty),
                grad_alpha_ptr,
                BLOCKS,
            )
    elif program < weight_programs + alpha_programs + A_programs:
        if grad_A_ptr is not None:
            column = (program - weight_programs - alpha_programs).to(tl.int64) * COLUMNS + columns
            size = rank * A_columns
            total = _sum_groups(A_ptr, A_groups, size, column, size, GROUPS, COLUMNS)
            to = grad_A_ptr + column
            tl.store(to, rounded(total, grad_A_ptr.dtype.element_ty), mask=column < size)
    elif grad_B_ptr is not None:
        program -= weight_programs + alpha_programs + A_programs
        column = program.to(tl.int64) * COLUMNS + columns
        size = rank * B_columns
        total = _sum_groups(B_ptr, B_groups, size, column, size, GROUPS, COLUMNS)
        to = grad_B_ptr + column % B_columns * rank + column // B_columns
        tl.store(to, rounded(total, grad_B_ptr.dtype.element_ty), mask=column < size)


@triton.jit
def _sum_groups(
    partials_ptr, groups, size, column, columns, GROUPS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The sums over groups of some columns of (groups, size) partials; (COLUMNS,)."""
    rows = tl.arange(0, GROUPS)[:, None]
    total = tl.zeros((GROUPS, COLUMNS), partials_ptr.dtype.element_ty)
    for first in range(0, groups, GROUPS):
        group = (first + rows).to(tl.int64)
        mask = (group < groups) & (column < columns)[None, :]
        total += tl.load(partials_ptr + group * size + column[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _store_weights(total, column, a, grad_depthwise, grad_pw_ptr, CHANNELS: tl.constexpr):
    """dL/dpw and dL/ddw from their sums, which lack the factor a_i."""
    PW: tl.constexpr = CHANNELS * CHANNELS
    for i in tl.static_range(4):
        taps = 9 + 16 * (i % 2)
        before = 4 * PW + (i // 2 * 34 + i % 2 * 9) * CHANNELS
        _store_range(total * a[i], column - i * PW, grad_pw_ptr + i * PW, PW)
        _store_range(total * a[i], column - before, grad_depthwise[i], taps * CHANNELS)


@triton.jit
def _store_range(values, offset, to_ptr, length):
    """Stores the values whose offset lies in 0..length-1."""
    values = rounded(values, to_ptr.dtype.element_ty)
    tl.store(to_ptr + offset, values, mask=(offset >= 0) & (offset < length))


@triton.jit
def _store_alpha(total, column, a, grad_alpha_ptr, BLOCKS: tl.constexpr):
    """dL/dalpha_k = a_k (dL/da_k - sum_j a_j dL/da_j); dL/da of ``none`` is zero."""
    grad_a = ()
    mean = a[7] * 0
    for k in tl.static_range(7):
        if k < 4:
            mine = (column % 4 == k) & (column < 4 * BLOCKS)
        else:
            mine = column == 4 * BLOCKS + k - 4
        grad_a = grad_a + (tl.sum(tl.where(mine, total, 0.0), axis=0),)
        mean += a[k] * grad_a[k]
    grad_a = grad_a + (a[7] * 0,)
    for k in tl.static_range(8):
        grad = a[k] * (grad_a[k] - mean)
        tl.store(grad_alpha_ptr + k, rounded(grad, grad_alpha_ptr.dtype.element_ty))
