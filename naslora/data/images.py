"""The samples of a data set, and decoding of their images."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from naslora.data.intensity import Intensity, scale
from naslora.data.tiff import read_tiff
from naslora.errors import UserError

Encoding = Literal["labels", "threshold", "nonzero", "thirds", "regions"]


class Annotation(NamedTuple):
    """A mask that is drawn, because it has no file of its own."""

    path: Path
    """The file that holds it together with others; for messages."""
    content: bytes
    """What ``regions.draw_annotation`` draws."""

    def read_bytes(self) -> bytes:
        """Returns the content, as ``Path.read_bytes`` does of a file."""
        return self.content

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


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are read. Pillow reads some others by calling a program, such as Ghostscript."""
WHITE_IS_ZERO = (262, 0)
"""Tag and value of such TIFF files."""
GREY_ROWS = 64
"""Rows of greys of more than 8 bits that are converted at once."""


def read_image(sample: Sample, intensity: Intensity | None = None) -> Image.Image:
    """Reads an image upright and in colour.

    Args:
        sample: only its image is read.
        intensity: how values of more than 8 bits are scaled; None scales 16-bit greys by
            255 / 65535, and refuses floating-point numbers.

    Returns:
        An 8-bit RGB image, rotated by its EXIF orientation. Palette indices become colours. The
        alpha channel is dropped.

    Raises:
        UserError: the file is missing, truncated, not an image, or has an unsupported pixel type.
    """
    return decode_image(sample.image, f"{sample.origin}: image {sample.image}", intensity)


def decode_image(
    file: Path | io.BytesIO, where: str, intensity: Intensity | None = None
) -> Image.Image:
    """Decodes an image, as ``read_image``.

    Args:
        file: path or content.
        where: the start of an error message: the origin and the path.
        intensity: as in ``read_image``.

    Raises:
        UserError: as ``read_image``.
    """
    if intensity is None:
        return to_rgb(open_upright(file, where).image, where)
    pixels = read_pixels(file, where, intensity)
    if pixels is not None:
        return to_rgb(Image.fromarray(pixels), where)
    return to_rgb(to_8_bits(open_upright(file, where).image, where, intensity), where)


def read_pixels(
    file: Path | io.BytesIO, where: str, intensity: Intensity | None
) -> np.ndarray | None:
    """Calls ``tiff.read_tiff``, and makes one error of all that a damaged file raises.

    Raises:
        UserError: as ``read_image``.
    """
    try:
        return read_tiff(file, where, intensity)
    except UserError:
        raise
    except Exception as error:  # tifffile raises exceptions of many types
        raise unreadable(where, error) from error


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


def open_image(file: Path | io.BytesIO) -> ImageFile.ImageFile:
    """Calls Pillow's ``Image.open`` for ``FORMATS``."""
    image = Image.open(file, formats=FORMATS)
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


def open_upright(file: Path | io.BytesIO, where: str) -> Upright:
    """Decodes an image file and rotates the image by its EXIF orientation.

    Args:
        file: path or content.
        where: the start of an error message: the origin and the path.

    Raises:
        UserError: the file is missing, truncated or not an image.
    """
    try:
        with open_image(file) as image:
            shortened = image.mode[0] != "I" and any(";16" in str(t.args) for t in image.tile)
            # In place: a copy of a large image costs as much memory as the image.
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            lossy = _is_lossy(image, file)
            tag, zero = WHITE_IS_ZERO
            if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(tag) == zero:
                inverted = Image.fromarray(65535 - np.asarray(image))  # Pillow does so for 8 bits
                return Upright(inverted, lossy, shortened)
            return Upright(image, lossy, shortened)
    # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and others.
    # Each of them means that the file is bad.
    except Exception as error:
        raise unreadable(where, error) from error


def _is_lossy(image: Image.Image, file: Path | io.BytesIO) -> bool:
    if image.format != "WEBP":
        return image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg"
    content = file.getvalue() if isinstance(file, io.BytesIO) else file.read_bytes()
    place = 12  # of the first chunk: a name, a size, and as many bytes, made even
    while place + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, place)
        if kind == b"VP8L":
            return False
        place += 8 + size + size % 2
    return True


def unreadable(where: str, error: Exception) -> UserError:
    """Makes the error for a file that cannot be read; ``where`` as in ``open_upright``."""
    if isinstance(error, UnidentifiedImageError):  # it may name a BytesIO in place of the file
        error = ValueError(f"it is none of {', '.join(FORMATS)}")
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UserError(f"{where} cannot be read ({reason}); replace the file or remove its entry")


def to_rgb(image: Image.Image, where: str) -> Image.Image:
    """Converts an image to 8-bit RGB, as ``read_image`` describes.

    Raises:
        UserError: the pixels are floating-point numbers or exceed 16 bits.
    """
    image = to_8_bits(image, where)
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise unreadable(where, error) from error


def to_8_bits(image: Image.Image, where: str, intensity: Intensity | None = None) -> Image.Image:
    """Converts greys of more than 8 bits to 8 bits; other images stay as they are.

    Args:
        image: of any mode.
        where: the start of an error message.
        intensity: as in ``read_image``.

    Raises:
        UserError: without ``intensity``: the pixels are floating-point numbers or exceed 16 bits.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    if intensity is not None:
        return Image.fromarray(scale(np.asarray(image), intensity))
    if image.mode == "F":
        raise UserError(
            f"{where} has floating-point pixels; give --intensity, or save it with 8 or 16 bits"
        )
    greys = np.empty((image.height, image.width), np.uint8)
    for top in range(0, image.height, GREY_ROWS):  # by bands, to bound the memory for 4-byte values
        bottom = min(top + GREY_ROWS, image.height)
        values = np.asarray(image.crop((0, top, image.width, bottom))).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{where} has grey values beyond 16 bits; save it with 8 or 16 bits")
        greys[top:bottom] = (values * 255 + 32767) // 65535
    return Image.fromarray(greys)
