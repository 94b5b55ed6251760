"""What the Triton kernels share: the dtype sums are kept in, and rounding to a stored dtype."""

import triton
import triton.language as tl

# The interpreter truncates to bfloat16 instead of rounding, and cannot multiply such matrices.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def widened(value):
    """The value in the dtype of sums: float64 stays, all else becomes float32."""
    if value.dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """The value in a dtype to store, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value == value, nearest, bits | 0x400000) >> 16  # NaN stays one
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def dot(a, b, total):
    """total + a b, in the dtype of ``total``; a and b of one stored dtype, or one of them float32.

    A float32 matrix beside a 16-bit one is split into its rounded value and the rest, so that it
    loses nothing to the tensor cores' 16 bits.
    """
    if INTERPRETED:
        return tl.dot(a.to(total.dtype), b.to(total.dtype), total, out_dtype=total.dtype)
    elif a.dtype == b.dtype:
        return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)
    else:
        near = b.to(a.dtype)
        rest = (b - near.to(b.dtype)).to(a.dtype)
        total = tl.dot(a, near, total, out_dtype=total.dtype)
        return tl.dot(a, rest, total, out_dtype=total.dtype)
