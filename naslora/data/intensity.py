"""Images of more than 8 bits, and how their values become 8 bits.

TIFF files are read with tifffile, because Pillow reads no colours of 16 bits and no bands of
floating-point numbers.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageOps

from naslora.errors import UserError

Kind = Literal["percentile", "window"]
PERCENTILES = (1.0, 99.0)
"""The percentiles that ``percentile`` takes if it is given none."""
SAMPLED = 1 << 24
"""Values of a channel from which on every n-th one decides its percentiles, to bound the memory."""
SCALED = 1 << 22
"""Values that are scaled at once, to bound the memory."""


class Intensity(NamedTuple):
    """How values of more than 8 bits become 0 to 255."""

    kind: Kind
    """``window``: ``low`` and ``high`` are values, the same for every image. ``percentile``: they
    are percentiles of each channel of each image."""
    low: float
    """Becomes 0, as everything below."""
    high: float
    """Becomes 255, as everything above."""


def parse_intensity(words: Sequence[str]) -> Intensity:
    """Reads ``--intensity``: ``percentile [LO HI]`` or ``window LO HI``.

    Raises:
        UserError: the words are none of the two, or LO and HI are no range.
    """
    usage = "intensity must be percentile, percentile LO HI or window LO HI"
    kind = words[0] if words else ""
    if kind not in get_args(Kind):
        raise UserError(f"{usage}, got {' '.join(words) or 'nothing'}")
    try:
        numbers = [float(word) for word in words[1:]]
    except ValueError as error:
        raise UserError(f"{usage} with two numbers, got {' '.join(words)}") from error
    if not numbers and kind == "percentile":
        numbers = list(PERCENTILES)
    if len(numbers) != 2:
        raise UserError(f"{usage}, got {' '.join(words)}")
    low, high = numbers
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"intensity: LO and HI must be finite and LO smaller, got {low}, {high}")
    if kind == "percentile" and not 0 <= low < high <= 100:
        raise UserError(f"intensity: percentiles lie in 0 to 100, got {low} and {high}")
    return Intensity("window" if kind == "window" else "percentile", low, high)


def scale(values: np.ndarray, intensity: Intensity) -> np.ndarray:
    """Scales values to 8 bits.

    NaN becomes 0. It and infinities do not count for percentiles. A channel whose percentiles are
    equal becomes 0 up to that value and 255 above it.

    Args:
        values: (H, W) or (H, W, C) numbers.
        intensity: the scaling.

    Returns:
        uint8, of the same shape, rounded.
    """
    planes = values[..., None] if values.ndim == 2 else values
    scaled = np.empty(planes.shape, np.uint8)
    rows = max(1, SCALED // max(1, values.shape[1]))
    for channel in range(planes.shape[2]):
        plane = planes[..., channel]
        low, high = _limits(plane, intensity)
        for top in range(0, len(plane), rows):
            band = plane[top : top + rows].astype(np.float64)
            if high > low:
                with np.errstate(invalid="ignore"):
                    share = (band - low) / (high - low)
            else:
                share = np.where(np.isnan(band), np.nan, band > high)
            share = np.clip(np.nan_to_num(share, nan=0, posinf=1, neginf=0), 0, 1)
            scaled[top : top + rows, :, channel] = np.rint(255 * share)
    return scaled.reshape(values.shape)


def _limits(plane: np.ndarray, intensity: Intensity) -> tuple[float, float]:
    """The values of a channel that become 0 and 255."""
    if intensity.kind == "window":
        return intensity.low, intensity.high
    flat = plane.reshape(-1)
    flat = flat[:: -(-flat.size // SAMPLED)]
    finite = flat[np.isfinite(flat)]
    if not finite.size:
        return 0.0, 0.0
    low, high = np.percentile(finite, [intensity.low, intensity.high])
    return float(low), float(high)


def read_deep(file: Path | io.BytesIO, where: str, intensity: Intensity) -> Image.Image | None:
    """Reads a TIFF file of more than 8 bits and scales it.

    Args:
        file: path or content.
        where: the start of an error message.
        intensity: the scaling.

    Returns:
        An upright image of mode L or RGB. None if the file is no TIFF or has 8 bits.

    Raises:
        UserError: the file has another number of channels than 1 or 3, besides transparency, or
            needs a package that is not installed.
        Exception: the file is damaged; tifffile raises exceptions of many types.
    """
    if not is_tiff(file):
        return None
    import tifffile  # imported here: few runs need it

    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        if page.dtype is None or page.dtype.itemsize == 1:
            return None
        try:
            values = page.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            kind = tifffile.COMPRESSION(page.compression).name
            raise UserError(
                f"{where} is compressed with {kind}, which needs imagecodecs; run "
                "pip install imagecodecs, or save it with the compression deflate"
            ) from error
        orientation = page.tags.valueof(274, default=1)
        white_is_zero = page.photometric == 0
        alphas = sum(extra in (1, 2) for extra in page.extrasamples)
        axes = page.axes
    if axes == "SYX":
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and alphas:
        values = values[..., : values.shape[2] - alphas]
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
        channels = values.shape[2] if values.ndim == 3 else f"the axes {axes} and so other"
        raise UserError(f"{where} has {channels} channels; save it with one (grey) or three (RGB)")
    if np.iscomplexobj(values):
        raise UserError(f"{where} has complex numbers; save their magnitude")
    pixels = scale(values, intensity)
    image = Image.fromarray(255 - pixels if white_is_zero else pixels)
    image.getexif()[274] = orientation
    ImageOps.exif_transpose(image, in_place=True)
    return image


def is_tiff(file: Path | io.BytesIO) -> bool:
    """Whether a file starts as TIFF files do. False if it cannot be read."""
    try:
        if isinstance(file, io.BytesIO):
            head = file.getvalue()[:4]
        else:
            with file.open("rb") as stream:
                head = stream.read(4)
    except OSError:
        return False
    return head in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
