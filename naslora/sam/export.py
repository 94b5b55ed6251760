"""Export of merged models to SAM state dicts, ONNX and torch.export, and their prediction.

Each file contains a ``Description`` of its model, so that it needs no other file to predict.
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

from naslora.adapter.modules import adapter_layers
from naslora.errors import UserError
from naslora.files import replaced_file
from naslora.sam.checkpoint import sam_state_dict
from naslora.sam.segmentation import SamForSegmentation, build_model, labels_of

# ---- What a file contains ------------------------------------------------------------------------

Format = Literal["onnx", "safetensors", "torch-export"]
Part = Literal["model", "encoder"]
SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torch-export": ".pt2"}
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
    """One of ``naslora.sam.encoders.MODELS``."""
    image_size: int
    """Side S of the images in pixels."""
    num_classes: int
    """1 if binary, else K."""
    class_names: tuple[str, ...]
    """Names of the foreground classes."""
    part: Part = "model"
    """The whole model, which maps images to the class map, or only the image encoder."""

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
            values = json.loads(text or "")
            return cls(**values | {"class_names": tuple(values["class_names"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} was not written by naslora export") from error


class Scores(nn.Module):
    """Maps (B, 3, S, S) images in [0, 1] to the class map, (B, K, S, S)."""

    def __init__(self, model: SamForSegmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).class_map()


class Embedding(nn.Module):
    """Maps (B, 3, S, S) images in [0, 1] to the image embedding, (B, 256, S/16, S/16)."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: SamForSegmentation) -> None:
        super().__init__()
        self.encoder = model.image_encoder
        self.register_buffer("pixel_mean", model.pixel_mean)
        self.register_buffer("pixel_std", model.pixel_std)

    def forward(self, images: Tensor) -> Tensor:
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
        file_format: "safetensors": the state dict of the SAM, or MobileSAM, that the model was
            made from. "onnx", "torch-export": a graph that maps images to the class map, or to the
            image embedding. It accepts one image size and
            batch sizes up to ``MOST_IMAGES``.
        path: the file; its suffix must be that of the format.

    Raises:
        UserError: the model has adapters, the format cannot store the model, the suffix is wrong,
            or a package is missing.
    """
    if file_format not in get_args(Format):
        names = ", ".join(get_args(Format))
        raise UserError(f"format must be one of {names}, got {file_format!r}")
    adapted = next(adapter_layers(model), None)
    if adapted is not None:
        raise UserError(f"the model is not merged: {adapted[0]} has an adapter; merge it first")
    if path.suffix != SUFFIXES[file_format]:
        raise UserError(f"{path} must end in {SUFFIXES[file_format]} for format {file_format}")
    if file_format == "safetensors":
        _write_state_dict(model, description, path)
        return
    module = (Scores if description.part == "model" else Embedding)(model.cpu().float()).eval()
    with torch.no_grad():
        program = _traced(module, description.image_size)
        (_write_onnx if file_format == "onnx" else _write_program)(program, description, path)


def _write_state_dict(model: SamForSegmentation, description: Description, path: Path) -> None:
    if description.part == "encoder":
        raise UserError("a SAM state dict contains the whole model; export the part 'model'")
    _check_layers(model, description)
    state = sam_state_dict(model.state_dict(), model.left_out, description.model)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with replaced_file(path) as temporary:
        save_file(tensors, temporary, metadata={KEY: description.to_json()})


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
            output_names=["scores" if description.part == "model" else "embedding"],
        )
    assert converted is not None  # it is None without dynamo only
    converted.model.metadata_props[KEY] = description.to_json()
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if size > MOST_BYTES:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not atomic: NAME.onnx contains the name of NAME.onnx.data, so neither can be renamed.
        converted.save(path, external_data=True)
        return
    with replaced_file(path) as temporary:
        converted.save(temporary, external_data=False)


def _write_program(
    program: torch.export.ExportedProgram, description: Description, path: Path
) -> None:
    buffer = io.BytesIO()  # torch.export.save refuses the temporary file's suffix
    torch.export.save(program, buffer, extra_files={KEY: description.to_json()})
    with replaced_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporter's progress and the deprecation warnings of other packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ---- Prediction ----------------------------------------------------------------------------------

Predict = Callable[[Tensor], Tensor]
"""Maps (B, 3, S, S) images in [0, 1] to (B, S, S) labels, both on the CPU."""
_ClassMap = Callable[[Tensor], Tensor]
"""Maps the same images to the (B, K, S, S) class map."""


def load_exported(path: Path) -> tuple[Predict, Description]:
    """Loads a file that ``export`` wrote, for prediction on the CPU.

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

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        return labels_of(class_map(images))

    return predict, description


def _load_onnx(path: Path) -> tuple[_ClassMap, Description]:
    try:  # an optional package
        import onnxruntime
    except ImportError as error:
        raise UserError(
            "predicting with ONNX needs onnxruntime; run pip install 'naslora[export]'"
        ) from error
    session: Any = _read(path, lambda: onnxruntime.InferenceSession(str(path)))
    metadata = session.get_modelmeta().custom_metadata_map

    def class_map(images: Tensor) -> Tensor:
        (result,) = session.run(None, {"images": np.ascontiguousarray(images.numpy())})
        return torch.from_numpy(result)

    return class_map, Description.from_json(metadata.get(KEY), path)


def _load_program(path: Path) -> tuple[_ClassMap, Description]:
    extra = {KEY: ""}
    program: Any = _read(path, lambda: torch.export.load(path, extra_files=extra))
    return program.module(), Description.from_json(extra[KEY], path)


def _load_state_dict(path: Path) -> tuple[_ClassMap, Description]:
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
    except Exception as error:  # the libraries of the formats raise exceptions of many types
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is damaged or has another format: {reason}") from error
