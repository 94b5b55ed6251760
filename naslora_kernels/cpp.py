"""The ``cpp`` backend: the kernels of ``csrc`` as the CPU implementation of ``ops.py``.

The extension is plain C++ over addresses, so it depends on no version of torch. At import it is
given torch's own thread pool, so it runs on as many threads as ``torch.set_num_threads`` says, and
the best instruction set of this machine, or the one that NASLORA_CPU_CAPABILITY names.
"""

import ctypes
import os

import torch
from torch import Tensor

from naslora_kernels.ops import define_operators, entry_points, gradient_like

try:
    from naslora_kernels import _C
except ImportError as error:
    _C = None
    _import_error = error

CAPABILITY_VARIABLE = "NASLORA_CPU_CAPABILITY"

# The order of Dtype in csrc/cpu_kernels.h, and the dtype that each is computed in.
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ACCUMULATORS = dict.fromkeys(_DTYPE_CODES, torch.float32) | {torch.float64: torch.float64}


def unavailable_reason() -> str | None:
    """Why the extension cannot be used, or None."""
    if _C is None:
        return (
            f"the C++ extension is not there ({_import_error}); reinstall naslora with a C++17 "
            "compiler (GCC or Clang) present and NASLORA_SKIP_EXT unset"
        )
    if instruction_set() is None:
        return (
            f"{CAPABILITY_VARIABLE}={os.environ[CAPABILITY_VARIABLE]!r} names none of "
            f"{', '.join(_C.capabilities())}"
        )
    return None


def unsupported_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why these tensors cannot be served, or None."""
    if device_type != "cpu":
        return f"it computes on the CPU, the tensors are on {device_type!r}"
    return None if dtype in _DTYPE_CODES else f"it has no kernels for {dtype}"


def instruction_set() -> str | None:
    """The instruction set to compute with; None if the environment names an impossible one."""
    best = _C.capabilities()[-1]
    wanted = os.environ.get(CAPABILITY_VARIABLE) or best
    return wanted if wanted in _C.capabilities() else None


def build_info() -> dict[str, object]:
    """How the extension was compiled and what it uses here; empty if there is none."""
    if _C is None:
        return {}
    compiler, compiled = _C.build_info()
    return {
        "compiler": compiler,
        "architectures": compiled,
        "instruction_set": instruction_set(),
        "shares_torch_threads": bool(_torch_parallel_for()),
    }


mixed_cell, nas_lora_linear, folded_cell, folded_linear = entry_points("cpp")


def _mixed_cell(z, alpha, depthwise, pw, channels):
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    cell = _CellArguments(z, alpha, depthwise, pw, channels)
    _C.cell_forward(*cell.addresses, y.data_ptr())
    return y


def _mixed_cell_backward(
    grad_y, z, alpha, depthwise, pw, channels, need_z, need_alpha, need_weights
):
    cell = _CellArguments(z, alpha, depthwise, pw, channels)
    dtype = cell.dtype
    grad_z = gradient_like(z, need_z)
    grad_alpha = gradient_like(alpha, need_alpha, dtype)
    grad_weights = [gradient_like(weight, need_weights, dtype) for weight in (*depthwise, pw)]
    _C.cell_backward(
        *cell.addresses,
        grad_y.data_ptr(),
        *grad_y.stride(),
        grad_z.data_ptr() if need_z else 0,
        grad_alpha.data_ptr() if need_alpha else 0,
        *(gradient.data_ptr() if need_weights else 0 for gradient in grad_weights),
    )
    return (
        grad_z,
        grad_alpha.to(alpha.dtype),
        *(g.to(w.dtype) for g, w in zip(grad_weights, (*depthwise, pw), strict=True)),
    )


def _nas_lora_linear(x, weight, bias, lora_A, lora_B, alpha, depthwise, pw, channels, scaling):
    rows = _rows(x)  # (tokens, C_in)
    tokens, c_in = rows.shape
    c_out, rank = lora_B.shape
    code, dtype = _DTYPE_CODES[x.dtype], _ACCUMULATORS[x.dtype]

    z = x.new_empty((*x.shape[:-1], rank))
    encoder = _plain(lora_A, dtype)
    _C.low_rank_pass(
        code, rows.data_ptr(), rows.stride(0), tokens, c_in, rank, 1.0,
        encoder.data_ptr(), z.data_ptr(), 0, 0, 0, 0,
    )  # fmt: skip
    y = _mixed_cell(z, alpha, depthwise, pw, channels) if pw.shape[-1] else z

    # h starts as the bias and the adapter's part, and the frozen product is added to it: that
    # costs what starting from the bias alone costs, where updating h afterwards would read and
    # write all of it once more.
    h = x.new_empty((*x.shape[:-1], c_out))
    decoder = _plain(lora_B.t(), dtype)  # (r, C_out)
    start = None if bias is None else _plain(bias, dtype)
    _C.low_rank_expand(
        code, y.data_ptr(), decoder.data_ptr(), 0 if start is None else start.data_ptr(),
        tokens, c_out, rank, scaling, h.data_ptr(),
    )  # fmt: skip
    h.view(tokens, c_out).addmm_(rows, weight.t())
    return h, z


def _nas_lora_linear_backward(
    grad_h, x, z, weight, lora_A, lora_B, alpha, depthwise, pw, channels, scaling,
    need_x, need_lora_A, need_lora_B, need_alpha, need_weights,
):  # fmt: skip
    rows = _rows(grad_h)  # (tokens, C_out)
    tokens, c_out = rows.shape
    rank, c_in = lora_A.shape
    code, dtype = _DTYPE_CODES[z.dtype], _ACCUMULATORS[z.dtype]
    has_cell = pw.shape[-1] > 0

    # One pass over grad_h: grad_y = s grad_h W_d and grad W_d = s grad_h^T y.
    need_y_gradient = need_x or need_lora_A or need_alpha or need_weights
    y = grad_y = decoder = None
    grad_B = gradient_like(lora_B, need_lora_B, dtype)
    if need_lora_B:
        y = _mixed_cell(z, alpha, depthwise, pw, channels) if has_cell else z
    if need_y_gradient:
        grad_y = torch.empty_like(z)
        decoder = _plain(lora_B.t(), dtype)
    _C.low_rank_pass(
        code, rows.data_ptr(), rows.stride(0), tokens, c_out, rank, scaling,
        _address(decoder), _address(grad_y), _address(y), grad_B.data_ptr() if need_lora_B else 0,
        1, rank,
    )  # fmt: skip

    grad_z, grad_cell = grad_y, None
    if need_y_gradient and has_cell:
        grad_z, *grad_cell = _mixed_cell_backward(
            grad_y, z, alpha, depthwise, pw, channels,
            need_x or need_lora_A, need_alpha, need_weights,
        )  # fmt: skip
    else:
        grad_cell = [
            gradient_like(t, need).zero_()
            for t, need in ((alpha, need_alpha), *((w, need_weights) for w in (*depthwise, pw)))
        ]

    grad_A = gradient_like(lora_A, need_lora_A, dtype)
    if need_lora_A:
        inputs = _rows(x)
        _C.low_rank_pass(
            code, inputs.data_ptr(), inputs.stride(0), tokens, c_in, rank, 1.0,
            0, 0, grad_z.data_ptr(), grad_A.data_ptr(), c_in, 1,
        )  # fmt: skip

    grad_x = z.new_empty((*z.shape[:-1], c_in) if need_x else (0,))
    if need_x:
        encoder = _plain(lora_A, dtype)
        _C.low_rank_expand(
            code, grad_z.data_ptr(), encoder.data_ptr(), 0, tokens, c_in, rank, 1.0,
            grad_x.data_ptr(),
        )  # fmt: skip
        grad_x.view(tokens, c_in).addmm_(rows, weight)
    return grad_x, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype), *grad_cell


def _folded_cell(z, kernel, average, maximum):
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    taps = _plain(kernel, _ACCUMULATORS[z.dtype])
    _C.folded_cell(
        _DTYPE_CODES[z.dtype], *z.shape, taps.data_ptr(), taps.shape[-1], average, maximum,
        z.data_ptr(), *z.stride(), y.data_ptr(),
    )  # fmt: skip
    return y


def _folded_linear(x, weight, bias, lora_A, lora_B, kernel, average, maximum):
    rows, grid, dtype = _rows(x), x.shape[:-1], _ACCUMULATORS[x.dtype]
    tokens, c_in = rows.shape
    c_out, c = lora_B.shape
    h = x.new_empty((*grid, c_out))
    taps, encoder = _plain(kernel, dtype), _plain(lora_A, dtype)
    decoder = _plain(lora_B.t(), dtype)  # (c, C_out)
    start = None if bias is None else _plain(bias, dtype)
    # As in _nas_lora_linear h starts as the bias and the adapter's part.
    _C.folded_update(
        _DTYPE_CODES[x.dtype], *grid, c, taps.data_ptr(), taps.shape[-1], average, maximum,
        rows.data_ptr(), rows.stride(0), c_in, encoder.data_ptr(), decoder.data_ptr(),
        _address(start), c_out, h.data_ptr(),
    )  # fmt: skip
    h.view(tokens, c_out).addmm_(rows, weight.t())
    return h


class _CellArguments:
    """A cell's arguments as addresses; keeps the tensors behind them alive."""

    def __init__(self, z, alpha, depthwise, pw, channels):
        self.dtype = dtype = _ACCUMULATORS[z.dtype]
        parameters = [_plain(t, dtype) for t in (alpha, *depthwise, pw)]
        channels = None if channels is None else channels.contiguous()
        self._alive = parameters, channels
        self.addresses = (
            _DTYPE_CODES[z.dtype],
            *z.shape,
            pw.shape[-1],
            _address(channels),
            *(t.data_ptr() for t in parameters),
            z.data_ptr(),
            *z.stride(),
        )


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor  # half a microsecond sooner than the calls below find that out
    return tensor.to(dtype).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(grid: Tensor) -> Tensor:
    """(..., channels) as a matrix (tokens, channels) whose rows are contiguous."""
    rows = grid.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _torch_parallel_for() -> int:
    """The address of torch's C function of that name, which runs work on its threads; else 0.

    It is found in the libraries that ``torch._C`` was linked with.
    """
    try:
        function = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except (AttributeError, OSError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value


if _C is not None:
    _C.set_parallel_for(_torch_parallel_for())
    if instruction_set():
        _C.use_capability(instruction_set())
    _library = define_operators("cpp")
    _library.impl("mixed_cell", _mixed_cell, "CPU")
    _library.impl("mixed_cell_backward", _mixed_cell_backward, "CPU")
    _library.impl("nas_lora_linear", _nas_lora_linear, "CPU")
    _library.impl("nas_lora_linear_backward", _nas_lora_linear_backward, "CPU")
    _library.impl("folded_cell", _folded_cell, "CPU")
    _library.impl("folded_linear", _folded_linear, "CPU")
