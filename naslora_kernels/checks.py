"""Argument checks of the public functions: each names the argument, what was expected, what came.

They cost a few microseconds, touch no data on a GPU, and are the only checks: backends trust their
arguments.
"""

import math
import numbers
import weakref

import torch
from torch import Tensor

from naslora_kernels.operations import CONVOLUTIONS, FOLDED_SIZE, OPERATIONS

DEPTHWISE_NAMES = ("dw_sep3", "dw_sep5", "dw_dil3", "dw_dil5")
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_cell(
    name: str,
    maps: Tensor,
    alpha: Tensor,
    depthwise: tuple[Tensor, ...],
    pw: Tensor,
    channels: Tensor | None,
    rank: int | None = None,
) -> None:
    """Checks a cell's arguments; ``name`` and ``maps`` are the tensor that sets device and dtype.

    Raises:
        TypeError, ValueError: as ``mixed_cell`` documents.
    """
    _check_grid(name, maps)
    r = maps.shape[-1] if rank is None else rank
    c = r if channels is None else _check_channels(channels, r, maps.device, name)
    _check_parameter("alpha", alpha, (len(OPERATIONS),), maps, name)
    for argument, conv, dw in zip(DEPTHWISE_NAMES, CONVOLUTIONS, depthwise, strict=True):
        _check_parameter(argument, dw, (c, conv.kernel, conv.kernel), maps, name)
    _check_parameter("pw", pw, (len(CONVOLUTIONS), c, c), maps, name)


def check_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    alpha: Tensor,
    depthwise: tuple[Tensor, ...],
    pw: Tensor,
    channels: Tensor | None,
    scaling: float,
) -> None:
    """Checks the arguments of ``nas_lora_linear``.

    Raises:
        TypeError, ValueError: as ``nas_lora_linear`` documents.
    """
    rank = _check_low_rank(x, weight, bias, lora_A, lora_B)
    check_cell("x", x, alpha, depthwise, pw, channels, rank)
    _check_number("scaling", scaling)


def check_folded_cell(name: str, maps: Tensor, c: int, kernel: Tensor, **pooling: float) -> None:
    """Checks a folded cell on c channels; ``name`` and ``maps`` as in ``check_cell``.

    Raises:
        TypeError, ValueError: as ``folded_cell`` documents.
    """
    _check_grid(name, maps)
    _check_tensor("kernel", kernel)
    size = kernel.shape[-1] if kernel.dim() == 4 else 0
    if size % 2 == 0 or size > FOLDED_SIZE:
        raise ValueError(
            f"kernel: expected shape (c, c, k, k) with k odd and at most {FOLDED_SIZE}, got "
            f"{tuple(kernel.shape)}"
        )
    _check_parameter("kernel", kernel, (c, c, size, size), maps, name)
    for argument, weight in pooling.items():
        _check_number(argument, weight)


def check_folded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    kernel: Tensor,
    **pooling: float,
) -> None:
    """Checks the arguments of ``folded_linear``.

    Raises:
        TypeError, ValueError: as ``folded_linear`` documents.
    """
    c = _check_low_rank(x, weight, bias, lora_A, lora_B)
    check_folded_cell("x", x, c, kernel, **pooling)


def _check_low_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor
) -> int:
    """Checks a linear layer and the two matrices of its adapter; returns the rank."""
    _check_grid("x", x)
    c_in = x.shape[-1]
    _check_matrix("weight", weight, ("C_out", c_in), x)
    _check_same_dtype("weight", weight, x)
    c_out = weight.shape[0]
    if bias is not None:
        _check_parameter("bias", bias, (c_out,), x, "x")
        _check_same_dtype("bias", bias, x)
    _check_matrix("lora_A", lora_A, ("r", c_in), x)
    rank = lora_A.shape[0]
    if rank == 0:
        raise ValueError("lora_A: expected a rank of at least 1, got shape (0, C_in)")
    _check_parameter("lora_B", lora_B, (c_out, rank), x, "x")
    return rank


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # comparisons, which torch.compile can trace
        raise ValueError(f"{name}: expected a finite number, got {value}")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _check_grid(name: str, value: Tensor) -> None:
    _check_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}"
        )
    if value.dim() != 4 or 0 in value.shape[1:]:
        raise ValueError(
            f"{name}: expected a channels-last map (B, H, W, channels) with H, W and channels at "
            f"least 1, got {tuple(value.shape)}"
        )


def _check_parameter(
    name: str, value: Tensor, shape: tuple[int, ...], like: Tensor, like_name: str
) -> None:
    """A floating parameter on the device of ``like``, either in its dtype or in float32."""
    _check_tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    _check_device(name, value, like, like_name)
    if value.dtype != like.dtype and not (
        value.dtype == torch.float32 and like.dtype in (torch.bfloat16, torch.float16)
    ):
        allowed = str(like.dtype)
        if like.dtype in (torch.bfloat16, torch.float16):
            allowed += " or torch.float32"
        raise TypeError(f"{name}: expected {allowed} to go with {like_name}, got {value.dtype}")


def _check_matrix(name: str, value: Tensor, shape: tuple[str, int], x: Tensor) -> None:
    """A matrix whose number of columns is given, and whose number of rows is free."""
    _check_tensor(name, value)
    rows, columns = shape
    if value.dim() != 2 or value.shape[1] != columns:
        raise ValueError(
            f"{name}: expected shape ({rows}, {columns}), as x has {columns} channels, got "
            f"{tuple(value.shape)}"
        )
    _check_parameter(name, value, tuple(value.shape), x, "x")


def _check_same_dtype(name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype != x.dtype:
        raise TypeError(f"{name}: expected {x.dtype} to go with x, got {value.dtype}")


def _check_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device}, where {like_name} is, got {value.device}"
        )


def _check_channels(channels: Tensor, rank: int, device: torch.device, like_name: str) -> int:
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
            f"channels: expected device {device}, where {like_name} is, got {channels.device}"
        )
    _check_channel_values(channels, rank)
    return channels.shape[0]


# Reading channels back from a GPU would stall it, so a tensor already seen is not read again.
# Keyed by identity and version: an in-place change makes it a new one.
_seen_channels: dict[int, tuple[weakref.ref, int | None, int]] = {}


def _check_channel_values(channels: Tensor, rank: int) -> None:
    if torch.compiler.is_compiling() or channels.is_meta:
        return  # values are not there to be read; the eager call has the check
    # Inference tensors keep no version, so a change of theirs would go unseen.
    version = None if channels.is_inference() else channels._version
    seen = _seen_channels.get(id(channels))
    if version is not None and seen and seen[0]() is channels and seen[1:] == (version, rank):
        return
    values = channels.tolist()
    if any(not 0 <= value < rank for value in values):
        raise ValueError(f"channels: expected values in 0..{rank - 1}, got {values}")
    if len(set(values)) != len(values):
        raise ValueError(f"channels: expected distinct values, got {values}")
    key = id(channels)
    reference = weakref.ref(channels, lambda _: _seen_channels.pop(key, None))
    _seen_channels[key] = (reference, version, rank)
