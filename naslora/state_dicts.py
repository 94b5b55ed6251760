"""Tensors that come from files: which are accepted, whether they fit a model, their checksums."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from naslora.errors import UserError

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *INTEGERS)


def plain_tensors(tensors: Mapping[Any, Any], where: object) -> dict[str, Tensor]:
    """Checks the state dict of a file, ``where``, before anything computes with it.

    PyTorch's files can hold tensors of every layout, and describe terabytes by strides of 0.
    Returns the tensors, detached.

    Raises:
        UserError: a name is no string, or a value no plain tensor: on the CPU, strided, of real or
            whole numbers, with its values in memory.
    """
    for name, value in tensors.items():
        problem = None if isinstance(name, str) else "its name is no string"
        problem = problem or _unusual(value)
        if problem is not None:
            shown = repr(str(name)[:200])
            raise UserError(f"{where} is not a plain state dict of tensors: {shown}: {problem}")
    return {name: value.detach().resolve_neg() for name, value in tensors.items()}


def _unusual(value: Any) -> str | None:
    """What sets a value apart from plain tensors; None if it is one."""
    if type(value) not in (Tensor, Parameter):
        return f"it is a {type(value).__name__}"
    if value.layout != torch.strided or value.is_nested or value.device.type != "cpu":
        return f"it is a {value.layout} tensor on {value.device}".replace("torch.", "")
    if value.dtype not in DTYPES:
        return f"its dtype is {value.dtype}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"it has shape {tuple(value.shape)}, and the file holds fewer values"
    return None


def tensor_problem(name: str, tensor: Tensor, state: Mapping[str, Tensor]) -> str | None:
    """Why a tensor of ``plain_tensors`` does not fit a model, whose tensors are ``state``.

    Its name, shape or kind of dtype differs, or it holds NaN or infinities. None if it fits.
    """
    present = state.get(name)
    if present is None:
        return f"{name} is not in the model"
    if tensor.shape != present.shape:
        shapes = f"{tuple(tensor.shape)} in the file, {tuple(present.shape)} in the model"
        return f"{name} has shape {shapes}"
    floating = tensor.is_floating_point()
    if tensor.dtype != present.dtype and not (floating and present.is_floating_point()):
        return f"{name} has dtype {tensor.dtype} in the file, {present.dtype} in the model"
    if floating and not tensor.to(present.dtype).isfinite().all():
        return f"{name} holds NaN or infinities in the file"
    return None


def mismatches(
    tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], expected: Iterable[str]
) -> list[str]:
    """Why the tensors of a file do not fit a model, of which the file must hold ``expected``."""
    missing = [f"{name} is missing in the file" for name in expected if name not in tensors]
    problems = (tensor_problem(name, tensors[name], state) for name in sorted(tensors))
    return [*filter(None, problems), *missing]


def check_fit(what: str, problems: list[str]) -> None:
    """Refuses a file, which ``what`` names, if there are problems, and lists the first six."""
    if problems:
        listed = "; ".join(problems[:6]) + ("; ..." if len(problems) > 6 else "")
        raise UserError(f"{what} does not fit this model ({len(problems)} mismatches): {listed}")


# ---- Checksums -----------------------------------------------------------------------------------


def weights_checksum(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes and values of floating-point tensors, in their order.

    The values are rounded to bfloat16, so weights that are cast to bfloat16 keep their checksum. A
    tensor without plain values (on the meta device, quantized by a library) counts by its shape.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(json.dumps(list(tensor.shape)).encode())
        if type(tensor) in (Tensor, Parameter) and not tensor.is_meta:
            digest.update(_bytes(tensor.detach().to(torch.bfloat16).cpu()))
    return digest.hexdigest()


def tensors_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, dtypes, shapes and values of CPU tensors, and of the metadata."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        head = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(head).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
