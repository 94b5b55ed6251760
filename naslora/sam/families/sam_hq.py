"""SAM-HQ: SAM, or MobileSAM, with one more mask token and finer maps in the decoder."""

from segment_anything.modeling import ImageEncoderViT
from torch import Tensor

from naslora.sam.decoder import HQDecoder
from naslora.sam.families import mobile_sam
from naslora.sam.families.sam import HQ_TOKENS, build_vit, vit_config
from naslora.sam.family import Family
from naslora.sam.naming import PLAIN_VIT, PROMPTS_AND_DECODER, HuggingFace, mlp, parts
from naslora.sam.vits import VITS, ViT

SIZES: dict[str, ViT] = {f"sam_hq_{size}": VITS[f"vit_{size}"] for size in "blh"}


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

    WIDTH = 160
    """Channels of that map."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Maps (B, 3, S, S) to the embedding (B, 256, g, g) and (B, 160, g, g), g = S/16."""
        x = self.patch_embed(images)
        for number, stage in enumerate(self.stages.children()):
            if number == 2:
                early = stage.get_submodule("downsample")(x)
                x = stage.get_submodule("blocks")(early.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            else:
                x = stage(x)
        return self.neck(x), early


_CONVOLUTIONS = {0: "conv1", 1: "norm", 3: "conv2"}
HUGGINGFACE = HuggingFace(
    architecture="SamHQModel",
    kind="sam_hq",
    starts=(
        ("mask_decoder.hf_token.", "mask_decoder.hq_token."),
        *mlp("mask_decoder.hf_mlp.", "mask_decoder.hq_mask_mlp."),
        *parts("mask_decoder.compress_vit_feat.", "mask_decoder.compress_vit_", _CONVOLUTIONS),
        *parts("mask_decoder.embedding_encoder.", "mask_decoder.encoder_", _CONVOLUTIONS),
        *parts("mask_decoder.embedding_maskfeature.", "mask_decoder.mask_", _CONVOLUTIONS),
        *PROMPTS_AND_DECODER,
        *PLAIN_VIT,
    ),
    config=lambda name, image_size: {
        **vit_config("sam_hq", SIZES[name], image_size),
        "mask_decoder_config": {"vit_dim": SIZES[name].width},
    },
)
HOME = "github.com/SysCV/sam-hq#model-checkpoints"
FAMILY = Family(
    title="SAM-HQ",
    models=SIZES,
    build_encoder=lambda name, image_size: build_vit(SIZES[name], image_size, HQViT),
    build_decoder=lambda name, classes, tokens: HQDecoder(classes, tokens, SIZES[name].width),
    has_marks=lambda names: not HQ_TOKENS.isdisjoint(names),
    huggingface=HUGGINGFACE,
    weights={f"sam_hq_{size}": f"hf:lkeab/hq-sam/sam_hq_vit_{size}.pth" for size in "blh"},
    home=HOME,
)
LIGHT = Family(
    title="Light HQ-SAM",
    models={"sam_hq_tiny": None},
    build_encoder=lambda name, image_size: HQTinyViT(),
    build_decoder=lambda name, classes, tokens: HQDecoder(classes, tokens, HQTinyViT.WIDTH),
    has_marks=lambda names: not HQ_TOKENS.isdisjoint(names),
    official=mobile_sam.NAMING,
    weights={"sam_hq_tiny": "hf:lkeab/hq-sam/sam_hq_vit_tiny.pth"},
    home=HOME,
)
