"""Small adapted models, and helpers for tests of merging."""

import io
from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from naslora import NASLoRAConfig, inject
from naslora.adapter.layer.modules import adapter_layers
from naslora.sam.export import Description
from naslora.sam.segmentation import SamForSegmentation

SIZE, DEPTH = 64, 2


def build_encoder(depth: int = DEPTH, **options) -> ImageEncoderViT:
    """An unmodified segment_anything encoder: 4 x 4 tokens, windowed blocks and a global one."""
    torch.manual_seed(0)
    sizes = {"img_size": SIZE, "embed_dim": 32, "num_heads": 2, "out_chans": 16, "window_size": 3}
    sizes |= {"use_rel_pos": True, "global_attn_indexes": (1,), **options}
    return ImageEncoderViT(depth=depth, **sizes).eval()


def description(model: SamForSegmentation, part: str = "model") -> Description:
    """Of an exported model."""
    names = tuple(f"class {k}" for k in range(1, max(model.num_classes, 2)))
    return Description(model.name, model.image_size, model.num_classes, names, part)


def named(**parts: nn.Module) -> nn.Sequential:
    """Modules one after the other, as children of these names."""
    return nn.Sequential(OrderedDict(parts))


def original_sam(encoder: nn.Module, size: int, **transformer: int) -> Sam:
    """segment_anything's own model around an encoder, with a decoder of full size by default."""
    sizes = {"depth": 2, "embedding_dim": 256, "mlp_dim": 2048, "num_heads": 8, **transformer}
    decoder = MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(**sizes))
    prompts = PromptEncoder(256, (size // 16,) * 2, (size, size), mask_in_chans=16)
    return Sam(encoder, prompts, decoder).eval()


@torch.no_grad()
def stir(parameters: Iterable[torch.Tensor], by: float, seed: int = 1) -> None:
    """Adds normal noise of this deviation: what starts at zero or alike does not stay so."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def randomize(module: nn.Module, seed: int = 3) -> None:
    """Moves all parameters and statistics of the adapters away from their start."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapter_layers(module):
        with torch.no_grad():
            if layer.alpha is not None:
                layer.alpha.normal_(generator=generator)
            layer.lora_B.normal_(std=0.02, generator=generator)
            for name, value in layer.state_dict().items():
                if name.startswith("cell.") and value.is_floating_point():
                    noise = 0.3 * torch.randn(value.shape, generator=generator)
                    value.add_(noise.abs() if "var" in name else noise)


def adapted_encoder(seed: int = 0, **options) -> ImageEncoderViT:
    model = build_encoder()
    inject(model, NASLoRAConfig(**options), seed=seed)
    randomize(model)
    return model


def trained_encoder(**options) -> ImageEncoderViT:
    """An adapted encoder of which the neck is trained as well."""
    model = adapted_encoder(**options)
    model.neck.requires_grad_(True)
    stir(model.neck.parameters(), 0.1)
    return model


def adapted_layer(dtype=torch.float32, c_in=16, c_out=12, **options) -> nn.Sequential:
    """One layer, as the child of a model whose state dict calls it ``qkv``."""
    torch.manual_seed(1)
    model = named(qkv=nn.Linear(c_in, c_out).to(dtype))
    inject(model, NASLoRAConfig(target="qkv", **options))
    randomize(model)
    return model.eval()


def tokens(*shape: int, dtype=torch.float32, seed: int = 8) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def images(seed: int = 5) -> torch.Tensor:
    return tokens(2, 3, SIZE, SIZE, seed=seed)


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    """What a model makes of ``images``."""
    return model(images())


def smooth_images(count: int, seed: int) -> torch.Tensor:
    """Images whose neighbouring tokens are alike, as in photographs."""
    noise = tokens(count, 3, 5, 5, seed=seed)
    return F.interpolate(noise, (SIZE, SIZE), mode="bicubic")


class Calls(TorchDispatchMode):
    """Collects the arguments of the calls of an operator."""

    def __init__(self, operator: object) -> None:
        super().__init__()
        self.operator, self.arguments = operator, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is self.operator:
            self.arguments.append(arguments)
        return function(*arguments, **(keywords or {}))


def shard(model: nn.Module, parts: bool = True) -> nn.Module:
    """FSDP2 over the processes of the group, with ``parts`` of each block by itself."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.blocks if parts else ():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def relative(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return (difference.double().norm() / reference.double().norm()).item()


def as_torch(value: object) -> bytes:
    """What ``torch.save`` writes."""
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> set[str]:
    """The names of the tensors of two states whose bits differ."""
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


def snapshot(model: nn.Module) -> dict:
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "training": [module.training for module in model.modules()],
        "parameters": [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()],
        "values": {n: v.numpy().tobytes() for n, v in model.state_dict().items()},
        "attributes": sorted(vars(model)),
        "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
    }
