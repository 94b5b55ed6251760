"""SAM-HQ: SAM, or MobileSAM, with one more mask token and finer maps in the decoder."""

from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from naslora.sam.decoder import HQDecoder
from naslora.sam.families import mobile_sam
from naslora.sam.families.sam import (
    COPIES,
    HQ_TOKENS,
    VITS,
    ViT,
    build_vit,
    vit_config,
    vit_matches,
)
from naslora.sam.family import Family
from naslora.sam.naming import (
    PLAIN_VIT,
    PROMPTS_AND_DECODER,
    HuggingFace,
    Tensors,
    by_prefix,
    mlp_names,
    part_names,
    same_names,
)

SIZES: dict[str, ViT] = {f"sam_hq_{size}": VITS[f"vit_{size}"] for size in "blh"}
TOKEN = HQ_TOKENS[0]


class HQViT(ImageEncoderViT):
    """SAM's plain ViT, which also returns the tokens after its first global attention."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, 3, S, S) to the embedding (B, 256, g, g) and (B, width, g, g), g = S/16."""
        x = self.patch_embed(images) + self.pos_embed  # (B, g, g, width)
        early = None
        for block in self.blocks:
            x = block(x)
            if early is None and block.window_size == 0:
                early = x
        assert early is not None
        return self.neck(x.permute(0, 3, 1, 2)), early.permute(0, 3, 1, 2)


class HQTinyViT(mobile_sam.TinyViTEncoder):
    """MobileSAM's encoder, which also returns what its third stage starts from."""

    EARLY = 2
    """The stage whose first map is returned."""
    WIDTH = 160
    """Channels of that map."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Maps (B, 3, S, S) to the embedding (B, 256, g, g) and (B, 160, g, g), g = S/16."""
        stages = list(self.stages.children())
        x = self.patch_embed(images)
        for stage in stages[: self.EARLY]:
            x = stage(x)
        stage = stages[self.EARLY]
        early = stage.get_submodule("downsample")(x)
        x = stage.get_submodule("blocks")(early.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for stage in stages[self.EARLY + 1 :]:
            x = stage(x)
        return self.neck(x), early


def build_hq_vit(name: str, image_size: int) -> nn.Module:
    """Builds the encoder of a model of SAM-HQ with random weights."""
    return build_vit(SIZES[name], image_size, HQViT)


def _matches(name: str, tensors: Tensors) -> bool:
    return TOKEN in tensors and vit_matches(SIZES[name], tensors)


HUGGINGFACE = HuggingFace(
    architecture="SamHQModel",
    kinds=("sam_hq",),
    naming=by_prefix(
        ("mask_decoder.hf_token.", "mask_decoder.hq_token."),
        *mlp_names("mask_decoder.hf_mlp.", "mask_decoder.hq_mask_mlp."),
        *part_names(
            "mask_decoder.compress_vit_feat.",
            {
                0: "mask_decoder.compress_vit_conv1.",
                1: "mask_decoder.compress_vit_norm.",
                3: "mask_decoder.compress_vit_conv2.",
            },
        ),
        *part_names(
            "mask_decoder.embedding_encoder.",
            {
                0: "mask_decoder.encoder_conv1.",
                1: "mask_decoder.encoder_norm.",
                3: "mask_decoder.encoder_conv2.",
            },
        ),
        *part_names(
            "mask_decoder.embedding_maskfeature.",
            {
                0: "mask_decoder.mask_conv1.",
                1: "mask_decoder.mask_norm.",
                3: "mask_decoder.mask_conv2.",
            },
        ),
        *PROMPTS_AND_DECODER,
        *PLAIN_VIT,
    ),
    config=lambda name, image_size: {
        **vit_config("sam_hq", SIZES[name], image_size),
        "mask_decoder_config": {"vit_dim": SIZES[name].width},
    },
    copies=COPIES,
)

FAMILY = Family(
    title="SAM-HQ",
    models=SIZES,
    build_encoder=build_hq_vit,
    build_decoder=lambda name, classes, tokens: HQDecoder(classes, tokens, SIZES[name].width),
    official=same_names(),
    matches=_matches,
    huggingface=HUGGINGFACE,
)
LIGHT = Family(
    title="Light HQ-SAM",
    models={"sam_hq_tiny": None},
    build_encoder=lambda name, image_size: HQTinyViT(),
    build_decoder=lambda name, classes, tokens: HQDecoder(classes, tokens, HQTinyViT.WIDTH),
    official=mobile_sam.NAMING,
    matches=lambda name, tensors: TOKEN in tensors and mobile_sam.IN_ENCODER in tensors,
)
