"""Merging: folds trained adapters into the frozen weights and reports the error.

The frozen weight acts on one token; the cell mixes neighbours. So folding a cell into the weight
(paper, Eq. 6-7) is exact only for its pointwise part:

- ``exact`` keeps what cannot fold: one small convolution on the c channels, and pooling. The error
  is rounding.
- ``center`` reads Eq. 6 literally: the centre taps and the skip connection fold, the rest is
  dropped, and a plain nn.Linear remains.
- ``calibrated`` fits a plain nn.Linear to the layer's output on calibration images, layer by layer;
  see ``calibration.py``.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from naslora.adapter.io.wrappers import unsharded, unwrap
from naslora.adapter.layer.applied import applied
from naslora.adapter.layer.layer import NASLoRALinear
from naslora.adapter.layer.modules import adapter_layers, check_model, replace_module
from naslora.adapter.merging.calibration import (
    TOKENS_PER_INPUT,
    Calibration,
    Fit,
    Forward,
    calibrate,
    calibration_batches,
    check_calibration,
    check_reached,
    feed,
)
from naslora.adapter.merging.merged import (
    MergedNASLoRALinear,
    can_unmerge,
    mark_merged,
    merged_modules,
)
from naslora.adapter.merging.report import MODES, LayerError, MergeMode, MergeReport
from naslora.errors import UserError

# Batch, height and width of the seeded white noise on which errors are measured without images.
NOISE_GRID = (2, 16, 16)

Update = Callable[[Any, Tensor, Tensor], Tensor]
"""Takes a layer, its input and its output. Returns the adapter's part of the output."""


def merge(
    model: nn.Module,
    mode: MergeMode = "exact",
    calibration: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
) -> MergeReport:
    """Folds the model's adapters into the frozen weights, in place. ``unmerge`` undoes it.

    LoRA, DoRA and VeRA become plain nn.Linear layers, exactly in every mode.

    Args:
        model: a model that ``inject`` or ``naslora.methods.apply`` adapted. It may be inside
            wrappers such as DistributedDataParallel or ``torch.compile``. With sharded tensors
            (``fully_shard``) every process must call this; each holds the merged layers in one
            piece, and during the merge a copy of the whole model.
        mode: what a searched cell becomes. "exact": each layer becomes a ``MergedNASLoRALinear``,
            equal up to rounding (plain LoRA becomes an nn.Linear). "center": each layer becomes an
            nn.Linear, under the state dict keys of the original model, without the contribution of
            neighbouring tokens. "calibrated": an nn.Linear too, but fitted to the calibration
            images, which recovers most of that contribution.
        calibration: batches on which layers are fitted and errors measured. They are kept in memory
            until the merge ends. None measures errors on seeded white noise.
        forward: feeds a batch, as ``forward(model, batch)``, for example
            ``lambda model, batch: model(**batch)``. It must run in evaluation mode without
            gradients. None calls ``model(batch)``.

    Returns:
        The relative errors, layer by layer.

    Raises:
        UserError: an argument of a wrong type, a method that cannot be merged, an unknown mode,
            nothing to merge, a model merged before, no batches, batches that do not fit the model
            or do not reach a layer, too few tokens, values that are not finite, or an operation set
            that the mode cannot fold. The model is then unchanged.
    """
    check_model(model)
    given = check_calibration(calibration, forward)
    model = unwrap(model)
    present = applied(model)
    fold = merge_cells if present is None else present.method.require_merge()
    whole = unsharded(model)
    report = fold(whole, mode, given)
    if whole is not model:
        _move_merged(whole, model, mode)
    return report


def _move_merged(whole: nn.Module, model: nn.Module, mode: str) -> None:
    """Puts the merged modules of a copy in one piece into the sharded model it was copied from."""
    for name, module in list(merged_modules(whole)):
        if mode == "calibrated" and distributed.is_initialized():
            for tensor in module.state_dict().values():  # the processes may have fed other images
                distributed.broadcast(tensor, 0)
        mark_merged(module, model.get_submodule(name))
        replace_module(model, name, module)


def check_merges(model: nn.Module) -> None:
    """Refuses a model whose applied method cannot be merged.

    Raises:
        UserError: it cannot. The message says why.
    """
    present = applied(model)
    if present is not None:
        present.method.require_merge()


def merge_cells(
    model: nn.Module, mode: MergeMode, calibration: Iterable[Any] | Calibration | None
) -> MergeReport:
    """``merge`` for the layers of ``inject``."""
    layers = dict(adapter_layers(model))
    check_mergeable(model, layers, mode)
    batches = calibration_batches(calibration)
    if mode == "calibrated" and batches is None:
        raise UserError("mode 'calibrated' needs images: give them as calibration=batches")
    fits: dict[str, Fit] = {}
    merged: dict[str, nn.Module] = {}
    with torch.no_grad():
        if mode == "calibrated" and batches is not None:
            fitted = calibrate(model, layers, batches)
            fits = {name: fit for name, (fit, _) in fitted.items()}
            merged = {name: fitted[name][1] for name in layers}
        else:
            fold = _merge_exact if mode == "exact" else _merge_center
            merged = {name: fold(layer) for name, layer in layers.items()}
    return replace_by_merged(model, layers, merged, mode, batches, _update, fits)


def _update(layer: NASLoRALinear, x: Tensor, h: Tensor) -> Tensor:
    return layer.update(x)


def check_mergeable(model: nn.Module, layers: Mapping[str, nn.Module], mode: str) -> None:
    """The checks of ``merge`` that do not depend on the layers' values.

    Raises:
        UserError: an unknown mode, nothing to merge, or a model merged before.
    """
    if any(merged_modules(model)):
        if not can_unmerge(model):
            raise UserError("there is nothing to merge: the model was merged before it was loaded")
        raise UserError("the model is merged already; call unmerge(model) first")
    if not layers:
        raise UserError("there is nothing to merge: the model has no NAS-LoRA layers")
    if "" in layers:
        raise UserError("model is a single layer; give the model around it")
    if mode not in MODES:
        raise UserError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


@torch.no_grad()
def replace_by_merged(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    merged: Mapping[str, nn.Module],
    mode: str,
    batches: Calibration | None,
    update: Update,
    fits: Mapping[str, Fit] | None = None,
) -> MergeReport:
    """Measures the errors of the merged modules and puts them in place of ``layers``.

    Args:
        model: the adapted model.
        layers: the adapted layers by their names, which ``unmerge`` restores. They have the
            attributes ``in_features`` and ``weight``.
        merged: the merged modules by the same names.
        mode: the mode of the merge, for the report.
        batches: the result of ``calibration_batches``.
        update: computes the adapter's part of a layer's output.
        fits: the fits of calibrated layers.

    Raises:
        UserError: batches that do not reach a layer, or values that are not finite. The model is
            then unchanged.
    """
    errors = _errors(model, layers, merged, batches, update, fits or {})
    for name, module in merged.items():
        module.train(model.training)
        mark_merged(module, layers[name])
        replace_module(model, name, module)
    source = "white noise" if batches is None else "calibration images"
    report = MergeReport(mode, source, errors, _warning(fits or {}))
    if report.warning:
        warnings.warn(report.warning, stacklevel=5)  # at the call of ``merge``
    return report


def _merge_exact(layer: NASLoRALinear) -> nn.Module:
    """The channels that bypass the cell fold; the cell becomes one convolution and pooling."""
    encoder = layer.lora_A.detach().double()
    if layer.cell is None or layer.alpha is None:
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
        layer.prefix_tokens,
    )


def _merge_center(layer: NASLoRALinear) -> nn.Module:
    """The cell's centre taps on its channels, the identity on the others, folded into W0."""
    return layer.folded(layer.centre() @ layer.lora_A.double())


def _warning(fits: Mapping[str, Fit]) -> str | None:
    """The warning about fits on too few tokens; None if there are none."""
    inputs = {name: fit.linear_map.shape[1] for name, fit in fits.items()}
    scarce = {
        name: fit.tokens / inputs[name]
        for name, fit in fits.items()
        if fit.tokens < TOKENS_PER_INPUT * inputs[name]
    }
    if not scarce:
        return None
    name = min(scarce, key=lambda name: scarce[name])
    return (
        f"{len(scarce)} layers were fitted on fewer tokens than they need; {name} saw "
        f"{fits[name].tokens:,}, and should see {TOKENS_PER_INPUT * inputs[name]:,}: give "
        "more calibration images"
    )


class _ErrorSums:
    """Sums of squares of one layer's difference, update and output over many inputs."""

    def __init__(self) -> None:
        self.difference = self.update = self.output = 0.0
        self.calls = 0

    def add(self, layer: Any, merged: nn.Module, update: Update, x: Tensor) -> None:
        h = layer(x)
        self.calls += 1
        self.difference += _squared_norm(merged(x) - h)
        self.update += _squared_norm(update(layer, x, h))
        self.output += _squared_norm(h)

    def relative(self, name: str, fit: Fit | None) -> LayerError:
        if not math.isfinite(self.difference + self.update + self.output):
            raise UserError(
                f"layer {name} meets values that are not finite; look for bad images, or merge in "
                "float32"
            )
        # The error of an adapter whose update is zero (lora_B = 0) is zero.
        update = (self.difference / self.update) ** 0.5 if self.update else 0.0
        output = (self.difference / self.output) ** 0.5 if self.output else 0.0
        if fit is None:
            return LayerError(name, update, output)
        return LayerError(name, update, output, fit.tokens, fit.regularisation, fit.held_out_error)


def _squared_norm(x: Tensor) -> float:
    return float(x.double().square().sum())


def _errors(
    model: nn.Module,
    layers: Mapping[str, Any],
    merged: Mapping[str, nn.Module],
    batches: Calibration | None,
    update: Update,
    fits: Mapping[str, Fit],
) -> list[LayerError]:
    """Compares each layer with its merged module: on noise, or on its inputs in the model."""
    sums = {layer: _ErrorSums() for layer in layers.values()}
    twins = {layer: merged[name] for name, layer in layers.items()}

    def compare(batch: int, layer: Any, x: Tensor) -> None:
        sums[layer].add(layer, twins[layer], update, x)

    if batches is None:
        for layer in layers.values():
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(*NOISE_GRID, layer.in_features, generator=generator)
            training = layer.training
            layer.eval()
            compare(0, layer, noise.to(layer.weight))
            layer.train(training)
    else:
        feed(model, batches, compare, list(layers.values()))
        check_reached(layers, [layer for layer, own in sums.items() if own.calls])
    return [sums[layer].relative(name, fits.get(name)) for name, layer in layers.items()]
