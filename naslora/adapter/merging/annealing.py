"""Annealing: over the last epochs the cell moves to its pointwise part, which merges exactly.

t, ``LinearCell.spatial``, falls from 1 to 0. The annealed cell is a linear cell with other tensors
(``annealed_kernel`` and ``annealed_alpha`` in ``cell.py``), so every backend computes it:

- Taps of the depthwise kernels beside the centre are multiplied by t. Centre taps stay.
- Average pooling moves to its centre tap, which is 1/9 of the pixel. It keeps the share t of its
  weight a_avg. The skip connection gets (1 - t) a_avg / 9, ``none`` gets 8 (1 - t) a_avg / 9.
- Max-pooling has no centre tap. It keeps the share t of its weight, ``none`` gets the rest.

The weights still add up to one, so they are the softmax of other logits. At t = 0 the cell computes
what mode "center" folds. Only the preset `linear` can be annealed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from naslora.adapter.layer.cell import LinearCell
from naslora.adapter.layer.modules import adapter_layers


def spatial_share(epoch: int, epochs: int, anneal_epochs: int) -> float:
    """t in an epoch. It falls over the first half of the last ``anneal_epochs``, then it is 0.

    Args:
        epoch: counted from 0.
        epochs: of the whole training.
        anneal_epochs: the number of last epochs that anneal; 0 for none.
    """
    into = epoch - (epochs - anneal_epochs) + 1
    falling = max(anneal_epochs // 2, 1)
    return min(max(1 - into / falling, 0.0), 1.0)


def set_spatial(model: nn.Module, spatial: float) -> int:
    """Sets t of every linear cell. Returns the number of linear cells."""
    cells = [cell for _, cell in _linear_cells(model)]
    for cell in cells:
        cell.spatial = spatial
    return len(cells)


@contextmanager
def fixed(model: nn.Module) -> Iterator[None]:
    """Within the context the parameters hold their annealed values and t is 1, for saving them.

    The model computes the same inside and outside. Parameters and t are restored at the end.
    """
    shares: list[tuple[LinearCell, float]] = []
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for alpha, cell in _linear_cells(model):
            if cell.spatial == 1.0:
                continue
            annealed = cell.arguments(alpha)
            own = (alpha, *cell.depthwise)
            values = (annealed.alpha, *annealed.depthwise)
            for parameter, value in zip(own, values, strict=True):
                kept.append((parameter, parameter.clone()))
                parameter.copy_(value)
            shares.append((cell, cell.spatial))
            cell.spatial = 1.0
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
        for cell, share in shares:
            cell.spatial = share


def _linear_cells(model: nn.Module) -> Iterator[tuple[Tensor, LinearCell]]:
    """alpha and cell of every layer whose preset is `linear`."""
    for _, layer in adapter_layers(model):
        if layer.alpha is not None and isinstance(layer.cell, LinearCell):
            yield layer.alpha, layer.cell
