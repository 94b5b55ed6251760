"""Export of merged models: SAM state dicts, ONNX, OpenVINO, Core ML and torch.export.

Each file contains a ``Description`` of its model, so that it needs no other file to predict.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.export import ExportedProgram

from naslora.adapter.layer.modules import adapter_layers
from naslora.choices import Format, Part, Quantize, Task
from naslora.errors import UserError, imported
from naslora.files import (
    CHECKSUM,
    file_checksum,
    replaced_file,
    replaced_folder,
    write_tensors,
    write_text,
)
from naslora.records import from_json
from naslora.sam.attention import fuse_attention
from naslora.sam.checkpoint import CONFIG, WEIGHTS, huggingface_files, sam_state_dict
from naslora.sam.encoders import LARGEST_IMAGE, check_image_size
from naslora.sam.families import find_family
from naslora.sam.prompts import AnySam, PromptableSam
from naslora.sam.quantization import QUANTIZED, compress_onnx, quantized_openvino
from naslora.sam.segmentation import SamForSegmentation

# ---- What a file contains ------------------------------------------------------------------------

SUFFIXES = {
    "onnx": ".onnx",
    "tensorrt": ".onnx",
    "openvino": ".xml",
    "coreml": ".mlpackage",
    "safetensors": ".safetensors",
    "torch-export": ".pt2",
}
"""The endings of files; format huggingface writes a folder."""
OLD_VERSIONS = 18, 9
"""ONNX's operators and format, as TensorRT 8.6 and onnxruntime 1.15 of annotation tools read
them."""
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
    slice_axis: int = 2
    """As in ``DataConfig``, and so are ``neighbours`` and ``stacks``."""
    neighbours: int = 0
    stacks: bool = False


def text_of(description: Description) -> str:
    """The text of a description that is stored."""
    return json.dumps(asdict(description))


def read_description(text: str | None) -> Description:
    """Inverts ``text_of``.

    Raises:
        UserError: ``text``, None if the file has none, is not a description, or its model takes no
            images of its size.
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


def export(
    model: AnySam,
    description: Description,
    file_format: Format,
    path: Path,
    quantize: Quantize | None = None,
    images: Sequence[Tensor] = (),
) -> None:
    """Writes a merged model to a file, atomically.

    For an ONNX model with more than ``MOST_BYTES`` of weights, two files are written one after the
    other: ``NAME.onnx.data`` and ``NAME.onnx``. OpenVINO's are ``NAME.bin`` and ``NAME.xml``.

    Args:
        model: a model without adapters: merged, or never adapted.
        description: the description of the model. Its ``part`` selects what is exported.
        file_format: "safetensors": the state dict of the SAM that the model was made from, under
            the names of its original code. "huggingface": the same as a folder that the
            transformers library loads. "onnx", "torch-export": a graph that maps images to the
            class map, or to what the image encoder returns. It accepts one image size and batch
            sizes up to ``MOST_IMAGES``. "openvino": the same. "tensorrt": the same as ONNX with
            operators that ``trtexec`` reads. "coreml": the same for one image.
        path: the file; its suffix must be that of the format. For "huggingface" the folder, new or
            empty.
        quantize: "int8": linear layers and convolutions of an ONNX or OpenVINO graph compute with
            8 bits, in ranges that are measured on ``images``. "float16": weights are stored in 16
            bits, and computed with as float32. None keeps float32.
        images: batches of images in [0, 1] as the model sees them, for "int8".

    Raises:
        UserError: the model has adapters, the format cannot store the model, the suffix is wrong,
            the folder is not empty, or a package is missing.
    """
    check_merged(model)
    if file_format != "huggingface" and path.suffix != SUFFIXES[file_format]:
        raise UserError(f"{path} must end in {SUFFIXES[file_format]} for format {file_format}")
    if quantize and file_format not in QUANTIZED:
        raise UserError(f"--quantize takes the formats {' and '.join(QUANTIZED)}")
    if quantize == "int8" and not images:
        raise UserError("int8 needs images to measure the ranges of the numbers on")
    if file_format in ("huggingface", "safetensors"):
        _write_tensors(model, description, file_format, path)
        return
    if description.part == "model" and isinstance(model, PromptableSam):
        raise UserError(
            "the model takes prompts, and a graph of it would take none; export it to safetensors "
            "or huggingface, or its --part encoder"
        )
    if model.family.fuses:  # its traced forward has an operator that other runtimes fuse
        fuse_attention(model.image_encoder)
    module: nn.Module = (Scores if description.part == "model" else Embedding)(
        model.cpu().float()
    ).eval()
    fixed, size = file_format == "coreml", description.image_size  # Core ML compiles for one shape
    example = torch.zeros(1 if fixed else EXAMPLE_IMAGES, len(model.pixel_mean), size, size)
    free = {} if fixed else {0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)}
    with torch.no_grad():
        module(example)  # fills TinyViT's cache of attention biases, which must not be traced
        program = torch.export.export(module, (example,), dynamic_shapes={"images": free})
    if file_format == "torch-export":
        _write_program(program, description, path)
        return
    outputs = ["scores"]
    if description.part == "encoder":
        further = range(1, len(program.graph_signature.user_outputs))
        outputs = ["embedding", *(f"features_{i}" for i in further)]
    if file_format == "openvino":
        _write_openvino(program, description, path, outputs, quantize, images)
    elif file_format == "coreml":
        _write_coreml(program, description, path, outputs)
    else:
        old = file_format == "tensorrt"
        write_onnx(program, description, path, ["images"], outputs, old, quantize, images)


def check_merged(model: nn.Module) -> None:
    """Refuses a model with adapters."""
    if adapted := next(adapter_layers(model), None):
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
    classes = () if isinstance(model, PromptableSam) else (model.num_classes,)
    with torch.device("meta"):
        plain: Any = type(model)(model.name, model.image_size, *classes)
    metadata = {KEY: text_of(description)}
    extra = sorted(model.state_dict().keys() - plain.state_dict().keys())
    if extra:
        raise UserError(
            f"{model.family.title} has no {extra[0]}: merge with mode center or calibrated, or "
            "export to onnx or torch-export"
        )
    if not folder:
        write_tensors(path, sam_state_dict(model), metadata)
        return
    config, tensors = huggingface_files(model)
    with replaced_folder(path) as temporary:
        write_tensors(temporary / WEIGHTS, tensors, {"format": "pt", **metadata})
        write_text(temporary / CONFIG, json.dumps(config, indent=2) + "\n")


def write_onnx(
    program: ExportedProgram,
    description: Description,
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    old: bool = False,
    quantize: Quantize | None = None,
    images: Sequence[Tensor] = (),
) -> None:
    """Writes a program to an ONNX file, as ``export``; in ``OLD_VERSIONS`` or PyTorch's own."""
    onnx, _ = imported("export", "onnx", "onnxscript")  # the second for torch.onnx.export
    with quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            opset_version=OLD_VERSIONS[0] if old else None,
        )
    assert converted is not None  # it is None without dynamo only
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    # NAME.onnx contains the name of NAME.onnx.data, so both get their names in another folder.
    with replaced_file(path) as temporary, TemporaryDirectory(dir=path.parent) as folder:
        graph, data = Path(folder, path.name), Path(folder, f"{path.name}.data")
        converted.save(graph, external_data=size > MOST_BYTES)
        if quantize:
            with quiet():
                compress_onnx(graph, quantize, images)
        model = onnx.load(graph, load_external_data=False)
        if old:
            model.ir_version = OLD_VERSIONS[1]
        model.metadata_props.add(key=KEY, value=text_of(description))
        model.metadata_props.add(key=CHECKSUM, value=onnx_checksum(model, data))
        onnx.save(model, temporary)
        if data.exists():
            os.replace(data, path.with_name(data.name))


def onnx_checksum(model: Any, data: Path) -> str:
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


def _write_program(program: ExportedProgram, description: Description, path: Path) -> None:
    buffer = io.BytesIO()  # torch.export.save refuses the temporary file's suffix
    with quiet():
        torch.export.save(program, buffer, extra_files={KEY: text_of(description)})
    with replaced_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _write_openvino(
    program: ExportedProgram,
    description: Description,
    path: Path,
    outputs: Sequence[str],
    quantize: Quantize | None,
    images: Sequence[Tensor],
) -> None:
    (openvino,) = imported("openvino", "openvino")
    shape = program.example_inputs[0][0].shape  # type: ignore[index]
    with quiet():
        model = openvino.convert_model(program, input=[-1, *shape[1:]])
        if quantize == "int8":
            model = quantized_openvino(model, images)
    for output, name in zip(model.outputs, outputs, strict=True):
        output.get_tensor().set_names({name})
    model.set_rt_info(text_of(description), [KEY, "description"])
    # NAME.xml is read with the NAME.bin beside it, so both get their names in another folder.
    with replaced_file(path) as temporary, TemporaryDirectory(dir=path.parent) as folder:
        graph, data = Path(folder, path.name), Path(folder, f"{path.stem}.bin")
        for known in (False, True):  # the weights' checksum, after they are written once
            model.set_rt_info(file_checksum(data) if known else "", [KEY, CHECKSUM])
            openvino.save_model(model, graph, compress_to_fp16=quantize == "float16")
        os.replace(data, path.with_name(data.name))
        os.replace(graph, temporary)


def _write_coreml(
    program: ExportedProgram, description: Description, path: Path, outputs: Sequence[str]
) -> None:
    """Writes a package, which is a folder, with weights in 16 bits."""
    check_new(path)
    with quiet():
        (coremltools,) = imported("coreml", "coremltools")
        model = coremltools.convert(
            program.run_decompositions({}),
            outputs=[coremltools.TensorType(name=name) for name in outputs],
            minimum_deployment_target=coremltools.target.iOS17,
        )
        model.user_defined_metadata[KEY] = text_of(description)
        with replaced_folder(path) as folder, TemporaryDirectory() as other:
            model.save(str(Path(other, path.name)))
            shutil.copytree(Path(other, path.name), folder, dirs_exist_ok=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides progress and the warnings of other packages, some of which hold tracebacks."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
