"""SAM checkpoints: loading them into a model of any image size, and writing them back."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.errors import UserError
from naslora.files import read_safetensors, reason_of

MASK_TOKENS = "mask_decoder.mask_tokens.weight"

# ---- Loading -------------------------------------------------------------------------------------

_ENCODER_BLOCK = re.compile(r"image_encoder\.(blocks|stages)\.")
# These tensors may be missing: the classification branch starts with random weights, and the
# batch norms of a SAM encoder do not use their counters.
_OPTIONAL = re.compile(r"mask_decoder\.class_head\.|num_batches_tracked$")


def load_sam_checkpoint(model: nn.Module, path: str | Path, name: str) -> dict[str, Tensor]:
    """Loads a SAM checkpoint. It executes no code from the file.

    Position embeddings are resized to the model's token grid. Mask-decoder tensors that the model
    lacks are not loaded: the IoU head, and surplus mask tokens and hypernetworks.

    Args:
        model: a model with ``image_encoder``, ``prompt_encoder`` and ``mask_decoder``, whose
            parameters have SAM's names.
        path: an official ``.pth`` file, or the same tensors as ``.safetensors``.
        name: the model's name in ``MODELS``.

    Returns:
        The tensors of the file that were not loaded or were resized, with their original values
        and the model's names. ``sam_state_dict`` writes them back.

    Raises:
        UserError: the file is missing, damaged, not a SAM checkpoint, or has the tensors of another
            model. The model is then unchanged.
    """
    path = Path(path)
    tensors = _read(path)
    if not any(key.startswith("image_encoder.") for key in tensors):
        raise UserError(f"{path} holds no SAM checkpoint: it has no image_encoder weights")
    if name == "mobile_sam":
        tensors = {timm_name(key): value for key, value in tensors.items()}
    state = model.state_dict()
    fitted = {key: _fit(key, value, state) for key, value in tensors.items() if key in state}
    surplus = [key for key in tensors if key not in state and _ENCODER_BLOCK.match(key)]
    _check_complete(path, name, fitted, state, surplus)
    model.load_state_dict({**state, **fitted})
    _drop_caches(model)
    return {
        key: value
        for key, value in tensors.items()
        if key not in state or value.shape != state[key].shape
    }


def _drop_caches(model: nn.Module) -> None:
    # In evaluation mode, TinyViT caches its attention biases. A change of mode drops the cache.
    training = model.training
    model.train()
    model.train(training)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"checkpoint {path} is truncated or is not a PyTorch state dict: {reason_of(error)}"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise UserError(f"checkpoint {path} is not a plain state dict of tensors")
    return tensors


def _fit(key: str, value: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Converts a stored tensor to the model's shape, as SAM does, or returns it unchanged."""
    wanted = state[key].shape
    if value.shape == wanted:
        return value
    if key == "image_encoder.pos_embed" and value.shape[-1] == wanted[-1]:  # (1, H, W, C)
        return _resize(value.permute(0, 3, 1, 2), wanted[1:3], "bicubic").permute(0, 2, 3, 1)
    if re.search(r"attn\.rel_pos_[hw]$", key) and value.shape[1] == wanted[1]:  # (2 size - 1, C)
        return _resize(value.T[None], wanted[:1], "linear")[0].T
    if key == MASK_TOKENS and value.shape[1] == wanted[1]:  # (Q, 256)
        kept = min(value.shape[0], wanted[0])
        return torch.cat([value[:kept], state[key][kept:]])
    return value


def _resize(value: Tensor, size: torch.Size, mode: str) -> Tensor:
    return F.interpolate(value.float(), size=tuple(size), mode=mode, align_corners=False)


def _check_complete(
    path: Path,
    name: str,
    fitted: dict[str, Tensor],
    state: dict[str, Tensor],
    surplus: list[str],
) -> None:
    """Raises a UserError unless ``fitted`` fills the model's ``state`` and ``surplus`` is empty."""
    wrong = [key for key, value in fitted.items() if value.shape != state[key].shape]
    missing = [key for key in state if key not in fitted and not _OPTIONAL.search(key)]
    if not wrong and not missing and not surplus:
        return
    examples = [
        f"{key} has shape {tuple(fitted[key].shape)} in the file, {tuple(state[key].shape)} in the "
        "model"
        for key in wrong[:2]
    ]
    examples += [f"{key} is missing" for key in missing[:2]]
    examples += [f"{key} is not in the model" for key in surplus[:2]]
    raise UserError(
        f"checkpoint {path} does not fit model {name} ({len(wrong)} tensors of another shape, "
        f"{len(missing)} missing, {len(surplus)} not in the model): {'; '.join(examples)}; choose "
        "the --model that the checkpoint was made for"
    )


# ---- Writing back --------------------------------------------------------------------------------


def sam_state_dict(
    state: dict[str, Tensor], left_out: dict[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Makes a state dict that ``segment_anything``, or MobileSAM, loads strictly.

    Tensors with the same shape in the checkpoint and the model come from the model. The others come
    from the checkpoint: position embeddings of another image size, the IoU head, and the mask
    tokens and hypernetworks that the model lacks. SAM has no classification branch, so the model's
    is not written.

    Args:
        state: state dict of a model whose layers are all SAM's: merged, or without an adapter.
        left_out: what ``load_sam_checkpoint`` returned.
        name: the model's name in ``MODELS``.

    Raises:
        UserError: the model was not made from a SAM checkpoint.
    """
    if not any(key.startswith("mask_decoder.iou_prediction_head.") for key in left_out):
        raise UserError(
            "the model was not made from a SAM checkpoint, so SAM's IoU head is missing; export to "
            "onnx or torch-export"
        )
    merged = {k: v for k, v in state.items() if not k.startswith("mask_decoder.class_head.")}
    merged |= left_out
    if MASK_TOKENS in left_out:
        own, original = state[MASK_TOKENS], left_out[MASK_TOKENS]  # (Q, 256)
        kept = min(len(own), len(original))
        merged[MASK_TOKENS] = torch.cat([own[:kept], original[kept:].to(own)])
    if name == "mobile_sam":
        merged = {mobile_sam_name(key): value for key, value in merged.items()}
    return merged


# ---- MobileSAM's names ---------------------------------------------------------------------------

_Renaming = list[tuple[str, str | Callable[[re.Match[str]], str]]]

_TO_TIMM: _Renaming = [
    (r"patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"patch_embed\.seq\.2\.", "patch_embed.conv2."),
    # MobileSAM reduces the resolution at the end of a stage, timm at the start of the next one.
    (
        r"layers\.(\d)\.downsample\.",
        lambda match: f"stages.{int(match.group(1)) + 1}.downsample.",
    ),
    (r"layers\.(\d)\.", r"stages.\1."),
    (r"\.c\.weight$", ".conv.weight"),
]

_TO_MOBILE_SAM: _Renaming = [
    (r"^patch_embed\.conv1\.", "patch_embed.seq.0."),
    (r"^patch_embed\.conv2\.", "patch_embed.seq.2."),
    (
        r"^stages\.(\d)\.downsample\.",
        lambda match: f"layers.{int(match.group(1)) - 1}.downsample.",
    ),
    (r"^stages\.(\d)\.", r"layers.\1."),
    (r"\.conv\.weight$", ".c.weight"),
]


def timm_name(key: str) -> str:
    """Converts a parameter name of MobileSAM to the name that timm's TinyViT uses."""
    return _renamed(key, _TO_TIMM)


def mobile_sam_name(key: str) -> str:
    """Inverts ``timm_name``."""
    return _renamed(key, _TO_MOBILE_SAM)


def _renamed(key: str, renaming: _Renaming) -> str:
    prefix, dot, rest = key.partition(".")
    if prefix != "image_encoder":
        return key
    for pattern, replacement in renaming:
        rest = re.sub(pattern, replacement, rest)
    return prefix + dot + rest
