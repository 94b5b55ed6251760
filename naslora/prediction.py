"""Prediction: images to masks and overlays, whole or by tiles."""

import contextlib
import dataclasses
import functools
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from naslora.choices import OVERLAP, TileSize
from naslora.data.dataset import resize_image
from naslora.data.images import Sample, large_images, open_image, open_picture
from naslora.data.layouts import list_images, read_rows
from naslora.data.picture import ImageError, Picture
from naslora.data.rasters import (
    DEFAULT_OUTPUTS,
    SOFTWARE,
    STRIP,
    LabelFile,
    OutputConfig,
    Rows,
    in_pieces,
    rows_of,
    write_png,
    write_tiff,
)
from naslora.data.tiff import read_georeference, software_of
from naslora.data.tiles import SMALLEST, Box, Grid, Tiles
from naslora.errors import UserError, listing
from naslora.files import reading, replaced_file
from naslora.instances import COCO_FILE, InstanceFinder
from naslora.locks import locked
from naslora.report.pictures import class_colour, in_turn, paint_bands
from naslora.sam.export import ClassMap, load_class_map
from naslora.sam.instance_config import InstanceConfig
from naslora.sam.promptable import PROMPTS
from naslora.sam.segmentation import labels_of
from naslora.sam.shipped import NONE
from naslora.settings import checked
from naslora.trained import load_model
from naslora.training.accelerator import make_accelerator
from naslora.training.resolve import resolve
from naslora.training.run_config import DataConfig, ModelConfig, Pixels, RunConfig, mirror_axes
from naslora.training.run_data import check_with_progress, scaling_of, shown_of, tiles_of

ENDINGS = "_mask.png", "_overlay.png", "_mask.tif", "_probabilities.tif"
Overlap = Annotated[float, Meta(ge=0, le=0.5)]


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


def predict_run(
    path: Path,
    inputs: Sequence[Path],
    output: Path,
    on_error: Callable[[UserError], None] | None = None,
    tiles: TileSize | None = None,
    overlap: float = OVERLAP,
    trust: bool = False,
    overwrite: bool = False,
    search: InstanceConfig | None = None,
    outputs: OutputConfig = DEFAULT_OUTPUTS,
) -> list[Path]:
    """Segments images: writes a mask and an overlay for each, at the image's own size.

    Binary masks are 0/255, others class indices, which a palette shows in colours. Images are read
    one after another, and masks are written as they are computed. In memory are what Pillow needs,
    unless windows of a TIFF file are read, and with tiles the class maps of as many rows as a tile
    has.

    Args:
        path: a run's folder, a merged model's, or a file that ``export_run`` wrote.
        inputs: image files, folders of images, or CSV files as ``read_csv`` takes, of which labels
            are not read. Masks and overlays of an earlier call in such a folder are no images.
        output: created if needed; gets NAME_mask.png and NAME_overlay.png. For an image with a
            georeference it also gets NAME_mask.tif, which has the same.
        on_error: called with the error of an image that cannot be read; the other images are
            segmented. If None, every image is read before the first mask is written, and the
            first error is raised.
        tiles: side of the tiles in pixels of the images; "auto" takes the windows that the model
            was trained on (``crop``), or else its image size. None segments images whole. An image
            that fits into one tile has the same mask with and without tiles.
        overlap: share of a tile that neighbours have in common, in [0, 0.5].
        trust: as in ``load_class_map``.
        overwrite: whether masks and overlays that exist are replaced.
        outputs: what is decided from the scores, and which of them are written.
        search: finds objects with a model of ``load_predictor`` instead, as ``InstanceFinder``.
            Masks are label images, and ``output`` also gets instances.json.

    Returns:
        The PNG masks that were written.

    Raises:
        UserError: as ``load_model`` and ``load_class_map``; an image is missing or unreadable, two
            have the same name, a mask or an overlay would overwrite an input, or exists without
            ``overwrite``, or the tiles are out of range.
    """
    samples = find_samples(inputs)
    images = [sample.image for sample in samples]
    _check_targets(images, output, overwrite)
    if search is not None and (tiles is not None or outputs != DEFAULT_OUTPUTS):
        raise UserError("--instances searches by --crops, and has no --tiles, --flips or the like")
    if search is not None and (output / COCO_FILE).exists() and not overwrite:
        raise UserError(f"{output / COCO_FILE} exists; give --overwrite, or another --output")
    if tiles is not None:
        checked("tiles", SMALLEST if tiles == "auto" else tiles, Pixels)
        checked("overlap", overlap, Overlap)
    with locked(output), large_images() if tiles is not None else contextlib.nullcontext():
        predictor: Predictor | InstanceFinder
        if search is None:
            predictor = _load_predictor(path, tiles, overlap, trust, outputs)
        else:
            predictor = InstanceFinder(path, search)
        if on_error is None and len(samples) > 1:  # one image is read before anything is written
            check_with_progress(samples, predictor.config)
        written = list(_predict(predictor, samples, output, on_error))
        if isinstance(predictor, InstanceFinder):
            names = {_targets(image, output)[0]: image.name for image in images}
            predictor.write(output / COCO_FILE, [names[mask] for mask in written])
        return written


def _predict(
    predictor: Predictor | InstanceFinder,
    samples: list[Sample],
    output: Path,
    on_error: Callable[[UserError], None] | None,
) -> Iterator[Path]:
    config = predictor.config
    for sample in samples:
        try:
            channels = len(config.data.channels) or None
            picture = open_picture(sample, scaling_of(config), channels=channels)
            georeference = read_georeference(sample.image)
            if isinstance(predictor, InstanceFinder):
                found = predictor.labels(picture)
                labels, kind = rows_of(found), found.dtype
            else:
                labels = _segment_file(predictor, picture, sample, output).rows
                kind = np.dtype(np.uint8)
        except ImageError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        mask, overlay, geotiff, _ = _targets(sample.image, output)
        size = picture.height, picture.width
        numbers = config.task == "promptable"
        foreground = np.uint8(255 if config.data.num_classes == 1 and not numbers else 1)
        with replaced_file(mask) as file:
            indexed = foreground == 1 and kind == np.uint8
            colours = [(0, 0, 0), *map(class_colour, range(1, 256))] if indexed else None
            write_png(file, size, _times(labels, size, foreground), colours)
        with replaced_file(overlay) as file:
            names = ["background", *config.data.class_names]
            shown = labels
            if numbers:
                turned, names = in_turn(labels(0, picture.height))
                shown = rows_of(turned)
            rgb = functools.partial(_rgb_rows, picture, shown_of(config))
            write_png(file, size, paint_bands(rgb, shown, size, names))
        if georeference:
            with replaced_file(geotiff) as file:
                bands = _times(labels, size, foreground)
                write_tiff(file, bands, size, kind, georeference)
        yield mask


def _times(labels: Rows, size: tuple[int, int], factor: np.uint8) -> Iterator[np.ndarray]:
    return (rows * factor for rows in in_pieces(labels, size[0]))


def _segment_file(
    predictor: Predictor, picture: Picture, sample: Sample, output: Path
) -> LabelFile:
    """Segments an image into a file, and writes its probabilities if they are wanted.

    Raises:
        ImageError: the image is damaged, or a channel has only NaN. Nothing is written then.
    """
    labels = LabelFile(output, picture.width)
    bands = segment(predictor, picture, labels)
    kind = predictor.outputs.probabilities
    if kind is None:
        deque(bands, maxlen=0)
        picture.check_channels()
        return labels
    with replaced_file(_targets(sample.image, output)[3]) as file:
        first = next(bands)
        shape = picture.height, picture.width, *first.shape[2:]
        everything = map(functools.partial(_stored, kind), itertools.chain([first], bands))
        write_tiff(file, everything, shape, np.dtype(kind), read_georeference(sample.image))
        picture.check_channels()
    return labels


def _stored(kind: str, probabilities: np.ndarray) -> np.ndarray:
    return np.rint(255 * probabilities).astype(np.uint8) if kind == "uint8" else probabilities


def _rgb_rows(picture: Picture, shown: list[int], top: int, bottom: int) -> np.ndarray:
    return picture.rows(top, bottom)[..., shown]


# ---- Segmenting ----------------------------------------------------------------------------------


def segment(predictor: Predictor, picture: Picture, labels: LabelFile) -> Iterator[np.ndarray]:
    """Segments an image.

    Args:
        predictor: the model.
        picture: the image.
        labels: gets the labels.

    Yields:
        The probabilities, some rows at a time, float32: (n, W), or (n, W, K) of several classes;
        with an uncertainty (n, W, K + 1).
    """
    count, threshold = predictor.config.data.num_classes, predictor.outputs.threshold
    for band in score_bands(predictor, picture):
        for part in band.split(STRIP, dim=1):  # because labels have 8 bytes at first
            labels.append(labels_of(part[None, :count], threshold)[0].numpy())
            total = part[:count].sum(0).clamp(min=1e-12) if count > 1 else 1
            shares = torch.cat([part[:count] / total, part[count:]])
            yield shares.movedim(0, 2).squeeze(2).numpy()
        del band, part, shares  # before the next row of tiles is computed


def score_bands(predictor: Predictor, picture: Picture) -> Iterator[Tensor]:
    """The class map of an image: (K, rows, W) float32 bands, from its top to its bottom."""
    height, width = picture.height, picture.width
    grid = None if predictor.tiles is None else Grid(predictor.tiles, height, width)
    if grid is None or len(grid) == 1:
        yield from _enlarged(scores_of(predictor, picture.rows())[0], height, width)
        return
    shared = functools.lru_cache(1)(picture.rows)  # by the tiles of one row

    def pixels_of(box: Box) -> np.ndarray:
        if picture.by_rows:
            return shared(box.top, box.bottom)[:, box.left : box.right]
        return picture.rows(box.top, box.bottom, box.left, box.right)

    maps = (scores_of(predictor, pixels_of(box))[0] for box in grid.boxes())
    yield from map(itemgetter(1), grid.blend(maps))


def _enlarged(scores: Tensor, height: int, width: int) -> Iterator[Tensor]:
    """Resizes a (K, S, S) class map bilinearly, some rows at a time."""
    side = scores.shape[1]
    columns = F.interpolate(scores[None], (side, width), mode="bilinear", align_corners=False)[0]
    for rows in ((torch.arange(height) + 0.5) * side / height - 0.5).clamp(min=0).split(STRIP):
        low = rows.long().clamp(max=side - 1)
        weight = (rows - low)[:, None]
        high = (low + 1).clamp(max=side - 1)
        yield columns[:, low] * (1 - weight) + columns[:, high] * weight


@torch.no_grad()
def scores_of(predictor: Predictor, pixels: np.ndarray) -> Tensor:
    """The (1, K, S, S) class map of (H, W, C) uint8."""
    image = resize_image(pixels, predictor.config.model.image_size)
    return predictor.class_map(transforms.to_dtype(image, torch.float32, scale=True)[None])


def _load_predictor(
    path: Path, tiles: TileSize | None, overlap: float, trust: bool, outputs: OutputConfig
) -> Predictor:
    """Loads a folder or an exported file, and further members."""
    class_map, config = _load_class_map(path, trust)
    if outputs.threshold != OutputConfig.threshold and config.data.num_classes > 1:
        raise UserError("--threshold is for two classes; of several the most probable one is taken")
    views = [class_map]
    for member in outputs.members:
        other, its = _load_class_map(member, trust)
        for name in ("num_classes", "channels", "intensity"):
            if getattr(its.data, name) != getattr(config.data, name):
                raise UserError(f"{member} has another {name} than {path}; give runs that agree")
        if its.model.image_size != config.model.image_size:
            raise UserError(f"{member} has another image_size than {path}; give runs that agree")
        views.append(other)
    if outputs.flips:
        turns = mirror_axes(config)
        views += [functools.partial(_flipped, own, turn) for own in views for turn in turns]
    if len(views) > 1:
        class_map = functools.partial(_averaged, views)
    size = None
    if tiles is not None:
        size = tiles_of(config, None if tiles == "auto" else tiles, overlap)
    return Predictor(class_map, config, size, outputs)


def _flipped(class_map: ClassMap, axes: list[int], images: Tensor) -> Tensor:
    return class_map(images.flip(axes)).flip(axes)


def _averaged(views: list[ClassMap], images: Tensor) -> Tensor:
    """The mean class map, and the largest standard deviation of a class's probability."""
    maps = torch.stack([view(images) for view in views])  # (V, B, K, S, S)
    shares = maps / maps.sum(2, keepdim=True).clamp(min=1e-12) if maps.shape[2] > 1 else maps
    spread = shares.std(0, correction=0).amax(1, keepdim=True)
    return torch.cat([maps.mean(0), spread], dim=1)


def _load_class_map(path: Path, trust: bool) -> tuple[ClassMap, RunConfig]:
    """Loads a folder or an exported file."""
    if path.is_file():
        class_map, held = load_class_map(path, trust)
        with reading(path):
            names = ("num_classes", "class_names", "crop", "intensity", "channels", "shown")
            data = DataConfig(**{name: getattr(held, name) for name in names})
            own = ModelConfig(held.model, NONE, held.image_size)
            return class_map, resolve(RunConfig(data=data, model=own))
    model, config = load_model(path)
    if config.task == "promptable":
        raise UserError(f"{path} {PROMPTS}")
    model.to(make_accelerator(config.training).device)

    def of_model(images: Tensor) -> Tensor:
        return model(images.to(model.pixel_mean.device)).class_map().cpu()

    return of_model, config


# ---- Files ---------------------------------------------------------------------------------------


def find_samples(inputs: Sequence[Path]) -> list[Sample]:
    """The images of ``predict_run``."""
    if not inputs:
        raise UserError("there is nothing to segment: give at least one IMAGE, a file or a folder")
    missing = [str(item) for item in inputs if not item.exists()]
    if missing:
        raise UserError(f"{listing(missing)} does not exist")
    samples = []
    for item in inputs:
        if item.suffix == ".csv":
            samples += read_rows(item, masks=False)
            continue
        images = [item] if item.is_file() else [i for i in list_images(item) if not _is_own(i)]
        samples += [Sample(image, None, "input") for image in images]
    if not samples:
        raise UserError(f"there are no images in {', '.join(map(str, inputs))}")
    repeated = [stem for stem, n in Counter(own.image.stem for own in samples).items() if n > 1]
    if repeated:
        raise UserError(f"two images are called {repeated[0]!r}: their masks would collide")
    return samples


def _is_own(image: Path) -> bool:
    """Returns whether ``predict_run`` wrote a file."""
    if not image.name.endswith(ENDINGS):
        return False
    try:
        if image.suffix == ".tif":
            return software_of(image) == SOFTWARE
        with large_images(), open_image(image) as opened:
            return opened.info.get("Software") == SOFTWARE
    except Exception:  # the libraries raise many kinds; the check of the images reports it
        return False


def _targets(image: Path, output: Path) -> list[Path]:
    """The files that may be written for an image, in the order of ``ENDINGS``."""
    return [output / f"{image.stem}{ending}" for ending in ENDINGS]


def _check_targets(images: Sequence[Path], output: Path, overwrite: bool) -> None:
    """Refuses to overwrite an input, and without ``overwrite`` any file."""
    resolved = {image.resolve() for image in images}
    existing = []
    for image in images:
        for target in _targets(image, output):
            if target.resolve() in resolved:
                raise UserError(
                    f"{target} is an input, and the prediction for {image} would overwrite it; "
                    "choose another --output"
                )
            existing += [target] if target.exists() else []
    if existing and not overwrite:
        raise UserError(
            f"{len(existing)} of the files to write exist, first {existing[0]}; give --overwrite, "
            "or another --output"
        )
