"""How to train: the schedule of the two stages, optimizers, precision."""

import math
import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from naslora.adapter.alpha_search import CELL_RATE
from naslora.adapter.checks import check_types
from naslora.data.augmentation import Augment
from naslora.data.masks import IGNORED
from naslora.errors import UserError
from naslora.results import Keep
from naslora.sam.losses import ClassLoss, segmentation_loss
from naslora.sam.segmentation import SegmentationOutput

Schedule = Literal["linear", "cosine", "constant"]


Optimizer = Literal["adam", "adamw"]


ArchData = Literal["redraw", "rotate", "hold-out", "split"]


Precision = Literal["no", "bf16", "fp16"]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MOST_EPOCHS, MOST_WORKERS = 1_000_000, 1024
"""Greater numbers are mistakes, and would exhaust the memory before the first step."""


def default_precision() -> str:
    """The precision of a run that is not given one: see ``TrainConfig.mixed_precision``."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if launched:
        return launched
    fast = not torch.accelerator.is_available() and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "no"


@dataclass(frozen=True)
class TrainConfig:
    """How to train: schedule of the two stages, optimizers, precision."""

    epochs: int = 30
    """Epochs over the training split."""
    search_start: int | None = None
    """First epoch (T1, counted from 0) that also updates alpha. None begins after a third of the
    epochs, as the paper does."""
    simultaneous: bool = False
    """Ablation: update weights and alpha together, on the training split, from epoch 0."""
    arch_data: ArchData | None = None
    """Images of the alpha steps: `redraw`, a part of the training images drawn anew each epoch;
    `rotate`, the same, but that epoch's weight steps leave it out; `hold-out`, a fixed part that
    the weights never see; `split`, the data's own `arch` split. None is `split` if the data has
    one, else `redraw`. An epoch has equally many weight steps with each of them."""
    arch_fraction: float = 0.2
    """Size of that part, as a share of the training images."""
    batch_size: int = 4
    """Images per optimizer step, over all processes."""
    accumulation: int = 1
    """Forward passes over which a process spreads its share of a batch."""
    optimizer: Optimizer = "adamw"
    """Optimizer of the weights and of alpha: `adamw` with decoupled weight decay, or `adam`, which
    adds the decay to the gradients."""
    learning_rate: float = 1e-4
    """Learning rate of the weights at the start."""
    weight_decay: float = 1e-4
    """Weight decay of the weights, without the cell's."""
    cell_rate: float = CELL_RATE
    """Learning rate of the cell's weights, as a multiple of the other weights'."""
    cell_weight_decay: float = 0.0
    """Weight decay of the cell's weights."""
    schedule: Schedule = "linear"
    """How the rates fall: to zero at the end of training, or not at all (`constant`)."""
    alpha_learning_rate: float | None = None
    """Rate of alpha at the start of training. None fits it to the number of alpha steps, so that
    small sets search too: the rates of all steps add up to 12, but it is at least 3e-4 (the
    paper's) and at most 0.3."""
    alpha_schedule: Schedule | None = None
    """How alpha's rate falls. None takes `schedule`."""
    alpha_weight_decay: float = 0.0
    """Weight decay of alpha."""
    keep: Keep = "last"
    """The epoch whose weights the run keeps: the `last` one, or the one that is `best` on the
    validation images. On few images the best is luck."""
    anneal_epochs: int = 0
    """Number of last epochs that anneal the cell to its pointwise part, so that merging with
    `center` is exact. The share of the neighbours falls over the first half of them and is zero
    in the second. 0 keeps the whole cell."""
    clip_norm: float = 1.0
    """Largest norm of the weights' gradients; 0 does not clip."""
    class_loss: ClassLoss = "matching"
    """Loss of several classes: at every `pixel`, or by `matching` mask tokens to classes."""
    lambda_seg: float = 1.0
    """Weight of BCE + Dice."""
    lambda_cls: float = 1.0
    """Weight of the classification loss."""
    flip: bool = True
    """Mirror half of the training images, left to right, unless `augment` is `none`."""
    augment: Augment = "flip"
    """Random changes of the training images: `none`; `flip`, only the mirroring; `medical`, also
    small rotations, shifts, brightness, contrast and blur; `natural`, also other excerpts and
    colours. docs/data.md lists them."""
    mixed_precision: Precision | None = None
    """Autocast precision. None takes that of `accelerate launch`, or else `bf16` if the machine has
    no GPU and its CPU multiplies in it, or else `no`."""
    frozen_precision: Precision | None = None
    """Precision in which the encoder's frozen weights are kept while training: 16 bits take half
    the memory and are not cast in every step. None takes `mixed_precision`, `no` is float32. A
    finished run is scored and merged with the weights in float32."""
    gradient_checkpointing: bool = False
    """Recompute the encoder's blocks in the backward: less memory, about a third more time."""
    workers: int = 2
    """Number of data loading processes."""

    def __post_init__(self) -> None:
        if self.mixed_precision is None:
            object.__setattr__(self, "mixed_precision", default_precision())
        for name, minimum in (
            ("epochs", 1),
            ("search_start", 0),
            ("workers", 0),
            ("anneal_epochs", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UserError(f"{name} must be at least {minimum}, got {value}")
        for name, maximum in (("epochs", MOST_EPOCHS), ("workers", MOST_WORKERS)):
            if getattr(self, name) > maximum:
                raise UserError(f"{name} must be at most {maximum}, got {getattr(self, name)}")
        if self.anneal_epochs > self.epochs:
            raise UserError(
                f"anneal_epochs must be at most epochs, {self.epochs}, got {self.anneal_epochs}"
            )
        if self.batch_size < 1 or self.accumulation < 1:
            raise UserError("batch_size and accumulation must be at least 1")
        self._check_arch_data()
        for name in (
            "learning_rate",
            "weight_decay",
            "cell_rate",
            "cell_weight_decay",
            "alpha_learning_rate",
            "alpha_weight_decay",
            "clip_norm",
            "lambda_seg",
            "lambda_cls",
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} must be finite and not negative, got {value}")
        for name, choices in (
            ("optimizer", Optimizer),
            ("schedule", Schedule),
            ("alpha_schedule", Schedule),
            ("arch_data", ArchData),
            ("keep", Keep),
            ("class_loss", ClassLoss),
            ("augment", Augment),
            ("mixed_precision", Precision),
            ("frozen_precision", Precision),
        ):
            optional = name in ("alpha_schedule", "arch_data", "frozen_precision")
            allowed = (*get_args(choices), None) if optional else get_args(choices)
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} must be one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.frozen_precision not in (None, "no", self.mixed_precision):
            raise UserError(
                f"frozen_precision {self.frozen_precision} needs mixed_precision "
                f"{self.frozen_precision}, got {self.mixed_precision}"
            )

    def _check_arch_data(self) -> None:
        if not 0 < self.arch_fraction <= 1:
            raise UserError(f"arch_fraction must lie in (0, 1], got {self.arch_fraction}")
        if self.arch_fraction == 1 and self.arch_data in ("rotate", "hold-out"):
            raise UserError(
                f"arch_fraction 1 leaves no images for the weights with arch_data {self.arch_data}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The configuration that a run's file holds.

        Earlier versions had fewer settings. Those that a file lacks get the values that they used.

        Raises:
            UserError: a field is out of range.
            TypeError: a field is unknown.
        """
        if not isinstance(values, dict):
            raise TypeError(f"search must be a dictionary, got {values!r}")
        if "arch_data" not in values:
            fraction = values.get("arch_fraction", 0.2)
            values = {
                "arch_data": "hold-out" if fraction else "redraw",
                "optimizer": "adam",
                "cell_rate": 1.0,
                "cell_weight_decay": values.get("weight_decay", 1e-4),
                "alpha_schedule": "constant",
                "alpha_weight_decay": 1e-3,
                **values,
                "arch_fraction": fraction or 1.0,
            }
        values = {"mixed_precision": "no", "keep": "best", **values}
        if values["mixed_precision"] != "no":
            values = {"frozen_precision": "no", **values}
        check_types(cls, values)
        return cls(**values)

    @property
    def first_search_epoch(self) -> int:
        """The first epoch that also updates alpha, counted from 0."""
        return self.epochs // 3 if self.search_start is None else self.search_start

    @property
    def mirrors(self) -> bool:
        """Whether half of the training images are mirrored."""
        return self.flip and self.augment != "none"

    @property
    def frozen_dtype(self) -> torch.dtype:
        """The dtype of the encoder's frozen weights while training."""
        return DTYPES[self.frozen_precision or self.mixed_precision or "no"]

    def factor(self, schedule: Schedule, done: float) -> float:
        """What a rate is multiplied by after the share ``done`` of all epochs, in [0, 1]."""
        if schedule == "linear":
            return 1 - done
        return (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1.0

    def loss(self, output: SegmentationOutput, target: Tensor) -> Tensor:
        """The loss of a batch, as ``segmentation_loss``; pixels with the label ``IGNORED`` do not
        count."""
        return segmentation_loss(
            output, target, self.class_loss, self.lambda_seg, self.lambda_cls, IGNORED
        )
