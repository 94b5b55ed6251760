"""Decoding of masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from naslora.data.images import (
    Annotation,
    Encoding,
    Sample,
    Upright,
    open_upright,
    source_of,
    source_of_array,
)
from naslora.data.picture import Picture, Source, readable
from naslora.data.regions import draw_annotation
from naslora.data.tiff import open_tiff
from naslora.data.volumes import read_slice
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

    In the mask that an ``Annotation`` describes, pixels of several classes are ``IGNORED``.

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
    if sample.mask is None:
        raise UserError(f"{sample.origin}: image {sample.image} has no mask")
    where = f"{sample.origin}: mask {sample.mask}{sample.at}"
    if isinstance(sample.mask, Annotation):
        return draw_annotation(sample.mask.content, IGNORED, where)
    codes = palette_codes(palette, num_classes, ignore_index)
    image, lossy, shortened = _open(sample, sample.mask, where)
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
        rgb = _rgb(image, where)
        ignored = _blank(rgb, ignore_index)
        labels = _decode_encoded(rgb, sample.encoding, image, where)
    elif codes is not None:
        labels, unknown = _places(_pack(_rgb(image, where)), codes)
        if unknown.size:
            raise UserError(
                f"{where} has colours that --palette lacks: {listing(map(_hex, unknown))}; "
                "add them as classes, or correct the mask"
            )
        ignored = labels == max(num_classes, 2)  # the last colour of ``ignore_index``
    else:
        values = _pixel_values(image, where)
        if values.ndim == 3 and not lossy and (values == values[..., :1]).all():
            values = values[..., 0]
        return _class_indices(values, num_classes, ignore_index, where, lossy)
    return np.where(ignored, np.int32(IGNORED), labels)


def open_mask(
    sample: Sample,
    num_classes: int,
    palette: Sequence[str] | None = None,
    ignore_index: int | None = None,
) -> Source:
    """Opens a mask, of which windows are taken as class indices, (h, w) int32.

    Of a TIFF file of whole numbers in one channel only these windows are in memory, as
    ``open_tiff`` reads them. Arguments and errors as ``read_mask``, also of windows.
    """
    found, where = None, f"{sample.origin}: mask {sample.mask}{sample.at}"
    if isinstance(sample.mask, Path) and sample.slice is None and sample.encoding == "labels":
        with readable(where):
            found = open_tiff(sample.mask, where)
            pixel = np.zeros((1, 1, 3)) if found is None else found.values(0, 1, 0, 1)
    if found is None or palette or found.white_is_zero or pixel.shape[2] > 1:
        return source_of_array(read_mask(sample, num_classes, palette, ignore_index))
    if pixel.dtype.kind not in "ui":
        raise UserError(f"{where} has floating-point pixels; save it with 8 or 16 bits")
    source, seen = found, np.zeros(0, np.int32)

    def labels(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        nonlocal seen
        with readable(where):
            values = source.values(top, bottom, left, right)[..., 0]
        # All values so far are decoded, because 1 and 255 are no foreground of one mask.
        seen = np.union1d(seen, values).astype(np.int32)
        table = _class_indices(seen.copy(), num_classes, ignore_index, where)
        return table[np.searchsorted(seen, values)]

    return source._replace(values=labels)


def read_numbers(sample: Sample, ignore_index: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads a mask in which each object has its value, of up to 32 bits, or its colour.

    Arguments as ``read_mask``.

    Returns:
        (H, W) int32 values, 0 for no object, and where pixels are ignored, (H, W) or () bool.

    Raises:
        UserError: the file cannot be read, or its compression changes values.
    """
    where = f"{sample.origin}: mask {sample.mask}{sample.at}"
    assert isinstance(sample.mask, Path)
    image, lossy, shortened = _open(sample, sample.mask, where)
    if lossy or shortened:
        raise UserError(
            f"{where} does not keep the objects' numbers; save it as PNG of one channel"
        )
    values = _pixel_values(image, where)
    ignored = _blank(values, ignore_index)
    return (_pack(values) if values.ndim == 3 else values), ignored


def _open(sample: Sample, path: Path, where: str) -> Upright:
    """Opens a mask, of a volume the slice."""
    if sample.slice is None:
        return open_upright(path, where)
    alone = sample.slice.how._replace(neighbours=0)
    values = read_slice(path, sample.slice._replace(how=alone), where)[..., 0]
    labels = np.nan_to_num(values).astype(np.int32)
    if (labels != values).any():
        raise UserError(f"{where} has values that are no whole numbers; save it as class indices")
    return Upright(Image.fromarray(labels), lossy=False, shortened=False)


def _rgb(image: Image.Image, where: str) -> np.ndarray:
    return Picture(source_of(image), where).rows()


def _pixel_values(image: Image.Image, where: str) -> np.ndarray:
    """Returns (H, W) greys or palette indices, or (H, W, 3) colours; int32."""
    if image.mode == "F":
        raise UserError(f"{where} has floating-point pixels; save it with 8 or 16 bits")
    if image.mode in ("LA", "La"):
        image = image.getchannel(0)
    elif image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        return _rgb(image, where).astype(np.int32)
    return np.array(image).astype(np.int32)


def _blank(values: np.ndarray, ignore_index: int | None) -> np.ndarray:
    """Sets ignored pixels to 0 and returns where they are, (H, W) bool; () without an index."""
    if ignore_index is None:
        return np.array(False)
    ignored = np.asarray(np.all(values == ignore_index, axis=tuple(range(2, values.ndim))))
    values[ignored] = 0
    return ignored


def _class_indices(
    values: np.ndarray, num_classes: int, ignore_index: int | None, where: str, lossy: bool = False
) -> np.ndarray:
    """Decodes greys or colours of a mask that stores labels, without a palette; int32."""
    if ignore_index is None and 2 < num_classes <= IGNORED:
        ignore_index = IGNORED
    ignored = _blank(values, ignore_index)
    labels = _decode_values(values, num_classes, lossy, where).astype(np.int32, copy=False)
    return np.where(ignored, np.int32(IGNORED), labels)


def _decode_encoded(
    rgb: np.ndarray, encoding: Encoding, image: Image.Image, where: str
) -> np.ndarray:
    """Decodes the colours of a mask whose encoding is not "labels"."""
    if encoding == "nonzero":
        return np.any(rgb, axis=2)
    means = rgb.mean(axis=2)
    if encoding == "threshold":
        if image.mode == "P" and (rgb != rgb[..., :1]).any():  # it only displays the indices
            return np.asarray(image) > 0
        values = np.asarray(image) if image.mode.startswith("I") else means
        return values > 0 if values.max() <= 1 else means >= 128
    labels, unknown = _places(means, (0, 85, 255))
    if unknown.size:
        shown = ", ".join(map(str, unknown[:8].round(1).tolist()))
        raise UserError(
            f"{where} has pixels whose channels have the means {shown}; expected 0 (background), "
            "85 (things) and 255 (stuff)"
        )
    return labels


def _places(values: np.ndarray, known: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The place of each value among the known ones, int32, and the values that are not there."""
    places = np.full(values.shape, -1, np.int32)
    for place, value in enumerate(known):
        places[values == value] = place
    return places, np.unique(values[places < 0])


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
    found = np.unique(values)
    shown = ", ".join(map(str, found[:8])) + (f" .. {found[-1]}" if len(found) > 8 else "")
    beyond = f"the {num_classes} classes 0 to {num_classes - 1}"
    remedy = "raise --num-classes, or relabel the mask"
    if num_classes == 1:
        beyond = "the two classes 0/1 or 0/255 of a binary mask"
        remedy = (
            "set --num-classes, save the mask with two values, or, with --task promptable, set "
            "--objects numbers if each object has its number"
        )
    raise UserError(f"{where} has the labels {shown}, beyond {beyond}; {remedy}")


def _photograph(what: str, where: str) -> str:
    return (
        f"{where} {what}, so it is a photograph, or noise, and no mask; check that the "
        "columns image and label are not swapped"
    )


def palette_codes(
    palette: Sequence[str] | None, num_classes: int, ignore_index: int | None = None
) -> list[int] | None:
    """Converts a palette to the numbers that colours are compared with.

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
