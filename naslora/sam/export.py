"""Merged models for other runtimes - SAM state dicts, ONNX, torch.export - and back for masks.

Whatever the format, the file says which model it holds, so that it predicts on its own.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from naslora.adapter.injection import adapter_layers
from naslora.errors import UserError
from naslora.files import replaced_file
from naslora.sam.checkpoint import sam_state_dict
from naslora.sam.segmentation import SamForSegmentation, build_model

Format = Literal["onnx", "safetensors", "torch-export"]
Part = Literal["model", "encoder"]
SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torch-export": ".pt2"}
KEY = "naslora"  # of the description among a file's metadata
EXAMPLE_IMAGES = 2  # traced with a batch size that any other may replace
MOST_IMAGES = 1024
MOST_BYTES = 1_900_000_000  # a protobuf file ends at 2 GiB; larger weights go to a file beside it

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Description:
    """What a file holds."""

    model: str
    image_size: int
    num_classes: int
    class_names: tuple[str, ...]
    part: Part = "model"

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | None, path: Path) -> "Description":
        """The inverse; ``path`` is for messages.

        Raises:
            UserError: ``text`` is none of ours.
        """
        try:
            values = json.loads(text or "")
            return cls(**values | {"class_names": tuple(values["class_names"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} was not written by naslora export") from error


class Scores(nn.Module):
    """(B, 3, S, S) images in [0, 1] to the class map, (B, K, S, S) scores: one tensor."""

    def __init__(self, model: SamForSegmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).class_map()


class Embedding(nn.Module):
    """(B, 3, S, S) images in [0, 1] to the image embedding, (B, 256, S/16, S/16)."""

    def __init__(self, model: SamForSegmentation) -> None:
        super().__init__()
        self.encoder = model.image_encoder
        self.register_buffer("pixel_mean", model.pixel_mean)
        self.register_buffer("pixel_std", model.pixel_std)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder((images - self.pixel_mean) / self.pixel_std)


def export(
    model: SamForSegmentation, description: Description, file_format: Format, path: Path
) -> None:
    """Writes a merged model, atomically.

    Args:
        model: without adapters: merged, or never adapted.
        description: what it is; its ``part`` says what is exported.
        file_format: "safetensors": the state dict of the SAM, or MobileSAM, that the model was
            made from. "onnx", "torch-export": a graph of images to class scores, or to the image
            embedding, for any batch size and this image size.
        path: the file.

    Raises:
        UserError: the model has adapters, or cannot take the format; a package is missing.
    """
    if file_format not in get_args(Format):
        names = ", ".join(get_args(Format))
        raise UserError(f"format must be one of {names}, got {file_format!r}")
    adapted = next(adapter_layers(model), None)
    if adapted is not None:
        raise UserError(f"the model is not merged: {adapted[0]} has an adapter; merge it first")
    if path.suffix != SUFFIXES[file_format]:
        raise UserError(f"{path} has to end in {SUFFIXES[file_format]} to hold {file_format}")
    if file_format == "safetensors":
        if description.part == "encoder":
            raise UserError("a SAM state dict is whole; export the part 'model'")
        _check_layers(model, description)
        state = sam_state_dict(model.state_dict(), model.left_out, description.model)
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        with replaced_file(path) as temporary:
            save_file(tensors, temporary, metadata={KEY: description.to_json()})
        return
    module = (Scores if description.part == "model" else Embedding)(model.cpu().float()).eval()
    with torch.no_grad():
        program = _traced(module, description.image_size)
        if file_format == "onnx":
            _write_onnx(program, description, path)
            return
        buffer = io.BytesIO()  # a path of its own would have to end in .pt2
        torch.export.save(program, buffer, extra_files={KEY: description.to_json()})
        with replaced_file(path) as temporary:
            temporary.write_bytes(buffer.getvalue())


def _check_layers(model: SamForSegmentation, description: Description) -> None:
    with torch.device("meta"):
        plain = SamForSegmentation(
            description.model, description.image_size, description.num_classes
        )
    extra = sorted(model.state_dict().keys() - plain.state_dict().keys())
    if extra:
        raise UserError(
            f"SAM has no {extra[0]}: merge with mode center or calibrated, or export to onnx or "
            "torch-export"
        )


def _traced(module: nn.Module, size: int) -> torch.export.ExportedProgram:
    images = torch.zeros(EXAMPLE_IMAGES, 3, size, size)
    module(images)  # TinyViT caches its attention biases; they must not be made while tracing
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    return torch.export.export(module, (images,), dynamic_shapes={"images": {0: batch}})


def _write_onnx(
    program: torch.export.ExportedProgram, description: Description, path: Path
) -> None:
    if find_spec("onnxscript") is None:  # torch exports with it
        raise UserError("exporting to ONNX needs onnxscript; run pip install 'naslora[export]'")
    with _quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=["scores" if description.part == "model" else "embedding"],
        )
    converted.model.metadata_props[KEY] = description.to_json()
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if size > MOST_BYTES:
        path.parent.mkdir(parents=True, exist_ok=True)
        converted.save(path, external_data=True)  # NAME.onnx.data, which NAME.onnx knows by name
        return
    with replaced_file(path) as temporary:
        converted.save(temporary, external_data=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's progress and deprecations of others to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def load_exported(path: Path) -> tuple[Predict, Description]:
    """What a file of ``export`` predicts with: (B, 3, S, S) images to (B, S, S) labels, on the CPU.

    Raises:
        UserError: it is damaged, none of ours, an encoder alone, or lacks the classes.
    """
    loaders = {".onnx": _load_onnx, ".pt2": _load_program, ".safetensors": _load_state_dict}
    if path.suffix not in loaders:
        raise UserError(f"{path} is no exported model: it ends in none of {', '.join(loaders)}")
    scores, description = loaders[path.suffix](path)
    if description.part != "model":
        raise UserError(f"{path} holds the image encoder alone, which predicts no masks")

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        classes = scores(images)
        return classes.argmax(1) if description.num_classes > 1 else (classes[:, 0] > 0.5).long()

    return predict, description


def _load_onnx(path: Path) -> tuple[Predict, Description]:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            "predicting with ONNX needs onnxruntime; run pip install 'naslora[export]'"
        ) from error
    session: Any = _read(path, lambda: onnxruntime.InferenceSession(str(path)))
    metadata = session.get_modelmeta().custom_metadata_map

    def scores(images: Tensor) -> Tensor:
        (result,) = session.run(None, {"images": np.ascontiguousarray(images.numpy())})
        return torch.from_numpy(result)

    return scores, Description.from_json(metadata.get(KEY), path)


def _load_program(path: Path) -> tuple[Predict, Description]:
    extra = {KEY: ""}
    program: Any = _read(path, lambda: torch.export.load(path, extra_files=extra))
    return program.module(), Description.from_json(extra[KEY], path)


def _load_state_dict(path: Path) -> tuple[Predict, Description]:
    def metadata() -> dict[str, str]:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}

    description = Description.from_json(_read(path, metadata).get(KEY), path)
    if description.num_classes > 1:
        raise UserError(
            f"{path} is a SAM state dict, which has no place for the branch that tells classes "
            "apart; predict with the merged folder, onnx or torch-export"
        )
    model = build_model(description.model, description.image_size, 1, path).eval()
    return Scores(model), description


def _read(path: Path, read: Callable[[], Any]) -> Any:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return read()
    except Exception as error:  # the formats' libraries raise what they like
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is damaged or of another format: {reason}") from error
