"""The (H, W) of a sequence of tokens.

A cell needs to know which tokens are neighbours. (B, H, W, C) inputs say it. Of a (B, N, C) input
the layer takes, in this order: its own ``grid``, what the host model states of the layer's tokens,
a square. ``find_hint`` reads the host's statement once, when the layer is put into the model.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Grid = tuple[int, int]  # (H, W)

# Configurations of Hugging Face with one of these describe encoders whose stages have grids of
# their own, so the image's grid is not that of every layer.
STAGED = ("depths", "hidden_sizes", "embed_dims", "embed_dim_per_stage", "blocks_per_stage")


@dataclass(frozen=True)
class GridHint:
    """What the host states of the tokens that a layer sees."""

    grid: Grid
    """(H, W)."""
    source: str
    """The attribute that states it, for messages, such as `patch_embed.grid_size`."""
    layer: str
    """The layer's name in the model, for messages."""
    window: bool = False
    """Whether it is the window of a windowed attention. Hosts shrink a square window to images that
    are smaller than it, so smaller squares are accepted."""


def split_prefix(x: Tensor, prefix: int) -> tuple[Tensor | None, Tensor]:
    """Splits (B, N, C) tokens into those without a place in the image and those with one.

    Args:
        x: the tokens. (B, H, W, C) has no prefix.
        prefix: number of class and register tokens at the start of a sequence.

    Returns:
        (B, prefix, C), None if there are none, and the other tokens.
    """
    return (x[:, :prefix], x[:, prefix:]) if prefix and x.dim() == 3 else (None, x)


def as_grid(x: Tensor, grid: Grid | None, hint: GridHint | None = None, prefix: int = 0) -> Tensor:
    """Views (B, N, C) tokens as a (B, H, W, C) grid; returns (B, H, W, C) unchanged.

    Args:
        x: the tokens, without the prefix.
        grid: (H, W) as set by the user; None for what the host states.
        hint: what the host states; None for a square.
        prefix: number of tokens that were split off, for the message.

    Raises:
        ValueError: another number of dimensions, or N does not fit the grid.
    """
    if x.dim() == 4:
        return x
    if x.dim() != 3:
        raise ValueError(f"x: expected (B, H, W, C_in) or (B, N, C_in), got {tuple(x.shape)}")
    count = x.shape[1]
    height, width = grid or (hint.grid if hint is not None else (math.isqrt(count),) * 2)
    if height * width != count or (prefix and not count):
        height, width = _smaller_window(count, grid, hint, prefix)
    return x.reshape(x.shape[0], height, width, x.shape[2])


def _smaller_window(count: int, grid: Grid | None, hint: GridHint | None, prefix: int) -> Grid:
    """The grid of tokens that are no declared grid: a smaller window, or else a ValueError."""
    side = math.isqrt(count)
    stated = hint if hint is not None and grid in (None, hint.grid) else None
    height, width = stated.grid if stated is not None else grid or (side, side)
    if stated is not None and stated.window and side * side == count and height == width > side:
        return side, side
    tokens = f"{count} tokens" + (f" behind {prefix} prefix tokens" if prefix else "")
    advice, number = "set the layer's `grid` to (H, W), as in `layer.grid = (H, W)`", "N"
    if stated is None:
        found = f"{tokens} are no {height} x {width} grid"
    else:
        found = (
            f"{tokens} at layer {stated.layer!r} are not the {height} x {width} grid of the "
            f"model's {stated.source}"
        )
        if 0 <= prefix + count - height * width < height * width:
            number = str(prefix + count - height * width)
    starts = "without" if number == "0" else "with"
    raise ValueError(
        f"x: {found}; {advice}, or prefix_tokens={number} in NASLoRAConfig if the sequence starts "
        f"{starts} class or register tokens"
    )


def place_hint(model: nn.Module, name: str, layer: Any, prefix: int | None = None) -> None:
    """Gives a layer what the model states of its tokens: ``hint``, ``grid`` if not square, and
    ``prefix_tokens``, timm's ``num_prefix_tokens``.

    ``grid`` is what merged layers keep. They need it only where a square is wrong.

    Args:
        model: the host.
        name: the layer's name in it.
        layer: a layer with these three attributes.
        prefix: the prefix tokens as the configuration states them; None takes the model's.
    """
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    stated = max(getattr(module, "num_prefix_tokens", 0) for module in around)
    layer.prefix_tokens = stated if prefix is None else prefix
    layer.hint = find_hint(model, name)
    if layer.hint is not None and layer.grid is None and layer.hint.grid[0] != layer.hint.grid[1]:
        layer.grid = layer.hint.grid


def find_hint(model: nn.Module, name: str) -> GridHint | None:
    """What the modules around a layer state of its tokens; None if they state nothing.

    The nearest module that contains the layer and states something decides. Read are:

    - ``resolution`` (TinyViT) and ``window_size`` (Swin, BEiT, SAM) of an attention or its block;
    - ``patch_embed.grid_size`` around the layer's ``blocks`` (timm's ViTs), or a pair
      ``grid_size``;
    - ``config.image_size`` and ``config.patch_size`` (Hugging Face), unless the encoder has stages.
    """
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        host: Any = model.get_submodule(".".join(parts[:depth]))
        inner = parts[depth:]
        # The MLP of a block does not see its windows.
        named = any("att" in part.lower() for part in (type(host).__name__, *inner[:-1]))
        if len(inner) <= 2 and named:
            for attribute in ("resolution", "window_size"):
                sides = getattr(host, attribute, None)
                # One number on an attention itself means something else, as in Hiera.
                window = None if isinstance(sides, int) and len(inner) == 1 else _pair(sides)
                if window is not None:
                    return GridHint(window, attribute, name, window=True)
        stated = _image_grid(host, inner[0])
        if stated is not None:
            return GridHint(*stated, name)
    return None


def _image_grid(host: Any, inner: str) -> tuple[Grid, str] | None:
    """The grid of the whole image that a module states, and the attribute that states it."""
    grid = _pair(getattr(getattr(host, "patch_embed", None), "grid_size", None))
    if inner == "blocks" and grid is not None:
        return grid, "patch_embed.grid_size"
    grid = getattr(host, "grid_size", None)  # one number means something else, as in KAN layers
    if not isinstance(grid, int) and _pair(grid) is not None:
        return _pair(grid), "grid_size"  # type: ignore[return-value]
    config = getattr(host, "config", None)
    image, patch = (_pair(getattr(config, key, None)) for key in ("image_size", "patch_size"))
    if image is None or patch is None or any(hasattr(config, key) for key in STAGED):
        return None
    return (image[0] // patch[0], image[1] // patch[1]), "config.image_size and config.patch_size"


def _pair(value: Any) -> Grid | None:
    """(H, W) of one positive integer or of two; None for anything else."""
    sides = (value, value) if isinstance(value, int) else value
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        return None
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        return None
    return int(sides[0]), int(sides[1])
