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
    window: bool = False
    """Whether it is the window of a windowed attention. Hosts shrink a square window to images that
    are smaller than it, so smaller squares are accepted."""


class GridLayer(nn.Module):
    """A layer whose tokens are an image.

    Attributes:
        name: the layer's name in the host, for messages.
        grid: (H, W) of token sequences that are not square, or None.
        hint: what the host model states of the layer's tokens, or None.
        prefix_tokens: class and register tokens at the start of (B, N, C) inputs. They have no
            place in the image.
    """

    name = ""
    grid: Grid | None = None
    hint: GridHint | None = None
    prefix_tokens: int = 0

    def split(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Splits (B, N, C) into the prefix, (B, prefix_tokens, C) or None if there is none, and the
        image, a view (B, H, W, C). (B, H, W, C) is an image without a prefix.

        Raises:
            ValueError: another number of dimensions, or the other tokens do not fit the grid.
        """
        if x.dim() == 4:
            return None, x
        if x.dim() != 3:
            raise ValueError(f"x: expected (B, H, W, C_in) or (B, N, C_in), got {tuple(x.shape)}")
        tokens = x[:, self.prefix_tokens :]
        count = tokens.shape[1]
        prefix = x[:, : self.prefix_tokens] if self.prefix_tokens else None
        side, hint = math.isqrt(count), self.hint
        height, width = self.grid or (hint.grid if hint is not None else (side, side))
        if height * width != count or (prefix is not None and not count):
            # A grid of the user's own is no window of the host's.
            stated = hint if hint is not None and self.grid in (None, hint.grid) else None
            window = stated is not None and stated.window and height == width > side
            if not window or side * side != count:
                raise self._misfit(count, x.shape[1] - count, height, width, stated)
            height, width = side, side
        return prefix, tokens.reshape(x.shape[0], height, width, x.shape[2])

    def _misfit(
        self, count: int, prefix: int, height: int, width: int, stated: GridHint | None
    ) -> ValueError:
        """The error about tokens behind a prefix that are no such grid, which the host states."""
        tokens = f"{count} tokens" + (f" behind {prefix} prefix tokens" if prefix else "")
        found, further = f"{tokens} are no {height} x {width} grid", -1
        if stated is not None:
            grid = f"the {height} x {width} grid of the model's {stated.source}"
            found = f"{tokens} at layer {self.name!r} are not {grid}"
            further = prefix + count - height * width
        number = further if 0 <= further < height * width else "N"
        starts = "with" if number else "without"
        return ValueError(
            f"x: {found}; set the layer's `grid` to (H, W), as in `layer.grid = (H, W)`, or "
            f"prefix_tokens={number} in NASLoRAConfig if the sequence starts {starts} class or "
            "register tokens"
        )


def place_hint(model: nn.Module, name: str, layer: GridLayer, prefix: int | None = None) -> None:
    """Gives the layer its name, and what the model states of its tokens: ``hint``, ``grid`` if not
    square, and ``prefix_tokens``, timm's ``num_prefix_tokens`` unless ``prefix`` is given.

    ``grid`` is what merged layers keep. They need it only where a square is wrong.
    """
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    stated = max(getattr(module, "num_prefix_tokens", 0) for module in around)
    layer.prefix_tokens = stated if prefix is None else prefix
    layer.name, layer.hint = name, find_hint(model, name)
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
                # One number on an attention itself means something else, as in Hiera.
                window = _pair(getattr(host, attribute, None), one=len(inner) > 1)
                if window is not None:
                    return GridHint(window, attribute, window=True)
        stated = _image_grid(host, inner[0])
        if stated is not None:
            return stated
    return None


def _image_grid(host: Any, inner: str) -> GridHint | None:
    """The grid of the whole image that a module states."""
    grid = _pair(getattr(getattr(host, "patch_embed", None), "grid_size", None))
    if inner == "blocks" and grid is not None:
        return GridHint(grid, "patch_embed.grid_size")
    # One number means something else, as in KAN layers.
    if (grid := _pair(getattr(host, "grid_size", None), one=False)) is not None:
        return GridHint(grid, "grid_size")
    config = getattr(host, "config", None)
    image, patch = (_pair(getattr(config, key, None)) for key in ("image_size", "patch_size"))
    if image is None or patch is None or any(hasattr(config, key) for key in STAGED):
        return None
    grid = image[0] // patch[0], image[1] // patch[1]
    return GridHint(grid, "config.image_size and config.patch_size")


def _pair(value: Any, one: bool = True) -> Grid | None:
    """(H, W) of two positive integers, or of one if that is allowed; None for anything else."""
    sides = (value, value) if one and isinstance(value, int) else value
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        return None
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        return None
    return int(sides[0]), int(sides[1])
