"""Merging: what the search found, folded into the weights, with its loss told.

The frozen weight acts on one token; the cell mixes neighbours. So folding a cell into the weight
(paper, Eq. 6-7) is exact only for its pointwise part:

- ``exact`` keeps what cannot fold - one small convolution on the c channels, and pooling - and
  loses nothing but rounding;
- ``center`` reads Eq. 6 literally: the centre taps and the skip fold, the rest is dropped, and a
  plain nn.Linear remains;
- ``calibrated`` fits a plain nn.Linear to what the layer does on calibration images, layer by
  layer; see ``calibration.py``.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.adapter.calibration import TOKENS_PER_INPUT, Fit, calibrate, check_reached, feed
from naslora.adapter.cell import FoldedCell, restore_collapsed
from naslora.adapter.injection import adapter_layers, replace_module
from naslora.adapter.layer import NASLoRALinear, as_grid
from naslora.errors import UserError
from naslora_kernels import folded_linear

MergeMode = Literal["exact", "center", "calibrated"]
MODES: tuple[str, ...] = get_args(MergeMode)
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
    tokens: int | None = None
    """How many tokens the layer was fitted on; None if the mode fits nothing, as below."""
    regularisation: float | None = None
    """The penalty of the fit, relative to the mean variance of the layer's inputs."""
    held_out_error: float | None = None
    """Relative error of the update on tokens held out from the fit, with the layers before merged
    likewise: what to expect on new images."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge lost, layer by layer."""

    mode: str
    source: str
    """What the errors were measured on: "calibration images", or "white noise", on which
    neighbours share nothing and errors are about as large as they get."""
    layers: list[LayerError]
    warning: str | None = None
    """What the user should know before using the result."""

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
        text = (
            f"merged {len(self.layers)} layers with mode {self.mode!r}: relative error of the "
            f"update {self.mean_update_error:.2e} on average, {self.max_update_error:.2e} at most "
            f"(on {self.source})"
        )
        fitted = [layer for layer in self.layers if layer.tokens is not None]
        if fitted:
            held_out = sum(layer.held_out_error for layer in fitted) / len(fitted)
            fewest = min(layer.tokens for layer in fitted)
            text += f"; {held_out:.2e} on held-out tokens, of at least {fewest:,} a layer"
        return text


class MergedNASLoRALinear(nn.Module):
    """An exactly merged layer: the pointwise part sits in ``base``, a small convolution remains.

    Attributes:
        base: nn.Linear with the channels that bypass the cell folded in.
        lora_A: (c, C_in) the encoder's rows that feed the cell.
        lora_B: (C_out, c) the decoder's columns behind it, scaling included.
        mixture: the collapsed cell, on (B, H, W, c).
        grid: (H, W) of token sequences that are not square, or None.
        backend: kernel backend; None takes the best that serves.
    """

    def __init__(
        self,
        base: nn.Linear,
        lora_A: Tensor,
        lora_B: Tensor,
        mixture: nn.Module,
        grid: tuple[int, int] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("lora_A", lora_A)
        # Laid out by channel, as the kernels read it.
        self.register_buffer("lora_B", lora_B.t().contiguous().t())
        self.mixture = mixture
        self.grid = grid
        if grid is not None:  # a saved model has to know it
            self.register_buffer("declared_grid", torch.tensor(grid))
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) or (B, N, C_in) to the same with C_out; shapes as ``NASLoRALinear``."""
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


def merge(
    model: nn.Module, mode: MergeMode = "exact", calibration: Iterable[Any] | None = None
) -> MergeReport:
    """Merges every NAS-LoRA layer of ``model`` into its frozen linear, in place.

    Args:
        model: a model that ``inject`` adapted.
        mode: "exact": each layer becomes a ``MergedNASLoRALinear``, equal up to rounding (plain
            LoRA becomes an nn.Linear). "center": each layer becomes an nn.Linear, under the state
            dict keys of the original model; what the neighbours contributed is lost.
            "calibrated": likewise, but fitted to the calibration images, which recovers most of it.
        calibration: batches, each fed as ``model(batch)``, on which to fit and to measure the
            errors; they are kept in memory meanwhile. None measures errors on seeded white noise.

    Returns:
        The relative errors, layer by layer.

    Raises:
        UserError: an unknown mode, nothing to merge, a model merged before, no batches, batches
            that do not fit the model or miss a layer, too few tokens, values that are not finite,
            or an operation set that the mode cannot fold. The model is then unchanged.
    """
    layers = dict(adapter_layers(model))
    check_mergeable(model, layers, mode)
    if mode == "calibrated" and calibration is None:
        raise UserError("mode 'calibrated' needs images: give them as calibration=batches")
    batches = calibration_batches(calibration)
    fits: dict[str, Fit] = {}
    with torch.no_grad():
        if mode == "calibrated":
            fitted = calibrate(model, layers, batches)
            fits = {name: fit for name, (fit, _) in fitted.items()}
            merged = {name: fitted[name][1] for name in layers}
        else:
            fold = _merge_exact if mode == "exact" else _merge_center
            merged = {name: fold(layer) for name, layer in layers.items()}
    return replace_by_merged(model, layers, merged, mode, batches, fits)


def calibration_batches(calibration: Iterable[Any] | None) -> list[Any] | None:
    """The batches as a list, as they are gone through more than once; None if there are none.

    Raises:
        UserError: there is something to go through, but it yields nothing.
    """
    if calibration is None:
        return None
    batches = list(calibration)
    if not batches:
        raise UserError("calibration yielded no batches")
    return batches


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
    batches: Sequence[Any] | None,
    fits: dict[str, Fit] | None = None,
) -> MergeReport:
    """Measures what the merged modules lose and puts them where ``layers`` were, in place.

    Args:
        layers: the adapted layers by their names; what ``unmerge`` restores.
        merged: their merged twins by the same names.
        batches: of ``calibration_batches``.
        fits: how each was calibrated, where it was.

    Raises:
        UserError: batches that miss a layer, or values that are not finite. The model is then
            unchanged.
    """
    errors = _errors(model, layers, merged, batches, fits or {})
    for name, module in merged.items():
        module.train(model.training)
        replace_module(model, name, module)
    _originals[model] = layers
    source = "white noise" if batches is None else "calibration images"
    report = MergeReport(mode, source, errors, _warning(layers, fits or {}))
    if report.warning:
        warnings.warn(report.warning, stacklevel=3)
    return report


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
        grid = tensors.get(f"{name}.declared_grid")
        layer = MergedNASLoRALinear(
            model.get_submodule(name),
            tensors[prefix],
            tensors[f"{name}.lora_B"],
            mixture,
            None if grid is None else tuple(grid.tolist()),
        )
        replace_module(model, name, layer)


def _merge_exact(layer: NASLoRALinear) -> nn.Module:
    """The channels that bypass the cell fold; the cell becomes one convolution and pooling."""
    encoder = layer.lora_A.detach().double()
    if layer.cell is None:
        return layer.folded(encoder)
    bypass = encoder.clone()
    bypass[layer.channels] = 0.0
    return MergedNASLoRALinear(
        layer.folded(bypass),
        layer.lora_A.detach()[layer.channels].clone(),
        layer.scaling * layer.lora_B.detach()[:, layer.channels],
        layer.cell.collapsed(layer.alpha),
        layer.grid,
        layer.backend,
    )


def _merge_center(layer: NASLoRALinear) -> nn.Linear:
    """The cell's centre taps on its channels, the identity on the others, folded into W0."""
    return layer.folded(layer.centre() @ layer.lora_A.double())


def _warning(layers: dict[str, NASLoRALinear], fits: dict[str, Fit]) -> str | None:
    """What is to be said about fits on few tokens."""
    scarce = {
        name: fit
        for name, fit in fits.items()
        if fit.tokens < TOKENS_PER_INPUT * layers[name].in_features
    }
    if not scarce:
        return None
    name, fit = min(scarce.items(), key=lambda item: item[1].tokens / item[1].linear_map.shape[1])
    return (
        f"{len(scarce)} layers were fitted on fewer tokens than they need; {name} saw "
        f"{fit.tokens:,}, and should see {TOKENS_PER_INPUT * layers[name].in_features:,}: give "
        "more calibration images"
    )


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

    def relative(self, name: str, fit: Fit | None) -> LayerError:
        if not math.isfinite(self.difference + self.update + self.output):
            raise UserError(
                f"layer {name} meets values that are not finite; look for bad images, or merge in "
                "float32"
            )
        # An adapter that does nothing (lora_B = 0) loses nothing.
        update = (self.difference / self.update) ** 0.5 if self.update else 0.0
        output = (self.difference / self.output) ** 0.5 if self.output else 0.0
        if fit is None:
            return LayerError(name, update, output)
        return LayerError(name, update, output, fit.tokens, fit.regularisation, fit.held_out_error)


def _squared_norm(x: Tensor) -> float:
    return float(x.double().square().sum())


def _errors(
    model: nn.Module,
    layers: dict[str, nn.Module],
    merged: dict[str, nn.Module],
    batches: Sequence[Any] | None,
    fits: dict[str, Fit],
) -> list[LayerError]:
    """Holds each layer against its merged twin: on noise, or on what it sees in the model."""
    sums = {layer: _ErrorSums() for layer in layers.values()}
    twins = {layer: merged[name] for name, layer in layers.items()}
    if batches is None:
        for layer in layers.values():
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(*NOISE_GRID, layer.in_features, generator=generator)
            training = layer.training
            layer.eval()
            sums[layer].add(layer, twins[layer], noise.to(layer.weight))
            layer.train(training)
    else:
        feed(
            model,
            batches,
            lambda _, layer, x: sums[layer].add(layer, twins[layer], x),
            list(layers.values()),
        )
        check_reached(layers, [layer for layer, own in sums.items() if own.calls])
    return [sums[layer].relative(name, fits.get(name)) for name, layer in layers.items()]
