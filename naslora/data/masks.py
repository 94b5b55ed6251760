"""Decoding of images and masks."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps

from naslora.data.intensity import Intensity, scale
from naslora.data.regions import draw_annotation
from naslora.data.tiff import read_tiff
from naslora.errors import UserError, listing

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


GREY_ROWS = 64
"""Rows of greys of more than 8 bits that are converted at once."""

# ---- Images --------------------------------------------------------------------------------------


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
        return to_rgb(open_upright(file, where)[0], where)
    try:
        pixels = read_tiff(file, where, intensity)
    except UserError:
        raise
    except Exception as error:  # any exception, as in open_upright
        raise unreadable(where, error) from error
    if pixels is not None:
        return to_rgb(Image.fromarray(pixels), where)
    return to_rgb(to_8_bits(open_upright(file, where)[0], where, intensity), where)


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


def open_upright(file: Path | io.BytesIO, where: str) -> tuple[Image.Image, str | None]:
    """Decodes an image file and rotates the image by its EXIF orientation.

    Args:
        file: path or content.
        where: the start of an error message: the origin and the path.

    Returns:
        The image, and the name of its file format, such as "PNG".

    Raises:
        UserError: the file is missing, truncated or not an image.
    """
    try:
        with Image.open(file) as image:
            # In place: a copy of a large image costs as much memory as the image.
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image, image.format
    # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and others.
    # Each of them means that the file is bad.
    except Exception as error:
        raise unreadable(where, error) from error


def unreadable(where: str, error: Exception) -> UserError:
    """Makes the error for a file that cannot be read; ``where`` as in ``open_upright``."""
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


# ---- Masks ---------------------------------------------------------------------------------------

IGNORED = 255
"""The label of pixels that neither the loss nor a metric counts."""


def read_mask(
    sample: Sample,
    num_classes: int,
    palette: Sequence[str] | None = None,
    ignore_index: int | None = None,
) -> np.ndarray:
    """Reads a mask as class indices.

    The sample's encoding says how the mask stores its labels:

    - "labels": grey values, and the indices of palette images, are the class indices. A mask of two
      classes may also use 0 and 255 (0 and 65535 with 16 bits). A JPEG of two classes is
      thresholded at 128. In a coloured mask of two classes, a pixel is foreground if any channel is
      not zero. With ``palette``, every mask is read by its colours.
    - "threshold": two classes; grey values from 128 of 255 on are foreground. It suits masks that
      were compressed or smoothed. A mask with no value above 1 is read as class indices.
    - "nonzero": two classes; a pixel is foreground if any channel is not zero.
    - "thirds": three classes; the mean of the channels is 0, 85 or 255.
    - "regions": the mask is an ``Annotation``. Pixels of several classes are ``IGNORED``.

    Args:
        sample: only its mask is read.
        num_classes: 1 for a binary task, with the labels 0 and 1. K >= 2 for the labels 0 .. K-1;
            label 0 is the background.
        palette: colours such as "#ff0000", one a class in order; two for a binary task.
        ignore_index: the grey value or palette index of pixels without a known class. With
            ``palette`` it is the number of the last colour, which is one more than the classes.
            None is 255 in masks of class indices of more than two classes, else no value.

    Returns:
        (H, W) int32, rotated by the EXIF orientation. ``IGNORED`` stands for ``ignore_index``.

    Raises:
        UserError: the sample has no mask, the file cannot be read, it contains labels or colours
            outside the classes, it needs a palette, or the palette is invalid.
    """
    codes = palette_codes(palette, num_classes, ignore_index)
    return decode_mask(sample, sample.mask, num_classes, codes, ignore_index)


def decode_mask(
    sample: Sample,
    file: Path | Annotation | io.BytesIO | None,
    num_classes: int,
    codes: list[int] | None,
    ignore_index: int | None = None,
) -> np.ndarray:
    """Decodes a mask, as ``read_mask``.

    Args:
        sample: its encoding is used, and its origin and mask name the file in messages.
        file: path or content of the mask.
        num_classes: as in ``read_mask``.
        codes: the palette, from ``palette_codes``.
        ignore_index: as in ``read_mask``.

    Returns:
        (H, W) int32.

    Raises:
        UserError: as ``read_mask``.
    """
    if file is None:
        raise UserError(f"{sample.origin}: image {sample.image} has no mask")
    where = f"{sample.origin}: mask {sample.mask}"
    if sample.encoding == "regions":
        content = file.getvalue() if isinstance(file, io.BytesIO) else file.read_bytes()
        return draw_annotation(content, IGNORED, where)
    assert not isinstance(file, Annotation)
    image, file_format = open_upright(file, where)
    jpeg = file_format in ("JPEG", "MPO")
    exact = codes is not None or num_classes > 2 or sample.encoding in ("nonzero", "thirds")
    if jpeg and (exact or ignore_index is not None):
        raise UserError(
            f"{where} is a JPEG, whose compression changes labels and colours; "
            "save masks of colours, of more than two classes or with ignored pixels as PNG"
        )
    if sample.encoding != "labels":
        image, ignored = _blank_ignored(image, ignore_index, where)
        labels = _DECODERS[sample.encoding](image, where).astype(np.int32, copy=False)
        return np.where(ignored, np.int32(IGNORED), labels)
    if codes is not None:
        labels = _decode_colors(np.asarray(to_rgb(image, where)), codes, where)
        if ignore_index is not None:
            labels[labels == len(codes) - 1] = IGNORED
    else:
        values = _pixel_values(image, where)
        if values.ndim == 3 and not jpeg and (values == values[..., :1]).all():
            values = values[..., 0]
        if ignore_index is None and 2 < num_classes <= IGNORED:
            ignore_index = IGNORED
        if ignore_index is not None and values.ndim == 2:
            return _decode_with_ignored(values, ignore_index, num_classes, where)
        labels = _decode_values(values, num_classes, jpeg, where)
    return labels.astype(np.int32, copy=False)


def _decode_with_ignored(
    values: np.ndarray, ignore_index: int, num_classes: int, where: str
) -> np.ndarray:
    ignored = values == ignore_index
    labels = _decode_values(np.where(ignored, 0, values), num_classes, False, where)
    return np.where(ignored, IGNORED, labels).astype(np.int32)


def _blank_ignored(
    image: Image.Image, ignore_index: int | None, where: str
) -> tuple[Image.Image, np.ndarray]:
    """Finds the ignored pixels, (H, W) bool, and returns the image with 0 in their place."""
    if ignore_index is None:
        return image, np.zeros((), bool)
    ignored = _pixel_values(image, where) == ignore_index
    if ignored.ndim == 3:
        ignored = ignored.all(axis=2)
    blank = image.copy() if image.mode in ("L", "P") else to_rgb(image, where).copy()
    blank.paste(0 if blank.mode in ("L", "P") else (0, 0, 0), mask=Image.fromarray(ignored))
    return blank, ignored


def _pixel_values(image: Image.Image, where: str) -> np.ndarray:
    """Returns (H, W) greys or palette indices, or (H, W, 3) colours; int32."""
    if image.mode == "F":
        raise UserError(f"{where} has floating-point pixels; save it with 8 or 16 bits")
    if image.mode in ("LA", "La"):
        image = image.getchannel(0)
    elif image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        image = to_rgb(image, where)
    return np.asarray(image).astype(np.int32)


def _decode_threshold(image: Image.Image, where: str) -> np.ndarray:
    rgb = np.asarray(to_rgb(image, where))  # (H, W, 3)
    values = _pixel_values(image, where)
    if image.mode == "P":
        if (rgb != rgb[..., :1]).any():  # a coloured palette only displays the indices
            return values > 0
        values = rgb[..., 0]
    if values.max() <= 1:
        return np.any(values, axis=2) if values.ndim == 3 else values > 0
    return rgb.mean(axis=2) >= 128


def _decode_nonzero(image: Image.Image, where: str) -> np.ndarray:
    return np.any(np.asarray(to_rgb(image, where)), axis=2)


def _decode_thirds(image: Image.Image, where: str) -> np.ndarray:
    means = np.asarray(to_rgb(image, where)).mean(axis=2)
    labels = np.full(means.shape, -1, dtype=np.int32)
    for label, mean in enumerate((0, 85, 255)):
        labels[means == mean] = label
    if (labels < 0).any():
        unknown = np.unique(means[labels < 0])[:8].round(1).tolist()
        raise UserError(
            f"{where} has pixels whose channels have the means {', '.join(map(str, unknown))}; "
            "expected 0 (background), 85 (things) and 255 (stuff)"
        )
    return labels


_DECODERS: dict[Encoding, Callable[[Image.Image, str], np.ndarray]] = {
    "threshold": _decode_threshold,
    "nonzero": _decode_nonzero,
    "thirds": _decode_thirds,
}


def _decode_values(values: np.ndarray, num_classes: int, jpeg: bool, where: str) -> np.ndarray:
    if values.ndim == 3:
        if jpeg:
            values = values.mean(axis=2)
        elif num_classes == 1:
            return np.any(values, axis=2)
        else:
            found = [_hex(code) for code in np.unique(_pack(values))]
            raise UserError(
                f"{where} is coloured ({listing(found)}); name the {num_classes} classes' colours "
                "in order with --palette, or save it as class indices"
            )
    highest = values.max()
    if jpeg and highest > 1:
        return values >= 128
    if values.min() >= 0 and highest < max(num_classes, 2):
        return values
    # Only 0 and the maximum are accepted. With a tolerance, a mask of class indices that marks
    # ignored pixels with 255 would pass as a binary mask.
    if num_classes <= 2 and highest in (255, 65535) and np.isin(values, (0, highest)).all():
        return values > 0
    raise UserError(_beyond_classes(values, num_classes, where))


def _beyond_classes(values: np.ndarray, num_classes: int, where: str) -> str:
    found = np.unique(values)
    shown = ", ".join(map(str, found[:8])) + (f" .. {found[-1]}" if len(found) > 8 else "")
    if num_classes == 1:
        return (
            f"{where} has the labels {shown}, beyond the two classes 0/1 or 0/255 of a binary "
            "mask; set --num-classes, or save the mask with two values"
        )
    return (
        f"{where} has the labels {shown}, beyond the {num_classes} classes 0 to "
        f"{num_classes - 1}; raise --num-classes, or relabel the mask"
    )


def _decode_colors(rgb: np.ndarray, codes: list[int], where: str) -> np.ndarray:
    packed = _pack(rgb)  # (H, W)
    labels = np.full(packed.shape, -1, dtype=np.int32)
    for label, code in enumerate(codes):
        labels[packed == code] = label
    unknown = np.unique(packed[labels < 0])
    if unknown.size:
        raise UserError(
            f"{where} has colours that --palette lacks: {listing([_hex(c) for c in unknown])}; "
            "add them as classes, or correct the mask"
        )
    return labels


def palette_codes(
    palette: Sequence[str] | None, num_classes: int, ignore_index: int | None = None
) -> list[int] | None:
    """Converts a palette to the numbers that ``decode_mask`` compares colours with.

    Returns:
        One integer a class, red in its highest byte, and one more for ignored pixels if there is an
        ``ignore_index``; None without a palette.

    Raises:
        UserError: a colour is not valid, colours repeat, or their number is not that of the
            classes.
    """
    if palette is None:
        return None
    try:
        codes = [int(_pack(np.array(ImageColor.getcolor(color, "RGB")))) for color in palette]
    except ValueError as error:
        raise UserError(f"--palette: {error}; write colours as #ff0000") from error
    expected = max(num_classes, 2) + (ignore_index is not None)
    if len(codes) != expected or len(set(codes)) != expected:
        last = "" if ignore_index is None else ", and one for ignored pixels"
        raise UserError(
            f"--palette: expected {expected} different colours, one per class in order{last}, "
            f"got {', '.join(palette)}"
        )
    return codes


def _pack(rgb: np.ndarray) -> np.ndarray:
    """Packs (..., 3) values of 0 .. 255 into (...) int32, red in the highest byte."""
    red, green, blue = np.moveaxis(rgb.astype(np.int32), -1, 0)
    return (red << 16) | (green << 8) | blue


def _hex(code: int) -> str:
    return f"#{code:06x}"


def has_foreground(labels: np.ndarray) -> bool:
    """Whether a pixel that counts has another label than 0."""
    return bool(((labels != 0) & (labels != IGNORED)).any())


def check_sizes(sample: Sample, image_size: tuple[int, int], mask: np.ndarray) -> None:
    """Checks that an image and its mask have the same size.

    Args:
        sample: names the files in the message.
        image_size: (width, height) of the upright image.
        mask: (H, W).

    Raises:
        UserError: the sizes differ.
    """
    height, width = mask.shape
    if image_size != (width, height):
        raise UserError(
            f"{sample.origin}: image {sample.image} has {image_size[0]}x{image_size[1]} pixels "
            f"(width x height), its mask {sample.mask} has {width}x{height}; the sizes must be the "
            "same"
        )
