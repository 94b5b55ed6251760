"""SAM's mask decoder for semantic segmentation, and what families add to it."""

from typing import ClassVar

import torch
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

EMBED_DIM = 256
"""Channels of SAM's image embedding."""


def build_transformer() -> TwoWayTransformer:
    """The transformer of SAM's mask decoder, with random weights."""
    return TwoWayTransformer(depth=2, embedding_dim=EMBED_DIM, mlp_dim=2048, num_heads=8)


def build_neck(width: int) -> nn.Sequential:
    """SAM's neck, with random weights: (B, width, g, g) to (B, 256, g, g)."""
    return nn.Sequential(
        nn.Conv2d(width, EMBED_DIM, 1, bias=False),
        LayerNorm2d(EMBED_DIM),
        nn.Conv2d(EMBED_DIM, EMBED_DIM, 3, padding=1, bias=False),
        LayerNorm2d(EMBED_DIM),
    )


class SegmentationDecoder(nn.Module):
    """SAM's mask decoder for semantic segmentation. Its parameters have SAM's names.

    It has no IoU head. Binary: one mask token with one hypernetwork. Several classes: the mask
    tokens, Q in number, share one hypernetwork, and ``class_head`` classifies them. If the
    embedding has another ``width`` than 256 channels, a neck brings it to them.
    """

    TOKENS: ClassVar[tuple[str, ...]] = ("iou_token", "mask_tokens")
    """The embeddings that the transformer takes, in its order."""

    def __init__(self, num_classes: int, num_tokens: int, width: int = EMBED_DIM) -> None:
        super().__init__()
        self.neck = nn.Identity() if width == EMBED_DIM else build_neck(width)
        self.transformer = build_transformer()
        self.iou_token = nn.Embedding(1, EMBED_DIM)
        self.mask_tokens = nn.Embedding(num_tokens, EMBED_DIM)
        enlarging = _enlarging(EMBED_DIM, EMBED_DIM // 4, EMBED_DIM // 8)
        self.output_upscaling = nn.Sequential(*enlarging, nn.GELU())
        self.output_hypernetworks_mlps = nn.ModuleList(
            [MLP(EMBED_DIM, EMBED_DIM, EMBED_DIM // 8, num_layers=3)]
        )
        self.class_head = nn.Linear(EMBED_DIM, num_classes + 1) if num_classes > 1 else None

    def forward(
        self, embedding: Tensor, positions: Tensor, dense_prompt: Tensor, *features: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Predicts masks and classes.

        Args:
            embedding: (B, width, g, g) image embedding.
            positions: (1, 256, g, g) positional encoding of its tokens.
            dense_prompt: (1, 256, 1, 1) no-mask embedding.
            features: what the family's encoder returns beside the embedding.

        Returns:
            (B, Q, 4g, 4g) mask logits, and (B, Q, K + 1) class logits, None if binary.
        """
        embedding = self.neck(embedding)
        batch, channels, height, width = embedding.shape
        tables = [getattr(self, name).weight for name in self.TOKENS]
        tokens = torch.cat(tables).expand(batch, -1, -1)  # (B, tokens, 256)
        positions = positions.expand(batch, -1, -1, -1)
        tokens, source = self.transformer(embedding + dense_prompt, positions, tokens)
        parts = tokens.split([len(table) for table in tables], 1)
        found = dict(zip(self.TOKENS, parts, strict=True))
        source = source.transpose(1, 2).reshape(batch, channels, height, width)
        masks = self._masks(found, source, embedding, *features)
        classes = None if self.class_head is None else self.class_head(found["mask_tokens"])
        return masks, classes

    def _masks(
        self, tokens: dict[str, Tensor], source: Tensor, embedding: Tensor, *features: Tensor
    ) -> Tensor:
        """(B, Q, 4g, 4g) from (B, number, 256) tokens and the (B, 256, g, g) image."""
        weights = self.output_hypernetworks_mlps[0](tokens["mask_tokens"])  # (B, Q, 32)
        return _weighted(weights, self._upscaled(source, *features))

    def _upscaled(self, source: Tensor, *features: Tensor) -> Tensor:
        """(B, 256, g, g) to (B, 32, 4g, 4g)."""
        return self.output_upscaling(source)


def _weighted(weights: Tensor, maps: Tensor) -> Tensor:
    """(B, Q, 4g, 4g): the sums of (B, 32, 4g, 4g) maps with weights (B, Q, 32)."""
    return torch.einsum("bqc,bchw->bqhw", weights, maps)


class Sam2Decoder(SegmentationDecoder):
    """SAM 2's mask decoder, which adds finer maps of the encoder while it upscales.

    Its head for the object score is left out. The token of that head stays, because the other
    tokens attend to it.
    """

    TOKENS = ("obj_score_token", *SegmentationDecoder.TOKENS)

    def __init__(self, num_classes: int, num_tokens: int) -> None:
        super().__init__(num_classes, num_tokens)
        self.obj_score_token = nn.Embedding(1, EMBED_DIM)
        self.conv_s0 = nn.Conv2d(EMBED_DIM, EMBED_DIM // 8, 1)
        self.conv_s1 = nn.Conv2d(EMBED_DIM, EMBED_DIM // 4, 1)

    def _upscaled(self, source: Tensor, *features: Tensor) -> Tensor:
        middle, fine = features  # (B, 256, 2g, 2g), (B, 256, 4g, 4g)
        first, norm, activation, second, _ = self.output_upscaling
        upscaled = activation(norm(first(source) + self.conv_s1(middle)))
        return activation(second(upscaled) + self.conv_s0(fine))


class HQDecoder(SegmentationDecoder):
    """SAM-HQ's mask decoder: the masks of SAM's tokens plus those of its own tokens.

    SAM-HQ has one token. Here every mask token has one beside it, and they share ``hf_mlp``.
    ``width`` is the channels of the encoder's early map.
    """

    TOKENS = (*SegmentationDecoder.TOKENS, "hf_token")

    def __init__(self, num_classes: int, num_tokens: int, width: int) -> None:
        super().__init__(num_classes, num_tokens)
        quarter, eighth = EMBED_DIM // 4, EMBED_DIM // 8
        self.hf_token = nn.Embedding(num_tokens, EMBED_DIM)
        self.hf_mlp = MLP(EMBED_DIM, EMBED_DIM, eighth, num_layers=3)
        self.compress_vit_feat = _enlarging(width, EMBED_DIM, eighth)
        self.embedding_encoder = _enlarging(EMBED_DIM, quarter, eighth)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(eighth, quarter, 3, padding=1),
            LayerNorm2d(quarter),
            nn.GELU(),
            nn.Conv2d(quarter, eighth, 3, padding=1),
        )

    def _masks(
        self, tokens: dict[str, Tensor], source: Tensor, embedding: Tensor, *features: Tensor
    ) -> Tensor:
        (early,) = features  # (B, width, g, g)
        upscaled = self._upscaled(source)
        detail = self.embedding_encoder(embedding) + self.compress_vit_feat(early)
        detail = detail + self.embedding_maskfeature(upscaled)  # (B, 32, 4g, 4g)
        weights = self.output_hypernetworks_mlps[0](tokens["mask_tokens"])
        return _weighted(weights, upscaled) + _weighted(self.hf_mlp(tokens["hf_token"]), detail)


def _enlarging(width: int, hidden: int, out: int) -> nn.Sequential:
    """(B, width, g, g) to (B, out, 4g, 4g)."""
    return nn.Sequential(
        nn.ConvTranspose2d(width, hidden, kernel_size=2, stride=2),
        LayerNorm2d(hidden),
        nn.GELU(),
        nn.ConvTranspose2d(hidden, out, kernel_size=2, stride=2),
    )
