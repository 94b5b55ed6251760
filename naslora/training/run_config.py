"""The configuration of a run: everything that decides its result."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import tyro

from naslora.adapter.layer.alpha_search import CELL_RATE
from naslora.adapter.layer.config import MethodConfig, NASLoRAConfig
from naslora.choices import Augment, ClassLoss, ObjectSource, Precision, Task
from naslora.data.datasets import DATASETS
from naslora.data.layouts import GROUP
from naslora.data.tiles import LARGEST, SMALLEST
from naslora.methods import METHODS, MethodName
from naslora.metrics import METRICS
from naslora.results import Keep
from naslora.sam.attention import Attention
from naslora.settings import Common, Count, Index, Rate, Seed, Settings, Share, checked

Resolution = Literal["network", "original", "tiles"]
Schedule = Literal["linear", "cosine", "constant"]
Pixels = Annotated[int, msgspec.Meta(ge=SMALLEST, le=LARGEST)]
Part = Annotated[float, msgspec.Meta(ge=0, le=0.5)]
if TYPE_CHECKING:
    DatasetName = str
    MetricName = str
    ImageSize = int  # once it is resolved, as the two below
    LearningRate = float
    SearchStart = int
else:
    ImageSize, LearningRate, SearchStart = Pixels | None, Rate | None, Index | None
    DatasetName, MetricName = Literal[tuple(DATASETS)], Literal[tuple(METRICS)]


@dataclass(frozen=True)
class DataConfig(Settings):
    """The images and masks of a run, and how they are read and scored."""

    dataset: Common[DatasetName] = "csv"
    """Layout of the data: `csv` (train.csv, val.csv and test.csv with the columns image,label,
    optionally arch.csv), `folders` ({train,val,test}/{images,masks}), `coco` (JSON files of COCO;
    the categories, or those of `class_names`, are the classes), `mni152`, or a data set of the
    paper in its original layout: `isic2017`, `kvasir`, `cvc-clinicdb`, `polyp` (the two together),
    `camouflage` (COD10K, CAMO, CHAMELEON), `sbu`, `leaf`, `roads`, `trans10k-v1`, `trans10k-v2`."""
    root: Common[Annotated[Path | None, tyro.conf.arg(aliases=["--data"])]] = None
    """Folder of the data set."""
    split: tuple[float, float, float] | None = None
    """Shares of train, val and test, which are drawn from all images: of one CSV file, or of
    train.csv, val.csv and test.csv (`csv`), where images with one entry in the column `group` stay
    together, or of one folder {images,masks}, or of all (`folders`)."""
    group: str = GROUP
    """Column of the CSV files whose equal entries stay together in `split` and in the folds of
    compare, such as the patient."""
    cache: Path | None = None
    """Folder that keeps decoded, resized images for later epochs and runs."""
    cache_embeddings: bool = False
    """Whether the folder of `--cache` also keeps the embeddings of the images, so that the encoder
    sees each once. The encoder must be frozen (`--method decoder-only`), and the changes of images
    few (`--augment none`, `flip` or `dihedral`)."""
    num_classes: Common[Annotated[int, msgspec.Meta(ge=1, le=255)]] = 1
    """1 for binary masks, else the number of classes, the background (0) included. The paper's data
    sets set it themselves. Masks have 8 bits."""
    class_names: tuple[str, ...] = ()
    """Names of the classes without the background, for tables and reports."""
    palette: tuple[str, ...] | None = None
    """One colour per class (#rrggbb), for masks that are colour images; with `ignore_index` one
    more at the end."""
    ignore_index: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    """Value of mask pixels without a known class, which are left out of the loss, the metrics and
    the reports. With `palette` it is the number of the classes. None is 255 in masks of more than
    two class indices."""
    intensity: tuple[str, ...] | None = None
    """Scaling of images with more than 8 bits, 16-bit or floating-point TIFF files for instance:
    `window LO HI` maps LO to black and HI to white; `percentile` does so with the 1st and the 99th
    percentile of each channel of each image, `percentile LO HI` with others. None scales 16-bit
    values by 255 / 65535."""
    channels: tuple[str, ...] = ()
    """Number of the images' channels, or their names: bands of a GeoTIFF, pages of a TIFF stack,
    NumPy arrays, or several files an image (columns `image`, `image2`, ...). The patch embedding is
    widened and trained, unless there are three. None makes RGB."""
    slice_axis: Literal[0, 1, 2] = 2
    """Axis of volumes along which slices are taken. NIfTI files (.nii, .nii.gz) are volumes."""
    stacks: bool = False
    """Whether TIFF files are volumes, whose pages are slices along axis 2, and not channels."""
    neighbours: Annotated[int, msgspec.Meta(ge=0, le=16)] = 0
    """Slices on each side of a volume's slice that are further channels; of several files an image,
    `channels` counts them all."""
    shown: tuple[str, str, str] | None = None
    """Names, or numbers from 1, of the channels that are red, green and blue in pictures. None is
    the first three."""
    channel_mean: tuple[float, ...] | None = None
    """Of each channel, in [0, 1]. None computes it from the training images; for three channels
    it is what the model's weights were made for."""
    channel_std: tuple[float, ...] | None = None
    """The same of the standard deviation."""
    metrics: tuple[MetricName, ...] | None = None
    """Metrics of the test images; the default is the data set's own."""
    resolution: Resolution | None = None
    """Size at which test images are scored: `network`, the model's, or `original`, each mask's.
    `tiles` is each mask's, too, but images are cut into overlapping tiles of `crop` pixels, or of
    `image_size`; validation images as well. None is `tiles` with `crop`, else `network`."""
    crop: Pixels | None = None
    """Side of random windows, in an image's own pixels, that training sees in place of whole
    images: for images much larger than `image_size`. Windows are resized to `image_size`."""
    crop_foreground: Share = 0.5
    """Share of these windows that are sure to hold foreground, where the image has some."""


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The pre-trained model of a run."""

    name: Common[Annotated[str, tyro.conf.arg(name="model")]] = "vit_t"
    """vit_t (small, trains on a CPU), vit_b, vit_l, vit_h (SAM), mobile_sam (MobileSAM), sam_hq_b,
    sam_hq_l, sam_hq_h, sam_hq_tiny (SAM-HQ), sam2.1_t, sam2.1_s, sam2.1_b+, sam2.1_l (SAM 2.1),
    the same with sam2_ (SAM 2), sam3 (SAM 3), or an encoder under a new mask decoder: dinov3_s,
    dinov3_b, dinov3_l, dinov2_s, dinov2_b, pe_spatial_t, pe_spatial_s, pe_spatial_b, pe_spatial_l.
    """
    checkpoint: Common[Annotated[str, msgspec.Meta(pattern=r"^[^\0]+\Z")] | None] = None
    """Pre-trained SAM checkpoint: an official .pth or .pt file, the same as .safetensors, a folder
    of Hugging Face, or `hf:owner/name[@revision][/file]`, which is downloaded. `naslora models`
    lists them. `vit_t` has its weights in the package and needs none. `none` starts from random
    weights."""
    image_size: Common[ImageSize] = None  # type: ignore[assignment]
    """Side to which images are resized, in pixels; a multiple of the number that `naslora models`
    shows. None is what the weights were made for, such as 256 for `vit_t` and 1024 for SAM."""
    attention: Attention = "fused"
    """Computation of the image encoder's attention: `fused`, which takes less time and memory, or
    `stock`, the code of segment_anything and timm. The results are equal up to rounding. Models
    without such a bias as `fused` is for, such as SAM 2, keep the stock code."""


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How to train: schedule of the two stages, optimizers, precision."""

    epochs: Common[Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]] = 30
    """Epochs over the training split."""
    steps: Count | None = None
    """Weight steps in all, in place of `epochs`: as many epochs as come nearest, at least one. So a
    small set trains as long as a large one."""
    search_start: SearchStart = None  # type: ignore[assignment]
    """First epoch (T1, counted from 0) that also updates alpha. None begins after a third of the
    epochs, as the paper does."""
    simultaneous: bool = False
    """Ablation: update weights and alpha together, on the training split, from epoch 0."""
    arch_data: Literal["redraw", "rotate", "hold-out", "split"] | None = None
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
    optimizer: Literal["adam", "adamw"] = "adamw"
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


@dataclass(frozen=True)
class PromptConfig(Settings):
    """How prompts are simulated, for `--task promptable`."""

    objects: ObjectSource = "components"
    """What an object is: a connected part of a class (`components`), or what has a number of its
    own in the mask, of 8 or more bits, or a colour (`numbers`). In COCO it is an instance."""
    clicks: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8
    """Most prompts of an object in training: a point or a box, then corrections of the mask. Their
    number is drawn for each batch."""
    objects_per_image: Annotated[int, msgspec.Meta(ge=1, le=254)] = 8
    """Most objects of an image that train at once, and that are scored. Training draws others in
    every epoch."""
    train_prompt_encoder: bool = False
    """Train the prompt encoder, too."""


@dataclass(frozen=True)
class RunConfig(Settings):
    """Everything that decides a run's result.

    ``resolve`` replaces what the fields leave open. A run's files hold the result.
    """

    recipe: Common[str | None] = None
    """Source of the settings that are not given: a recipe that ships with naslora, such as
    `isic2017`, or a YAML file."""
    task: Common[Task] = "semantic"
    """`semantic` labels every pixel without prompts. `promptable` keeps SAM's prompts: it trains
    masks of single objects from points and boxes."""
    seed: Seed = 0
    """Seed of every random number."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: Common[MethodName] = "nas-pc-lora"
    """Fine-tuning method of the encoder. `--help-all` after it lists its own settings. Plain LoRA
    in the fused kernels is `nas-pc-lora` with `--channel-ratio 0`."""
    adapter: MethodConfig = field(default_factory=NASLoRAConfig)
    """The method's own configuration."""
    training: TrainConfig = field(default_factory=TrainConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)

    @classmethod
    def from_dict(cls, values: Any) -> "RunConfig":
        """The configuration that a file holds. ``method`` decides what ``adapter`` may hold.

        Raises:
            UserError: a field is unknown or out of range.
        """
        if isinstance(values, dict):
            method = checked("method", values.get("method", cls.method), MethodName)
            adapter = METHODS[method].config.from_dict(values.get("adapter", {}))
            values = {**values, "adapter": adapter}
        return super().from_dict(values)


def varied(config: RunConfig, part: str, **fields: Any) -> RunConfig:
    """The configuration with other values of fields of a part, such as ``data``."""
    return replace(config, **{part: replace(getattr(config, part), **fields)})


def mirror_axes(config: RunConfig) -> list[list[int]]:
    """Of each mirror image that a trained model knows, besides images, the axes of (B, 3, S, S)
    that are reversed: left to right, after training with `dihedral` also upside down."""
    return [[-1], [-2], [-2, -1]] if config.training.augment == "dihedral" else [[-1]]


def differing(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """The fields in which two configurations differ, with the stored values, as text."""
    found = []
    for name, value in given.items():
        if isinstance(value, dict):
            found += differing(stored[name], value)
        elif stored.get(name) != value:
            found.append(f"{name} {stored.get(name)}")
    return found
