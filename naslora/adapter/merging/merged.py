"""Merged layers: what stands in a merged model, and how it remembers the layers it replaces."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.adapter.layer.calls import AdaptedLinear
from naslora.adapter.layer.cell import FoldedCell, restore_collapsed
from naslora.adapter.layer.grid import as_grid, split_prefix
from naslora.adapter.layer.modules import check_model, replace_module
from naslora.errors import UserError
from naslora_kernels import folded_linear
from naslora_kernels.operations import FOLDED_SIZE, OPERATIONS

MARK = "merged_from"  # the attribute of a merged module that holds its ``MergedFrom``


class MergedNASLoRALinear(AdaptedLinear):
    """An exactly merged layer: ``base`` holds the pointwise part, a small convolution remains.

    Attributes:
        base: nn.Linear with the channels that bypass the cell folded in.
        lora_A: (c, C_in) the encoder's rows that feed the cell.
        lora_B: (C_out, c) the decoder's columns behind it, scaling included.
        mixture: the collapsed cell, on (B, H, W, c).
        grid: (H, W) of token sequences that are not square, or None.
        backend: kernel backend; None takes the best that can compute here.
        prefix_tokens: class and register tokens at the start of (B, N, C_in) inputs.
    """

    lora_A: Tensor
    lora_B: Tensor

    def __init__(
        self,
        base: nn.Linear,
        lora_A: Tensor,
        lora_B: Tensor,
        mixture: nn.Module,
        grid: tuple[int, int] | None = None,
        backend: str | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("lora_A", lora_A)
        # Laid out by channel, as the kernels read it.
        self.register_buffer("lora_B", lora_B.t().contiguous().t())
        self.mixture = mixture
        self.grid = grid
        if grid is not None:  # the state dict must hold it, so that a saved model can be restored
            self.register_buffer("declared_grid", torch.tensor(grid))
        self.prefix_tokens = prefix_tokens
        if prefix_tokens:
            self.register_buffer("declared_prefix", torch.tensor(prefix_tokens))
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) or (B, N, C_in) to the same with C_out; shapes as ``NASLoRALinear``."""
        prefix, tokens = split_prefix(x, self.prefix_tokens)
        if prefix is not None:  # plain LoRA, so nothing is left of the cell
            plain = F.linear(F.linear(prefix, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
            return torch.cat([self.base(prefix) + plain, self._on_grid(tokens)], 1)
        return self._on_grid(x)

    def _on_grid(self, x: Tensor) -> Tensor:
        tokens, base, mixture = as_grid(x, self.grid), self.base, self.mixture
        if isinstance(mixture, FoldedCell):
            h = folded_linear(
                tokens,
                base.weight,
                base.bias,
                self.lora_A,
                self.lora_B,
                mixture.kernel,
                mixture.average,
                mixture.maximum,
                backend=self.backend,
            )
        else:
            z = F.linear(tokens, self.lora_A.to(x.dtype))  # (B, H, W, c)
            h = base(tokens) + F.linear(mixture(z), self.lora_B.to(z.dtype))
        return h if x.dim() == 4 else h.reshape(*x.shape[:-1], h.shape[-1])


class _Kept:
    """A replaced layer, which a merged module and its copies share until one of them is unmerged.

    So a copy of a merged model costs no memory for the layers that were replaced.
    """

    def __init__(self, layer: nn.Module | None) -> None:
        self.layer = layer
        self.holders: WeakSet[MergedFrom] = WeakSet()


class MergedFrom:
    """The layer that a merged module replaces, for ``unmerge``.

    It is no module, so the layer is no part of the merged model's state dict or parameters. It is
    pickled as None: a pickle holds the merged model alone.

    Args:
        layer: the layer; None if it is unknown, because the merged model was read from files.
    """

    def __init__(self, layer: nn.Module | None) -> None:
        self._kept = _Kept(layer)
        self._kept.holders.add(self)
        self._is_copy = False

    @property
    def known(self) -> bool:
        """Whether the layer is known."""
        return self._kept.layer is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> "MergedFrom":
        twin = object.__new__(MergedFrom)
        twin._kept, twin._is_copy = self._kept, True
        self._kept.holders.add(twin)
        return twin

    def __reduce__(self) -> Any:
        return type(None), ()

    def take(self) -> nn.Module:
        """The layer itself, and in copies of the merged module a copy of the layer.

        The layer may be trained on afterwards. That does not change the other copies.
        """
        layer = cast(nn.Module, self._kept.layer)
        self._kept.holders.discard(self)
        if not self._kept.holders:
            return layer
        if self._is_copy:
            return copy.deepcopy(layer)
        self._kept.layer = copy.deepcopy(layer)
        return layer


def mark_merged(module: nn.Module, layer: nn.Module | None) -> None:
    """Records in a merged module the layer that it replaces, or that the layer is unknown."""
    setattr(module, MARK, MergedFrom(layer))


def merged_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The merged modules of a model with their names, in model order."""
    for name, module in model.named_modules():
        if MARK in vars(module):
            yield name, module


def can_unmerge(model: nn.Module) -> bool:
    """Whether the layers that all merged modules replace are known."""
    origins = (getattr(module, MARK) for _, module in merged_modules(model))
    return all(origin is not None and origin.known for origin in origins)


def unmerge(model: nn.Module) -> None:
    """Undoes ``merge``: the same layers return, on the device where the model is now.

    Args:
        model: the merged model, a part of it, a model around it, or a deep copy. The layers of a
            deep copy are copies of the layers that were merged.

    Raises:
        UserError: ``model`` is not merged, is a single merged layer, or was read from files. The
            model is then unchanged.
    """
    check_model(model)
    merged = dict(merged_modules(model))
    if not merged:
        raise UserError("the model is not merged")
    if "" in merged:
        raise UserError("model is a single merged layer; give the model around it")
    if not can_unmerge(model):
        raise UserError(
            "the model cannot be unmerged: it was read from a file, which does not hold the "
            "adapter; load the original model, and its adapter with load_adapter"
        )
    for name, module in merged.items():
        device = next(iter(module.state_dict().values())).device
        layer = cast(MergedFrom, getattr(module, MARK)).take()
        replace_module(model, name, layer.to(device).train(module.training))


def restore_merged(model: nn.Module, layers: Iterable[str], tensors: dict[str, Tensor]) -> None:
    """Puts into an unadapted model the modules that a merged state dict belongs to, in place.

    Args:
        model: the original model. Its tensors are not filled.
        layers: the merged layers' names.
        tensors: the merged model's state dict.
    """
    for name in layers:
        base = cast(nn.Linear, model.get_submodule(name))
        stored = {
            key.removeprefix(f"{name}."): value
            for key, value in tensors.items()
            if key.startswith(f"{name}.")
        }
        if "lora_A" not in stored:
            mark_merged(base, None)  # it merged into a plain nn.Linear
            continue
        layer = _restore_layer(base, stored)
        mark_merged(layer, None)
        replace_module(model, name, layer)


def _restore_layer(base: nn.Linear, stored: dict[str, Tensor]) -> MergedNASLoRALinear:
    """The layer that ``stored``, its state dict, belongs to.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor does not fit ``base`` or the others.
    """
    channels = stored["lora_A"].shape[0]
    shapes: dict[str, tuple[int, ...]]
    shapes = {"lora_A": (channels, base.in_features), "lora_B": (base.out_features, channels)}
    if "mixture.kernel" in stored:
        size = min(stored["mixture.kernel"].shape[-1] | 1, FOLDED_SIZE)  # odd
        shapes |= {"mixture.kernel": (channels, channels, size, size), "mixture.pooling": (2,)}
    else:
        shapes["mixture.mixture"] = (len(OPERATIONS),)
    for name, shape in shapes.items():
        tensor = stored[name]
        if tensor.shape != shape or not tensor.is_floating_point():
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{name} is {found}, not floating-point of shape {shape}")
        stored[name] = tensor.to(torch.promote_types(tensor.dtype, base.weight.dtype))
    mixture = {
        name.removeprefix("mixture."): tensor
        for name, tensor in stored.items()
        if name.startswith("mixture.")
    }
    grid = stored.get("declared_grid")
    return MergedNASLoRALinear(
        base,
        stored["lora_A"],
        stored["lora_B"],
        restore_collapsed(mixture, channels),
        None if grid is None else (int(grid[0]), int(grid[1])),
        prefix_tokens=int(stored.get("declared_prefix", 0)),
    )
