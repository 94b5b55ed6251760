"""Graphs in fewer bits: int8 by NNCF and by onnxruntime, weights in float16."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from naslora.choices import Quantize
from naslora.errors import imported

QUANTIZED = "onnx", "openvino"
"""The formats that take fewer bits."""
SMALLEST_WEIGHT = 1024
"""Tensors of fewer numbers stay in float32: biases and the like."""


def quantized_openvino(model: Any, images: Sequence[Tensor]) -> Any:
    """An ``openvino.Model`` whose linear layers and convolutions compute with 8 bits.

    The ranges are measured on batches of (B, C, S, S) images.
    """
    (nncf,) = imported("openvino", "nncf")
    singles = [image[None].numpy() for batch in images for image in batch]
    return nncf.quantize(
        model,
        nncf.Dataset(singles),
        subset_size=len(singles),
        preset=nncf.QuantizationPreset.MIXED,  # activations of SAM are not symmetric
        model_type=nncf.ModelType.TRANSFORMER,
    )


def compress_onnx(path: Path, quantize: Quantize, images: Sequence[Tensor]) -> None:
    """Changes an ONNX file, whose weights are inside it: to int8, or its weights to float16."""
    if quantize == "float16":
        _store_in_float16(path)
        return
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):
        rest = iter([{"images": image[None].numpy()} for batch in images for image in batch])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    quant_pre_process(path, path, skip_symbolic_shape=True)
    quantization.quantize_static(
        path,
        path,
        Images(),
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},  # attention itself stays in float32
    )


def _store_in_float16(path: Path) -> None:
    """Stores weights in 16 bits. A cast gives each its name; runtimes compute it once."""
    import onnx

    model = onnx.load(path)
    casts = []
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size >= SMALLEST_WEIGHT:
            name, own = tensor.name, f"{tensor.name}_float16"
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), own))
            casts.append(onnx.helper.make_node("Cast", [own], [name], to=onnx.TensorProto.FLOAT))
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(casts + rest)
    onnx.save(model, path)
