"""Argument checks of the public functions.

Each error names the argument, what was expected and what came. The checks cost a few microseconds
and read no data from a GPU. There are no others: backends trust their arguments.
"""

import numbers
import sys
import weakref

import torch
from torch import Tensor

from naslora_kernels.cell import AttentionOperands, Cell, LoRALinear
from naslora_kernels.operations import CONVOLUTIONS, FOLDED_SIZE, OPERATIONS
from naslora_kernels.tensors import DTYPES, signature

_HALF_DTYPES = (torch.bfloat16, torch.float16)


def check_cell(name: str, maps: Tensor, cell: Cell, rank: int | None = None) -> None:
    """Checks a mixed cell.

    Args:
        name: the name of the argument ``maps``.
        maps: (B, H, W, channels); its device and dtype are those that the parameters must fit.
        cell: the parameters and channels to check.
        rank: the number r of channels that the cell gets; None if it is that of ``maps``.

    Raises:
        TypeError, ValueError: as ``mixed_cell`` documents.
    """
    if rank is None:
        _check_grid(name, maps)
        rank = maps.shape[-1]
    channels = cell.channels
    c = rank if channels is None else _check_channels(channels, rank, maps.device, name)
    kernels = [(c, conv.kernel, conv.kernel) for conv in CONVOLUTIONS]
    shapes = [(len(OPERATIONS),), *kernels, (len(CONVOLUTIONS), c, c)]
    for argument, parameter, shape in zip(Cell._fields[:6], cell.parameters, shapes, strict=True):
        _check_parameter(argument, parameter, shape, maps, name)


def check_layer(x: Tensor, linear: LoRALinear, cell: Cell, scaling: float) -> None:
    """Checks the arguments of ``nas_lora_linear``.

    Raises:
        TypeError, ValueError: as ``nas_lora_linear`` documents.
    """
    of_call = signature((x, *linear, *cell))
    if of_call is not None and of_call in _passed_layers:
        _check_channel_values(cell.channels, linear.lora_A.shape[0])
    else:
        check_cell("x", x, cell, _check_linear(x, linear))
        # torch.compile would compile anew after a change of the set, and shapes that keep changing
        # would fill the memory.
        if of_call is not None and len(_passed_layers) < 1024:
            _passed_layers.add(of_call)
    _check_number("scaling", scaling)


_passed_layers: set[object] = set()
"""The signatures of calls that have passed the check, which runs once for each."""


def check_folded_cell(
    name: str, maps: Tensor, kernel: Tensor, average: float, maximum: float, c: int | None = None
) -> None:
    """Checks a folded cell.

    Args:
        name: the name of the argument ``maps``.
        maps: (B, H, W, channels); its device and dtype are those that the kernel must fit.
        kernel, average, maximum: the arguments to check.
        c: the number of channels that the cell gets; None if it is that of ``maps``.

    Raises:
        TypeError, ValueError: as ``folded_cell`` documents.
    """
    if c is None:
        _check_grid(name, maps)
        c = maps.shape[-1]
    _check_tensor("kernel", kernel)
    size = kernel.shape[-1] if kernel.dim() == 4 else 0
    if size % 2 == 0 or size > FOLDED_SIZE:
        raise ValueError(
            f"kernel: expected shape (c, c, k, k) with k odd and at most {FOLDED_SIZE}, got "
            f"{tuple(kernel.shape)}"
        )
    _check_parameter("kernel", kernel, (c, c, size, size), maps, name)
    _check_number("average", average)
    _check_number("maximum", maximum)


def check_folded_linear(
    x: Tensor, linear: LoRALinear, kernel: Tensor, average: float, maximum: float
) -> None:
    """Checks the arguments of ``folded_linear``.

    Raises:
        TypeError, ValueError: as ``folded_linear`` documents.
    """
    c = _check_linear(x, linear)
    check_folded_cell("x", x, kernel, average, maximum, c)


def check_attention(
    operands: AttentionOperands, grid: tuple[int, int], scale: float | None
) -> None:
    """Checks the arguments of ``rel_pos_attention``.

    Raises:
        TypeError, ValueError: as ``rel_pos_attention`` documents.
    """
    q = operands.q
    _check_dtype("q", q)
    if q.dim() != 4 or 0 in q.shape[1:]:
        raise ValueError(
            "q: expected shape (B, heads, N, d) with heads, N and d at least 1, got "
            f"{tuple(q.shape)}"
        )
    if not isinstance(grid, tuple | list) or len(grid) != 2 or not all(map(_is_integer, grid)):
        raise TypeError(f"grid: expected two integers (H, W), got {grid!r}")
    height, width = grid
    if height < 1 or width < 1:
        raise ValueError(f"grid: expected (H, W) of at least 1, got {tuple(grid)}")
    keys = (*q.shape[:2], height * width, q.shape[3])
    biases = [(*q.shape[:3], size) for size in (height, width)]
    shapes = {"k": keys, "v": keys, "rel_h": biases[0], "rel_w": biases[1]}
    for (name, expected), tensor in zip(shapes.items(), operands[1:], strict=True):
        _check_tensor(name, tensor)
        _check_same_dtype(name, tensor, q, "q")
        if tensor.shape != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(
                f"{name}: expected device {q.device}, the device of q, got {tensor.device}"
            )
    if scale is not None:
        _check_number("scale", scale)


def _is_integer(value: object) -> bool:
    # torch.compile passes sizes that it does not know as SymInt.
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _check_linear(x: Tensor, linear: LoRALinear) -> int:
    """Checks x, a linear layer and the two matrices of its adapter. Returns the rank."""
    _check_grid("x", x)
    c_in = x.shape[-1]
    weight, bias, lora_A, lora_B = linear
    _check_matrix("weight", weight, ("C_out", c_in), x)
    _check_same_dtype("weight", weight, x, "x")
    c_out = weight.shape[0]
    if bias is not None:
        _check_parameter("bias", bias, (c_out,), x, "x")
        _check_same_dtype("bias", bias, x, "x")
    _check_matrix("lora_A", lora_A, ("r", c_in), x)
    rank = lora_A.shape[0]
    if rank == 0:
        raise ValueError("lora_A: expected a rank of at least 1, got shape (0, C_in)")
    _check_parameter("lora_B", lora_B, (c_out, rank), x, "x")
    return rank


def _check_number(name: str, value: float) -> None:
    is_float = type(value) is float  # asking numbers.Real takes ten times as long
    if not is_float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # torch.compile can trace comparisons, not math.isfinite.
    if not -sys.float_info.max <= value <= sys.float_info.max:
        shown = value if isinstance(value, float) else f"a {type(value).__name__} beyond float64"
        raise ValueError(f"{name}: expected a finite number, got {shown}")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {value.layout}")


def _check_dtype(name: str, value: Tensor) -> None:
    """Checks a tensor of a dtype that the backends compute."""
    _check_tensor(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}"
        )


def _check_grid(name: str, value: Tensor) -> None:
    """Checks a channels-last map of a dtype that the backends compute."""
    _check_dtype(name, value)
    if value.dim() != 4 or 0 in value.shape[1:]:
        raise ValueError(
            f"{name}: expected a channels-last map (B, H, W, channels) with H, W and channels at "
            f"least 1, got {tuple(value.shape)}"
        )


def _check_parameter(
    name: str, value: Tensor, shape: tuple[int, ...], like: Tensor, like_name: str
) -> None:
    """Checks a parameter on the device of ``like``.

    Its dtype is that of ``like``, or float32 if ``like`` has 16 bits.
    """
    _check_tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device}, the device of {like_name}, got {value.device}"
        )
    if value.dtype != like.dtype and not (
        value.dtype == torch.float32 and like.dtype in _HALF_DTYPES
    ):
        allowed = f"{like.dtype}{' or torch.float32' if like.dtype in _HALF_DTYPES else ''}"
        raise TypeError(f"{name}: expected {allowed} to go with {like_name}, got {value.dtype}")


def _check_matrix(name: str, value: Tensor, shape: tuple[str, int], x: Tensor) -> None:
    """Checks a matrix with a given number of columns and any number of rows."""
    _check_tensor(name, value)
    rows, columns = shape
    if value.dim() != 2 or value.shape[1] != columns:
        raise ValueError(
            f"{name}: expected shape ({rows}, {columns}), as x has {columns} channels, got "
            f"{tuple(value.shape)}"
        )
    _check_parameter(name, value, tuple(value.shape), x, "x")


def _check_same_dtype(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} to go with {like_name}, got {value.dtype}")


def _check_channels(channels: Tensor, rank: int, device: torch.device, like_name: str) -> int:
    """Checks the channels S of a cell on r = ``rank`` channels. Returns their number c."""
    _check_tensor("channels", channels)
    if channels.dtype != torch.int64:
        raise TypeError(f"channels: expected torch.int64, got {channels.dtype}")
    if channels.dim() != 1 or channels.shape[0] > rank:
        raise ValueError(
            f"channels: expected shape (c,) with c at most the rank {rank}, got "
            f"{tuple(channels.shape)}"
        )
    if channels.device != device:
        raise ValueError(
            f"channels: expected device {device}, the device of {like_name}, got {channels.device}"
        )
    _check_channel_values(channels, rank)
    return channels.shape[0]


# Channels on a GPU whose values have been checked, by identity, with their version and the rank.
# Reading values back from a GPU stalls it, so the same tensor is read once. An in-place change
# raises the version, so a changed tensor is read again. Writes through ``.data`` do not raise it,
# and inference tensors have none. Values on a CPU, where reading is cheap, are read in every call.
_seen_channels: dict[int, tuple[weakref.ref[Tensor], int | None, int]] = {}


def _check_channel_values(channels: Tensor | None, rank: int) -> None:
    if channels is None:
        return
    if torch.compiler.is_compiling() or channels.is_meta:
        return  # the values cannot be read; the first eager call checks them
    if _stalls_when_read(channels):
        _check_channel_values_once(channels, rank)
    else:
        _read_channel_values(channels, rank)


def _stalls_when_read(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _check_channel_values_once(channels: Tensor, rank: int) -> None:
    version = None if channels.is_inference() else channels._version
    seen = _seen_channels.get(id(channels))
    if seen and seen[0]() is channels and seen[1:] == (version, rank):
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # reading would end the capture; the calls that warmed up have checked them
    _read_channel_values(channels, rank)
    key = id(channels)
    reference = weakref.ref(channels, lambda _: _seen_channels.pop(key, None))
    _seen_channels[key] = (reference, version, rank)


def _read_channel_values(channels: Tensor, rank: int) -> None:
    values = channels.tolist()
    if any(not 0 <= value < rank for value in values):
        raise ValueError(f"channels: expected values in 0..{rank - 1}, got {values}")
    if len(set(values)) != len(values):
        raise ValueError(f"channels: expected distinct values, got {values}")
