"""The table of families in docs/families.md: ``python -m bench.families`` prints it.

Every cell is the outcome of a check on a small random model. ``tests/test_family_table.py`` fails
if the page says something else.
"""

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from bench.gpu.resources import markdown
from naslora import NASLoRAConfig, inject, load_adapter, merge, save_adapter
from naslora.adapter.layer.modules import adapter_layers
from naslora.errors import UserError
from naslora.sam.attention import fuse_attention, unfuse_attention
from naslora.sam.families import plain_vits, sam2, sam3, sam_hq
from naslora.sam.families.mobile_sam import TinyViTEncoder
from naslora.sam.families.sam import ViT, build_vit

ATTENTION = "qkv"
VIT = ViT(32, 2, 2, (1,))
HIERA = sam2.Hiera(16, 1, (1, 2, 3, 1), (4,))
HEAD = ("family", "`target`", "layers see", "`prefix_tokens`", "same outputs", "gradients")
HEAD += ("save, load", "merge", "not square", "bf16", "attention")


@dataclass(frozen=True)
class Host:
    """An encoder to adapt."""

    title: str
    build: Callable[[int, int], nn.Module]
    """Maps height and width of the images to a small random encoder."""
    target: str = ATTENTION
    prefix: int | None = None
    """As in the configuration; None takes what the model states."""
    size: tuple[int, int] = (64, 64)
    later: int = 0
    """Prefix tokens that the last block has beside."""


def plain_vit(kind: type[ImageEncoderViT], height: int, width: int) -> nn.Module:
    encoder = build_vit(VIT, 64, kind)
    encoder.pos_embed = nn.Parameter(torch.randn(1, height // 16, width // 16, VIT.width))
    return encoder


def sam3_encoder(height: int, width: int) -> nn.Module:
    tokens = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    blocks = {"num_hidden_layers": 2, "global_attn_indexes": [1], "window_size": 2}
    small = tokens | blocks | {"pretrain_image_size": 4 * sam3.PATCH}
    with patch.dict(sam3.SIZES, sam3=small):
        return sam3.Sam3Encoder("sam3", height)


def transformers_model(kind: str, **values: Any) -> nn.Module:
    import transformers

    config = re.sub("(Model|ForUniversalSegmentation)$", "Config", kind)
    return getattr(transformers, kind)(getattr(transformers, config)(**values))


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def oblong_vit(kind: str, height: int, width: int, **values: Any) -> nn.Module:
    """A small ViT of transformers that knows height and width."""
    return transformers_model(kind, **SMALL, image_size=(height, width), **values)


def eomt(height: int, width: int) -> nn.Module:
    values = {"num_register_tokens": 4, "num_blocks": 1, "num_queries": 7, "num_labels": 2}
    return transformers_model("EomtForUniversalSegmentation", **SMALL, **values, image_size=height)


def hugging_face_sam(kind: str, height: int, width: int) -> nn.Module:
    values = {**SMALL, "mlp_dim": 64, "global_attn_indexes": [1], "image_size": height}
    model = transformers_model(kind, **values)
    encoder: Any = model.vision_encoder
    encoder.pos_embed = nn.Parameter(torch.randn(1, height // 16, width // 16, 32))
    encoder.patch_embed.image_size = (height, width)
    return model


def hugging_face_sam2(height: int, width: int) -> nn.Module:
    values = sam2.HUGGINGFACE.config("sam2.1_t", 64)["vision_config"]["backbone_config"]
    del values["model_type"]
    values |= {"hidden_size": 16, "blocks_per_stage": [1, 2, 3, 1]}
    values |= {"embed_dim_per_stage": [16, 32, 64, 128], "global_attention_blocks": [4]}
    return transformers_model("Sam2HieraDetModel", **values)


def timm_vit(height: int, width: int) -> nn.Module:
    values = {"img_size": (height, width), "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_small_patch16_dinov3", num_classes=0, **values)


def plain(size: plain_vits.PlainViT) -> Callable[[int, int], nn.Module]:
    small: Any = size._replace(width=32, depth=2, heads=2)
    return lambda height, width: plain_vits.PlainViTEncoder(small, (height, width))


DINOV2 = partial(oblong_vit, "Dinov2WithRegistersModel", patch_size=16)
DINOV3 = partial(oblong_vit, "DINOv3ViTModel", num_register_tokens=4, intermediate_size=64)
OF_14 = {"size": (56, 56)}  # pixels a patch
HOSTS = (
    Host("SAM (`vit_*`)", partial(plain_vit, ImageEncoderViT)),
    Host("MobileSAM (`mobile_sam`)", lambda height, width: TinyViTEncoder()),
    Host("SAM-HQ (`sam_hq_*`)", partial(plain_vit, sam_hq.HQViT)),
    Host("Light HQ-SAM (`sam_hq_tiny`)", lambda height, width: sam_hq.HQTinyViT()),
    Host("SAM 2, 2.1 (`sam2_*`, `sam2.1_*`)", lambda height, width: sam2.HieraEncoder(HIERA)),
    Host("SAM 3 (`sam3`), Sam3 of transformers", sam3_encoder, **OF_14),
    Host("DINOv3 (`dinov3_*`)", plain(plain_vits.DINOV3["dinov3_s"])),
    Host("DINOv2 (`dinov2_*`)", plain(plain_vits.DINOV2["dinov2_s"]), **OF_14),
    Host("PE Spatial (`pe_spatial_*`)", plain(plain_vits.PE_SPATIAL["pe_spatial_s"])),
    Host("SamModel of transformers", partial(hugging_face_sam, "SamVisionModel")),
    Host("SamHQModel of transformers", partial(hugging_face_sam, "SamHQVisionModel")),
    Host("Sam2Model of transformers", hugging_face_sam2),
    Host("DINOv2 of transformers", DINOV2, prefix=5),
    Host("DINOv3 of transformers", DINOV3, prefix=5),
    Host("EoMT of transformers", eomt, prefix=5, later=7),
    Host("ViTs of timm", timm_vit),
)


def first(output: Any) -> Tensor:
    """The first tensor of what an encoder returns."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return output


def adapted(host: Host, size: tuple[int, int], change: bool = True) -> nn.Module:
    """The host with adapters; ``change`` makes them add something."""
    torch.manual_seed(0)
    model = host.build(*size).eval()
    inject(model, NASLoRAConfig(target=host.target, prefix_tokens=host.prefix))
    prepare(host, model, change)
    return model


def prepare(host: Host, model: nn.Module, change: bool) -> None:
    layers = dict(adapter_layers(model))
    last = max(int(part) for name in layers for part in name.split(".") if part.isdigit())
    generator = torch.Generator().manual_seed(1)
    for name, layer in layers.items():
        layer.prefix_tokens += host.later if f".{last}." in f".{name}" else 0
        if change:
            nn.init.normal_(layer.lora_B, std=0.02, generator=generator)


def images(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


def row(host: Host) -> list[str]:
    """Runs all checks of one host."""
    x = images(host.size)
    prefix = host.prefix or 0
    return [
        host.title,
        f"`{host.target}`".replace("|", "\\|"),
        seen(host, x),
        str(prefix) + (f", {prefix + host.later} in the last" if host.later else ""),
        same_outputs(host, x),
        yes(gradients(adapted(host, host.size), x)),
        yes(saves(host, x)),
        ", ".join(merges(host, x)),
        oblong(host),
        yes(gradients(adapted(host, host.size).bfloat16(), x.bfloat16())),  # finite, too
        attention(host, x),
    ]


def yes(outcome: bool) -> str:
    return "yes" if outcome else "no"


def seen(host: Host, x: Tensor) -> str:
    """The layout of the inputs of the adapted layers."""
    model, found = adapted(host, host.size), set()
    for _, layer in adapter_layers(model):
        layer.register_forward_pre_hook(lambda module, inputs: found.add(inputs[0].dim()))
    model(x)
    return " and ".join({4: "(B, H, W, C)", 3: "(B, N, C)"}[dim] for dim in sorted(found))


def same_outputs(host: Host, x: Tensor) -> str:
    """Whether fresh adapters leave the output as it was."""
    torch.manual_seed(0)
    before = first(host.build(*host.size).eval()(x))
    after = first(adapted(host, host.size, change=False)(x))
    if torch.equal(before, after):
        return "bit-equal"
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    return "to rounding"


def gradients(model: nn.Module, x: Tensor) -> bool:
    """Whether every parameter of every adapter gets a gradient that is finite."""
    first(model(x)).float().square().mean().backward()
    parameters = [p for _, layer in adapter_layers(model) for p in layer.parameters()]
    gradients = [p.grad for p in parameters if p.requires_grad]
    return all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


@torch.no_grad()
def saves(host: Host, x: Tensor) -> bool:
    """Whether a saved adapter gives the same bits in a fresh model."""
    model = adapted(host, host.size)
    torch.manual_seed(0)
    fresh = host.build(*host.size).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder))
        load_adapter(fresh, Path(folder))
    prepare(host, fresh, change=False)
    return torch.equal(first(fresh(x)), first(model(x)))


@torch.no_grad()
def merges(host: Host, x: Tensor) -> Iterator[str]:
    """The modes that work. The exact one must keep the output."""
    model = adapted(host, host.size)
    for _, layer in adapter_layers(model):
        layer.lora_B *= 0.1  # the lossy modes must not run away on random weights
    before = first(model(x))
    batches = [torch.randn(16, *x.shape[1:]) for _ in range(2)]
    for mode in ("exact", "center", "calibrated"):
        merged = copy.deepcopy(model)
        try:
            merge(merged, mode, batches if mode == "calibrated" else None)
        except UserError as error:
            if "give more images" not in str(error):
                raise
            merge(merged, mode, [torch.randn(48, *x.shape[1:]) for _ in range(8)])
        after = first(merged(x))
        assert after.isfinite().all()
        if mode == "exact":
            torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
        yield mode


def oblong(host: Host) -> str:
    """Whether adapted layers take images that are not square; a dash if the encoder does not."""
    size = host.size[0], host.size[0] * 3 // 2
    x = images(size)
    try:
        host.build(*size).eval()(x)
    except (ValueError, RuntimeError):
        return "–"
    return yes(bool(first(adapted(host, size)(x)).isfinite().all()))


def attention(host: Host, x: Tensor) -> str:
    """Whether ``fuse_attention`` knows the encoder, and gives the same output if it does."""
    model = adapted(host, host.size)
    before = first(model(x))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = fuse_attention(model)
    except UserError:
        names = []
    if not names:
        return "stock"
    torch.testing.assert_close(first(model(x)), before, rtol=1e-3, atol=1e-3)
    unfuse_attention(model)
    return "fused"


if __name__ == "__main__":
    print(markdown(HEAD, map(row, HOSTS)))
