"""What a run leaves behind: the names of its files, and the types of their records.

``records.py`` reads and writes them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from naslora.adapter.merging.report import LayerError
from naslora.errors import UserError
from naslora.files import file_checksum
from naslora.records import OPTIONAL, UNSTORED, read_record, read_rows

# The files of a run's folder.
CONFIG = "config.json"
DATA = "data.json"
ADAPTER = "adapter"
"""Folder of the kept epoch's adapter, as ``save_adapter`` writes it."""
LAST = "last.pt"
"""Everything that ``--resume`` needs."""
HISTORY = "history.csv"
OPERATIONS_JSON = "operations.json"
TEST_IMAGES = "test_images.csv"
METRICS_JSON = "metrics.json"
REPORT = "report.html"

Keep = Literal["last", "best"]
"""The epoch that a run keeps."""

CLICKS = (1, 3, 5, 8)
"""Numbers of clicks whose scores a promptable run reports."""
CLICK_SCORES = (*(f"IoU, {n} click{'s' if n > 1 else ''}" for n in CLICKS), "IoU, box")
"""Its scores in the tables of a study."""

MetricValue = float | None | dict[str, float | None]
"""A metric's number; None where it is undefined; for a metric of classes, one number a class."""


# ---- An epoch ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epoch:
    """One epoch of training: a row of history.csv."""

    epoch: int
    """Counted from 1."""
    stage: int
    """1 while only the weights train, 2 once alpha trains as well."""
    spatial: float
    """Share in [0, 1] that the cell takes from neighbouring tokens; below 1 only in annealing."""
    train_loss: float
    arch_loss: float | None
    """Mean loss of the architecture steps; None in an epoch without any."""
    val_loss: float
    val_dice: float | None
    """In [0, 1], like the other scores; None if no validation image has a score."""
    val_iou: float | None
    val_accuracy: float | None
    learning_rate: float
    """Rate of the weights at the start of the epoch."""
    entropy: float | None
    """Entropy of softmax(alpha) in nats, mean over the layers; None without alpha."""
    seconds_weights: float
    seconds_architecture: float
    seconds_evaluation: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole epoch."""
        return self.seconds_weights + self.seconds_architecture + self.seconds_evaluation


@dataclass(frozen=True)
class Mixture:
    """The state of the search after an epoch."""

    epoch: int
    """0 is the state before training."""
    softmax: list[list[float]]
    """softmax(alpha): one list a layer, one weight an operation."""


@dataclass(frozen=True)
class OperationHistory:
    """The path of alpha through training: operations.json."""

    operations: list[str]
    layers: list[str]
    epochs: list[Mixture]


# ---- Scores --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassScores:
    """Scores of one foreground class, in [0, 1]; None if no image has it."""

    dice: float | None
    iou: float | None


@dataclass(frozen=True)
class GroupScores:
    """Scores of a part of a split that is also scored on its own."""

    images: int
    metrics: dict[str, MetricValue]


@dataclass(frozen=True)
class VolumeScores:
    """Scores of the volumes of a split in three dimensions: means over volumes, then classes."""

    number: int
    """Of the volumes."""
    unit: str
    """Of the lengths: "mm" if the headers say so, "voxels", or "header units"."""
    metrics: dict[str, float | None]
    """``dice``, and the metrics of shapes among those of the images."""


@dataclass(frozen=True)
class SplitScores:
    """Loss and scores of a model on a split. Scores lie in [0, 1]; None means undefined."""

    loss: float | None = None
    dice: float | None = None
    iou: float | None = None
    accuracy: float | None = None
    per_class: dict[str, ClassScores] = field(default_factory=dict, metadata=OPTIONAL)
    metrics: dict[str, MetricValue] = field(default_factory=dict, metadata=OPTIONAL)
    """What the data set is reported by, by the names of ``naslora.metrics.METRICS``."""
    resolution: str | None = field(default=None, metadata=OPTIONAL)
    """Size at which ``metrics`` were taken, in words."""
    groups: dict[str, GroupScores] = field(default_factory=dict, metadata=OPTIONAL)
    images: int | None = field(default=None, metadata=OPTIONAL)
    click_iou: list[float] | None = field(default=None, metadata=OPTIONAL)
    """Mean IoU after one click, two, and so on, of a promptable model."""
    calibration: list[tuple[float, float, float]] = field(default_factory=list, metadata=OPTIONAL)
    """Of each bin of confidence the number of pixels, and the sums of their confidence and of those
    that are right, over all images; with the metric ``ece``."""
    volumes: VolumeScores | None = field(default=None, metadata=OPTIONAL)
    image_dice: list[float | None] | None = field(
        default=None, compare=False, repr=False, metadata=UNSTORED
    )
    """Dice of each image of the split, mean over its classes; None where it is undefined."""


# ---- A run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by part of the model."""

    frozen: int
    decoder: int
    adapter: int
    """What the method trains in the encoder, without alpha."""
    architecture: int
    """Alpha."""

    @property
    def trainable(self) -> int:
        """All parameters that train."""
        return self.decoder + self.adapter + self.architecture

    @property
    def total(self) -> int:
        """All parameters of the model."""
        return self.frozen + self.trainable


@dataclass(frozen=True)
class MergeResult:
    """A way of merging, tried on the trained model: its report, or why it was refused."""

    mode: str | None = field(default=None, metadata=OPTIONAL)
    source: str | None = field(default=None, metadata=OPTIONAL)
    """What the errors were measured on."""
    layers: list[LayerError] = field(default_factory=list, metadata=OPTIONAL)
    warning: str | None = None
    refused: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run reports: metrics.json."""

    test: SplitScores
    val: SplitScores
    untouched: SplitScores | None = field(default=None, metadata=OPTIONAL)
    """Test scores of a promptable model before training."""
    test_last: SplitScores | None = field(default=None, metadata=OPTIONAL)
    """Test scores of the last step's weights, where the kept ones are averages (``ema``)."""
    kept_epoch: int
    """The epoch that the run kept and that the scores belong to."""
    trainable_parameters: int
    parameters: ParameterCounts
    images: dict[str, int]
    """Number of images by split."""
    test_float32: SplitScores | None = field(default=None, metadata=OPTIONAL)
    """Test scores in float32, for comparison with the merged models; None if ``test`` is."""
    test_merged: dict[str, SplitScores] = field(default_factory=dict, metadata=OPTIONAL)
    """Test scores by way of merging, in float32."""
    merge: dict[str, MergeResult] = field(default_factory=dict, metadata=OPTIONAL)
    annealed: SplitScores | None = field(default=None, metadata=OPTIONAL)
    """Validation scores of the kept epoch merged with ``center``, if its cell was annealed."""
    seconds: float
    """Seconds of training and of the final evaluation."""
    weights: str | None = field(default=None, metadata=OPTIONAL)
    """What the encoder started from, as ``resolve`` names it: `none` is random."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the scores should know; empty for a run like others."""
    history_sha256: str | None = field(default=None, metadata=OPTIONAL)
    """SHA-256 of history.csv, which has no place for it."""


# ---- A study -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunNumbers:
    """What a study measures of one run: numbers.json."""

    numbers: dict[str, int | float | None]
    """By the columns of a study's table.csv. Times and memory are among them if the run had a
    process of its own."""
    image_dice: list[float | None] = field(default_factory=list, metadata=OPTIONAL)
    """Dice of each test image, as in ``SplitScores``."""
    machine: str | None = field(default=None, metadata=OPTIONAL)
    """Where times were taken, in words."""
    load: float = 0.0
    """Load average of the machine over the last minute of training."""


# ---- Reading -------------------------------------------------------------------------------------


def kept_epoch(history: list[Epoch], keep: Keep) -> Epoch:
    """The epoch that a run keeps.

    With ``best`` it is the epoch with the highest Dice on the validation images. Equal Dice leaves
    the choice to the lower validation loss: a model that predicts nothing yet has a Dice of 0, and
    a split without foreground has none. With annealing only the epochs count whose cells take
    nothing from neighbouring tokens. ``history`` has at least one epoch.
    """
    if keep == "last":
        return history[-1]
    return max(history, key=lambda epoch: (-epoch.spatial, epoch.val_dice or 0.0, -epoch.val_loss))


def adapter_folder(run: Path) -> Path:
    """The folder of the adapter that a run keeps; a ``UserError`` before its first epoch ends."""
    if (run / ADAPTER).is_dir():
        return run / ADAPTER
    raise UserError(f"{run} has no trained model yet: {run / ADAPTER} does not exist")


def read_history(run: Path) -> list[Epoch]:
    """Reads history.csv of a finished run, and verifies the checksum that metrics.json holds."""
    history = read_rows(run / HISTORY, Epoch)
    stored = read_record(run / METRICS_JSON, RunResult).history_sha256
    if stored is not None and stored != file_checksum(run / HISTORY):
        raise UserError(
            f"{run / HISTORY} is damaged or was edited: it does not match the checksum in "
            f"{METRICS_JSON}; run train with --resume, which writes it again"
        )
    return history
