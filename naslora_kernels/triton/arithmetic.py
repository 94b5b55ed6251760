"""Arithmetic of all Triton kernels: the dtype of sums, rounding, products, softmax."""

import triton
import triton.language as tl

# The interpreter truncates to bfloat16 instead of rounding, and cannot multiply bfloat16 matrices.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
IEEE = tl.constexpr("ieee")  # Triton 3.6 takes a default only in this form


@triton.jit
def widened(value):
    """Returns the value in the dtype of sums: float64 stays, all others become float32."""
    if value.dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """Returns the value in the dtype in which it is stored, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value == value, nearest, bits | 0x400000) >> 16  # NaN stays NaN
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def whole(number, rest, dtype: tl.constexpr):
    """Returns a float argument with full precision.

    Triton passes arguments as float32. The launch passes what float32 lost as ``rest``.
    """
    return tl.cast(number, dtype) + tl.cast(rest, dtype)


@triton.jit
def dot(a, b, dtype: tl.constexpr, PRECISION: tl.constexpr = IEEE):
    """Returns the matrix product a b, summed in ``dtype``.

    If the dtypes differ, b is float32 and a has 16 bits. Then b is split into its rounded value
    and the rest, so the 16 bits of the tensor cores lose nothing of b. PRECISION is Triton's
    ``input_precision`` of float32.
    """
    if INTERPRETED:
        return tl.dot(a.to(dtype), b.to(dtype), out_dtype=dtype)
    elif a.dtype == b.dtype:
        return tl.dot(a, b, input_precision=PRECISION, out_dtype=dtype)
    else:
        near = b.to(a.dtype)
        total = tl.dot(a, near, out_dtype=dtype)
        return tl.dot(a, (b - near.to(tl.float32)).to(a.dtype), total, out_dtype=dtype)


@triton.jit
def softmax(alpha_ptr, DTYPE: tl.constexpr):
    """Returns the weights a = softmax(alpha) of the operations, a tuple of eight scalars."""
    logits = ()
    for i in tl.static_range(8):
        logits = logits + (tl.load(alpha_ptr + i).to(DTYPE),)
    largest = logits[0]
    for i in tl.static_range(1, 8):
        largest = tl.maximum(largest, logits[i])
    total = largest * 0
    exponentials = ()
    for i in tl.static_range(8):
        exponentials = exponentials + (tl.exp(logits[i] - largest),)
        total += exponentials[i]
    weights = ()
    for i in tl.static_range(8):
        weights = weights + (exponentials[i] / total,)
    return weights
