"""Small SAMs of every family: ours, and the same of the transformers library as references."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn

from naslora.sam.families import find_family, plain_vits, sam2, sam3, sam_hq
from naslora.sam.families.sam import VITS, ViT
from naslora.sam.segmentation import SamForSegmentation

SMALL = {
    "vit_b": (VITS, ViT(32, 3, 2, (1,))),
    "vit_l": (VITS, ViT(48, 2, 3, (0, 1))),
    "sam_hq_b": (sam_hq.SIZES, ViT(32, 3, 2, (1,))),
    "sam_hq_l": (sam_hq.SIZES, ViT(48, 2, 3, (0, 1))),
    "sam2.1_t": (sam2.SAM21, sam2.Hiera(16, 1, (1, 2, 3, 1), (4,))),
    "sam2.1_l": (sam2.SAM21, sam2.Hiera(24, 2, (1, 1, 2, 2), (3,), (8, 4, 16, 8), 14)),
    "sam3": (
        sam3.SIZES,
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "window_size": 4,
            "global_attn_indexes": [1],
            "pretrain_image_size": 4 * sam3.PATCH,
        },
    ),
}
PLAIN = {
    name: (table, table[name]._replace(width=width, depth=2, heads=2))
    for table, name, width in (
        (plain_vits.DINOV3, "dinov3_s", 32),
        (plain_vits.DINOV3, "dinov3_b", 48),
        (plain_vits.DINOV2, "dinov2_s", 32),
        (plain_vits.PE_SPATIAL, "pe_spatial_t", 32),
        (plain_vits.PE_SPATIAL_L, "pe_spatial_l", 32),
    )
}


def classes(architecture: str) -> tuple[type[nn.Module], type]:
    """A model of transformers and its configuration."""
    names = architecture, architecture.removesuffix("Model") + "Config"
    return tuple(getattr(transformers, name) for name in names)


def side(name: str) -> int:
    """Of images with four by four tokens."""
    return 4 * find_family(name).patch


@contextlib.contextmanager
def small_models() -> Iterator[None]:
    """Makes the models of ``SMALL`` and ``PLAIN`` small."""
    with pytest.MonkeyPatch.context() as patch:
        for name, (table, size) in (SMALL | PLAIN).items():
            patch.setitem(table, name, size)
        patch.setitem(sam2.SAM2, "sam2_t", SMALL["sam2.1_t"][1])
        yield


def reference(name: str, image_size: int, seed: int = 0) -> nn.Module:
    """A model of transformers with random weights and one mask token."""
    huggingface = find_family(name).huggingface
    kind, config_kind = classes(huggingface.architecture)
    values = huggingface.config(name, image_size)
    decoder = {**values.pop("mask_decoder_config", {}), "num_multimask_outputs": 0}
    if huggingface.architecture in ("SamModel", "SamHQModel"):
        decoder["layer_norm_eps"] = 1e-5  # segment_anything's; transformers has another default
    else:
        decoder["dynamic_multimask_via_stability"] = False
    torch.manual_seed(seed)
    model = kind(config_kind(**values, mask_decoder_config=decoder)).eval()
    randomize_all(model)
    return model


@torch.no_grad()
def randomize_all(model: nn.Module) -> None:
    """Random values in every parameter: some start at zero, others at 1e-10."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # biases and norms
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
        else:
            few = "pos" in name or "token" in name
            parameter.normal_(std=0.1 if few else parameter[0].numel() ** -0.5)


def pixels(size: int, batch: int = 2, seed: int = 4) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def our_masks(model: SamForSegmentation, images: Tensor) -> Tensor:
    """(B, 1, 4g, 4g) logits, before they are enlarged to the image."""
    found = []
    handle = model.mask_decoder.register_forward_hook(lambda m, i, output: found.append(output[0]))
    model.eval()(images)
    handle.remove()
    return found[0]


@torch.no_grad()
def their_masks(model: nn.Module, images: Tensor) -> Tensor:
    """The same of transformers, without prompts."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    architecture = type(model).__name__
    third = architecture == "Sam3TrackerModel"
    if third:
        mean = std = torch.full((3,), 0.5)
    x = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    batch, grid = len(x), x.shape[-1] // (14 if third else 16)
    dense = model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    positions = model.get_image_wide_positional_embeddings()
    shared = {
        "image_positional_embeddings": positions.expand(batch, -1, -1, -1),
        "sparse_prompt_embeddings": torch.zeros(batch, 1, 0, 256),
        "dense_prompt_embeddings": dense.expand(batch, -1, grid, grid),
        "multimask_output": False,
    }
    if third or architecture == "Sam2Model":
        fine, middle, last = model.get_image_features(x, return_dict=True).fpn_hidden_states
        last = last + model.no_memory_embedding
        *finer, maps = (
            tokens.permute(1, 2, 0).unflatten(2, (side * grid, side * grid))
            for tokens, side in ((fine, 4), (middle, 2), (last, 1))
        )
        shared |= {"image_embeddings": maps, "high_resolution_features": finer}
        return model.mask_decoder(**shared)[0][:, 0]
    encoded = model.vision_encoder(x)
    if architecture == "SamHQModel":
        early = encoded.intermediate_embeddings[0].permute(0, 3, 1, 2)
        return hq_masks(model.mask_decoder, encoded.last_hidden_state, early, **shared)
    return model.mask_decoder(image_embeddings=encoded.last_hidden_state, **shared)[0][:, 0]


def hq_masks(decoder: nn.Module, embedding: Tensor, early: Tensor, **shared: Tensor) -> Tensor:
    """Composes the masks of SAM-HQ from the parts of SamHQModel's decoder.

    Its own forward, in transformers 5.24, enlarges the image that the transformer got, with rows
    and columns exchanged, instead of the image that the transformer returned. SAM-HQ's original
    code does not.
    """
    weights = [decoder.iou_token.weight, decoder.mask_tokens.weight, decoder.hq_token.weight]
    tokens = torch.cat(weights).expand(len(embedding), 1, -1, -1)
    tokens, image, *_ = decoder.transformer(
        point_embeddings=tokens,
        image_embeddings=embedding + shared["dense_prompt_embeddings"],
        image_positional_embeddings=shared["image_positional_embeddings"],
        attention_similarity=None,
    )
    image = image[:, 0].transpose(1, 2).reshape(embedding.shape)
    gelu, parts = decoder.activation, decoder
    upscaled = gelu(parts.upscale_layer_norm(parts.upscale_conv1(image)))
    upscaled = gelu(parts.upscale_conv2(upscaled))
    detail = parts.mask_conv2(gelu(parts.mask_norm(parts.mask_conv1(upscaled))))
    detail = detail + parts.encoder_conv2(gelu(parts.encoder_norm(parts.encoder_conv1(embedding))))
    compressed = gelu(parts.compress_vit_norm(parts.compress_vit_conv1(early)))
    detail = detail + parts.compress_vit_conv2(compressed)
    sam = parts.output_hypernetworks_mlps[0](tokens[:, 0, 1])  # (B, 32)
    own = parts.hq_mask_mlp(tokens[:, 0, 2])
    pairs = ((sam, upscaled), (own, detail))
    return sum(torch.einsum("bc,bchw->bhw", *pair)[:, None] for pair in pairs)
