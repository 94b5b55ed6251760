"""Exported models as functions from images to class maps, whatever runtime computes them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from naslora.errors import UserError, imported
from naslora.files import CHECKSUM, check_archive, file_checksum, read_metadata, reading
from naslora.sam.export import KEY, Description, Scores, onnx_checksum, quiet, read_description
from naslora.sam.families import find_family
from naslora.sam.prompts import PROMPTS
from naslora.sam.segmentation import build_model

ClassMap = Callable[[Tensor], Tensor]
"""Maps (B, C, S, S) images in [0, 1] to the (B, K, S, S) class map, both on the CPU."""


def load_class_map(path: Path, trust: bool = False) -> tuple[ClassMap, Description]:
    """Loads a file that ``export`` wrote, as a function from images to class maps, on the CPU.

    ``trust`` says whether to read a ``.pt2`` file. PyTorch executes code that such a file holds.
    The other formats hold none.

    Raises:
        UserError: the file is missing or damaged, was not written by ``export``, contains only the
            image encoder, or is a SAM state dict of a model with several classes. The function
            raises it, too, if the model cannot take the images, or returns anything else than
            finite class maps.
    """
    if path.suffix not in RUNTIMES:
        raise UserError(
            f"{path} is not an exported model: its suffix is none of {', '.join(RUNTIMES)}"
        )
    if path.suffix == ".pt2" and not trust:
        raise UserError(
            f"{path} may hold code, which PyTorch runs when it loads a .pt2 file: give --trust if "
            "you know who made it, or take the model's folder, .onnx or .safetensors file"
        )
    with reading(path), quiet():
        compute, description = RUNTIMES[path.suffix](path)
        if description.part != "model":
            raise UserError(f"{path} holds only the image encoder, which predicts no masks")
        if description.task == "promptable":
            raise UserError(f"{path} {PROMPTS}")

    @torch.no_grad()
    def class_map(images: Tensor) -> Tensor:
        expected = (len(images), description.num_classes, *images.shape[2:])
        with reading(path, "cannot segment an image"):
            scores = compute(images)
            if scores.shape != expected:
                raise ValueError(f"it returns the shape {tuple(scores.shape)}, not {expected}")
            if not scores.isfinite().all():
                raise ValueError("its weights or its graph give NaN or infinities")
        return scores

    return class_map, description


def _load_onnx(path: Path) -> tuple[ClassMap, Description]:
    onnx, onnxruntime = imported("export", "onnx", "onnxruntime")
    model = onnx.load(path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    stored = model.metadata_props.pop().value if CHECKSUM in metadata else None
    if onnx_checksum(model, path.with_name(f"{path.name}.data")) != stored is not None:
        raise UserError(f"{path} is damaged: it does not match its checksum; export it again")
    del model
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options)

    def class_map(images: Tensor) -> Tensor:
        (result,) = session.run(None, {"images": np.ascontiguousarray(images.numpy())})
        return torch.from_numpy(result)

    return class_map, read_description(metadata.get(KEY))


def _load_program(path: Path) -> tuple[ClassMap, Description]:
    extra = {KEY: ""}
    check_archive(path)
    program = torch.export.load(path, extra_files=extra)
    return program.module(), read_description(extra[KEY])


def _load_state_dict(path: Path) -> tuple[ClassMap, Description]:
    description = read_description(read_metadata(path).get(KEY))
    if description.num_classes > 1 and not find_family(description.model).new_decoder:
        raise UserError(
            f"{path} is a SAM state dict, and SAM has no classification branch for "
            f"{description.num_classes} classes; predict with the merged folder, onnx or "
            "torch-export"
        )
    classes = description.num_classes
    model = build_model(description.model, description.image_size, classes, path).eval()
    return Scores(model), description


def _load_openvino(path: Path) -> tuple[ClassMap, Description]:
    (openvino,) = imported("openvino", "openvino")
    core = openvino.Core()
    model = core.read_model(path)
    written = model.has_rt_info([KEY, "description"])
    text = model.get_rt_info([KEY, "description"]).astype(str) if written else None
    description = read_description(text)
    if model.get_rt_info([KEY, CHECKSUM]).astype(str) != file_checksum(path.with_suffix(".bin")):
        raise UserError(f"{path.with_suffix('.bin')} does not match {path}; export it again")
    compiled = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})

    def class_map(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(np.ascontiguousarray(images.numpy()))[0].copy())

    return class_map, description


RUNTIMES = {
    ".onnx": _load_onnx,
    ".xml": _load_openvino,
    ".pt2": _load_program,
    ".safetensors": _load_state_dict,
}
"""What loads a file, by its suffix."""
