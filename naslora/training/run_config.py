"""The configuration of a run: everything that decides its result."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from naslora.adapter.checks import check_types, choice
from naslora.adapter.config import NASLoRAConfig
from naslora.data.datasets import find_dataset
from naslora.data.intensity import Intensity, parse_intensity
from naslora.data.layouts import DataSet
from naslora.data.masks import IGNORED
from naslora.data.tiles import Tiles, check_side, fit_tiles
from naslora.errors import UserError
from naslora.files import read_json
from naslora.methods import METHODS, MethodName, searches
from naslora.metrics import METRICS, check_metrics
from naslora.sam.attention import Attention
from naslora.sam.shipped import NONE, shipped_file, shipped_version
from naslora.training.train_config import TrainConfig

Resolution = Literal["network", "original", "tiles"]
MOST_CLASSES = 255
PATHS = ("data", "root", "cache", "checkpoint")
SHIPPED = "shipped"
"""How the checkpoint in a configuration's file begins for the weights in the package."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result."""

    recipe: str | None = None
    """Source of the settings that are not given: a recipe that ships with naslora, such as
    `isic2017/nas-pc-lora`, or a YAML file."""
    data: Path | None = None
    """Folder with train.csv, val.csv and test.csv (columns image,label), optionally arch.csv."""
    dataset: str = "csv"
    """Layout of the data: `csv`, `folders` ({train,val,test}/{images,masks}), `coco` (JSON files of
    COCO; the categories, or those of `class_names`, are the classes), `mni152`, or a data set of
    the paper in its original layout: `isic2017`, `kvasir`, `cvc-clinicdb`, `polyp` (the two
    together), `camouflage` (COD10K, CAMO, CHAMELEON), `sbu`, `leaf`, `roads`, `trans10k-v1`,
    `trans10k-v2`."""
    root: Path | None = None
    """Folder of the data set; `--data DIR` is short for `--dataset csv --root DIR`."""
    cache: Path | None = None
    """Folder that keeps decoded, resized images for later epochs and runs."""
    model: str = "vit_b"
    """vit_b, vit_l, vit_h (SAM), mobile_sam (MobileSAM), vit_t (small, trains on a CPU), sam_hq_b,
    sam_hq_l, sam_hq_h, sam_hq_tiny (SAM-HQ), sam2.1_t, sam2.1_s, sam2.1_b+, sam2.1_l (SAM 2.1), or
    the same with sam2_ (SAM 2)."""
    checkpoint: Path | None = None
    """Pre-trained SAM checkpoint: an official .pth or .pt file, the same as .safetensors, or a
    folder of Hugging Face. Without one, `vit_t` starts from the weights in the package, and the
    encoders of the other models are random. `none` makes that of `vit_t` random, too."""
    image_size: int = 1024
    """Side to which images are resized, in pixels; a multiple of 16, for SAM 2 of 32."""
    num_classes: int = 1
    """1 for binary masks, else the number of classes, the background (0) included. The paper's data
    sets set it themselves."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes without the background, for tables and reports."""
    palette: tuple[str, ...] | None = None
    """One colour per class (#rrggbb), for masks that are colour images; with `ignore_index` one
    more at the end."""
    ignore_index: int | None = None
    """Value of mask pixels without a known class, which are left out of the loss, the metrics and
    the reports. With `palette` it is the number of the classes. None is 255 in masks of more than
    two class indices."""
    intensity: tuple[str, ...] | None = None
    """Scaling of images with more than 8 bits, 16-bit or floating-point TIFF files for instance:
    `window LO HI` maps LO to black and HI to white; `percentile` does so with the 1st and the 99th
    percentile of each channel of each image, `percentile LO HI` with others. None scales 16-bit
    greys by 255 / 65535."""
    metrics: tuple[str, ...] | None = None
    """Metrics of the test images; the default is the data set's own."""
    resolution: Resolution | None = None
    """Size at which test images are scored: `network`, the model's, or `original`, each mask's.
    `tiles` is each mask's, too, but images are cut into overlapping tiles of `crop` pixels, or of
    `image_size`; validation images as well. None is `tiles` with `crop`, else `network`."""
    crop: int | None = None
    """Side of random windows, in an image's own pixels, that training sees in place of whole
    images: for images much larger than `image_size`. Windows are resized to `image_size`."""
    crop_foreground: float = 0.5
    """Share of these windows that are sure to hold foreground, where the image has some."""
    method: MethodName = "nas-pc-lora"
    """Fine-tuning method of the encoder. Plain LoRA in the fused kernels is `nas-pc-lora` with
    `--channel-ratio 0`."""
    attention: Attention = "fused"
    """Computation of the image encoder's attention: `fused`, which takes less time and memory, or
    `stock`, the code of segment_anything and timm. The results are equal up to rounding. SAM 2 has
    no such bias as `fused` is for: it keeps the stock code."""
    adapter: NASLoRAConfig = field(default_factory=NASLoRAConfig)
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        choice(Attention)("attention", self.attention)
        self._fill_in(find_dataset(self.dataset))
        self._check_crop()
        if self.intensity is not None:
            words = tuple(map(str, self.intensity))  # a recipe may hold numbers
            object.__setattr__(self, "intensity", words)
            parse_intensity(words)
        self._check_ignore_index()
        foreground = max(self.num_classes - 1, 1)
        if self.class_names is not None and len(self.class_names) != foreground:
            raise UserError(
                f"class_names must name the {foreground} foreground classes, got "
                f"{len(self.class_names)}"
            )
        if self.data is not None and (self.root is not None or self.dataset != "csv"):
            raise UserError("give either --data DIR or --dataset NAME --root DIR, not both")
        if self.num_classes > MOST_CLASSES:
            raise UserError(
                f"num_classes must be at most {MOST_CLASSES}, because masks have 8 bits, got "
                f"{self.num_classes}"
            )

    def _check_crop(self) -> None:
        if self.resolution is None:
            object.__setattr__(self, "resolution", "network" if self.crop is None else "tiles")
        choice(Resolution)("resolution", self.resolution)
        if self.crop is not None:
            check_side("crop", self.crop)
        if not 0 <= self.crop_foreground <= 1:
            raise UserError(f"crop_foreground must lie in [0, 1], got {self.crop_foreground}")

    @property
    def tiles(self) -> Tiles:
        """The tiles by which the model sees large images at the scale of its training."""
        return fit_tiles(self.crop or self.image_size, self.image_size)

    def _check_ignore_index(self) -> None:
        if self.ignore_index is None:
            return
        if self.dataset == "coco":
            raise UserError("ignore_index is a label of mask files, which coco has not; drop it")
        if not 0 < self.ignore_index < 65536:
            raise UserError(f"ignore_index must be in 1 to 65535, got {self.ignore_index}")
        classes = max(self.num_classes, 2)
        if self.palette is not None and self.ignore_index != classes:
            raise UserError(
                f"ignore_index must be {classes} with --palette, the number of its last colour, "
                f"got {self.ignore_index}"
            )
        if self.ignore_index < classes or classes > IGNORED:
            raise UserError(
                f"ignore_index must be none of the {classes} classes 0 to {classes - 1}, and there "
                f"may be at most {IGNORED} classes, got {self.ignore_index}"
            )
        for name in self.metrics or ():
            if METRICS[name].saliency:
                raise UserError(
                    f"metric {name!r} cannot leave out pixels; choose others with --metrics, or "
                    "drop --ignore-index"
                )

    def _fill_in(self, dataset: DataSet) -> None:
        """Sets the number and names of the classes, and the metrics, that the data set defines."""
        known: dict[str, Any] = {}
        names = dataset.class_names or self._categories(dataset)
        if names:
            count = 1 if len(names) == 2 else len(names)
            if self.num_classes not in (1, count):
                raise UserError(f"{self.dataset} has {count} classes, got {self.num_classes}")
            known["num_classes"] = count
            if self.class_names is None:
                known["class_names"] = names[1:]
        if self.metrics is None:
            known["metrics"] = dataset.metrics
        for name, value in known.items():
            object.__setattr__(self, name, value)
        check_metrics(self.metrics or (), self.num_classes)

    def _categories(self, dataset: DataSet) -> tuple[str, ...]:
        """The background and the categories of a data set whose files name them, or those that the
        run wants. The files are read only if the run does not name any."""
        if dataset.categories is None or (self.class_names is None and self.root is None):
            return ()
        if self.class_names is not None:
            return ("background", *self.class_names)
        assert self.root is not None
        return ("background", *dataset.categories(self.root))

    @property
    def scaling(self) -> Intensity | None:
        """``intensity``, as ``read_image`` takes it."""
        return None if self.intensity is None else parse_intensity(self.intensity)

    @property
    def searches(self) -> bool:
        """Whether the method has architecture parameters alpha."""
        return searches(self.method, self.adapter)

    @property
    def pretrained(self) -> bool:
        """Whether the model starts from pre-trained weights, given or in the package."""
        if self.checkpoint is None:
            return shipped_file(self.model) is not None
        return str(self.checkpoint) != NONE

    @property
    def foreground_names(self) -> list[str]:
        """Names of the classes without the background."""
        count = max(self.num_classes - 1, 1)
        if self.class_names is not None:
            return list(self.class_names)
        return ["foreground"] if count == 1 else [f"class {k}" for k in range(1, count + 1)]

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values.

        Paths are absolute, and ``search_start`` is a number. The checkpoint is null for random
        weights, as in 0.1.0, and ``SHIPPED`` with a version for those in the package.
        """
        values = dataclasses.asdict(self)
        for name in PATHS:
            if values[name] is not None:
                values[name] = str(Path(values[name]).resolve())
        if not self.pretrained:
            values["checkpoint"] = None
        elif self.checkpoint is None:
            values["checkpoint"] = f"{SHIPPED} {shipped_version(self.model)}"
        values["training"]["search_start"] = self.training.first_search_epoch
        return json.loads(json.dumps(values))  # tuples become lists, as in the file

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """The inverse of ``to_dict``. Files of 0.1.0 have no ``attention``: it was "stock".

        Raises:
            UserError: a field is unknown or out of range.
        """
        try:
            values = {"attention": "stock", **values}
            check_types(cls, values)
            for name in PATHS:
                values[name] = Path(values[name]) if values[name] is not None else None
            if str(values["checkpoint"]).startswith(f"{SHIPPED} "):
                _check_shipped(values["model"], str(values["checkpoint"]))
                values["checkpoint"] = None
            elif values["checkpoint"] is None and shipped_file(values["model"]) is not None:
                values["checkpoint"] = Path(NONE)
            values.setdefault("intensity", None)  # not in the files of 0.1.0
            for name in ("class_names", "palette", "metrics", "intensity"):
                values[name] = tuple(values[name]) if values[name] is not None else None
            values["adapter"] = NASLoRAConfig.from_dict(values["adapter"])
            values["training"] = TrainConfig.from_dict(values["training"])
            return cls(**values)
        except KeyError as error:
            raise UserError(f"this is no run configuration of this version: no {error}") from error
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"this is no run configuration of this version: {error}") from error


def _check_shipped(name: str, stored: str) -> None:
    """Refuses a run that started from other weights than those in this package."""
    own = f"{SHIPPED} {shipped_version(name)}"
    if stored != own:
        raise UserError(
            f"the run started from the weights of {name} in another version of naslora ({stored}, "
            f"here {own}); use that version"
        )


def read_config(path: Path) -> RunConfig:
    """Reads config.json of a run.

    Raises:
        UserError: the file is missing or damaged, or a field is missing, unknown or out of range.
    """
    values = read_json(path)
    try:
        return RunConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def differing(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """The fields in which two configurations differ, with the stored values, as text."""
    found = []
    for name, value in given.items():
        if isinstance(value, dict):
            found += differing(stored[name], value)
        elif stored[name] != value:
            found.append(f"{name} {stored[name]}")
    return found
