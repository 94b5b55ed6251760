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
from naslora.predictor import Predictor, make_predictor
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
Item = TypeVar("Item")
Result = TypeVar("Result")
Pending = Iterable[tuple[Sample, Callable[[], Result]]]
"""Images, and what gives the result of each."""


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
        finder = None if search is None else InstanceFinder(path, search)
        predictor = finder or make_predictor(path, tiles, overlap, trust, outputs)
        settings = f"{tiles} {overlap} {outputs}"
        manifest = Manifest(output, [path, *outputs.members], settings, rank, resume)
        samples = [own for own in samples if own not in manifest]
        writer = _Writer(predictor, output, batch_size)
        if on_error is None and len(samples) > 1:  # one image is read before anything is written
            check_with_progress(slices_of(samples, writer.slicing), predictor.config)
        written = list(writer.write_all(samples, on_error, manifest.add))
        if finder is not None:
            names = {_targets(own.image, output)[0]: own.image.name for own in samples}
            finder.write(output / COCO_FILE, [names[mask] for mask in written])
        return written


# ---- Segmenting ----------------------------------------------------------------------------------


class _Opened(NamedTuple):
    """An image that has been read."""

    sample: Sample
    picture: Picture
    values: Tensor | None
    """Of an image that is taken whole: (C, S, S) float32, and once computed (K, S, S) scores."""


class _Writer:
    """Segments images, and writes their files to a folder."""

    def __init__(
        self, predictor: Predictor | InstanceFinder, output: Path, batch_size: int
    ) -> None:
        self.predictor, self.output, self.batch_size = predictor, output, batch_size
        self.config = predictor.config
        self.slicing = slicing_of(self.config.data)

    def write_all(
        self,
        samples: Sequence[Sample],
        on_error: Callable[[UserError], None] | None,
        done: Callable[[Sample, UserError | None], None],
    ) -> Iterator[Path]:
        """Reads, computes and writes whole images at the same time, others in turn, volumes last.

        Yields the masks. ``done`` is called for each image, ``on_error`` as in ``predict_run``.
        """
        volumes = [sample for sample in samples if is_volume(sample.image, self.slicing)]
        images = [sample for sample in samples if not is_volume(sample.image, self.slicing)]
        whole = isinstance(self.predictor, Predictor) and self.predictor.tiles is None
        size, ahead = (self.batch_size, THREADS) if whole else (1, 0)

        def finished(pending: Pending[Result]) -> Iterator[tuple[Sample, Result]]:
            for sample, result in pending:
                try:
                    found = result()
                except ImageError as error:  # also in writing: some rows are read as needed
                    if on_error is None:
                        raise
                    done(sample, error)
                    on_error(error)
                else:
                    yield sample, found

        with _threads() as threads:
            read = _ahead(threads, self._read, images, ahead and size + ahead)
            opened = (own for _, own in finished(read))
            batches = iter(lambda: list(itertools.islice(opened, size)), [])
            computed = itertools.chain.from_iterable(map(self._with_scores, batches))
            written = _ahead(threads, self._write, computed, ahead)
            masks = ((own.sample, result) for own, result in written)
            others = _ahead(threads, self._write_volume, volumes, 0)
            for sample, mask in finished(itertools.chain(masks, others)):
                done(sample, None)
                yield mask

    def _read(self, sample: Sample) -> _Opened:
        channels = len(self.config.data.channels) or None
        picture = open_picture(sample, scaling_of(self.config), channels=channels)
        if isinstance(self.predictor, InstanceFinder) or self.predictor.tiles is not None:
            return _Opened(sample, picture, None)
        image = self.predictor.image_of(picture.rows())
        picture.check_channels()
        return _Opened(sample, picture, image)

    def _with_scores(self, batch: list[_Opened]) -> list[_Opened]:
        images = [own.values for own in batch if own.values is not None]
        if not images or isinstance(self.predictor, InstanceFinder):
            return batch
        maps = self.predictor.class_map(torch.stack(images))
        return [own._replace(values=scores) for own, scores in zip(batch, maps, strict=True)]

    def _write(self, opened: _Opened) -> Path:
        """Segments an image, and writes its files."""
        sample, picture, _ = opened
        georeference = read_georeference(sample.image)
        if isinstance(self.predictor, InstanceFinder):
            found = self.predictor.labels(picture)
            labels, kind = rows_of(found), found.dtype
        else:
            labels, kind = self._segment(self.predictor, opened).rows, np.dtype(np.uint8)
        mask, overlay, geotiff, _ = _targets(sample.image, self.output)
        size = picture.height, picture.width
        binary = self.config.data.num_classes == 1 and self.config.task == "semantic"
        foreground = np.uint8(255 if binary else 1)

        def bands() -> Iterator[np.ndarray]:
            return (rows * foreground for rows in in_pieces(labels, size[0]))

        with replaced_file(mask) as file:
            indexed = foreground == 1 and kind == np.uint8
            colours = [(0, 0, 0), *map(class_colour, range(1, 256))] if indexed else None
            write_png(file, size, bands(), colours)
        self._write_overlay(picture, labels, overlay)
        if georeference:
            with replaced_file(geotiff) as file:
                write_tiff(file, bands(), size, kind, georeference)
        return mask

    def _segment(self, predictor: Predictor, opened: _Opened) -> LabelFile:
        """Segments an image into a file, and writes its probabilities if they are wanted.

        Raises:
            ImageError: the image is damaged, or a channel has only NaN. Nothing is written then.
        """
        sample, picture, scores = opened
        labels = LabelFile(self.output, picture.width)
        bands = predictor.segment(picture, labels, scores)
        kind = predictor.outputs.probabilities
        if kind is None:
            deque(bands, maxlen=0)
            picture.check_channels()
            return labels
        with replaced_file(_targets(sample.image, self.output)[3]) as file:
            first = next(bands)
            shape = picture.height, picture.width, *first.shape[2:]
            everything = (_stored(kind, band) for band in itertools.chain([first], bands))
            write_tiff(file, everything, shape, np.dtype(kind), read_georeference(sample.image))
            picture.check_channels()
        return labels

    def _write_volume(self, sample: Sample) -> Path:
        """Segments the slices of a volume, and writes its files; none of a bad one."""
        predictor = self.predictor
        if isinstance(predictor, InstanceFinder):
            raise UserError(f"--instances takes images, and {sample.image} is a volume")
        kind, labels, shares = predictor.outputs.probabilities, [], []
        slices = slices_of([sample], self.slicing)
        pending = map(self._read, slices)
        while batch := list(itertools.islice(pending, self.batch_size)):
            for _, picture, scores in self._with_scores(batch):
                file = LabelFile(self.output, picture.width)
                bands = [
                    _stored(kind, band) if kind else band[:0]
                    for band in predictor.segment(picture, file, scores)
                ]
                picture.check_channels()
                labels.append(file.rows(0, picture.height))
                shares.append(np.concatenate(bands))
        _, overlay, mask, probabilities = _targets(sample.image, self.output)
        middle = len(slices) // 2
        picture = self._read(slices[middle]).picture
        self._write_overlay(picture, rows_of(labels[middle]), overlay)
        for target, parts in [(mask, labels), *([(probabilities, shares)] if kind else [])]:
            with replaced_file(target) as path:
                write_volume(path, sample.image, parts, self.slicing.axis)
        return mask

    def _write_overlay(self, picture: Picture, labels: Rows, path: Path) -> None:
        """Paints the labels on the image, if that is wanted."""
        if isinstance(self.predictor, Predictor) and not self.predictor.outputs.overlays:
            return
        step = -(-max(picture.height, picture.width) // OVERLAY_SIDE)
        image, shown = (
            np.concatenate(
                [
                    own[::step, ::step].copy()
                    for own in in_pieces(rows, picture.height, STRIP * step)
                ]
            )
            for rows in (picture.rows, labels)
        )
        names = ["background", *self.config.data.class_names]
        if self.config.task == "promptable":
            shown, names = in_turn(shown)
        painted = paint(image[..., shown_of(self.config)], shown, names)
        with replaced_file(path) as file:
            Image.fromarray(painted).save(file, **JPEG, comment=SOFTWARE)


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
    if not ahead:
        yield from ((item, functools.partial(function, item)) for item in items)
        return
    pending: deque[tuple[Item, Callable[[], Result]]] = deque()
    for item in items:
        pending.append((item, pool.submit(function, item).result))
        if len(pending) > ahead:
            yield pending.popleft()
    yield from pending


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
