"""SAM checkpoints: loading them at any image size, and writing them back."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.errors import UserError
from naslora.files import read_safetensors

_ENCODER_BLOCK = re.compile(r"image_encoder\.(blocks|stages)\.")


def load_sam_checkpoint(model: nn.Module, path: str | Path, name: str) -> dict[str, Tensor]:
    """Loads a SAM checkpoint into ``model``, which has SAM's parts under SAM's names.

    Position embeddings are resized to the model's grid. Of the mask decoder, what the model has not
    (the IoU head, spare tokens and hypernetworks) is left out. Runs no code from the file.

    Returns:
        What was left out or changed its size, as it is in the file but under the model's names:
        ``sam_state_dict`` writes it back.

    Args:
        model: has ``image_encoder``, ``prompt_encoder`` and ``mask_decoder``.
        path: an official ``.pth`` file or the same as ``.safetensors``.
        name: which of ``MODELS`` the model is.

    Raises:
        UserError: the file is missing, damaged, no SAM checkpoint, or one of another model size.
    """
    path = Path(path)
    tensors = _read(path)
    if not any(key.startswith("image_encoder.") for key in tensors):
        raise UserError(f"{path} is no SAM checkpoint: it has no image_encoder weights")
    if name == "mobile_sam":
        tensors = {_timm_name(key): value for key, value in tensors.items()}
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
    # TinyViT caches its attention biases in evaluation mode; a change of mode drops the cache.
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
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"checkpoint {path} is truncated or no PyTorch state dict: {reason}"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise UserError(f"checkpoint {path} holds no plain state dict of tensors")
    return tensors


def _fit(key: str, value: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Gives a stored tensor the model's shape where SAM defines how; leaves the others alone."""
    wanted = state[key].shape
    if value.shape == wanted:
        return value
    if key == "image_encoder.pos_embed" and value.shape[-1] == wanted[-1]:
        return _resize(value.permute(0, 3, 1, 2), wanted[1:3], "bicubic").permute(0, 2, 3, 1)
    if re.search(r"attn\.rel_pos_[hw]$", key) and value.shape[1] == wanted[1]:
        return _resize(value.T[None], wanted[:1], "linear")[0].T
    if key == "mask_decoder.mask_tokens.weight" and value.shape[1] == wanted[1]:
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
    wrong = [key for key, value in fitted.items() if value.shape != state[key].shape]
    # Fresh by design: the class branch, and the counters that batch norm does not use here.
    optional = re.compile(r"mask_decoder\.class_head\.|num_batches_tracked$")
    missing = [key for key in state if key not in fitted and not optional.search(key)]
    if not wrong and not missing and not surplus:
        return
    examples = [
        f"{key} is {tuple(fitted[key].shape)} there and {tuple(state[key].shape)} in {name}"
        for key in wrong[:2]
    ]
    examples += [f"{key} is missing" for key in missing[:2]]
    examples += [f"{key} is unknown to {name}" for key in surplus[:2]]
    raise UserError(
        f"checkpoint {path} does not fit model {name} ({len(wrong)} tensors of another shape, "
        f"{len(missing)} missing, {len(surplus)} too many): {'; '.join(examples)}; choose the "
        "--model it was made for"
    )


def sam_state_dict(
    state: dict[str, Tensor], left_out: dict[str, Tensor], name: str
) -> dict[str, Tensor]:
    """The state dict that ``segment_anything``, or MobileSAM, loads strictly.

    What SAM has in the same size is the model's own; the rest is the original checkpoint's: the
    embeddings of another image size, the decoder's IoU head, spare tokens and hypernetworks. What
    SAM has no place for, the class branch, is dropped.

    Args:
        state: of a model that has no layers but SAM's.
        left_out: of ``load_sam_checkpoint``.
        name: which of ``MODELS`` the model is.

    Raises:
        UserError: the model was not made from a SAM checkpoint, so there is nothing to write back.
    """
    if not any(key.startswith("mask_decoder.iou_prediction_head.") for key in left_out):
        raise UserError(
            "the model was not made from a SAM checkpoint, so SAM's IoU head is missing; export to "
            "onnx or torch-export"
        )
    merged = {k: v for k, v in state.items() if not k.startswith("mask_decoder.class_head.")}
    merged |= left_out
    tokens = "mask_decoder.mask_tokens.weight"
    if tokens in left_out:
        kept = min(len(state[tokens]), len(left_out[tokens]))
        merged[tokens] = torch.cat(
            [state[tokens][:kept], left_out[tokens][kept:].to(state[tokens])]
        )
    if name == "mobile_sam":
        merged = {_mobile_sam_name(key): value for key, value in merged.items()}
    return merged


# MobileSAM's names, and what timm calls the same modules.
_TIMM_NAMES: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"patch_embed\.seq\.2\.", "patch_embed.conv2."),
    # MobileSAM reduces the resolution at the end of a stage, timm at the start of the next.
    (
        r"layers\.(\d)\.downsample\.",
        lambda match: f"stages.{int(match.group(1)) + 1}.downsample.",
    ),
    (r"layers\.(\d)\.", r"stages.\1."),
    (r"\.c\.weight$", ".conv.weight"),
]


# The other way round.
_MOBILE_SAM_NAMES: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"^patch_embed\.conv1\.", "patch_embed.seq.0."),
    (r"^patch_embed\.conv2\.", "patch_embed.seq.2."),
    (
        r"^stages\.(\d)\.downsample\.",
        lambda match: f"layers.{int(match.group(1)) - 1}.downsample.",
    ),
    (r"^stages\.(\d)\.", r"layers.\1."),
    (r"\.conv\.weight$", ".c.weight"),
]


def _timm_name(key: str) -> str:
    return _renamed(key, _TIMM_NAMES)


def _mobile_sam_name(key: str) -> str:
    return _renamed(key, _MOBILE_SAM_NAMES)


def _renamed(key: str, names: list[tuple[str, str | Callable[[re.Match], str]]]) -> str:
    prefix, dot, rest = key.partition(".")
    if prefix != "image_encoder":
        return key
    for pattern, replacement in names:
        rest = re.sub(pattern, replacement, rest)
    return prefix + dot + rest
