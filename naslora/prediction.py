"""Prediction: images to masks and overlays, whole or by tiles."""

import contextlib
import functools
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import numpy as np
import torch
from msgspec import Meta
from PIL import Image
from torch import Tensor

from naslora.choices import OVERLAP, TileSize
from naslora.data.datasets import slices_of
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
from naslora.data.tiles import SMALLEST
from naslora.data.volumes import is_nifti, is_volume, stem_of, write_volume
from naslora.errors import UserError, listing
from naslora.files import replaced_file
from naslora.instances import COCO_FILE, InstanceFinder
from naslora.locks import locked
from naslora.manifest import Manifest
from naslora.predictor import Predictor, image_of, make_predictor, segment
from naslora.report.pictures import JPEG, class_colour, in_turn, paint
from naslora.sam.instance_config import InstanceConfig
from naslora.settings import Count, checked
from naslora.training.run_config import Pixels
from naslora.training.run_data import check_with_progress, scaling_of, shown_of, slicing_of

ENDINGS = "_mask.png", "_overlay.jpg", "_mask.tif", "_probabilities.tif"
Overlap = Annotated[float, Meta(ge=0, le=0.5)]
OVERLAY_SIDE = 4096
"""Pixels on the longer side of an overlay, at most: of larger images it has every n-th pixel."""
THREADS = 2
"""That read and write, beside the one of the model."""
Model = Predictor | InstanceFinder
Item = TypeVar("Item")
Result = TypeVar("Result")


class _Opened(NamedTuple):
    """An image that has been read, and its class map."""

    sample: Sample
    picture: Picture
    image: Tensor | None = None
    """(C, S, S) float32, of a whole image."""
    scores: Tensor | None = None
    """(K, S, S), of a whole image."""


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
    batch_size: int = 1,
    resume: bool = False,
) -> list[Path]:
    """Segments images: writes a mask for each, at the image's own size, and an overlay.

    Binary masks are 0/255, others class indices, which a palette shows in colours. Masks are
    written as they are computed. While the model computes whole images, threads read the next ones
    and write the last. Large images, by tiles, come one after another: in memory are what Pillow
    needs, unless windows of a TIFF file are read, and the class maps of as many rows as a tile has.
    An image that fits into one tile has the same mask with and without tiles.

    Processes that ``torchrun`` or ``accelerate launch`` started share the images. Each lists those
    that are done in a manifest of its own, in ``output``.

    Arguments that are not listed are the options of ``naslora predict``.

    Args:
        inputs: image files, folders of images, or CSV files as ``read_csv`` takes, of which labels
            are not read. Masks and overlays of an earlier call in such a folder are no images.
        output: created if needed; gets NAME_mask.png and NAME_overlay.jpg. For an image with a
            georeference it also gets NAME_mask.tif, which has the same. A volume gets
            NAME_mask.nii.gz, class indices in its geometry, and the overlay of its middle slice.
        on_error: called with the error of an image that cannot be read; the other images are
            segmented. If None, every image is read before the first mask is written, and the
            first error is raised.
        search: finds objects with a model of ``load_predictor`` instead, as ``InstanceFinder``.
            Masks are label images, and ``output`` also gets instances.json.

    Returns:
        The masks that were written: PNG files, and volumes.

    Raises:
        UserError: as ``load_model`` and ``load_class_map``; an image is missing or unreadable, two
            have the same name, a mask or an overlay would overwrite an input, or exists without
            ``overwrite``, the tiles are out of range, or a manifest is of another model.
    """
    checked("batch_size", batch_size, Count)
    rank, processes = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    samples = find_samples(inputs)[rank::processes]
    _check_targets([sample.image for sample in samples], output, overwrite or resume)
    if search is not None and (resume or processes > 1):
        raise UserError("--instances takes neither --resume nor several processes")
    if search is not None and (tiles is not None or outputs != DEFAULT_OUTPUTS):
        raise UserError("--instances searches by --crops, and has no --tiles, --flips or the like")
    if search is not None and (output / COCO_FILE).exists() and not overwrite:
        raise UserError(f"{output / COCO_FILE} exists; give --overwrite, or another --output")
    if tiles is not None:
        checked("tiles", SMALLEST if tiles == "auto" else tiles, Pixels)
        checked("overlap", overlap, Overlap)
    with contextlib.ExitStack() as stack:
        if rank == 0:  # the others work in its folder
            stack.enter_context(locked(output))
        if tiles is not None:
            stack.enter_context(large_images())
        predictor: Model
        if search is None:
            predictor = make_predictor(path, tiles, overlap, trust, outputs)
        else:
            predictor = InstanceFinder(path, search)
        settings = f"{tiles} {overlap} {outputs}"
        manifest = Manifest(output, [path, *outputs.members], settings, rank, resume)
        samples = [own for own in samples if own not in manifest]
        if on_error is None and len(samples) > 1:  # one image is read before anything is written
            how = slicing_of(predictor.config.data)
            check_with_progress(slices_of(samples, how), predictor.config)
        written = list(_predict(predictor, samples, output, on_error, batch_size, manifest.add))
        if isinstance(predictor, InstanceFinder):
            names = {_targets(own.image, output)[0]: own.image.name for own in samples}
            predictor.write(output / COCO_FILE, [names[mask] for mask in written])
        return written


def _predict(
    predictor: Model,
    samples: Sequence[Sample],
    output: Path,
    on_error: Callable[[UserError], None] | None,
    batch_size: int,
    done: Callable[[Sample, UserError | None], None],
) -> Iterator[Path]:
    """Reads, computes and writes whole images at the same time, others in turn, volumes last."""
    how = slicing_of(predictor.config.data)
    volumes = [sample for sample in samples if is_volume(sample.image, how)]
    samples = [sample for sample in samples if not is_volume(sample.image, how)]
    whole = isinstance(predictor, Predictor) and predictor.tiles is None
    size = batch_size if whole else 1

    def failed(sample: Sample, error: ImageError) -> None:
        if on_error is None:
            raise error
        done(sample, error)
        on_error(error)

    def computed() -> Iterator[_Opened]:
        batch: list[_Opened] = []
        read = functools.partial(_read, predictor)
        opened = _ahead(threads, read, samples, size + THREADS if whole else 0)
        for place, (sample, result) in enumerate(opened, 1):
            try:
                batch.append(result())
            except ImageError as error:
                failed(sample, error)
            if batch and (len(batch) == size or place == len(samples)):
                yield from _with_scores(predictor, batch)
                batch = []

    write = functools.partial(_write, predictor, output)
    with _threads() as threads:
        written = _ahead(threads, write, computed(), THREADS if whole else 0)
        results = ((opened.sample, result) for opened, result in written)
        segment_volume = functools.partial(_predict_volume, predictor, output, batch_size)
        for sample, result in itertools.chain(
            results, _ahead(threads, segment_volume, volumes, ahead=0)
        ):
            try:
                path = result()
            except ImageError as error:  # of which rows are read as they are needed
                failed(sample, error)
                continue
            done(sample, None)
            yield path


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that start none of torch's own, which would take the model's cores."""
    of_model = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(of_model)  # of threads that start later


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[tuple[Item, Callable[[], Result]]]:
    """The items in their order, each with what gives its result. Threads compute them ahead."""
    pending: deque[tuple[Item, Callable[[], Result]]] = deque()
    for item in items:
        if not ahead:
            yield item, functools.partial(function, item)
            continue
        pending.append((item, pool.submit(function, item).result))
        if len(pending) > ahead:
            yield pending.popleft()
    yield from pending


def _read(predictor: Model, sample: Sample) -> _Opened:
    config = predictor.config
    channels = len(config.data.channels) or None
    picture = open_picture(sample, scaling_of(config), channels=channels)
    if isinstance(predictor, InstanceFinder) or predictor.tiles is not None:
        return _Opened(sample, picture)
    image = image_of(predictor, picture.rows())
    picture.check_channels()
    return _Opened(sample, picture, image)


def _with_scores(predictor: Model, batch: list[_Opened]) -> list[_Opened]:
    images = [own.image for own in batch if own.image is not None]
    if not images or isinstance(predictor, InstanceFinder):
        return batch
    maps = predictor.class_map(torch.stack(images))
    return [
        own._replace(image=None, scores=own_map) for own, own_map in zip(batch, maps, strict=True)
    ]


def _write(predictor: Model, output: Path, opened: _Opened) -> Path:
    """Segments an image if it has no class map yet, and writes its files."""
    sample, picture, config = opened.sample, opened.picture, predictor.config
    georeference = read_georeference(sample.image)
    if isinstance(predictor, InstanceFinder):
        found = predictor.labels(picture)
        labels, kind = rows_of(found), found.dtype
    else:
        labels, kind = _segment_file(predictor, opened, output).rows, np.dtype(np.uint8)
    mask, overlay, geotiff, _ = _targets(sample.image, output)
    size = picture.height, picture.width
    binary = config.data.num_classes == 1 and config.task == "semantic"
    foreground = np.uint8(255 if binary else 1)
    with replaced_file(mask) as file:
        indexed = foreground == 1 and kind == np.uint8
        colours = [(0, 0, 0), *map(class_colour, range(1, 256))] if indexed else None
        write_png(file, size, _times(labels, size, foreground), colours)
    _write_overlay(predictor, picture, labels, overlay)
    if georeference:
        with replaced_file(geotiff) as file:
            bands = _times(labels, size, foreground)
            write_tiff(file, bands, size, kind, georeference)
    return mask


def _times(labels: Rows, size: tuple[int, int], factor: np.uint8) -> Iterator[np.ndarray]:
    return (rows * factor for rows in in_pieces(labels, size[0]))


def _segment_file(predictor: Predictor, opened: _Opened, output: Path) -> LabelFile:
    """Segments an image into a file, and writes its probabilities if they are wanted.

    Raises:
        ImageError: the image is damaged, or a channel has only NaN. Nothing is written then.
    """
    sample, picture = opened.sample, opened.picture
    labels = LabelFile(output, picture.width)
    bands = segment(predictor, picture, labels, opened.scores)
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


def _predict_volume(predictor: Model, output: Path, batch_size: int, sample: Sample) -> Path:
    """Segments the slices of a volume, and writes its files. Nothing is written of a bad one."""
    if isinstance(predictor, InstanceFinder):
        raise UserError(f"--instances takes images, and {sample.image} is a volume")
    config, kind = predictor.config, predictor.outputs.probabilities
    how = slicing_of(config.data)
    slices, labels, shares = slices_of([sample], how), [], []
    for start in range(0, len(slices), batch_size):
        batch = [_read(predictor, own) for own in slices[start : start + batch_size]]
        for opened in _with_scores(predictor, batch):
            picture, file = opened.picture, LabelFile(output, opened.picture.width)
            bands = [
                _stored(kind, band) if kind else band[:0]
                for band in segment(predictor, picture, file, opened.scores)
            ]
            picture.check_channels()
            labels.append(file.rows(0, picture.height))
            shares.append(np.concatenate(bands))
    _, overlay, mask, probabilities = _targets(sample.image, output)
    middle = len(slices) // 2
    picture = _read(predictor, slices[middle]).picture
    _write_overlay(predictor, picture, rows_of(labels[middle]), overlay)
    for target, parts in [(mask, labels), *([(probabilities, shares)] if kind else [])]:
        with replaced_file(target) as path:
            write_volume(path, sample.image, parts, how.axis)
    return mask


def _write_overlay(predictor: Model, picture: Picture, labels: Rows, path: Path) -> None:
    """Paints the labels on the image, if that is wanted."""
    config = predictor.config
    if isinstance(predictor, Predictor) and not predictor.outputs.overlays:
        return
    step = -(-max(picture.height, picture.width) // OVERLAY_SIDE)
    image, shown = (
        np.concatenate(
            [part[::step, ::step].copy() for part in in_pieces(rows, picture.height, STRIP * step)]
        )
        for rows in (picture.rows, labels)
    )
    names = ["background", *config.data.class_names]
    if config.task == "promptable":
        shown, names = in_turn(shown)
    painted = paint(image[..., shown_of(config)], shown, names)
    with replaced_file(path) as file:
        Image.fromarray(painted).save(file, **JPEG, comment=SOFTWARE)


def _stored(kind: str, probabilities: np.ndarray) -> np.ndarray:
    return np.rint(255 * probabilities).astype(np.uint8) if kind == "uint8" else probabilities


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
    repeated = [stem for stem, n in Counter(stem_of(own.image) for own in samples).items() if n > 1]
    if repeated:
        raise UserError(f"two images are called {repeated[0]!r}: their masks would collide")
    return samples


def _is_own(image: Path) -> bool:
    """Returns whether ``predict_run`` wrote a file."""
    if is_nifti(image):
        return image.name.endswith(("_mask.nii.gz", "_probabilities.nii.gz"))
    if not image.name.endswith(ENDINGS):
        return False
    try:
        if image.suffix == ".tif":
            return software_of(image) == SOFTWARE
        with large_images(), open_image(image) as opened:
            info = opened.info
            return info.get("Software") == SOFTWARE or info.get("comment") == SOFTWARE.encode()
    except Exception:  # the libraries raise many kinds; the check of the images reports it
        return False


def _targets(image: Path, output: Path) -> list[Path]:
    """The files that may be written for an image, in the order of ``ENDINGS``."""
    kind = ".nii.gz" if is_nifti(image) else ".tif"
    return [output / f"{stem_of(image)}{ending.replace('.tif', kind)}" for ending in ENDINGS]


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
