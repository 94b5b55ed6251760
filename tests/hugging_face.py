"""Small random SAMs of transformers, synthetic images and masks, and a loss."""

import torch
import torch.nn.functional as F
from adapted_models import randomize, stir
from torch import nn
from torch.func import functional_call

from bench.families import transformers_model
from naslora import NASLoRAConfig, inject

SIZE = 64
PROMPTS = {"hidden_size": 16, "image_size": SIZE, "patch_size": 16, "mask_input_channels": 4}
DECODER = {
    "hidden_size": 16,
    "mlp_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": 16,
}


def build_sam() -> nn.Module:
    """4 x 4 tokens, a windowed and a global block."""
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64}
    vision |= {"output_channels": 16, "num_pos_feats": 8, "image_size": SIZE, "patch_size": 16}
    vision |= {"window_size": 3, "global_attn_indexes": [1]}
    return started("SamModel", vision)


def build_sam2() -> nn.Module:
    """Four stages of Hiera, from 16 x 16 to 2 x 2 tokens."""
    backbone = {
        **{"model_type": "sam2_hiera_det_model", "hidden_size": 16, "num_attention_heads": 1},
        **{"image_size": [SIZE, SIZE], "global_attention_blocks": [3]},
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [8, 4, 4, 2],
        "window_positional_embedding_background_size": [4, 4],
    }
    vision = {
        "backbone_config": backbone,
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 16,
    }
    return started("Sam2Model", vision)


def started(kind: str, vision: dict) -> nn.Module:
    """A random model. Transformers starts so small that every mask is 0; this one does not."""
    torch.manual_seed(0)
    parts = {"prompt_encoder_config": dict(PROMPTS), "mask_decoder_config": dict(DECODER)}
    model = transformers_model(kind, vision_config=vision, **parts).eval()
    stir(model.parameters(), 0.15)
    return model


BUILDERS = {"SamModel": build_sam, "Sam2Model": build_sam2}


def trained(name: str) -> nn.Module:
    """An injected model whose adapter and decoder differ from the start."""
    model = BUILDERS[name]()
    inject(model, NASLoRAConfig(), train=("mask_decoder",))
    randomize(model)
    stir(model.mask_decoder.parameters(), 0.01)
    return model


def samples(count: int, seed: int = 0) -> list[dict]:
    """Bright squares on noise, as a data set of a Trainer."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        mask = torch.zeros(SIZE, SIZE)
        top, left = torch.randint(0, SIZE // 2, (2,), generator=generator).tolist()
        mask[top : top + SIZE // 2, left : left + SIZE // 2] = 1
        image = 2 * mask + 0.3 * torch.randn(3, SIZE, SIZE, generator=generator)
        box = torch.tensor([[0.0, 0.0, SIZE, SIZE]])
        found.append({"pixel_values": image, "input_boxes": box, "labels": mask})
    return found


def batch_of(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    found = samples(count, seed)
    return {name: torch.stack([sample[name] for sample in found]) for name in found[0]}


def mask_loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Cross-entropy of the first mask; the arguments are those of ``compute_loss_func``."""
    masks = outputs.pred_masks[:, 0, :1]  # (B, 1, h, w)
    target = F.interpolate(labels[:, None], masks.shape[-2:])
    return F.binary_cross_entropy_with_logits(masks, target)


def batch_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """The same for the callback."""
    batch = dict(batch)
    labels = batch.pop("labels")
    return mask_loss(model(**batch), labels)


def logits(model: nn.Module) -> torch.Tensor:
    """With no tensor that requires gradients: ``requires_grad`` of a weight decides whether
    ``torch.matmul`` multiplies a batch at once or image by image, even under ``no_grad``.
    """
    batch = batch_of(2, seed=7)
    del batch["labels"]
    detached = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return functional_call(model.eval(), detached, kwargs=batch).pred_masks
