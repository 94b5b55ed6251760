"""Prediction: images to masks and overlays, whole or by tiles."""

import contextlib
import dataclasses
import functools
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from naslora.choices import OVERLAP, TileSize
from naslora.data.dataset import resize_image
from naslora.data.images import Sample, large_images, open_image, open_picture
from naslora.data.layouts import list_images, read_rows
from naslora.data.picture import ImageError, Picture
from naslora.data.tiff import GeoTags, read_georeference
from naslora.data.tiles import SMALLEST, Grid, Tiles
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
from naslora.training.run_config import DataConfig, ModelConfig, Pixels, RunConfig
from naslora.training.run_data import check_with_progress, scaling_of, shown_of, tiles_of

ENDINGS = "_mask.png", "_overlay.png", "_mask.tif"
_SOFTWARE = "naslora predict"
"""The program's name in the files that ``predict_run`` writes, by which it knows them."""
_SOFTWARE_TAG = 305
"""The tag of a TIFF file that holds it."""

Overlap = Annotated[float, Meta(ge=0, le=0.5)]
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
    overwrite: bool = False,
    search: InstanceConfig | None = None,
) -> list[Path]:
    """Segments images: writes a mask and an overlay for each, at the image's own size.

    Binary masks are 0/255, others class indices, which a palette shows in colours. Images are read
    one after another, so that the memory depends on the largest of them only: 1 byte a pixel for
    the mask, and what Pillow needs, unless a TIFF file is read row by row. With tiles the class
    maps of as many rows as a tile has are in memory as well.

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
    if search is not None and tiles is not None:
        raise UserError("--instances searches large images by --crops, not by --tiles")
    if search is not None and (output / COCO_FILE).exists() and not overwrite:
        raise UserError(f"{output / COCO_FILE} exists; give --overwrite, or another --output")
    if tiles is not None:
        checked("tiles", SMALLEST if tiles == "auto" else tiles, Pixels)
        checked("overlap", overlap, Overlap)
    with locked(output), large_images() if tiles is not None else contextlib.nullcontext():
        predictor: Predictor | InstanceFinder
        if search is None:
            predictor = _load_predictor(path, tiles, overlap, trust)
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
                labels = predictor.labels(picture)
            else:
                labels = segment(predictor, picture)
            picture.check_channels()
        except ImageError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        mask, overlay, geotiff = _targets(sample.image, output)
        numbers = config.task == "promptable"
        foreground = np.uint8(255 if config.data.num_classes == 1 and not numbers else 1)
        with replaced_file(mask) as file:
            indexed = foreground == 1 and labels.dtype == np.uint8
            colours = [(0, 0, 0), *map(class_colour, range(1, 256))] if indexed else None
            bands = (labels[top:bottom] * foreground for top, bottom in picture.bands())
            write_png(file, picture, bands, colours)
        with replaced_file(overlay) as file:
            names = ["background", *config.data.class_names]
            shown, names = in_turn(labels) if numbers else (labels, names)
            rgb = functools.partial(_rgb_rows, picture, shown_of(config))
            write_png(file, picture, paint_bands(rgb, shown, names))
        if georeference:
            with replaced_file(geotiff) as file:
                write_geotiff(file, labels * foreground, georeference)
        yield mask


def _rgb_rows(picture: Picture, shown: list[int], top: int, bottom: int) -> np.ndarray:
    return picture.rows(top, bottom)[..., shown]


def write_png(
    path: Path,
    size: Picture,
    bands: Iterable[np.ndarray],
    palette: Sequence[tuple[int, int, int]] | None = None,
) -> None:
    """Writes a PNG file of 8 or 16 bits as its rows come. Pillow needs the whole image for that.

    Args:
        path: the file.
        size: an image of the same height and width.
        bands: (n, W) greys, uint8 or uint16, or (n, W, 3) RGB, uint8, from the top to the bottom.
        palette: the RGB colours that viewers show in place of greys 0, 1, ...; None for none.
    """
    with open(path, "wb") as file:

        def write_chunk(kind: bytes, data: bytes) -> None:
            checksum = zlib.crc32(data, zlib.crc32(kind))
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum))

        compressor, above = zlib.compressobj(), None
        for band in bands:
            big = np.ascontiguousarray(band, band.dtype.newbyteorder(">"))
            rows = big.view(np.uint8).reshape(len(band), -1)
            if above is None:
                file.write(b"\x89PNG\r\n\x1a\n")
                # PNG's number for RGB, for greys and for indices of a palette
                kind = 2 if band.ndim == 3 else 0 if palette is None else 3
                depth = 8 * band.itemsize
                header = struct.pack(">2I5B", size.width, size.height, depth, kind, 0, 0, 0)
                write_chunk(b"IHDR", header)
                if palette is not None:
                    write_chunk(b"PLTE", np.array(palette, np.uint8).tobytes())
                write_chunk(b"tEXt", f"Software\0{_SOFTWARE}".encode())
                above = np.zeros_like(rows[:1])
            # The filter 2 of each row: its difference to the row above. On photographs the file is
            # as small as with a choice of filters, within 4 %.
            filtered = np.full((len(rows), 1 + rows.shape[1]), 2, np.uint8)
            np.subtract(rows, np.concatenate([above, rows[:-1]]), out=filtered[:, 1:])
            above = rows[-1:].copy()
            write_chunk(b"IDAT", compressor.compress(filtered.tobytes()))
        write_chunk(b"IDAT", compressor.flush())
        write_chunk(b"IEND", b"")


def write_geotiff(path: Path, mask: np.ndarray, georeference: GeoTags) -> None:
    """Writes an (H, W) uint8 mask with a georeference from ``read_georeference``."""
    import tifffile  # imported here: few images need it

    tifffile.imwrite(
        path,
        mask,
        photometric="minisblack",
        compression="zlib",
        metadata=None,
        software=_SOFTWARE,
        extratags=georeference,
    )


# ---- Segmenting ----------------------------------------------------------------------------------


def segment(predictor: Predictor, picture: Picture) -> np.ndarray:
    """Segments an image. Returns (H, W) uint8 labels."""
    height, width = picture.height, picture.width
    grid = None if predictor.tiles is None else Grid(predictor.tiles, height, width)
    if grid is None or len(grid) == 1:
        labels = labels_of(scores_of(predictor, picture.rows()))[0].numpy().astype(np.uint8)
        return np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
    rows_of = functools.lru_cache(1)(picture.rows)  # tiles of one row share them
    maps = (
        scores_of(predictor, rows_of(box.top, box.bottom)[:, box.left : box.right])[0]
        for box in grid.boxes()
    )
    labels = np.empty((height, width), np.uint8)
    for top, band in grid.blend(maps):
        for start in range(0, band.shape[1], LABELLED_ROWS):
            scores = band[None, :, start : start + LABELLED_ROWS]
            found = labels_of(scores)[0].numpy()
            labels[top + start : top + start + len(found)] = found
        del band, scores  # before the next row of tiles is computed
    return labels


@torch.no_grad()
def scores_of(predictor: Predictor, pixels: np.ndarray) -> Tensor:
    """The (1, K, S, S) class map of (H, W, C) uint8."""
    image = resize_image(pixels, predictor.config.model.image_size)
    return predictor.class_map(transforms.to_dtype(image, torch.float32, scale=True)[None])


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
                channels=held.channels,
                shown=held.shown,
            )
            own = ModelConfig(held.model, NONE, held.image_size)
            config = resolve(RunConfig(data=data, model=own))
    else:
        model, config = load_model(path)
        if config.task == "promptable":
            raise UserError(f"{path} {PROMPTS}")
        model.to(make_accelerator(config.training).device)

        def class_map(images: Tensor) -> Tensor:
            return model(images.to(model.pixel_mean.device)).class_map().cpu()

    if tiles is None:
        return Predictor(class_map, config, None)
    side = None if tiles == "auto" else tiles
    return Predictor(class_map, config, tiles_of(config, side, overlap))


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
        with large_images(), open_image(image) as opened:
            tags = getattr(opened, "tag_v2", {})  # of TIFF files
            return _SOFTWARE in (opened.info.get("Software"), tags.get(_SOFTWARE_TAG))
    except Exception:  # Pillow raises many kinds; the check of the images reports it
        return False


def _targets(image: Path, output: Path) -> list[Path]:
    """The files that may be written for an image: mask, overlay and georeferenced mask."""
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
