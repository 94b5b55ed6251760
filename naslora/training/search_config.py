"""How to train: the schedule of the two stages, optimizers, precision."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from naslora.errors import UserError
from naslora.sam.losses import ClassLoss, segmentation_loss
from naslora.sam.segmentation import SegmentationOutput

Schedule = Literal["linear", "cosine", "constant"]


Optimizer = Literal["adam", "adamw"]


Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class SearchConfig:
    """How to train: schedule of the two stages, optimizers, precision."""

    epochs: int = 30
    """Epochs over the training split."""
    search_start: int = 10
    """First epoch (T1, counted from 0) that also updates alpha."""
    simultaneous: bool = False
    """Ablation: update weights and alpha together, on the training split, from epoch 0."""
    arch_fraction: float = 0.2
    """Share of the training images held out for alpha, if the data has no `arch` split. With 0 the
    alpha steps use the training images."""
    batch_size: int = 4
    """Images per optimizer step, over all processes."""
    accumulation: int = 1
    """Forward passes over which a process spreads its share of a batch."""
    optimizer: Optimizer = "adam"
    """Optimizer of the weights: `adam`, or `adamw` with decoupled weight decay."""
    learning_rate: float = 1e-4
    """Learning rate of the weights at the start."""
    weight_decay: float = 1e-4
    """Weight decay of the weights."""
    schedule: Schedule = "linear"
    """How the rate of the weights falls: to zero at the end, or not at all (`constant`)."""
    alpha_learning_rate: float | None = None
    """Adam's constant rate for alpha. None fits it to the number of alpha steps, so that small sets
    search too: 2 / steps, but at least 3e-4 (the paper's) and at most 0.1."""
    alpha_weight_decay: float = 1e-3
    """Adam's weight decay of alpha."""
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
    """Mirror half of the training images, left to right."""
    mixed_precision: Precision = "no"
    """Autocast precision."""
    gradient_checkpointing: bool = False
    """Recompute the encoder's blocks in the backward: less memory, about a third more time."""
    workers: int = 2
    """Number of data loading processes."""

    def __post_init__(self) -> None:
        for name, minimum in (
            ("epochs", 1),
            ("search_start", 0),
            ("workers", 0),
            ("anneal_epochs", 0),
        ):
            if getattr(self, name) < minimum:
                raise UserError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if self.anneal_epochs > self.epochs:
            raise UserError(
                f"anneal_epochs must be at most epochs, {self.epochs}, got {self.anneal_epochs}"
            )
        if self.batch_size < 1 or self.accumulation < 1:
            raise UserError("batch_size and accumulation must be at least 1")
        if not 0 <= self.arch_fraction < 1:
            raise UserError(f"arch_fraction must lie in [0, 1), got {self.arch_fraction}")
        for name in (
            "learning_rate",
            "weight_decay",
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
            ("class_loss", ClassLoss),
            ("mixed_precision", Precision),
        ):
            if getattr(self, name) not in get_args(choices):
                raise UserError(
                    f"{name} must be one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}"
                )

    def loss(self, output: SegmentationOutput, target: Tensor) -> Tensor:
        """The loss of a batch, as ``segmentation_loss``."""
        return segmentation_loss(output, target, self.class_loss, self.lambda_seg, self.lambda_cls)
