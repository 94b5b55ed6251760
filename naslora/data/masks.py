"""Decoding of masks."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from naslora.data.images import Annotation, Encoding, Sample, open_upright, to_rgb
from naslora.data.regions import draw_annotation
from naslora.errors import UserError, listing

IGNORED = 255
"""The label of pixels that neither the loss nor a metric counts."""
MOST_COLOURS = 256
"""A binary mask may have a colour for each object. A photograph has more colours than this."""
DARK, BRIGHT, MOST_BETWEEN = 48, 208, 0.2
"""The greys that the edges of a compressed mask have, and their largest share: masks of six data
sets as JPEG of quality 30 have up to 2.4 %, 95 % of 200 photographs of ImageNet more than 32 %."""


def read_mask(
    sample: Sample,
    num_classes: int,
    palette: Sequence[str] | None = None,
    ignore_index: int | None = None,
) -> np.ndarray:
    """Reads a mask as class indices.

    The sample's encoding says how the mask stores its labels:

    - "labels": grey values, and the indices of palette images, are the class indices. A mask of two
      classes may also use 0 and 255 (0 and 65535 with 16 bits). A JPEG, or a
      lossy WebP, of two classes is thresholded at 128. In a coloured mask of two classes, a pixel
      is foreground if any channel is not zero. With ``palette``, every mask is read by its colours.
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
    image, lossy, shortened = open_upright(file, where)
    if shortened:
        raise UserError(
            f"{where} has colours of 16 bits, of which 8 are read; save it with 8 bits, or as greys"
        )
    exact = codes is not None or num_classes > 2 or sample.encoding in ("nonzero", "thirds")
    if lossy and (exact or ignore_index is not None):
        raise UserError(
            f"{where} is a JPEG or a lossy WebP, whose compression changes labels and colours; "
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
        if values.ndim == 3 and not lossy and (values == values[..., :1]).all():
            values = values[..., 0]
        if ignore_index is None and 2 < num_classes <= IGNORED:
            ignore_index = IGNORED
        if ignore_index is not None and values.ndim == 2:
            return _decode_with_ignored(values, ignore_index, num_classes, where)
        labels = _decode_values(values, num_classes, lossy, where)
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


def _decode_values(values: np.ndarray, num_classes: int, lossy: bool, where: str) -> np.ndarray:
    if values.ndim == 3 and lossy:
        values = values.mean(axis=2)
    elif values.ndim == 3:
        found = np.unique(_pack(values))
        if num_classes == 1 and len(found) <= MOST_COLOURS:
            return np.any(values, axis=2)
        if num_classes == 1:
            raise UserError(_photograph(f"has {len(found)} colours", where))
        raise UserError(
            f"{where} is coloured ({listing(map(_hex, found))}); name the {num_classes} classes' "
            "colours in order with --palette, or save it as class indices"
        )
    highest = values.max()
    if lossy and highest > 1:
        between = float(((values >= DARK) & (values < BRIGHT)).mean())
        if between > MOST_BETWEEN:
            raise UserError(_photograph(f"has {between:.0%} greys between black and white", where))
        return values >= 128
    if values.min() >= 0 and highest < max(num_classes, 2):
        return values
    # Only 0 and the maximum are accepted. With a tolerance, a mask of class indices that marks
    # ignored pixels with 255 would pass as a binary mask.
    if num_classes <= 2 and highest in (255, 65535) and np.isin(values, (0, highest)).all():
        return values > 0
    raise UserError(_beyond_classes(values, num_classes, where))


def _photograph(what: str, where: str) -> str:
    return (
        f"{where} {what}, so it is a photograph, or noise, and no mask; check that the "
        "columns image and label are not swapped"
    )


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
