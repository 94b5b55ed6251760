"""Merging: what the search found, folded into the weights, with its loss told.

The frozen weight acts on one token; the cell mixes neighbours. So folding a cell into the weight
(paper, Eq. 6-7) is exact only for its pointwise part:

- ``exact`` keeps what cannot fold - one small convolution on the c channels, and pooling - and
  loses nothing but rounding;
- ``center`` reads Eq. 6 literally: the centre taps and the skip fold, the rest is dropped, and a
  plain nn.Linear remains.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.cell import restore_collapsed
from naslora.errors import UserError
from naslora.injection import adapter_layers, replace_module
from naslora.layer import NASLoRALinear, as_grid

MergeMode = Literal["exact", "center"]
# On this many seeded white-noise tokens errors are measured where no images are given.
NOISE_GRID = (2, 16, 16)

# The layers that each merged model had. Kept beside the model, not in it: what is copied, saved or
# counted of a merged model is the merged model alone.
_originals: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()


@dataclass(frozen=True)
class LayerError:
    """How far one merged layer is from the layer it replaces, as relative Frobenius norms."""

    name: str
    update_error: float
    """|merged - layer| / |the adapter's part of the layer's output|."""
    output_error: float
    """|merged - layer| / |the layer's output|."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge lost, layer by layer."""

    mode: str
    source: str
    """What the errors were measured on: "calibration images", or "white noise", on which
    neighbours share nothing and errors are about as large as they get."""
    layers: list[LayerError]

    @property
    def max_update_error(self) -> float:
        """The largest relative error of an update."""
        return max(layer.update_error for layer in self.layers)

    @property
    def mean_update_error(self) -> float:
        """The mean relative error of the updates."""
        return sum(layer.update_error for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"merged {len(self.layers)} layers with mode {self.mode!r}: relative error of the "
            f"update {self.mean_update_error:.2e} on average, {self.max_update_error:.2e} at most "
            f"(on {self.source})"
        )


class MergedNASLoRALinear(nn.Module):
    """An exactly merged layer: the pointwise part sits in ``base``, a small convolution remains.

    Attributes:
        base: nn.Linear with the channels that bypass the cell folded in.
        lora_A: (c, C_in) the encoder's rows that feed the cell.
        lora_B: (C_out, c) the decoder's columns behind it, scaling included.
        mixture: the collapsed cell, on (B, H, W, c).
        grid: (H, W) of token sequences that are not square, or None.
    """

    def __init__(
        self,
        base: nn.Linear,
        lora_A: Tensor,
        lora_B: Tensor,
        mixture: nn.Module,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("lora_A", lora_A)
        self.register_buffer("lora_B", lora_B)
        self.mixture = mixture
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) or (B, N, C_in) to the same with C_out; shapes as ``NASLoRALinear``."""
        h = self.base(x)
        z = F.linear(as_grid(x, self.grid), self.lora_A.to(x.dtype))  # (B, H, W, c)
        update = F.linear(self.mixture(z), self.lora_B.to(z.dtype))  # (B, H, W, C_out)
        return h + update.reshape(h.shape)


def merge(
    model: nn.Module, mode: MergeMode = "exact", calibration: Iterable[Any] | None = None
) -> MergeReport:
    """Merges every NAS-LoRA layer of ``model`` into its frozen linear, in place.

    Args:
        model: a model that ``inject`` adapted.
        mode: "exact": each layer becomes a ``MergedNASLoRALinear``, equal up to rounding (plain
            LoRA becomes an nn.Linear). "center": each layer becomes an nn.Linear, under the state
            dict keys of the original model; what the neighbours contributed is lost.
        calibration: batches, each fed as ``model(batch)``, on which to measure the errors; None
            measures them on seeded white noise.

    Returns:
        The relative errors, layer by layer.

    Raises:
        UserError: an unknown mode, nothing to merge, a model merged before, no batches, batches
            that miss a layer, or an operation set that the mode cannot fold. The model is then
            unchanged.
    """
    layers = dict(adapter_layers(model))
    check_mergeable(model, layers, mode)
    with torch.no_grad():
        merged = {name: MODES[mode](layer) for name, layer in layers.items()}
    return replace_by_merged(model, layers, merged, mode, calibration)


def check_mergeable(model: nn.Module, layers: dict[str, nn.Module], mode: str) -> None:
    """Refuses what ``merge`` refuses before it looks at a layer.

    Raises:
        UserError: an unknown mode, nothing to merge, or a model merged before.
    """
    if model in _originals:
        raise UserError("the model is merged already; call unmerge(model) first")
    if not layers:
        raise UserError("there is nothing to merge: the model has no NAS-LoRA layers")
    if mode not in MODES:
        raise UserError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


@torch.no_grad()
def replace_by_merged(
    model: nn.Module,
    layers: dict[str, nn.Module],
    merged: dict[str, nn.Module],
    mode: str,
    calibration: Iterable[Any] | None,
) -> MergeReport:
    """Measures what the merged modules lose and puts them where ``layers`` were, in place.

    Args:
        layers: the adapted layers by their names; what ``unmerge`` restores.
        merged: their merged twins by the same names.
        calibration: as in ``merge``.

    Raises:
        UserError: no batches, or batches that miss a layer. The model is then unchanged.
    """
    if calibration is None:
        errors = _errors_on_noise(layers, merged)
    else:
        errors = _errors_on_batches(model, layers, merged, calibration)
    for name, module in merged.items():
        module.train(model.training)
        replace_module(model, name, module)
    _originals[model] = layers
    source = "white noise" if calibration is None else "calibration images"
    return MergeReport(mode, source, errors)


def unmerge(model: nn.Module) -> None:
    """Takes the last ``merge`` back: the very layers return, on the device where the model is now.

    Raises:
        UserError: the model is not merged.
    """
    if model not in _originals:
        raise UserError("the model is not merged")
    for name, layer in _originals.pop(model).items():
        merged = model.get_submodule(name)
        device = next(iter(merged.state_dict().values())).device
        replace_module(model, name, layer.to(device).train(merged.training))


def restore_merged(model: nn.Module, layers: Iterable[str], tensors: dict[str, Tensor]) -> None:
    """Gives an unadapted model the modules that a merged state dict belongs to, in place.

    Args:
        model: the original model; its tensors are not filled.
        layers: the merged layers' names.
        tensors: the merged model's state dict.
    """
    for name in layers:
        prefix = f"{name}.lora_A"
        if prefix not in tensors:
            continue  # it merged into a plain nn.Linear
        stored = {
            key.removeprefix(f"{name}.mixture."): value
            for key, value in tensors.items()
            if key.startswith(f"{name}.mixture.")
        }
        mixture = restore_collapsed(stored)
        layer = MergedNASLoRALinear(
            model.get_submodule(name), tensors[prefix], tensors[f"{name}.lora_B"], mixture
        )
        replace_module(model, name, layer)


def _merge_exact(layer: NASLoRALinear) -> nn.Module:
    """The channels that bypass the cell fold; the cell becomes one convolution and pooling."""
    if layer.cell is None:
        return _folded_linear(layer, torch.eye(layer.rank, device=layer.lora_A.device))
    bypass = torch.ones(layer.rank, device=layer.lora_A.device)
    bypass[layer.channels] = 0.0
    return MergedNASLoRALinear(
        _folded_linear(layer, torch.diag(bypass)),
        layer.lora_A.detach()[layer.channels].clone(),
        layer.scaling * layer.lora_B.detach()[:, layer.channels],
        layer.cell.collapsed(layer.alpha),
        layer.grid,
    )


def _merge_center(layer: NASLoRALinear) -> nn.Linear:
    """The cell's centre taps on its channels, the identity on the others, folded into W0."""
    token_map = torch.eye(layer.rank, dtype=torch.float64, device=layer.lora_A.device)
    if layer.cell is not None:
        centre = layer.cell.centre(layer.alpha).double()
        token_map[layer.channels[:, None], layer.channels[None, :]] = centre
    return _folded_linear(layer, token_map)


MODES: dict[str, Callable[[NASLoRALinear], nn.Module]] = {
    "exact": _merge_exact,
    "center": _merge_center,
}


def _folded_linear(layer: NASLoRALinear, token_map: Tensor) -> nn.Linear:
    """nn.Linear with W0 + s W_d M W_e, M = ``token_map`` (r, r); summed in float64."""
    base = layer.base
    merged = nn.utils.skip_init(
        nn.Linear,
        base.in_features,
        base.out_features,
        bias=base.bias is not None,
        device=base.weight.device,
        dtype=base.weight.dtype,
    ).requires_grad_(False)
    update = layer.lora_B.double() @ token_map.double() @ layer.lora_A.double()
    merged.weight.copy_(base.weight.double() + layer.scaling * update)
    if base.bias is not None:
        merged.bias.copy_(base.bias)
    return merged


class _ErrorSums:
    """Sums of squares of one layer's difference, update and output over many inputs."""

    def __init__(self) -> None:
        self.difference = self.update = self.output = 0.0
        self.calls = 0

    def add(self, layer: nn.Module, merged: nn.Module, x: Tensor) -> None:
        h = layer(x)
        self.calls += 1
        self.difference += _squared_norm(merged(x) - h)
        ours = isinstance(layer, NASLoRALinear)  # else PEFT's
        self.update += _squared_norm(layer.update(x) if ours else h - layer.base_layer(x))
        self.output += _squared_norm(h)

    def relative(self, name: str) -> LayerError:
        # An adapter that does nothing (lora_B = 0) loses nothing.
        update = (self.difference / self.update) ** 0.5 if self.update else 0.0
        output = (self.difference / self.output) ** 0.5 if self.output else 0.0
        return LayerError(name, update, output)


def _squared_norm(x: Tensor) -> float:
    return float(x.double().square().sum())


def _errors_on_noise(
    layers: dict[str, nn.Module], merged: dict[str, nn.Module]
) -> list[LayerError]:
    errors = []
    for name, layer in layers.items():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(*NOISE_GRID, layer.in_features, generator=generator)
        sums, training = _ErrorSums(), layer.training
        layer.eval()
        sums.add(layer, merged[name], noise.to(layer.weight))
        layer.train(training)
        errors.append(sums.relative(name))
    return errors


def _errors_on_batches(
    model: nn.Module,
    layers: dict[str, nn.Module],
    merged: dict[str, nn.Module],
    batches: Iterable[Any],
) -> list[LayerError]:
    """Feeds the unmerged model and compares each layer with its merged twin on the way."""
    sums = {name: _ErrorSums() for name in layers}
    busy = False  # the twin is held against the layer by calling the layer again

    def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal busy
            if not busy:
                busy = True
                sums[name].add(layer, merged[name], inputs[0])
                busy = False

        return hook

    hooks = [layer.register_forward_pre_hook(compare(name)) for name, layer in layers.items()]
    modes, seen = {module: module.training for module in model.modules()}, 0
    model.eval()
    try:
        for batch in batches:
            model(batch)
            seen += 1
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in hooks:
            handle.remove()
    if seen == 0:
        raise UserError("calibration yielded no batches")
    unseen = [name for name in layers if not sums[name].calls]
    if unseen:
        raise UserError(f"no calibration batch reached the layers {', '.join(unseen[:4])}")
    return [sums[name].relative(name) for name in layers]
