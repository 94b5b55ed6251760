"""Checks that a backward still gets the tensors that its forward saved.

Autograd notices in-place changes of saved tensors by their version. Assignments to ``.data`` do not
raise it. A kernel that trusted such tensors would read out of bounds. The checks read no values.
Those of ``cpp`` and ``cuda`` are in csrc/shared/operators.h.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from naslora_kernels.attention import SavedAttention
from naslora_kernels.cell import Cell, LoRALinear
from naslora_kernels.operations import CONVOLUTIONS, OPERATIONS

_Expected = tuple[str, Tensor, tuple[int, ...]]  # name, tensor, shape


def check_saved_cell(grad_y: Tensor, z: Tensor, cell: Cell) -> None:
    """Checks what ``mixed_cell`` saved, against the gradient of its result.

    Raises:
        RuntimeError: a tensor has another shape, device or dtype than in the forward.
    """
    _check(grad_y, [("z", z, tuple(grad_y.shape)), *_cell(cell, z)], maps=("z",))


def check_saved_layer(
    grad_h: Tensor, x: Tensor | None, z: Tensor, linear: LoRALinear, cell: Cell
) -> None:
    """Checks what ``nas_lora_linear`` saved, against the gradient of its result.

    Raises:
        RuntimeError: as ``check_saved_cell``.
    """
    weight, _, lora_A, lora_B = linear
    *grid, c_out = grad_h.shape
    rank, c_in = z.shape[-1], weight.shape[-1]
    expected = [
        ("z", z, (*grid, rank)),
        ("weight", weight, (c_out, c_in)),
        ("lora_A", lora_A, (rank, c_in)),
        ("lora_B", lora_B, (c_out, rank)),
        *_cell(cell, z),
    ]
    if x is not None:
        expected.append(("x", x, (*grid, c_in)))
    _check(grad_h, expected, maps=("x", "z", "weight"))


def check_saved_attention(grad_o: Tensor, saved: SavedAttention) -> None:
    """Checks what ``rel_pos_attention`` saved, against the gradient of its result.

    Raises:
        RuntimeError: as ``check_saved_cell``.
    """
    operands, o, softmax, _ = saved
    shape = tuple(grad_o.shape)
    rows = shape[:3]  # (B, heads, N)
    height, width = operands.rel_h.shape[-1:], operands.rel_w.shape[-1:]
    sizes = (height[0] * width[0], *operands.k.shape[2:3], *operands.v.shape[2:3])
    count = sorted(sizes)[len(sizes) // 2]  # the median, as for a cell
    if sizes[0] != count:
        raise _changed("rel_h, rel_w", f"expected {count} keys, got {height[0]} x {width[0]}")
    keys = (*shape[:2], count, shape[3])
    shapes = (shape, keys, keys, (*rows, *height), (*rows, *width))
    expected: list[_Expected] = list(zip(operands._fields, operands, shapes, strict=True))
    expected += [("o", o, shape), ("softmax", softmax, (2, *rows))]
    _check(grad_o, expected, maps=(*operands._fields, "o"))


def _cell(cell: Cell, z: Tensor) -> list[_Expected]:
    # The median of three sizes, so that the message names the one tensor that changed.
    sizes = (*cell.pw.shape[-1:], *cell.dw_sep3.shape[:1], *cell.dw_sep5.shape[:1])
    c = z.shape[-1] if cell.channels is None or not sizes else sorted(sizes)[len(sizes) // 2]
    kernels = [(c, conv.kernel, conv.kernel) for conv in CONVOLUTIONS]
    shapes = [(len(OPERATIONS),), *kernels, (len(CONVOLUTIONS), c, c), (c,)]
    named = zip(cell._fields, cell, shapes, strict=True)
    return [(name, tensor, shape) for name, tensor, shape in named if tensor is not None]


def _check(gradient: Tensor, expected: Iterable[_Expected], maps: tuple[str, ...]) -> None:
    device, dtype = gradient.device, gradient.dtype
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise _changed(name, f"expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise _changed(name, f"expected device {device}, got {tensor.device}")
        wanted = torch.int64 if name == "channels" else dtype
        wide = dtype.itemsize == 2 and tensor.dtype == torch.float32 and name not in maps
        if tensor.dtype != wanted and (not wide or name == "channels"):
            raise _changed(name, f"expected {wanted}, got {tensor.dtype}")


def _changed(name: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"{name}: {what}; it changed between forward and backward: keep what the forward got until "
        "backward has run"
    )
