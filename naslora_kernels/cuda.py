"""The ``cuda`` backend: the kernels of ``csrc/cuda`` as the primitives of ``gpu.py``.

The extension is CUDA C++ over addresses and streams, so it depends on no version of torch. Each
function below is one launch, on the current stream of the tensors' device.

For tests where no GPU is, NASLORA_CUDA_EMULATION names an extension built from the same sources for
the CPU (``python tests/cuda_emulation.py``), which then computes on CPU tensors, slowly.
"""

import importlib.machinery
import importlib.util
import os
import re
import sys

import torch
from torch import Tensor

from naslora_kernels import gpu
from naslora_kernels.ops import entry_points

EMULATION_VARIABLE = "NASLORA_CUDA_EMULATION"
_emulation = os.environ.get(EMULATION_VARIABLE)


def _load_emulation(path: str):
    name = "naslora_kernels._CUDA"
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


try:
    if _emulation:
        _CUDA = _load_emulation(_emulation)
    else:
        from naslora_kernels import _CUDA
except ImportError as error:
    _CUDA = None
    _import_error = error

# The order of Dtype in csrc/cuda/kernels.h.
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def unavailable_reason() -> str | None:
    """Why the extension cannot be used, or None."""
    if _CUDA is None:
        return (
            f"the CUDA extension is not there ({_import_error}); reinstall naslora with nvcc on "
            "the PATH or below CUDA_HOME, and NASLORA_SKIP_CUDA unset"
        )
    if _emulation:
        return None
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not _serves(architectures(), capability):
            return (
                f"cuda:{index} has compute capability {capability[0]}.{capability[1]}, the "
                f"extension was built for {', '.join(architectures())}; reinstall naslora with "
                "TORCH_CUDA_ARCH_LIST naming it"
            )
    return None


def unsupported_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why these tensors cannot be served, or None."""
    served = "cpu" if _emulation else "cuda"
    if device_type != served:
        return f"it computes on {served!r}, the tensors are on {device_type!r}"
    return None if dtype in _DTYPE_CODES else f"it has no kernels for {dtype}"


def build_info() -> dict[str, object]:
    """How the extension was compiled; empty if there is none."""
    if _CUDA is None:
        return {}
    return {"cuda_compiler": _CUDA.build_info()[0], "cuda_architectures": architectures()}


def architectures() -> list[str]:
    """What was compiled: ``sm_80`` is machine code, ``compute_90`` is PTX."""
    return _CUDA.build_info()[1].split()


def _serves(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Machine code runs on its own and later minor versions, PTX on everything later.

    With a suffix it runs nowhere but on the version it names.
    """
    for architecture in architectures:
        kind, of_major, of_minor, suffix = re.fullmatch(
            r"(sm|compute)_(\d+)(\d)([af]?)", architecture
        ).groups()
        built = (int(of_major), int(of_minor))
        if built == capability:
            return True
        if not suffix and built < capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


mixed_cell, nas_lora_linear, folded_cell, folded_linear = entry_points("cuda")


# ---- The primitives of gpu.py ------------------------------------------------------------------


def low_rank_pass(
    rows: Tensor,
    matrix: Tensor | None,
    u: Tensor | None,
    scale: float,
    product: Tensor | None,
    partials: Tensor | None,
) -> None:
    tokens, columns = rows.shape
    rank = (product if partials is None else partials).shape[-1 if partials is None else 1]
    _CUDA.low_rank_pass(
        *_stream(rows), _DTYPE_CODES[rows.dtype], rows.data_ptr(), rows.stride(0), tokens, columns,
        rank, *_parameter(matrix), *((0, 0) if matrix is None else matrix.stride()), _address(u),
        scale, _address(product), _address(partials),
    )  # fmt: skip


def low_rank_expand(
    u: Tensor, matrix: Tensor, bias: Tensor | None, scale: float, out: Tensor
) -> None:
    _CUDA.low_rank_expand(
        *_stream(out), _DTYPE_CODES[out.dtype], u.data_ptr(), *out.shape, u.shape[1],
        *_parameter(matrix), *matrix.stride(), *_parameter(bias), scale, out.data_ptr(),
    )  # fmt: skip


def cell_forward(
    z: Tensor,
    alpha: Tensor,
    depthwise: list[Tensor],
    pw: Tensor,
    channels: Tensor | None,
    y: Tensor,
) -> None:
    _CUDA.cell_forward(
        *_stream(z), *_maps(z, pw.shape[-1], channels), *_parameters(alpha, depthwise, pw),
        y.data_ptr(),
    )  # fmt: skip


def cell_backward(
    grad_y: Tensor,
    z: Tensor,
    alpha: Tensor,
    depthwise: list[Tensor],
    pw: Tensor,
    channels: Tensor | None,
    grad_z: Tensor | None,
    partials: Tensor | None,
) -> None:
    _CUDA.cell_backward(
        *_stream(z), *_maps(z, pw.shape[-1], channels), *_parameters(alpha, depthwise, pw),
        grad_y.data_ptr(), *grad_y.stride(), _address(grad_z), _address(partials),
    )  # fmt: skip


def reduce_gradients(
    cell_partials: Tensor | None,
    alpha: Tensor,
    depthwise: list[Tensor],
    pw: Tensor,
    grad_alpha: Tensor | None,
    grad_depthwise: list[Tensor] | None,
    grad_pw: Tensor | None,
    A_partials: Tensor | None,
    grad_A: Tensor | None,
    B_partials: Tensor | None,
    grad_B: Tensor | None,
) -> None:
    partials = next(p for p in (cell_partials, A_partials, B_partials) if p is not None)
    _CUDA.reduce_gradients(
        *_stream(partials), int(partials.dtype is torch.float64),
        0 if cell_partials is None else cell_partials.shape[0], pw.shape[-1],
        _address(cell_partials), *_parameters(alpha, depthwise, pw),
        *_parameters(grad_alpha, grad_depthwise or [None] * 4, grad_pw),
        *(_NO_LOW_RANK if grad_A is None else _low_rank(A_partials, grad_A)),
        *(_NO_LOW_RANK if grad_B is None else _low_rank(B_partials, grad_B)),
    )  # fmt: skip


def folded_cell_forward(
    z: Tensor, kernel: Tensor, average: float, maximum: float, y: Tensor
) -> None:
    _CUDA.folded_cell_forward(
        *_stream(z), *_maps(z, z.shape[-1], None), *_parameter(kernel), kernel.shape[-1],
        average, maximum, y.data_ptr(),
    )  # fmt: skip


_NO_LOW_RANK = (0,) * 6


def _low_rank(partials: Tensor, gradient: Tensor) -> tuple[int, ...]:
    return (*partials.shape, partials.data_ptr(), *_parameter(gradient))


def _maps(z: Tensor, c: int, channels: Tensor | None) -> tuple[int, ...]:
    return (
        _DTYPE_CODES[z.dtype], *z.shape, c, _address(channels), z.data_ptr(), *z.stride()
    )  # fmt: skip


def _parameters(alpha: Tensor, depthwise: list[Tensor], pw: Tensor) -> tuple[int, ...]:
    parameters = (_parameter(t) for t in (alpha, *depthwise, pw))
    return tuple(number for parameter in parameters for number in parameter)


def _parameter(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


if _emulation:

    def _stream(tensor: Tensor) -> tuple[int, int]:
        return 0, 0

else:

    def _stream(tensor: Tensor) -> tuple[int, int]:
        """The device and the address of its current stream; what torch.compile's code calls."""
        device = tensor.get_device()
        return device, torch._C._cuda_getCurrentRawStream(device)


if _CUDA is not None:
    row_groups = _CUDA.row_groups
    cell_groups = _CUDA.cell_groups
    cell_partial_size = _CUDA.cell_partial_size
    _library = gpu.register("cuda", sys.modules[__name__])
