"""Choices and defaults of the command line, apart from the heavy modules that they are for.

So the help imports none of those modules.
"""

from typing import Literal

AblationName = Literal["operations", "rank", "blocks", "alpha-start", "channel-ratio"]
Augment = Literal["none", "flip", "dihedral", "medical", "natural"]
"""Which changes training images get. docs/data.md lists them with their strengths."""
ClassLoss = Literal["pixel", "matching"]
Tool = Literal["x-anylabeling", "samexporter"]
"""Annotation tools that read a model as two ONNX graphs."""
Format = (
    Literal["onnx", "openvino", "tensorrt", "coreml", "safetensors", "torch-export", "huggingface"]
    | Tool
)
Quantize = Literal["int8", "float16"]
Launcher = Literal["local", "slurm", "ray"]
Part = Literal["model", "encoder"]
Precision = Literal["no", "bf16", "fp16"]
ObjectSource = Literal["components", "numbers"]
Task = Literal["semantic", "promptable"]
TileSize = Literal["auto"] | int
Tracker = Literal["tensorboard", "wandb", "mlflow", "comet"]

CALIBRATION_IMAGES = 16
"""Number of training images that merging with ``calibrated`` is fitted to."""
MAX_LOSS = 0.005
"""Dice that an export to int8 may lose on validation images."""
DEMO_EPOCHS = 8
"""They take less than four minutes on two cores."""
OVERLAP = 0.25
"""Share of a tile's side that neighbours have in common at least."""
