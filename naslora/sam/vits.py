"""The sizes of SAM's plain ViTs. Importing them imports no package of models."""

from typing import NamedTuple


class ViT(NamedTuple):
    """Size of a plain ViT encoder."""

    width: int
    """Channels of a token."""
    depth: int
    """Number of transformer blocks."""
    heads: int
    """Number of attention heads in a block."""
    global_blocks: tuple[int, ...]
    """Indices of the blocks with global attention. The others use windows of 14 x 14 tokens."""
    weights: str | None = None
    """File of the pre-trained weights in the package; None if it has none."""


VITS: dict[str, ViT] = {
    "vit_t": ViT(192, 6, 3, (0, 1, 2, 3, 4, 5), weights="vit_t.safetensors"),
    "vit_b": ViT(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": ViT(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": ViT(1280, 32, 16, (7, 15, 23, 31)),
}
