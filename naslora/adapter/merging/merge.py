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
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from naslora.adapter.io.wrappers import sharded, unwrap
from naslora.adapter.layer.applied import Folding, applied
from naslora.adapter.layer.config import NASLoRAConfig
from naslora.adapter.layer.layer import NASLoRALinear
from naslora.adapter.layer.modules import adapter_layers, replace_module
from naslora.adapter.merging.calibration import (
    Calibration,
    Fit,
    Forward,
    calibrate,
    calibration_batches,
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


@torch.no_grad()
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
            wrappers such as DistributedDataParallel or ``torch.compile``.
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
            nothing to merge, a model merged before, sharded tensors (``fully_shard``), no batches,
            batches that do not fit the model or do not reach a layer, too few tokens, values that
            are not finite, or an operation set that the mode cannot fold. The model is then
            unchanged.
    """
    model = unwrap(model)
    present = applied(model)
    folding = CELLS if present is None else present.method.require_merge()
    layers = dict(folding.layers(model))
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
    if sharded(model):
        raise UserError(
            "the model's tensors are sharded (fully_shard): save its adapter, load that into a "
            "model that is not, and merge there"
        )
    batches = calibration_batches(calibration, forward)
    fits: dict[str, Fit] = {}
    if mode == "calibrated" and folding == CELLS:
        if batches is None:
            raise UserError("mode 'calibrated' needs images: give them as calibration=batches")
        fits, merged = calibrate(model, layers, batches)
    else:
        merged = {name: folding.fold(layer, mode) for name, layer in layers.items()}
    errors = _errors(model, layers, merged, batches, folding, fits)
    for name, module in merged.items():
        module.train(model.training)
        mark_merged(module, layers[name])
        replace_module(model, name, module)
    source = "white noise" if batches is None else "calibration images"
    report = MergeReport(mode, source, errors, _warning(fits))
    if report.warning:
        warnings.warn(report.warning, stacklevel=3)  # at the call of ``merge``
    return report


# ---- The layers of ``inject`` --------------------------------------------------------------------


def _fold(layer: NASLoRALinear, mode: MergeMode) -> nn.Module:
    """Mode "center" folds the cell's centre taps on its channels, the identity on the others. Mode
    "exact" folds the channels that bypass the cell; the cell becomes a convolution and pooling."""
    if mode == "center" or layer.cell is None or layer.alpha is None:
        return layer.folded(layer.pointwise())
    return MergedNASLoRALinear(
        layer.folded(layer.bypass()),
        layer.lora_A[layer.channels].clone(),
        layer.scaling * layer.lora_B[:, layer.channels],
        layer.cell.collapsed(layer.alpha),
        layer.grid,
        layer.backend,
        layer.prefix_tokens,
    )


def _update(layer: NASLoRALinear, x: Tensor, h: Tensor) -> Tensor:
    return layer.update(x)


def _modes(config: NASLoRAConfig) -> list[MergeMode]:
    """The preset `paper` is not linear: it has no centre taps."""
    return [mode for mode in MODES if mode != "center" or config.preset != "paper"]


CELLS = Folding(adapter_layers, _fold, _update, _modes)


# ---- Errors --------------------------------------------------------------------------------------


def _warning(fits: Mapping[str, Fit]) -> str | None:
    """The warning about fits on fewer tokens than inputs; None if there are none."""
    seen = [(fit.tokens, fit.linear_map.shape[1], name) for name, fit in fits.items()]
    scarce = [(tokens, inputs, name) for tokens, inputs, name in seen if tokens < inputs]
    if not scarce:
        return None
    tokens, inputs, name = min(scarce, key=lambda one: one[0] / one[1])
    return (
        f"{len(scarce)} layers were fitted on fewer tokens than they have inputs, so they stay "
        f"close to 'center'; {name} saw {tokens:,}, and has {inputs:,}: give more images, as "
        "calibration or with naslora merge --images"
    )


def _errors(
    model: nn.Module,
    layers: Mapping[str, Any],
    merged: Mapping[str, nn.Module],
    batches: Calibration | None,
    folding: Folding,
    fits: Mapping[str, Fit],
) -> list[LayerError]:
    """Compares each layer with its merged module: on noise, or on its inputs in the model."""
    twins = {layer: merged[name] for name, layer in layers.items()}
    squares: dict[nn.Module, list[float]] = {}  # of the difference, the update and the output

    def compare(batch: int, layer: Any, x: Tensor) -> None:
        h = layer.forward(x)  # without the hook that calls this
        sums = squares.setdefault(layer, [0.0, 0.0, 0.0])
        for i, part in enumerate((twins[layer](x) - h, folding.update(layer, x, h), h)):
            sums[i] += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2

    if batches is None:
        for layer in layers.values():
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(*NOISE_GRID, layer.in_features, generator=generator)
            training = layer.training
            layer.eval()
            compare(0, layer, noise.to(layer.weight))
            layer.train(training)
    else:
        feed(model, batches, compare, layers)
    errors = []
    for name, layer in layers.items():
        difference, update, output = squares[layer]
        if not math.isfinite(difference + update + output):
            raise UserError(
                f"layer {name} meets values that are not finite; look for bad images, or merge in "
                "float32"
            )
        # The error of an adapter whose update is zero (lora_B = 0) is zero.
        of_update = (difference / update) ** 0.5 if update else 0.0
        of_output = (difference / output) ** 0.5 if output else 0.0
        errors.append(LayerError(name, of_update, of_output, *fits.get(name, ())[2:]))
    return errors
