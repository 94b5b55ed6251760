"""SAM checkpoints: loading them into a model of any image size, and writing them back.

A checkpoint is an official file, the same tensors as ``.safetensors``, or a folder of Hugging Face.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from naslora.adapter.io.wrappers import fill
from naslora.errors import UserError
from naslora.files import read_safetensors, reading
from naslora.sam.families import FAMILIES
from naslora.sam.family import Family
from naslora.sam.naming import Tensors
from naslora.state_dicts import plain_tensors, tensor_problem

TOKENS = ("mask_decoder.mask_tokens.weight", "mask_decoder.hf_token.weight")
"""(Q, 256) embeddings, of which the model may have another number than the checkpoint."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""The files of a folder of Hugging Face."""

# ---- Loading -------------------------------------------------------------------------------------

_ENCODER = re.compile(
    r"(image_encoder|vision_encoder|vision_backbone)\.|^(blocks|transformer\.resblocks)\.0\."
)
_RESIZED = re.compile(r"(^|\.)pos_embed$|attn\.rel_pos_[hw]$")
_ENCODER_BLOCK = re.compile(r"image_encoder\.(blocks|stages|trunk\.blocks|backbone\.layers)\.")
# These tensors may be missing: the classification branch starts with random weights, and the
# batch norms of a SAM encoder do not use their counters.
_OPTIONAL = re.compile(r"mask_decoder\.class_head\.|num_batches_tracked$")


def load_sam_checkpoint(model: Any, path: str | Path) -> None:
    """Loads a SAM checkpoint. It executes no code from the file.

    Position embeddings are resized to the model's token grid. Mask-decoder tensors that the model
    lacks are not loaded: the IoU head, and surplus mask tokens and hypernetworks. Parts that the
    family's checkpoints lack stay as they are.

    The model's ``left_out`` becomes the tensors of the file that were not loaded or were resized,
    with their original values and the model's names.

    Args:
        model: a ``SamForSegmentation`` or a ``PromptableSam``.
        path: an official ``.pth`` or ``.pt`` file, the same tensors as ``.safetensors``, or a
            folder of Hugging Face with model.safetensors.

    Raises:
        UserError: the file is missing, damaged, not a SAM checkpoint, or has the tensors of another
            model. The model is then unchanged.
    """
    path, state = Path(path), model.state_dict()
    files = [path]
    if path.is_dir():  # large models are several files in a folder of Hugging Face
        files = sorted(path.glob("model*.safetensors")) or [path / WEIGHTS]
    stored = {key: value for file in files for key, value in read_checkpoint(file).items()}
    if not any(_ENCODER.search(key) for key in stored):
        raise UserError(f"{path} holds no SAM checkpoint: it has no image_encoder weights")
    name, family = model.name, model.family
    tensors = _under_our_names(stored, family)
    misfit: str | None
    if tensors is None:
        misfit = f"has Hugging Face's names, and {family.title} has none"
    elif not family.has_marks(stored.keys()):
        misfit = f"is not one of {family.title}"
    else:
        fitted = {key: _fit(key, value, state) for key, value in tensors.items() if key in state}
        if family.new_decoder and not any(key.startswith("mask_decoder.") for key in tensors):
            new = {k: v for k, v in state.items() if not k.startswith("image_encoder.")}
            fitted = new | fitted
        misfit = _misfit(name, tensors, fitted, state)
    if tensors is None or misfit is not None:
        for fit, other in _fitting(stored):
            if other != name:
                misfit = (
                    f"is {fit.title} ({other}), and --model says {name}; choose --model {other}"
                )
                break
        raise UserError(f"checkpoint {path} {misfit}")
    for key, value in fitted.items():
        if problem := tensor_problem(key, value, state):
            raise UserError(f"checkpoint {path} is damaged: {problem}; use another copy")
    fill(model, fitted)
    model.left_out = {
        key: value
        for key, value in tensors.items()
        if key not in state or value.shape != state[key].shape
    }


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint, ``.pth`` or ``.safetensors``. It executes no code.

    Raises:
        UserError: the file is missing, damaged or no state dict.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    with reading(path, "is truncated or is not a PyTorch state dict"):
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(tensors, dict) and isinstance(tensors.get("model"), dict):
        tensors = tensors["model"]  # SAM 2 has it there
    if not isinstance(tensors, dict):
        raise UserError(f"checkpoint {path} holds a {type(tensors).__name__}, no state dict")
    # SAM 3 has complex tables of its rotary positions there, which models compute.
    tensors = {key: value for key, value in tensors.items() if not str(key).endswith("freqs_cis")}
    return plain_tensors(tensors, f"checkpoint {path}")


def _under_our_names(stored: Tensors, family: Family) -> dict[str, Tensor] | None:
    """The tensors under a family's names; None if they are Hugging Face's and it has no such
    family."""
    if not any("vision_encoder." in key for key in stored):
        return family.official.to_ours(stored)
    return None if family.huggingface is None else family.huggingface.to_ours(stored)


def find_model(path: Path) -> str | None:
    """The name of the model that a checkpoint was made for; None if it is not known.

    Errors as ``read_checkpoint``.
    """
    return next((name for _, name in _fitting(read_checkpoint(path))), None)


def _fitting(stored: Tensors) -> Iterator[tuple[Family, str]]:
    """The models whose encoders have the tensors of a checkpoint."""
    for family in FAMILIES:
        tensors = _under_our_names(stored, family)
        if tensors is None or not family.has_marks(stored.keys()):
            continue
        blocks = {key for key in tensors if _ENCODER_BLOCK.match(key)}
        for name in family.models:
            with torch.device("meta"):
                encoder = family.build_encoder(name, family.image_size)
            own = {f"image_encoder.{key}": value for key, value in encoder.state_dict().items()}
            fits = all(
                _RESIZED.search(key) or (key in tensors and tensors[key].shape == value.shape)
                for key, value in own.items()
                if not _OPTIONAL.search(key)
            )
            if fits and blocks <= own.keys():
                yield family, name


def _fit(key: str, value: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Converts a stored tensor to the model's shape, as SAM does, or returns it unchanged."""
    wanted = state[key].shape
    if value.shape == wanted or value.dim() != len(wanted) or not value.numel():
        return value
    if key == "image_encoder.pos_embed" and value.shape[-1] == wanted[-1]:  # (1, H, W, C)
        return _resize(value.permute(0, 3, 1, 2), wanted[1:3], "bicubic").permute(0, 2, 3, 1)
    if key == "image_encoder.trunk.pos_embed" and value.dim() == 3:  # (1, prefix + H W, C)
        side = math.isqrt(wanted[1])
        prefix = wanted[1] - side**2
        if math.isqrt(value.shape[1] - prefix) ** 2 == value.shape[1] - prefix:
            return resample_abs_pos_embed(value, [side, side], num_prefix_tokens=prefix)
    if _RESIZED.search(key) and value.dim() == 2 and value.shape[1] == wanted[1]:  # (2 size - 1, C)
        return _resize(value.T[None], wanted[:1], "linear")[0].T
    if key in TOKENS and value.shape[1] == wanted[1]:  # (Q, 256)
        kept = min(value.shape[0], wanted[0])
        return torch.cat([value[:kept], state[key][kept:]])
    return value


def _resize(value: Tensor, size: torch.Size, mode: str) -> Tensor:
    return F.interpolate(value.float(), size=tuple(size), mode=mode, align_corners=False)


def _misfit(name: str, tensors: Tensors, fitted: Tensors, state: dict[str, Tensor]) -> str | None:
    """Says how a checkpoint differs from a model's ``state``; None if it fills it exactly."""
    wrong = [
        f"{key} has shape {tuple(value.shape)} in the file, {tuple(state[key].shape)} in the model"
        for key, value in fitted.items()
        if value.shape != state[key].shape
    ]
    lacking = (key for key in state if key not in fitted and not _OPTIONAL.search(key))
    missing = [f"{key} is missing" for key in lacking]
    further = (key for key in tensors if key not in state and _ENCODER_BLOCK.match(key))
    surplus = [f"{key} is not in the model" for key in further]
    examples = [*wrong[:2], *missing[:2], *surplus[:2]]
    if not examples:
        return None
    return (
        f"does not fit model {name} ({len(wrong)} tensors of another shape, {len(missing)} "
        f"missing, {len(surplus)} not in the model): {'; '.join(examples)}; choose the --model "
        "that the checkpoint was made for"
    )


# ---- Writing back --------------------------------------------------------------------------------


def sam_state_dict(model: Any) -> dict[str, Tensor]:
    """Makes a state dict that the model's original code loads strictly.

    The model's layers are all SAM's: it is merged, or without an adapter. Tensors with the same
    shape in the checkpoint and the model come from the model. The others come from the checkpoint:
    position embeddings of another image size, the IoU head, and the mask tokens and hypernetworks
    that the model lacks. SAM has no classification branch, so the model's is not written, unless
    its whole decoder is ours.

    Raises:
        UserError: the model was not made from a SAM checkpoint, or its original code needs more
            of that than was kept.
    """
    whole, family = _whole(model), model.family
    if family.elsewhere and not any(re.match(family.elsewhere, key) for key in model.left_out):
        raise UserError(
            f"{family.title}'s original code also needs parts that are not in the image model, and "
            "of this checkpoint they were not kept; export to huggingface"
        )
    return family.official.to_theirs(whole)


def huggingface_files(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Makes what the transformers library loads without a missing tensor.

    The model is as in ``sam_state_dict``.

    Returns:
        The content of config.json, and the tensors under Hugging Face's names.

    Raises:
        UserError: the model was not made from a SAM checkpoint, or Hugging Face does not know it.
    """
    family, theirs = model.family, model.family.huggingface
    if theirs is None:
        raise UserError(
            f"Hugging Face's transformers has no {family.title} with a mask decoder; export to "
            "safetensors, onnx or torch-export"
        )
    whole = _whole(model)
    positions = whole.get("image_encoder.pos_embed")  # (1, H, W, C) of the checkpoint
    size = model.image_size if positions is None else family.patch * positions.shape[1]
    config = theirs.config(model.name, size)
    header = {"architectures": [theirs.architecture], "model_type": theirs.kind}
    return {**header, "dtype": "float32", **config}, theirs.to_theirs(whole)


def _whole(model: Any) -> dict[str, Tensor]:
    """The tensors of a whole SAM under our names.

    Raises:
        UserError: the model was not made from a SAM checkpoint.
    """
    state, left_out = model.state_dict(), model.left_out
    if model.family.new_decoder:
        return state | left_out
    if not any(key.startswith("mask_decoder.iou_prediction_head.") for key in (*state, *left_out)):
        raise UserError(
            "the model was not made from a SAM checkpoint, so SAM's IoU head is missing; export to "
            "onnx or torch-export"
        )
    merged = {k: v for k, v in state.items() if not k.startswith("mask_decoder.class_head.")}
    merged |= left_out
    for name in TOKENS:
        if name in left_out:
            own, original = state[name], left_out[name]  # (Q, 256)
            kept = min(len(own), len(original))
            merged[name] = torch.cat([own[:kept], original[kept:].to(own)])
    return merged
