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

from torch import Tensor, nn

from naslora.adapter.layer.cell import LinearCell
from naslora.adapter.layer.modules import adapter_layers, bare_layers


def spatial_share(epoch: int, epochs: int, anneal_epochs: int) -> float:
    """t in an epoch, counted from 0, of the training's ``epochs``. It falls over the first half of
    the last ``anneal_epochs``, then it is 0."""
    into = epoch - (epochs - anneal_epochs) + 1
    falling = max(anneal_epochs // 2, 1)
    return min(max(1 - into / falling, 0.0), 1.0)


def set_spatial(model: nn.Module, spatial: float) -> int:
    """Sets t of every linear cell. Returns the number of linear cells."""
    cells = [layer.cell for _, layer in adapter_layers(model) if isinstance(layer.cell, LinearCell)]
    for cell in cells:
        cell.spatial = spatial
    return len(cells)


def annealed(model: nn.Module) -> dict[str, Tensor]:
    """alpha and the depthwise kernels of every linear cell, as they are at the current t.

    With these values, under their names in the model without wrappers, a cell computes at t = 1
    what it computes now. So a saved adapter holds them.
    """
    values = {}
    for name, layer in bare_layers(model).items():
        if layer.alpha is not None and isinstance(layer.cell, LinearCell):
            cell = layer.cell.tensors(layer.alpha)
            for field in ("alpha", "dw_sep3", "dw_sep5", "dw_dil3", "dw_dil5"):
                leaf = field if field == "alpha" else f"cell.{field}"
                values[f"{name}.{leaf}".lstrip(".")] = getattr(cell, field).detach()
    return values
