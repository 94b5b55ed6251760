"""What the Triton kernels share: the dtype of sums, rounding to a stored dtype, products."""

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
def whole(number, rest, dtype: tl.constexpr):
    """A float argument in full: Triton passes float32, so the launch adds what that leaves."""
    return tl.cast(number, dtype) + tl.cast(rest, dtype)


@triton.jit
def dot(a, b, dtype: tl.constexpr):
    """a b, summed in ``dtype``; of two dtypes one is float32.

    A float32 matrix beside a 16-bit one is split into its rounded value and the rest, so that it
    loses nothing to the 16 bits of the tensor cores.
    """
    if INTERPRETED:
        return tl.dot(a.to(dtype), b.to(dtype), out_dtype=dtype)
    elif a.dtype == b.dtype:
        return tl.dot(a, b, input_precision="ieee", out_dtype=dtype)
    else:
        near = b.to(a.dtype)
        total = tl.dot(a, near, out_dtype=dtype)
        return tl.dot(a, (b - near.to(tl.float32)).to(a.dtype), total, out_dtype=dtype)
