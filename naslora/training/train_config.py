"""How to train: the schedule of the two stages, optimizers, precision."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, cast

import msgspec
import torch

from naslora.adapter.layer.alpha_search import CELL_RATE
from naslora.choices import Augment, ClassLoss, Precision
from naslora.data.masks import IGNORED
from naslora.results import Keep
from naslora.sam.losses import SegmentationLoss, parse_terms
from naslora.settings import Common, Count, Index, Rate, Settings

Schedule = Literal["linear", "cosine", "constant"]
Optimizer = Literal["adam", "adamw"]
ArchData = Literal["redraw", "rotate", "hold-out", "split"]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Part = Annotated[float, msgspec.Meta(ge=0, le=0.5)]
if TYPE_CHECKING:
    LearningRate = float  # once it is resolved
else:
    LearningRate = Rate | None

LEARNING_TRAVEL = 0.2
"""What the weights' rates of all steps add up to, if no rate is given: about how far Adam moves a
weight whose gradient keeps its sign."""
LEARNING_BOUNDS = 1e-4, 2e-3
"""Of the rate that is fitted so."""
PROMPTABLE_BOUNDS = 1e-4, 3e-4
"""The same with `--task promptable`, whose decoder starts as SAM's and not from a part of it."""
WARMUP_START = 0.01
"""Share of its rate at which a warm-up starts."""


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How to train: schedule of the two stages, optimizers, precision."""

    epochs: Common[Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]] = 30
    """Epochs over the training split."""
    steps: Count | None = None
    """Weight steps in all, in place of `epochs`: as many epochs as come nearest, at least one. So a
    small set trains as long as a large one."""
    search_start: Index | None = None
    """First epoch (T1, counted from 0) that also updates alpha. None begins after a third of the
    epochs, as the paper does."""
    simultaneous: bool = False
    """Ablation: update weights and alpha together, on the training split, from epoch 0."""
    arch_data: ArchData | None = None
    """Images of the alpha steps: `redraw`, a part of the training images drawn anew each epoch;
    `rotate`, the same, but that epoch's weight steps leave it out; `hold-out`, a fixed part that
    the weights never see; `split`, the data's own `arch` split. None is `split` if the data has
    one, else `redraw`. An epoch has equally many weight steps with each of them."""
    arch_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.2
    """Size of that part, as a share of the training images."""
    batch_size: Common[Count] = 4
    """Images per optimizer step, over all processes."""
    accumulation: Count = 1
    """Forward passes over which a process spreads its share of a batch."""
    optimizer: Optimizer = "adamw"
    """Optimizer of the weights and of alpha: `adamw` with decoupled weight decay, or `adam`, which
    adds the decay to the gradients."""
    learning_rate: Common[LearningRate] = None  # type: ignore[assignment]
    """Learning rate of the weights at the start of the schedule. None fits it to the number of
    steps: the rates of all steps add up to 0.2, but it is at least 1e-4 and at most 2e-3, with
    `--task promptable` at most 3e-4."""
    weight_decay: Rate = 1e-4
    """Weight decay of the weights, without the cell's."""
    cell_rate: Rate = CELL_RATE
    """Learning rate of the cell's weights, as a multiple of the other weights'."""
    cell_weight_decay: Rate = 0.0
    """Weight decay of the cell's weights."""
    schedule: Schedule = "linear"
    """How the rates fall: to zero at the end of training, or not at all (`constant`)."""
    warmup: Part = 0.1
    """Share of all weight steps, at most 0.5, over which the weights' rates rise from near zero.
    The schedule follows."""
    ema: Part = 0.0
    """Average the weights exponentially (EMA), over about this share of all weight steps, at most
    0.5. The averages are validated, kept and tested. Alpha and the statistics of batch norms are
    not averaged. 0 takes the weights of the last step."""
    alpha_learning_rate: Rate | None = None
    """Rate of alpha at the start of training. None fits it to the number of alpha steps, so that
    small sets search too: the rates of all steps add up to 12, but it is at least 3e-4 (the
    paper's) and at most 0.3."""
    alpha_schedule: Schedule | None = None
    """How alpha's rate falls. None takes `schedule`."""
    alpha_weight_decay: Rate = 0.0
    """Weight decay of alpha."""
    keep: Keep = "last"
    """The epoch whose weights the run keeps: the `last` one, or the one that is `best` on the
    validation images. On few images the best is luck."""
    patience: Index = 0
    """Stop after so many epochs without a higher validation Dice. Epochs before the search do not
    count. Needs `keep` `best`. 0 trains all epochs."""
    anneal_epochs: Index = 0
    """Number of last epochs that anneal the cell to its pointwise part, so that merging with
    `center` is exact. The share of the neighbours falls over the first half of them and is zero
    in the second. 0 keeps the whole cell."""
    clip_norm: Rate = 1.0
    """Largest norm of the weights' gradients; 0 does not clip."""
    class_loss: ClassLoss = "matching"
    """Loss of several classes: at every `pixel`, or by `matching` mask tokens to classes."""
    loss: str = "bce,dice"
    """Terms of the loss of masks with their weights, such as `bce=1,dice=1,cldice=0.5`: `bce`,
    `dice`, `focal`, `tversky`, `focal_tversky`, `lovasz`, `structure`, `cldice`. docs/losses.md
    says what they are for."""
    class_weights: Literal["auto"] | tuple[float, ...] | None = None
    """What each class weighs in the loss, the background first: a number for each, or `auto`, which
    lets classes weigh more the rarer they are in the training masks. None weighs all alike."""
    lambda_seg: Rate = 1.0
    """Weight of the loss of masks."""
    lambda_cls: Rate = 1.0
    """Weight of the classification loss."""
    boundary_weight: Rate = 0.0
    """How much more pixels at the boundary of a mask weigh in BCE and Dice, at most: 5 in the
    structure loss of F3Net and PraNet. 0 weighs all pixels alike."""
    flip: bool = True
    """Mirror half of the training images, left to right, unless `augment` is `none`."""
    augment: Augment = "flip"
    """Random changes of the training images: `none`; `flip`, only the mirroring; `dihedral`, also
    quarter turns; `medical`, also small rotations, shifts, brightness, contrast and blur;
    `natural`, also other excerpts and colours. docs/data.md lists them."""
    mixed_precision: Precision | None = None
    """Autocast precision. None takes that of `accelerate launch`, or else `bf16` if the machine has
    no GPU and its CPU multiplies in it, or else `no`."""
    frozen_precision: Precision | None = None
    """Precision in which the encoder's frozen weights are kept while training: 16 bits take half
    the memory and are not cast in every step. None takes `mixed_precision`, `no` is float32. A
    finished run is scored and merged with the weights in float32."""
    gradient_checkpointing: bool = False
    """Recompute the encoder's blocks in the backward: less memory, about a third more time."""
    compile: bool = False
    """Compile forward, loss and backward with torch.compile, for batches of the full size. It takes
    minutes and pays on a GPU, where they also become CUDA graphs unless `accumulation` is used.
    What does not compile runs as without it."""
    workers: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 2
    """Number of data loading processes."""


def first_search_epoch(config: TrainConfig) -> int:
    """The first epoch that also updates alpha, counted from 0."""
    return config.epochs // 3 if config.search_start is None else config.search_start


def factor(schedule: Schedule, done: float, warmup: float = 0.0) -> float:
    """What a rate is multiplied by after the share ``done`` of all steps, in [0, 1].

    It rises over the share ``warmup``, then falls as ``schedule`` says.
    """
    if done < warmup:
        return WARMUP_START + (1 - WARMUP_START) * done / warmup
    done = (done - warmup) / (1 - warmup)
    if schedule == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1.0


def fitted_rate(travel: float, factors: Iterable[float], low: float, high: float) -> float:
    """The rate with which the rates of all steps add up to ``travel``, or the nearer bound.

    ``factors`` are what the rate is multiplied by in each step. Without steps it is ``high``.
    """
    total = sum(factors)
    return min(max(low, travel / total if total else high), high)


def fit_to_images(
    config: TrainConfig, images: int, bounds: tuple[float, float] = LEARNING_BOUNDS
) -> TrainConfig:
    """Turns ``steps`` into epochs, and fits the learning rate within bounds if it is None."""
    own, rate, epochs = -(-images // config.batch_size), config.learning_rate, config.epochs
    if config.steps is not None:
        epochs = max(1, round(config.steps / own))
    if rate is None:
        steps = epochs * own
        factors = (factor(config.schedule, step / steps, config.warmup) for step in range(steps))
        rate = fitted_rate(LEARNING_TRAVEL, factors, *bounds)
    return replace(config, epochs=epochs, steps=None, learning_rate=rate)


def loss_of(config: TrainConfig) -> SegmentationLoss:
    """The loss of a run. Pixels with the label ``IGNORED`` do not count."""
    return SegmentationLoss(
        class_loss=config.class_loss,
        lambda_seg=config.lambda_seg,
        lambda_cls=config.lambda_cls,
        ignore_index=IGNORED,
        boundary_weight=config.boundary_weight,
        terms=parse_terms(config.loss),
        class_weights=cast(tuple[float, ...] | None, config.class_weights),  # once it is resolved
    )


def frozen_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of the encoder's frozen weights while training."""
    return DTYPES[config.frozen_precision or config.mixed_precision or "no"]
