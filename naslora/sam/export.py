"""Export of merged models to SAM state dicts, ONNX and torch.export, and their prediction.

Each file contains a ``Description`` of its model, so that it needs no other file to predict.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor, nn

from naslora.adapter.layer.modules import adapter_layers
from naslora.choices import Format, Part, Task
from naslora.errors import UserError
from naslora.files import (
    CHECKSUM,
    check_archive,
    file_checksum,
    read_metadata,
    reading,
    replaced_file,
    replaced_folder,
    write_tensors,
    write_text,
)
from naslora.records import from_json
from naslora.sam.checkpoint import CONFIG, WEIGHTS, huggingface_files, sam_state_dict
from naslora.sam.encoders import LARGEST_IMAGE, check_image_size
from naslora.sam.families import find_family
from naslora.sam.promptable import PROMPTS, AnySam, PromptableSam
from naslora.sam.segmentation import SamForSegmentation, build_model

# ---- What a file contains ------------------------------------------------------------------------

SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torch-export": ".pt2"}
"""The endings of files; format huggingface writes a folder."""
KEY = "naslora"
"""Key of the description in a file's metadata."""
EXAMPLE_IMAGES = 2
"""Batch size of the traced example. The graph accepts other batch sizes."""
MOST_IMAGES = 1024
"""Largest batch size that the graph accepts."""
MOST_BYTES = 1_900_000_000
"""Largest size of weights inside an ONNX file, because a protobuf file is limited to 2 GiB. Larger
weights are written to a second file."""


@dataclass(frozen=True)
class Description:
    """The model that a file contains."""

    model: str
    """One of ``naslora.sam.families.MODELS``."""
    image_size: Annotated[int, Meta(ge=1, le=LARGEST_IMAGE)]
    """Side S of the images in pixels."""
    num_classes: Annotated[int, Meta(ge=1, le=256)]
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
    task: Task = "semantic"
    """As ``RunConfig.task``."""
    channels: tuple[str, ...] = ()
    """Names of the channels as ``DataConfig.channels``; empty for RGB. So is ``shown``."""
    shown: tuple[str, str, str] | None = None


def text_of(description: Description) -> str:
    """The text of a description that is stored."""
    return json.dumps(asdict(description))


def read_description(text: str | None) -> Description:
    """Inverts ``text_of``.

    Args:
        text: the stored text; None if the file has none.

    Raises:
        UserError: ``text`` is not a description, or its model takes no images of its size.
    """
    if not text:
        raise UserError("it was not written by naslora export")
    description = from_json(Description, json.loads(text), "its description")
    check_image_size(find_family(description.model), description.image_size)
    return description


class Scores(nn.Module):
    """Maps (B, C, S, S) images in [0, 1] to the class map, (B, K, S, S)."""

    def __init__(self, model: SamForSegmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).class_map()


class Embedding(nn.Module):
    """Maps (B, C, S, S) images in [0, 1] to what the image encoder returns.

    That is the image embedding, (B, 256, g, g), or a tuple of it and of the further maps that
    the family's decoder takes. The decoder's neck counts as the encoder's.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: AnySam) -> None:
        super().__init__()
        self.encoder = model.image_encoder
        self.neck = getattr(model.mask_decoder, "neck", nn.Identity())
        scale = 255 if isinstance(model, PromptableSam) else 1  # it has SAM's own numbers
        self.register_buffer("pixel_mean", model.pixel_mean / scale)
        self.register_buffer("pixel_std", model.pixel_std / scale)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.neck(self.encoder((images - self.pixel_mean) / self.pixel_std))


# ---- Writing -------------------------------------------------------------------------------------


def export(model: AnySam, description: Description, file_format: Format, path: Path) -> None:
    """Writes a merged model to a file, atomically.

    For an ONNX model with more than ``MOST_BYTES`` of weights, two files are written one after the
    other: ``NAME.onnx.data`` and ``NAME.onnx``.

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
    check_merged(model)
    if file_format != "huggingface" and path.suffix != SUFFIXES[file_format]:
        raise UserError(f"{path} must end in {SUFFIXES[file_format]} for format {file_format}")
    if file_format in ("huggingface", "safetensors"):
        _write_tensors(model, description, file_format, path)
        return
    if description.part == "model" and isinstance(model, PromptableSam):
        raise UserError(
            "the model takes prompts, and a graph of it would take none; export it to safetensors "
            "or huggingface, or its --part encoder"
        )
    module: nn.Module = (Scores if description.part == "model" else Embedding)(
        model.cpu().float()
    ).eval()
    with torch.no_grad():
        program = _traced(module, description.image_size, len(model.pixel_mean))
    if file_format == "torch-export":
        _write_program(program, description, path)
        return
    outputs = ["scores"]
    if description.part == "encoder":
        further = range(1, len(program.graph_signature.user_outputs))
        outputs = ["embedding", *(f"features_{i}" for i in further)]
    write_onnx(program, description, path, ["images"], outputs)


def check_merged(model: nn.Module) -> None:
    """Refuses a model with adapters."""
    adapted = next(adapter_layers(model), None)
    if adapted is not None:
        raise UserError(f"the model is not merged: {adapted[0]} has an adapter; merge it first")


def check_new(folder: Path) -> None:
    """Refuses a folder that is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; choose another --output")


def _write_tensors(
    model: AnySam, description: Description, file_format: Format, path: Path
) -> None:
    """Writes SAM's tensors: a file, or a folder that appears when all its files are written."""
    folder = file_format == "huggingface"
    if folder:
        check_new(path)
    if description.part == "encoder":
        raise UserError("a SAM state dict contains the whole model; export the part 'model'")
    if len(description.channels) not in (0, 3):
        raise UserError(
            f"the model has {len(description.channels)} channels, and {model.family.title}'s own "
            "code takes three; export to onnx or torch-export"
        )
    name, size = description.model, description.image_size
    with torch.device("meta"):
        plain: AnySam
        if isinstance(model, PromptableSam):
            plain = PromptableSam(name, size)
        else:
            plain = SamForSegmentation(name, size, description.num_classes)
    state, metadata = model.state_dict(), {KEY: text_of(description)}
    extra = sorted(state.keys() - plain.state_dict().keys())
    if extra:
        raise UserError(
            f"{model.family.title} has no {extra[0]}: merge with mode center or calibrated, or "
            "export to onnx or torch-export"
        )
    if not folder:
        write_tensors(path, sam_state_dict(state, model.left_out, name), metadata)
        return
    config, tensors = huggingface_files(state, model.left_out, name, size)
    with replaced_folder(path) as temporary:
        write_tensors(temporary / WEIGHTS, tensors, {"format": "pt", **metadata})
        write_text(temporary / CONFIG, json.dumps(config, indent=2) + "\n")


def _traced(module: nn.Module, size: int, channels: int) -> torch.export.ExportedProgram:
    images = torch.zeros(EXAMPLE_IMAGES, channels, size, size)
    module(images)  # fills TinyViT's cache of attention biases, which must not happen in the trace
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    return torch.export.export(module, (images,), dynamic_shapes={"images": {0: batch}})


def write_onnx(
    program: torch.export.ExportedProgram,
    description: Description,
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    versions: tuple[int, int] | None = None,
) -> None:
    """Writes a program to an ONNX file, as ``export``.

    ``versions`` are those of the operators and of the format; None takes PyTorch's own.
    """
    try:  # optional packages
        import onnx
        import onnxscript  # noqa: F401  # which torch.onnx.export needs
    except ImportError as error:
        raise UserError(
            "exporting to ONNX needs more libraries; run pip install onnx onnxscript"
        ) from error
    with quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            opset_version=versions[0] if versions else None,
        )
    assert converted is not None  # it is None without dynamo only
    converted.model.metadata_props[KEY] = text_of(description)
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    # NAME.onnx contains the name of NAME.onnx.data, so both get their names in another folder.
    with replaced_file(path) as temporary, TemporaryDirectory(dir=path.parent) as folder:
        graph, data = Path(folder, path.name), Path(folder, f"{path.name}.data")
        converted.save(graph, external_data=size > MOST_BYTES)
        model = onnx.load(graph, load_external_data=False)
        model.ir_version = versions[1] if versions else model.ir_version
        model.metadata_props.add(key=CHECKSUM, value=_checksum(model, data))
        onnx.save(model, temporary)
        if data.exists():
            os.replace(data, path.with_name(data.name))


def _checksum(model: Any, data: Path) -> str:
    """SHA-256 of an ONNX model, and of the file with its weights if it has one.

    Raises:
        UserError: the weights are in other files than ``data``.
    """
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    for name in {entry.value for entry in entries if entry.key == "location"}:
        if name != data.name:
            raise UserError(f"its weights are in {name}, and must be in {data.name}")
        digest.update(file_checksum(data).encode())
    return digest.hexdigest()


def _write_program(
    program: torch.export.ExportedProgram, description: Description, path: Path
) -> None:
    buffer = io.BytesIO()  # torch.export.save refuses the temporary file's suffix
    with quiet():
        torch.export.save(program, buffer, extra_files={KEY: text_of(description)})
    with replaced_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides progress and the warnings of other packages, some of which hold tracebacks."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
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

ClassMap = Callable[[Tensor], Tensor]
"""Maps (B, C, S, S) images in [0, 1] to the (B, K, S, S) class map, both on the CPU."""


def load_class_map(path: Path, trust: bool = False) -> tuple[ClassMap, Description]:
    """Loads a file that ``export`` wrote, as a function from images to class maps, on the CPU.

    Args:
        path: the file.
        trust: whether to read a ``.pt2`` file. PyTorch executes code that such a file holds. The
            other formats hold none.

    Raises:
        UserError: the file is missing or damaged, was not written by ``export``, contains only the
            image encoder, or is a SAM state dict of a model with several classes. The function
            raises it, too, if the model cannot take the images, or returns anything else than
            finite class maps.
    """
    loaders = {".onnx": _load_onnx, ".pt2": _load_program, ".safetensors": _load_state_dict}
    if path.suffix not in loaders:
        raise UserError(
            f"{path} is not an exported model: its suffix is none of {', '.join(loaders)}"
        )
    if path.suffix == ".pt2" and not trust:
        raise UserError(
            f"{path} may hold code, which PyTorch runs when it loads a .pt2 file: give --trust if "
            "you know who made it, or take the model's folder, .onnx or .safetensors file"
        )
    with reading(path), quiet():
        compute, description = loaders[path.suffix](path)
        if description.part != "model":
            raise UserError(f"{path} holds only the image encoder, which predicts no masks")
        if description.task == "promptable":
            raise UserError(f"{path} {PROMPTS}")

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
    try:  # optional packages
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(
            "predicting with ONNX needs onnxruntime; run pip install onnxruntime"
        ) from error
    model = onnx.load(path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    stored = model.metadata_props.pop().value if CHECKSUM in metadata else None
    if _checksum(model, path.with_name(f"{path.name}.data")) != stored is not None:
        raise UserError(f"{path} is damaged: it does not match its checksum; export it again")
    del model
    session = onnxruntime.InferenceSession(str(path))

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
