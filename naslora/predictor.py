"""A model that segments images: loaded from a folder or a file, whole images or by tiles."""

import dataclasses
import functools
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from naslora.choices import OVERLAP, Precision, TileSize
from naslora.data.dataset import resize_image
from naslora.data.picture import Picture
from naslora.data.rasters import DEFAULT_OUTPUTS, STRIP, LabelFile, OutputConfig
from naslora.data.tiles import Box, Grid, Tiles
from naslora.errors import UserError
from naslora.files import reading
from naslora.sam.precision import DTYPES, cast_frozen
from naslora.sam.prompts import PROMPTS, AnySam
from naslora.sam.runtimes import ClassMap, load_class_map
from naslora.sam.segmentation import labels_of
from naslora.sam.shipped import NONE
from naslora.trained import load_model
from naslora.training.accelerator import make_accelerator
from naslora.training.resolve import resolve
from naslora.training.run_config import DataConfig, ModelConfig, RunConfig, mirror_axes
from naslora.training.run_data import tiles_of


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model that segments images."""

    class_map: ClassMap
    """Maps (B, C, S, S) images in [0, 1] to (B, K, S, S) scores, both on the CPU, or to one map
    more, the uncertainty."""
    config: RunConfig
    tiles: Tiles | None
    """How images are cut; None takes them whole."""
    outputs: OutputConfig = DEFAULT_OUTPUTS
    model: nn.Module | None = None
    """PyTorch's, of a folder."""

    @property
    def channels(self) -> int:
        """The channels of its images."""
        return len(self.config.data.channels) or 3

    def image_of(self, pixels: np.ndarray) -> Tensor:
        """(H, W, C) uint8 as the model takes it: (C, S, S) float32."""
        own = torch.from_numpy(pixels).permute(2, 0, 1)
        image = resize_image(own, self.config.model.image_size)
        return transforms.to_dtype(image, torch.float32, scale=True)

    def segment(
        self, picture: Picture, labels: LabelFile, scores: Tensor | None = None
    ) -> Iterator[np.ndarray]:
        """Segments an image, whose labels ``labels`` gets.

        ``scores`` is the (K, S, S) class map of the whole image; None computes it.

        Yields:
            The probabilities, some rows at a time, float32: (n, W), or (n, W, K) of several
            classes; with an uncertainty (n, W, K + 1).
        """
        count, threshold = self.config.data.num_classes, self.outputs.threshold
        for band in self.score_bands(picture, scores):
            for part in band.split(STRIP, dim=1):  # because labels have 8 bytes at first
                labels.append(labels_of(part[None, :count], threshold)[0].numpy())
                total = part[:count].sum(0).clamp(min=1e-12) if count > 1 else 1
                shares = torch.cat([part[:count] / total, part[count:]])
                yield shares.movedim(0, 2).squeeze(2).numpy()
            del band, part, shares  # before the next row of tiles is computed

    def score_bands(self, picture: Picture, scores: Tensor | None = None) -> Iterator[Tensor]:
        """The class map of an image: (K, rows, W) float32 bands, from its top to its bottom."""
        height, width = picture.height, picture.width
        grid = None if self.tiles is None else Grid(self.tiles, height, width)
        if grid is None or len(grid) == 1:
            own = self._scores_of(picture.rows()) if scores is None else scores
            yield from _enlarged(own, height, width)
            return
        shared = functools.lru_cache(1)(picture.rows)  # by the tiles of one row

        def pixels_of(box: Box) -> np.ndarray:
            if picture.source.by_rows:
                return shared(box.top, box.bottom)[:, box.left : box.right]
            return picture.rows(box.top, box.bottom, box.left, box.right)

        maps = (self._scores_of(pixels_of(box)) for box in grid.boxes())
        yield from map(itemgetter(1), grid.blend(maps))

    def _scores_of(self, pixels: np.ndarray) -> Tensor:
        """The (K, S, S) class map of (H, W, C) uint8."""
        return self.class_map(self.image_of(pixels)[None])[0]


def _enlarged(scores: Tensor, height: int, width: int) -> Iterator[Tensor]:
    """Resizes a (K, S, S) class map bilinearly, some rows at a time."""
    side = scores.shape[1]
    columns = F.interpolate(scores[None], (side, width), mode="bilinear", align_corners=False)[0]
    for rows in ((torch.arange(height) + 0.5) * side / height - 0.5).clamp(min=0).split(STRIP):
        low = rows.long().clamp(max=side - 1)
        weight = (rows - low)[:, None]
        high = (low + 1).clamp(max=side - 1)
        yield columns[:, low] * (1 - weight) + columns[:, high] * weight


def make_predictor(
    path: Path,
    tiles: TileSize | None = None,
    overlap: float = OVERLAP,
    trust: bool = False,
    outputs: OutputConfig = DEFAULT_OUTPUTS,
) -> Predictor:
    """Loads a folder or an exported file, and further members."""
    class_map, config, model = _load_class_map(path, trust, outputs.precision)
    if outputs.threshold != OutputConfig.threshold and config.data.num_classes > 1:
        raise UserError("--threshold is for two classes; of several the most probable one is taken")
    views = [class_map]
    for member in outputs.members:
        other, its, _ = _load_class_map(member, trust, outputs.precision)
        theirs, ours = ({**vars(own.model), **vars(own.data)} for own in (its, config))
        for name in ("num_classes", "channels", "intensity", "slice_axis", "image_size"):
            if theirs[name] != ours[name]:
                raise UserError(f"{member} has another {name} than {path}; give runs that agree")
        views.append(other)
    if outputs.flips:
        turns = mirror_axes(config)
        views += [functools.partial(_flipped, own, turn) for own in views for turn in turns]
    if len(views) > 1:
        class_map = functools.partial(_averaged, views)
    size = None
    if tiles is not None:
        size = tiles_of(config, None if tiles == "auto" else tiles, overlap)
    return Predictor(class_map, config, size, outputs, model)


def _flipped(class_map: ClassMap, axes: list[int], images: Tensor) -> Tensor:
    return class_map(images.flip(axes)).flip(axes)


def _averaged(views: list[ClassMap], images: Tensor) -> Tensor:
    """The mean class map, and the largest standard deviation of a class's probability."""
    maps = torch.stack([view(images) for view in views])  # (V, B, K, S, S)
    shares = maps / maps.sum(2, keepdim=True).clamp(min=1e-12) if maps.shape[2] > 1 else maps
    spread = shares.std(0, correction=0).amax(1, keepdim=True)
    return torch.cat([maps.mean(0), spread], dim=1)


def _load_class_map(
    path: Path, trust: bool, precision: Precision
) -> tuple[ClassMap, RunConfig, AnySam | None]:
    """Loads a folder or an exported file."""
    if path.is_file():
        if precision != "no":
            raise UserError(f"--precision is for runs and merged models, and {path} has its own")
        class_map, held = load_class_map(path, trust)
        with reading(path):
            names = vars(held).keys() & DataConfig.__annotations__.keys()
            data = DataConfig(**{name: getattr(held, name) for name in names})
            own = ModelConfig(held.model, NONE, held.image_size)
            return class_map, resolve(RunConfig(data=data, model=own)), None
    model, config = load_model(path)
    if config.task == "promptable":
        raise UserError(f"{path} {PROMPTS}")
    accelerator = make_accelerator(dataclasses.replace(config.training, mixed_precision=precision))
    cast_frozen(model.image_encoder, DTYPES[precision])
    model.to(accelerator.device)

    @torch.no_grad()
    def of_model(images: Tensor) -> Tensor:
        with accelerator.autocast():
            return model(images.to(accelerator.device)).class_map().float().cpu()

    return of_model, config, model
