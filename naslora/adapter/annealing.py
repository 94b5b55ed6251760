"""Annealing: over the last epochs the cell moves to its pointwise part, which merges without loss.

With t, ``LinearCell.spatial``, falling from 1 to 0 the cell computes with other arguments of the
same kind, so whatever computes the cell computes its annealed form:

- the depthwise kernels' neighbour taps are multiplied by t; centre taps stay;
- the average pooling moves to its centre tap, 1/9 of the pixel itself: of its weight a_avg the
  share t stays, (1 - t) / 9 goes to the skip connection and 8 (1 - t) / 9 to ``none``;
- the max-pooling, which has no centre tap, gives (1 - t) of its weight to ``none``.

The weights still add up to one, so they are a softmax of other logits. At t = 0 the cell is what
mode "center" folds.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora_kernels.operations import AVG_POOL, MAX_POOL, NONE, SKIP

ZERO = -1e4  # exp(-1e4) is zero in any float


def spatial_share(epoch: int, epochs: int, anneal_epochs: int) -> float:
    """t in an epoch: it falls over the first half of the last ``anneal_epochs``, then is zero."""
    into = epoch - (epochs - anneal_epochs) + 1
    falling = max(anneal_epochs // 2, 1)
    return min(max(1 - into / falling, 0.0), 1.0)


def annealed_kernel(dw: Tensor, spatial: float) -> Tensor:
    """(c, k, k) with the taps beside the centre multiplied by ``spatial``."""
    middle = dw.shape[-1] // 2
    centre = F.pad(dw[:, middle : middle + 1, middle : middle + 1], (middle,) * 4)
    return spatial * dw + (1 - spatial) * centre


def annealed_alpha(alpha: Tensor, spatial: float) -> Tensor:
    """(8,) logits of the mixture whose poolings have moved to their centres."""
    logs = alpha.log_softmax(0)
    kept = math.log(spatial) if spatial > 0 else ZERO
    lost = math.log(1 - spatial)
    average, maximum = logs[AVG_POOL], logs[MAX_POOL]
    moved = {
        AVG_POOL: average + kept,
        MAX_POOL: maximum + kept,
        SKIP: torch.logaddexp(logs[SKIP], average + lost - math.log(9)),
        NONE: torch.stack([logs[NONE], average + lost + math.log(8 / 9), maximum + lost]).logsumexp(
            0
        ),
    }
    return torch.stack([moved.get(i, logs[i]) for i in range(len(logs))])


def set_spatial(model: nn.Module, spatial: float) -> int:
    """Sets the share of every cell that can be annealed; returns how many there are."""
    cells = [module for module in model.modules() if hasattr(module, "spatial")]
    for cell in cells:
        cell.spatial = spatial
    return len(cells)


@contextmanager
def fixed(model: nn.Module) -> Iterator[None]:
    """Writes what the annealed cells compute with into their parameters, for saving them."""
    layers = [
        module
        for module in model.modules()
        if getattr(getattr(module, "cell", None), "spatial", 1.0) != 1.0
    ]
    kept: list[tuple[nn.Parameter, Tensor]] = []
    shares = [layer.cell.spatial for layer in layers]
    with torch.no_grad():
        for layer in layers:
            alpha, depthwise, _ = layer.cell.arguments(layer.alpha)
            own = (layer.alpha, *layer.cell.depthwise)
            for parameter, value in zip(own, (alpha, *depthwise), strict=True):
                kept.append((parameter, parameter.clone()))
                parameter.copy_(value)
            layer.cell.spatial = 1.0
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
        for layer, share in zip(layers, shares, strict=True):
            layer.cell.spatial = share
