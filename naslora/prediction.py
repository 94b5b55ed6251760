"""Prediction: images to masks and overlays, whole or by tiles."""

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from naslora.choices import OVERLAP, TileSize
from naslora.data.dataset import resize_image
from naslora.data.geotiff import read_georeference, write_geotiff
from naslora.data.images import Sample, large_images, open_image, read_image
from naslora.data.large import LargeImage, read_large
from naslora.data.layouts import list_images
from naslora.data.png import PngWriter
from naslora.data.tiles import SMALLEST, Grid, Tiles, check_tiles, fit_tiles
from naslora.errors import UserError
from naslora.files import reading, replaced_file
from naslora.locks import locked
from naslora.report.pictures import paint_bands
from naslora.sam.export import ClassMap, load_class_map
from naslora.sam.segmentation import labels_of
from naslora.sam.shipped import NONE
from naslora.trained import load_model
from naslora.training.accelerator import make_accelerator
from naslora.training.resolve import resolve
from naslora.training.run_config import DataConfig, ModelConfig, RunConfig
from naslora.training.run_data import check_with_progress, scaling_of, tiles_of

MASK_ENDING, OVERLAY_ENDING, GEOTIFF_ENDING = "_mask.png", "_overlay.png", "_mask.tif"
_SOFTWARE = "naslora predict"
"""The program's name in the files that ``predict_run`` writes, by which it knows them."""
_SOFTWARE_TAG = 305
"""The tag of a TIFF file that holds it."""

LABELLED_ROWS = 64
"""Rows of a class map that become labels at once, because labels have 8 bytes at first."""


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model that segments images."""

    class_map: ClassMap
    """Maps (B, 3, S, S) images in [0, 1] to (B, K, S, S) scores, both on the CPU."""
    config: RunConfig
    tiles: Tiles | None
    """How images are cut; None takes them whole."""


def predict_run(
    path: Path,
    inputs: Sequence[Path],
    output: Path,
    on_error: Callable[[UserError], None] | None = None,
    tiles: TileSize | None = None,
    overlap: float = OVERLAP,
    trust: bool = False,
) -> list[Path]:
    """Segments images: writes a mask and an overlay for each, at the image's own size.

    Binary masks are 0/255, others class indices. Images are read one after another, so that the
    memory depends on the largest of them only: 4 bytes a pixel, with tiles as few as the image has
    channels (``LargeImage``). With tiles the class maps of as many rows as a tile has are in memory
    as well. Masks and overlays are written as the rows come.

    Args:
        path: a run's folder, a merged model's, or a file that ``export_run`` wrote.
        inputs: image files, or folders of images. Masks and overlays of an earlier call in such a
            folder are no images.
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

    Returns:
        The PNG masks that were written.

    Raises:
        UserError: as ``load_model`` and ``load_class_map``; an image is missing or unreadable, two
            have the same name, a mask or an overlay would overwrite an input, or the tiles are out
            of range.
    """
    images = _find_images(inputs)
    _check_targets(images, output)
    if tiles is not None:
        check_tiles(Tiles(SMALLEST if tiles == "auto" else tiles, overlap))
    with locked(output), large_images() if tiles is not None else contextlib.nullcontext():
        predictor = _load_predictor(path, tiles, overlap, trust)
        samples = [Sample(image, None, "input") for image in images]
        if on_error is None and len(samples) > 1:  # one image is read before anything is written
            check_with_progress(samples, predictor.config)
        return list(_predict(predictor, samples, output, on_error))


def _predict(
    predictor: Predictor,
    samples: list[Sample],
    output: Path,
    on_error: Callable[[UserError], None] | None,
) -> Iterator[Path]:
    scaling = scaling_of(predictor.config)
    for sample in samples:
        try:
            if predictor.tiles is None:
                image = LargeImage(read_image(sample, scaling))
            else:
                image = read_large(sample, scaling)
            georeference = read_georeference(sample.image)
        except UserError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        stem = sample.image.stem
        mask = output / f"{stem}{MASK_ENDING}"
        _write_pictures(predictor, image, mask, output / f"{stem}{OVERLAY_ENDING}")
        del image  # before the next one is read
        if georeference:
            with replaced_file(output / f"{stem}{GEOTIFF_ENDING}") as temporary:
                write_geotiff(temporary, mask, georeference, _SOFTWARE)
        yield mask


def _write_pictures(predictor: Predictor, image: LargeImage, mask: Path, overlay: Path) -> None:
    """Segments an image and writes both files, row by row as the labels come."""
    config = predictor.config
    foreground = 255 if config.data.num_classes == 1 else 1
    segmented = segment(predictor, image)
    first = next(segmented)  # before a file is created
    with contextlib.ExitStack() as files:
        writers = [
            PngWriter(
                files.enter_context(open(files.enter_context(replaced_file(path)), "wb")),
                image.width,
                image.height,
                channels,
                {"Software": _SOFTWARE},
            )
            for path, channels in ((mask, 1), (overlay, 3))
        ]

        def bands() -> Iterator[np.ndarray]:
            for labels in itertools.chain([first], segmented):
                writers[0].write(labels * np.uint8(foreground))
                yield labels

        names = ["background", *config.data.class_names]
        for painted in paint_bands(image.rows, bands(), names):
            writers[1].write(painted)


# ---- Segmenting ----------------------------------------------------------------------------------


def segment(predictor: Predictor, image: LargeImage) -> Iterator[np.ndarray]:
    """Segments an image.

    Yields:
        (n, W) uint8 labels of its rows, from the top to the bottom.
    """
    grid = None if predictor.tiles is None else Grid(predictor.tiles, image.height, image.width)
    if grid is None or len(grid) == 1:
        labels = labels_of(scores_of(predictor, image.crop(image.box)))[0].numpy().astype(np.uint8)
        size = image.width, image.height
        yield np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
        return
    maps = (scores_of(predictor, image.crop(box))[0] for box in grid.boxes())
    for _, band in grid.blend(maps):
        for scores in band.split(LABELLED_ROWS, dim=1):
            yield labels_of(scores[None])[0].numpy().astype(np.uint8)
        del band, scores  # before the next row of tiles is computed


@torch.no_grad()
def scores_of(predictor: Predictor, picture: Image.Image) -> Tensor:
    """The (1, K, S, S) class map of an RGB image or of a tile."""
    pixels = resize_image(picture, predictor.config.model.image_size)
    return predictor.class_map(transforms.to_dtype(pixels, torch.float32, scale=True)[None])


def _load_predictor(path: Path, tiles: TileSize | None, overlap: float, trust: bool) -> Predictor:
    """Loads a folder or an exported file."""
    if path.is_file():
        class_map, held = load_class_map(path, trust)
        with reading(path):
            data = DataConfig(
                num_classes=held.num_classes,
                class_names=held.class_names,
                crop=held.crop,
                intensity=held.intensity,
            )
            own = ModelConfig(held.model, NONE, held.image_size)
            config = resolve(RunConfig(data=data, model=own))
    else:
        model, config = load_model(path)
        model.to(make_accelerator(config.training).device)

        def class_map(images: Tensor) -> Tensor:
            return model(images.to(model.pixel_mean.device)).class_map().cpu()

    if tiles is None:
        return Predictor(class_map, config, None)
    side = tiles_of(config).size if tiles == "auto" else tiles
    return Predictor(class_map, config, fit_tiles(side, config.model.image_size, overlap))


# ---- Files ---------------------------------------------------------------------------------------


def _find_images(inputs: Sequence[Path]) -> list[Path]:
    if not inputs:
        raise UserError("there is nothing to segment: give at least one IMAGE, a file or a folder")
    images = [
        image
        for item in inputs
        for image in (
            [item] if item.is_file() else [i for i in list_images(item) if not _is_own(i)]
        )
    ]
    if not images:
        raise UserError(f"there are no images in {', '.join(map(str, inputs))}")
    repeated = [stem for stem, n in Counter(image.stem for image in images).items() if n > 1]
    if repeated:
        raise UserError(f"two images are called {repeated[0]!r}: their masks would collide")
    return images


def _is_own(image: Path) -> bool:
    """Returns whether ``predict_run`` wrote a file."""
    if not image.name.endswith((MASK_ENDING, OVERLAY_ENDING, GEOTIFF_ENDING)):
        return False
    try:
        with large_images(), open_image(image) as opened:
            tags = getattr(opened, "tag_v2", {})  # of TIFF files
            return _SOFTWARE in (opened.info.get("Software"), tags.get(_SOFTWARE_TAG))
    except Exception:  # Pillow raises many kinds; the check of the images reports it
        return False


def _check_targets(images: Sequence[Path], output: Path) -> None:
    """Refuses to overwrite an input."""
    resolved = {image.resolve() for image in images}
    for image in images:
        for ending in (MASK_ENDING, OVERLAY_ENDING, GEOTIFF_ENDING):
            target = output / f"{image.stem}{ending}"
            if target.resolve() in resolved:
                raise UserError(
                    f"{target} is an input, and the prediction for {image} would overwrite it; "
                    "choose another --output"
                )
