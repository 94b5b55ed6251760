"""Export of merged models to SAM state dicts, ONNX and torch.export, and their prediction.

Each file contains a ``Description`` of its model, so that it needs no other file to predict.
"""

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from naslora.adapter.modules import adapter_layers
from naslora.errors import UserError
from naslora.files import (
    check_archive,
    disk_error,
    reason_of,
    replaced_file,
    replaced_folder,
    write_tensors,
    write_text,
)
from naslora.sam.checkpoint import CONFIG, WEIGHTS, huggingface_files, sam_state_dict
from naslora.sam.segmentation import SamForSegmentation, build_model, labels_of

# ---- What a file contains ------------------------------------------------------------------------

Format = Literal["onnx", "safetensors", "torch-export", "huggingface"]
Part = Literal["model", "encoder"]
SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torch-export": ".pt2"}
"""The endings of files; format huggingface writes a folder."""
KEY = "naslora"
"""Key of the description in a file's metadata."""
EXAMPLE_IMAGES = 2
"""Batch size of the traced example. The graph accepts other batch sizes."""
MOST_IMAGES = 1024
"""Largest batch size that the graph accepts."""
# Field 14 of a ModelProto, 80 bytes long: a key of 12 bytes, and a value of 64.
CHECKSUM_HEAD = b"\x72\x50\x0a\x0cnaslora_256a\x12\x40"
CHECKSUM_HEAD_OF_TWO = b"\x72\x50\x0a\x0cnaslora_256b\x12\x40"
"""How the checksum of an ONNX file begins: of one file, and of one with NAME.onnx.data."""
MOST_BYTES = 1_900_000_000
"""Largest size of weights inside an ONNX file, because a protobuf file is limited to 2 GiB. Larger
weights are written to a second file."""


@dataclass(frozen=True)
class Description:
    """The model that a file contains."""

    model: str
    """One of ``naslora.sam.encoders.MODELS``."""
    image_size: int
    """Side S of the images in pixels."""
    num_classes: int
    """1 if binary, else K."""
    class_names: tuple[str, ...]
    """Names of the foreground classes."""
    part: Part = "model"
    """The whole model, which maps images to the class map, or only the image encoder."""
    crop: int | None = None
    """Side of the windows, in pixels of the images, that the model was trained on; None for whole
    images."""
    intensity: tuple[str, ...] | None = None
    """Scaling of images with more than 8 bits, as ``RunConfig.intensity``."""

    def to_json(self) -> str:
        """Converts the description to the text that is stored."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | None, path: Path) -> "Description":
        """Inverts ``to_json``.

        Args:
            text: the stored text; None if the file has none.
            path: the file, for the message.

        Raises:
            UserError: ``text`` is not a description.
        """
        try:
            return msgspec.json.decode(text or "", type=cls)
        except msgspec.MsgspecError as error:
            raise UserError(f"{path} was not written by naslora export") from error


class Scores(nn.Module):
    """Maps (B, 3, S, S) images in [0, 1] to the class map, (B, K, S, S)."""

    def __init__(self, model: SamForSegmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).class_map()


class Embedding(nn.Module):
    """Maps (B, 3, S, S) images in [0, 1] to what the image encoder returns.

    That is the image embedding, (B, 256, S/16, S/16), or a tuple of it and of the further maps that
    the family's decoder takes.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: SamForSegmentation) -> None:
        super().__init__()
        self.encoder = model.image_encoder
        self.register_buffer("pixel_mean", model.pixel_mean)
        self.register_buffer("pixel_std", model.pixel_std)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.encoder((images - self.pixel_mean) / self.pixel_std)


# ---- Writing -------------------------------------------------------------------------------------


def export(
    model: SamForSegmentation, description: Description, file_format: Format, path: Path
) -> None:
    """Writes a merged model to a file, atomically.

    For an ONNX model with more than ``MOST_BYTES`` of weights, two files are written, and not
    atomically: ``NAME.onnx`` and ``NAME.onnx.data``.

    Args:
        model: a model without adapters: merged, or never adapted.
        description: the description of the model. Its ``part`` selects what is exported.
        file_format: "safetensors": the state dict of the SAM that the model was made from, under
            the names of its original code. "huggingface": the same as a folder that the
            transformers library loads. "onnx", "torch-export": a graph that maps images to the
            class map, or to what the image encoder returns. It accepts one image size and batch
            sizes up to ``MOST_IMAGES``.
        path: the file; its suffix must be that of the format. For "huggingface" the folder, new or
            empty.

    Raises:
        UserError: the model has adapters, the format cannot store the model, the suffix is wrong,
            the folder is not empty, or a package is missing.
    """
    if file_format not in get_args(Format):
        names = ", ".join(get_args(Format))
        raise UserError(f"format must be one of {names}, got {file_format!r}")
    adapted = next(adapter_layers(model), None)
    if adapted is not None:
        raise UserError(f"the model is not merged: {adapted[0]} has an adapter; merge it first")
    if file_format == "huggingface":
        _write_folder(model, description, path)
        return
    if path.suffix != SUFFIXES[file_format]:
        raise UserError(f"{path} must end in {SUFFIXES[file_format]} for format {file_format}")
    if file_format == "safetensors":
        _write_state_dict(model, description, path)
        return
    module = (Scores if description.part == "model" else Embedding)(model.cpu().float()).eval()
    with torch.no_grad():
        program = _traced(module, description.image_size)
        (_write_onnx if file_format == "onnx" else _write_program)(program, description, path)


def _write_folder(model: SamForSegmentation, description: Description, path: Path) -> None:
    """Writes a folder of Hugging Face, which appears when all its files are written."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty; choose another --output")
    _check_layers(model, description)
    config, tensors = huggingface_files(
        model.state_dict(), model.left_out, description.model, description.image_size
    )
    metadata = {"format": "pt", KEY: description.to_json()}  # transformers asks for the first
    with replaced_folder(path) as folder:
        write_tensors(folder / WEIGHTS, tensors, metadata)
        write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _write_state_dict(model: SamForSegmentation, description: Description, path: Path) -> None:
    _check_layers(model, description)
    state = sam_state_dict(model.state_dict(), model.left_out, description.model)
    write_tensors(path, state, {KEY: description.to_json()})


def _check_layers(model: SamForSegmentation, description: Description) -> None:
    if description.part == "encoder":
        raise UserError("a SAM state dict contains the whole model; export the part 'model'")
    with torch.device("meta"):
        plain = SamForSegmentation(
            description.model, description.image_size, description.num_classes
        )
    extra = sorted(model.state_dict().keys() - plain.state_dict().keys())
    if extra:
        raise UserError(
            f"{model.family.title} has no {extra[0]}: merge with mode center or calibrated, or "
            "export to onnx or torch-export"
        )


def _traced(module: nn.Module, size: int) -> torch.export.ExportedProgram:
    images = torch.zeros(EXAMPLE_IMAGES, 3, size, size)
    module(images)  # fills TinyViT's cache of attention biases, which must not happen in the trace
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    return torch.export.export(module, (images,), dynamic_shapes={"images": {0: batch}})


def _write_onnx(
    program: torch.export.ExportedProgram, description: Description, path: Path
) -> None:
    if find_spec("onnxscript") is None:  # torch.onnx.export needs this optional package
        raise UserError("exporting to ONNX needs onnxscript; run pip install 'naslora[export]'")
    with _quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=_outputs(program, description.part),
        )
    assert converted is not None  # it is None without dynamo only
    converted.model.metadata_props[KEY] = description.to_json()
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if size > MOST_BYTES:
        _write_two_files(converted, path)
        return
    with replaced_file(path) as temporary:
        converted.save(temporary, external_data=False)
        _append_checksum(temporary)


def _outputs(program: torch.export.ExportedProgram, part: Part) -> list[str]:
    """The names of a graph's outputs."""
    if part == "model":
        return ["scores"]
    further = range(1, len(program.graph_signature.user_outputs))
    return ["embedding", *(f"features_{i}" for i in further)]


def _write_two_files(converted: Any, path: Path) -> None:
    """Writes NAME.onnx and NAME.onnx.data. An error removes both.

    Not atomic: NAME.onnx contains the name of NAME.onnx.data, so neither can be renamed.
    """
    data = _data_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # known by this file, a killed export leaves no model
    try:
        converted.save(path, external_data=True)
        _append_checksum(path, data)
    except Exception as error:  # the writers of the format raise exceptions of many types
        path.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
        reason = disk_error(error)
        if reason is None:
            raise
        raise UserError(f"{path} cannot be written: {reason}") from error


def _data_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _checksum_field(path: Path, content: int, data: Path | None) -> bytes:
    """The checksum of an ONNX file as one more entry of ``metadata_props``, in protobuf's encoding.

    A protobuf message may be continued by further fields, so the entry is the end of the file.

    Args:
        path: the file.
        content: number of its bytes that the checksum covers.
        data: the file with the weights, which it covers as well; None if there is none.
    """
    digest = hashlib.sha256()
    for file, left in ((path, content), (data, None)):
        if file is not None:
            with file.open("rb") as stream:
                while chunk := stream.read(min(left, 1 << 20) if left is not None else 1 << 20):
                    digest.update(chunk)
                    left = None if left is None else left - len(chunk)
    return (CHECKSUM_HEAD if data is None else CHECKSUM_HEAD_OF_TWO) + digest.hexdigest().encode()


def _append_checksum(path: Path, data: Path | None = None) -> None:
    field = _checksum_field(path, path.stat().st_size, data)
    with path.open("ab") as file:
        file.write(field)


def _check_onnx(path: Path) -> None:
    """Verifies the checksum of an ONNX file. Files of 0.1.0 have none.

    Raises:
        UserError: the file, or the one with its weights, does not match it.
    """
    length = len(CHECKSUM_HEAD) + 64
    content = path.stat().st_size - length
    if content < 0:
        return
    with path.open("rb") as file:
        file.seek(content)
        stored = file.read()
    if not stored.startswith((CHECKSUM_HEAD, CHECKSUM_HEAD_OF_TWO)):
        return
    data = _data_file(path) if stored.startswith(CHECKSUM_HEAD_OF_TWO) else None
    if stored != _checksum_field(path, content, data):
        raise UserError(f"{path} is damaged: it does not match its checksum; export it again")


def _write_program(
    program: torch.export.ExportedProgram, description: Description, path: Path
) -> None:
    buffer = io.BytesIO()  # torch.export.save refuses the temporary file's suffix
    with _quiet():
        torch.export.save(program, buffer, extra_files={KEY: description.to_json()})
    with replaced_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides progress and the warnings of other packages, some of which hold tracebacks."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- Prediction ----------------------------------------------------------------------------------

Predict = Callable[[Tensor], Tensor]
"""Maps (B, 3, S, S) images in [0, 1] to (B, S, S) labels, both on the CPU."""
ClassMap = Callable[[Tensor], Tensor]
"""Maps the same images to the (B, K, S, S) class map."""


def load_exported(path: Path) -> tuple[Predict, Description]:
    """Loads a file that ``export`` wrote, for prediction on the CPU.

    Raises:
        UserError: as ``load_class_map``.
    """
    class_map, description = load_class_map(path)

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        return labels_of(class_map(images))

    return predict, description


def load_class_map(path: Path) -> tuple[ClassMap, Description]:
    """Loads a file that ``export`` wrote, as a function from images to class maps, on the CPU.

    Raises:
        UserError: the file is missing or damaged, was not written by ``export``, contains only the
            image encoder, or is a SAM state dict of a model with several classes.
    """
    loaders = {".onnx": _load_onnx, ".pt2": _load_program, ".safetensors": _load_state_dict}
    if path.suffix not in loaders:
        raise UserError(
            f"{path} is not an exported model: its suffix is none of {', '.join(loaders)}"
        )
    class_map, description = loaders[path.suffix](path)
    if description.part != "model":
        raise UserError(f"{path} holds only the image encoder, which predicts no masks")
    return class_map, description


def _load_onnx(path: Path) -> tuple[ClassMap, Description]:
    try:  # an optional package
        import onnxruntime
    except ImportError as error:
        raise UserError(
            "predicting with ONNX needs onnxruntime; run pip install 'naslora[export]'"
        ) from error

    def load() -> Any:
        _check_onnx(path)
        session = onnxruntime.InferenceSession(str(path))
        return session, session.get_modelmeta().custom_metadata_map

    session, metadata = _read(path, load)

    def class_map(images: Tensor) -> Tensor:
        (result,) = session.run(None, {"images": np.ascontiguousarray(images.numpy())})
        return torch.from_numpy(result)

    return class_map, Description.from_json(metadata.get(KEY), path)


def _load_program(path: Path) -> tuple[ClassMap, Description]:
    extra = {KEY: ""}

    def load() -> Any:
        check_archive(path)
        return torch.export.load(path, extra_files=extra).module()

    with _quiet():
        module = _read(path, load)
    return module, Description.from_json(extra[KEY], path)


def _load_state_dict(path: Path) -> tuple[ClassMap, Description]:
    def metadata() -> dict[str, str]:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}

    description = Description.from_json(_read(path, metadata).get(KEY), path)
    if description.num_classes > 1:
        raise UserError(
            f"{path} is a SAM state dict, and SAM has no classification branch for "
            f"{description.num_classes} classes; predict with the merged folder, onnx or "
            "torch-export"
        )
    model = build_model(description.model, description.image_size, 1, path).eval()
    return Scores(model), description


def _read(path: Path, read: Callable[[], Any]) -> Any:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # the libraries of the formats raise exceptions of many types
        raise UserError(f"{path} is damaged or has another format: {reason_of(error)}") from error
