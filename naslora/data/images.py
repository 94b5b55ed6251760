"""The samples of a data set, and decoding of their images.

Pillow decodes files as a whole. Of TIFF files of colours or of more than 8 bits (``tiff.py``), and
of NumPy files, windows are read, so that they need not fit into the memory.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from naslora.data.picture import ImageError, Intensity, Picture, Source, joined, readable
from naslora.data.tiff import open_tiff, starts_with
from naslora.data.volumes import Slice, read_slice

Encoding = Literal["labels", "threshold", "nonzero", "thirds"]


class Annotation(NamedTuple):
    """A mask that is drawn, because it has no file of its own."""

    path: Path
    """The file that holds it together with others; for messages."""
    content: bytes
    """What ``regions.draw_annotation`` draws."""

    def open(self, _: str) -> io.BytesIO:
        """Opens the content, as ``Path.open`` does a file."""
        return io.BytesIO(self.content)

    def __str__(self) -> str:
        return str(self.path)


class Sample(NamedTuple):
    """One image with its mask."""

    image: Path
    """File of the image."""
    mask: Path | Annotation | None
    """File of the mask, or what it is drawn from; None for an image without one."""
    origin: str
    """The entry that names the files, such as "train.csv row 2". Messages start with it."""
    encoding: Encoding = "labels"
    """How the mask stores its labels; see ``read_mask``."""
    group: str | None = None
    """Part of the split that also gets its own scores; None for none."""
    further: tuple[Path, ...] = ()
    """Files with further channels of the image."""
    slice: Slice | None = None
    """What is taken of the files, which are volumes; None for images."""

    @property
    def at(self) -> str:
        """The number of the slice, for what names the image; empty for images."""
        return "" if self.slice is None else f" slice {self.slice.number}"

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the image."""
        return self.image, *self.further


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are read. Pillow reads some others by calling a program, such as Ghostscript."""


def open_picture(
    sample: Sample, intensity: Intensity | None = None, channels: int | None = None
) -> Picture:
    """Opens the image of a sample upright: rotated by its EXIF orientation.

    Palette indices become colours. The alpha channel is dropped.

    Args:
        sample: only its image is read.
        intensity, channels: as in ``Picture``. With ``channels`` the pages of a TIFF file are
            channels, too.

    Raises:
        ImageError: a file is missing, truncated, not an image, or has an unsupported pixel type;
            the files of an image do not fit together; as ``Picture``.
    """
    sources = []
    most = 0 if sample.further else channels  # of each of several files, all channels are taken
    for path in sample.files:
        where = f"{sample.origin}: image {path}{sample.at}"
        if sample.slice is not None:
            sources.append(source_of_array(read_slice(path, sample.slice, where)))
            continue
        with readable(where):
            source = _open_array(path, where) or open_tiff(path, where, most)
        sources.append(source or source_of(open_upright(path, where).image))
    where = f"{sample.origin}: image {sample.image}{sample.at}"
    return Picture(joined(sources, where), where, intensity, channels)


def _open_array(path: Path, where: str) -> Source | None:
    """Opens a NumPy file, (H, W), (H, W, C) or (C, H, W), C the smaller; None if it is none."""
    if not starts_with(path, (b"\x93NUMPY",)):
        return None
    array = np.load(path, mmap_mode="r")
    if array.ndim == 3 and array.shape[0] < array.shape[2]:
        array = np.moveaxis(array, 0, 2)
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif":
        raise ImageError(f"{where} holds {array.dtype} of {array.ndim} axes, and no image")
    return source_of_array(array)


def source_of_array(array: np.ndarray) -> Source:
    """The pixels of an array, (H, W) or (H, W, C)."""
    height, width = array.shape[:2]
    return Source(height, width, lambda top, bottom, left, right: array[top:bottom, left:right])


def source_of(image: Image.Image) -> Source:
    """The pixels of an image of Pillow: greys of any number of bits, or RGB."""

    def values(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        part = image.crop((left, top, right, bottom))
        if part.mode not in ("L", "I", "F") and not part.mode.startswith("I;16"):
            part = part.convert("RGB")
        return np.asarray(part)

    return Source(image.height, image.width, values)


# ---- Pillow --------------------------------------------------------------------------------------


@contextmanager
def large_images() -> Iterator[None]:
    """Lets Pillow read images of any size while the body runs.

    Pillow refuses more than 179 megapixels, because a small file may hold a picture that fills the
    memory.
    """
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def open_image(path: Path) -> ImageFile.ImageFile:
    """Calls Pillow's ``Image.open`` for ``FORMATS``."""
    try:
        image = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(FORMATS)}") from error
    if image.format == "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
        image.filename = ""  # else Pillow 13 maps the file to memory with width and height swapped
    return image


class Upright(NamedTuple):
    """A decoded image, rotated by its EXIF orientation."""

    image: Image.Image
    lossy: bool
    """Whether the compression changes values."""
    shortened: bool
    """Whether the file has colours of 16 bits, of which Pillow keeps the upper 8."""


def open_upright(path: Path, where: str) -> Upright:
    """Decodes an image file, and rotates it by its EXIF orientation.

    ``where`` is the start of an error message: the origin and the path.

    Raises:
        ImageError: the file is missing, truncated or not an image.
    """
    with readable(where), open_image(path) as image:
        shortened = image.mode[0] != "I" and any(";16" in str(t.args) for t in image.tile)
        # In place: a copy of a large image costs as much memory as the image.
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        lossy = _is_lossy(image, path)
        photometric = getattr(image, "tag_v2", {}).get(262)
        if photometric == 0 and image.mode.startswith("I;16"):  # white; Pillow inverts 8 bits only
            return Upright(Image.fromarray(65535 - np.asarray(image)), lossy, shortened)
        return Upright(image, lossy, shortened)


def _is_lossy(image: Image.Image, path: Path) -> bool:
    if image.format != "WEBP":
        return image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg"
    kind = re.search(rb"VP8[ L]", path.read_bytes())  # the chunk that holds the pixels
    return kind is None or kind.group() == b"VP8 "
