"""Merged layers: what stands in a merged model, and how it remembers the layers it replaces."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from naslora.adapter.layer.adapted import AdaptedLinear
from naslora.adapter.layer.cell import FixedMixture, FoldedCell, PaperCell
from naslora.adapter.layer.modules import replace_module
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
        backend: kernel backend; None takes the best that can compute here.
    """

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
        base, mixture = self.base, self.mixture
        if not isinstance(mixture, FoldedCell):
            return base(x) + self.update(x)
        prefix, image = self.split(x)
        h = folded_linear(
            image,
            base.weight,
            base.bias,
            self.lora_A,
            self.lora_B,
            mixture.kernel,
            mixture.average,
            mixture.maximum,
            backend=self.backend,
        )
        if prefix is None:
            return h if x.dim() == 4 else h.flatten(1, 2)
        # Plain LoRA, so nothing is left of the cell.
        return torch.cat([base(prefix) + self.decoded(self.encoded(prefix)), h.flatten(1, 2)], 1)

    def mix(self, z: Tensor) -> Tensor:
        """The collapsed cell on maps, (B, H, W, c) to the same."""
        return self.mixture(z)


class MergedFrom:
    """The layer that a merged module replaces, for ``unmerge``. None if it is unknown, because the
    merged model was read from files.

    It is no module, so the layer is no part of the merged model's state dict or parameters. It is
    pickled as None: a pickle holds the merged model alone.
    """

    def __init__(self, layer: nn.Module | None) -> None:
        self.layer = layer

    def __deepcopy__(self, memo: dict[int, Any]) -> "MergedFrom":
        return MergedFrom(copy.deepcopy(self.layer, memo))

    def __reduce__(self) -> Any:
        return type(None), ()


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
    return all(origin is not None and origin.layer is not None for origin in origins)


def unmerge(model: nn.Module) -> None:
    """Undoes ``merge``: the same layers return, on the device where the model is now.

    Args:
        model: the merged model, a part of it, a model around it, or a deep copy. The layers of a
            deep copy are copies of the layers that were merged.

    Raises:
        UserError: ``model`` is not merged, is a single merged layer, or was read from files. The
            model is then unchanged.
    """
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
        layer = cast(nn.Module, getattr(module, MARK).layer)
        replace_module(model, name, layer.to(device).train(module.training))


def restore_merged(model: nn.Module, layers: Iterable[str], tensors: dict[str, Tensor]) -> None:
    """Puts into the original model, in place, the modules of the merged layers of these names.

    ``tensors`` is the merged model's state dict. The model's tensors are not filled with it.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor does not fit the model or the others.
    """
    for name in layers:
        layer, prefix = cast(nn.Linear, model.get_submodule(name)), f"{name}."
        stored = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        # Without lora_A it merged into a plain nn.Linear.
        merged = _restored(layer, stored) if "lora_A" in stored else layer
        replace_module(model, name, merged)
        mark_merged(merged, None)


def _restored(base: nn.Linear, stored: dict[str, Tensor]) -> MergedNASLoRALinear:
    channels = stored["lora_A"].shape[0]
    shapes: dict[str, tuple[int, ...]]
    shapes = {"lora_A": (channels, base.in_features), "lora_B": (base.out_features, channels)}
    linear = "mixture.kernel" in stored
    if linear:
        size = min(stored["mixture.kernel"].shape[-1] | 1, FOLDED_SIZE)  # odd
        shapes |= {"mixture.kernel": (channels, channels, size, size), "mixture.pooling": (2,)}
    else:
        shapes["mixture.mixture"] = (len(OPERATIONS),)
    fitting = {}
    for name, shape in shapes.items():
        tensor = stored[name]
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not floating-point of "
                f"shape {shape}"
            )
        fitting[name] = tensor.to(torch.promote_types(tensor.dtype, base.weight.dtype))
    if linear:
        mixture: nn.Module = FoldedCell(fitting["mixture.kernel"], fitting["mixture.pooling"])
    else:
        cell = PaperCell(channels, "identity", torch.Generator())
        mixture = FixedMixture(cell, fitting["mixture.mixture"])
    grid = stored.get("declared_grid")
    return MergedNASLoRALinear(
        base,
        fitting["lora_A"],
        fitting["lora_B"],
        mixture,
        None if grid is None else (int(grid[0]), int(grid[1])),
        prefix_tokens=int(stored.get("declared_prefix", 0)),
    )
