"""Triton kernel of the second stage: adds up the groups' partial sums in order."""

import triton
import triton.language as tl

from naslora_kernels.triton.arithmetic import rounded, softmax


# A last batch of another size compiles nothing.
@triton.jit(do_not_specialize=["cell_groups", "A_groups", "B_groups"])
def reduce_gradients_kernel(
    cell_ptr,
    cell_groups,
    alpha_ptr,
    grad_alpha_ptr,
    grad_sep3_ptr,
    grad_sep5_ptr,
    grad_dil3_ptr,
    grad_dil5_ptr,
    grad_pw_ptr,
    A_ptr,
    A_groups,
    grad_A_ptr,
    A_columns,
    B_ptr,
    B_groups,
    grad_B_ptr,
    B_columns,
    rank,
    weight_programs,
    alpha_programs,
    A_programs,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALPHA_COLUMNS: tl.constexpr,
    PW: tl.constexpr,
    DW_SEP3: tl.constexpr,
    DW_SEP5: tl.constexpr,
    DW_DIL3: tl.constexpr,
    DW_DIL5: tl.constexpr,
    A_CONVOLUTIONS: tl.constexpr,
    A_OTHERS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Adds up partial sums, COLUMNS columns in each program.

    The first programs write the gradients of the cell's weights. The next one writes that of alpha
    from all of its columns, padded to ALPHA_COLUMNS. The next ones write grad_A (rank, A_columns).
    The last ones write grad_B (B_columns, rank). PW, ..., SIZE are the layout of a group's sums of
    the cell: ``partial_sums.py``.

    Over 60 lines because Triton and torch.compile take the arguments one by one.
    """
    program = tl.program_id(0)
    if program < weight_programs:
        if grad_pw_ptr is not None:
            column = program * COLUMNS + tl.arange(0, COLUMNS)
            total = _sum_groups(
                cell_ptr, cell_groups, SIZE, column, A_CONVOLUTIONS, GROUPS, COLUMNS
            )
            a = softmax(alpha_ptr, cell_ptr.dtype.element_ty)
            _store_pointwise(total, column - PW, a, grad_pw_ptr, CHANNELS)
            _store_range(total * a[0], column - DW_SEP3, grad_sep3_ptr, 9 * CHANNELS)
            _store_range(total * a[1], column - DW_SEP5, grad_sep5_ptr, 25 * CHANNELS)
            _store_range(total * a[2], column - DW_DIL3, grad_dil3_ptr, 9 * CHANNELS)
            _store_range(total * a[3], column - DW_DIL5, grad_dil5_ptr, 25 * CHANNELS)
    elif program < weight_programs + alpha_programs:
        if grad_alpha_ptr is not None:
            first, length = cell_ptr + A_CONVOLUTIONS, SIZE - A_CONVOLUTIONS
            columns = tl.arange(0, ALPHA_COLUMNS)
            total = _sum_groups(first, cell_groups, SIZE, columns, length, GROUPS, ALPHA_COLUMNS)
            a = softmax(alpha_ptr, cell_ptr.dtype.element_ty)
            _store_alpha(total, columns, a, A_OTHERS - A_CONVOLUTIONS, grad_alpha_ptr)
    elif program < weight_programs + alpha_programs + A_programs:
        if grad_A_ptr is not None:
            program -= weight_programs + alpha_programs
            column = program.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
            size = rank * A_columns
            total = _sum_groups(A_ptr, A_groups, size, column, size, GROUPS, COLUMNS)
            to = grad_A_ptr + column
            tl.store(to, rounded(total, grad_A_ptr.dtype.element_ty), mask=column < size)
    elif grad_B_ptr is not None:
        program -= weight_programs + alpha_programs + A_programs
        column = program.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        size = rank * B_columns
        total = _sum_groups(B_ptr, B_groups, size, column, size, GROUPS, COLUMNS)
        to = grad_B_ptr + column % B_columns * rank + column // B_columns
        tl.store(to, rounded(total, grad_B_ptr.dtype.element_ty), mask=column < size)


@triton.jit
def _sum_groups(
    partials_ptr, groups, size, column, columns, GROUPS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Returns the sums over groups of some columns of (groups, size) partials; (COLUMNS,)."""
    rows = tl.arange(0, GROUPS)[:, None]
    total = tl.zeros((GROUPS, COLUMNS), partials_ptr.dtype.element_ty)
    for first in range(0, groups, GROUPS):
        group = (first + rows).to(tl.int64)
        mask = (group < groups) & (column < columns)[None, :]
        total += tl.load(partials_ptr + group * size + column[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _store_pointwise(total, offset, a, grad_pw_ptr, CHANNELS: tl.constexpr):
    """Stores dL/dpw from its sums, which lack the factor a_i."""
    LENGTH: tl.constexpr = CHANNELS * CHANNELS
    for i in tl.static_range(4):
        _store_range(total * a[i], offset - i * LENGTH, grad_pw_ptr + i * LENGTH, LENGTH)


@triton.jit
def _store_range(values, offset, to_ptr, length):
    """Stores the values whose offset lies in 0..length-1."""
    values = rounded(values, to_ptr.dtype.element_ty)
    tl.store(to_ptr + offset, values, mask=(offset >= 0) & (offset < length))


@triton.jit
def _store_alpha(total, column, a, terms, grad_alpha_ptr):
    """Stores dL/dalpha_k = a_k (dL/da_k - sum_j a_j dL/da_j); dL/da of ``none`` is zero.

    The first ``terms`` columns are terms of the four convolutions, in turn. The next three are the
    poolings and the skip connection.
    """
    grad_a = ()
    mean = a[7] * 0
    for k in tl.static_range(7):
        if k < 4:
            mine = (column % 4 == k) & (column < terms)
        else:
            mine = column == terms + k - 4
        grad_a = grad_a + (tl.sum(tl.where(mine, total, 0.0), axis=0),)
        mean += a[k] * grad_a[k]
    grad_a = grad_a + (a[7] * 0,)
    for k in tl.static_range(8):
        grad = a[k] * (grad_a[k] - mean)
        tl.store(grad_alpha_ptr + k, rounded(grad, grad_alpha_ptr.dtype.element_ty))
