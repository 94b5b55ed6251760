"""TIFF files that are read piece by piece, so that a large image is in memory once, with 8 bits.

They are read with tifffile. Pillow reads no colours of 16 bits and no bands of floating-point
numbers, and takes 4 bytes for a pixel of three.
"""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from naslora.data.intensity import Intensity, Sampler, scale_channel
from naslora.errors import UserError

if TYPE_CHECKING:
    import tifffile

READ = 1 << 22
"""Bytes of an image without compression that are read at once."""
DECODED = (1, 8, 32946)
"""Compressions of 8-bit images that need no further package: none and deflate."""

JPEG = (6, 7, 33007, 34892)
"""Kinds of JPEG compression, whose pieces share tables."""

Piece = tuple[int, slice, slice, np.ndarray]
"""The plane, the rows and the columns of a piece of an image, and its (h, w, c) values."""


def read_tiff(
    file: Path | io.BytesIO, where: str, intensity: Intensity | None = None
) -> np.ndarray | None:
    """Reads a TIFF file of more than 8 bits and scales it, or one of plain 8-bit RGB.

    Args:
        file: path or content.
        where: the start of an error message.
        intensity: how values of more than 8 bits are scaled.

    Returns:
        (H, W) or (H, W, 3) uint8, upright. It need not be contiguous. None if Pillow has to read
        the file: it is no TIFF; it has more than 8 bits and there is no ``intensity``; or it has 8
        bits and is not RGB without transparency, uncompressed or compressed by deflate.

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
        if not (_is_plain(page) if _has_8_bits(page) else intensity is not None):
            return None
        channels = _channels(page, where)
        try:
            pixels = _read(page, channels, intensity)
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            kind = tifffile.COMPRESSION(page.compression).name
            raise UserError(
                f"{where} is compressed with {kind}, which needs imagecodecs; run "
                "pip install imagecodecs, or save it with the compression deflate"
            ) from error
        return _upright(pixels, page.tags.valueof(274, default=1))


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


def _has_8_bits(page: "tifffile.TiffPage") -> bool:
    return page.dtype is None or page.dtype.itemsize == 1


def _is_plain(page: "tifffile.TiffPage") -> bool:
    """Whether an 8-bit image is one that this file reads as Pillow does."""
    return (
        page.dtype == np.uint8
        and page.bitspersample == 8
        and page.photometric == 2  # RGB
        and page.samplesperpixel == 3
        and page.compression in DECODED
    )


def _channels(page: "tifffile.TiffPage", where: str) -> int:
    """The channels of a page that are no transparency.

    Raises:
        UserError: they are neither one nor three, or the numbers are complex.
    """
    planes, depth, _, _, samples = page.shaped
    count = planes * samples
    channels = count - sum(extra in (1, 2) for extra in page.extrasamples) if count > 1 else 1
    if depth != 1 or channels not in (1, 3):
        found = channels if depth == 1 else f"the axes {page.axes} and so other"
        raise UserError(f"{where} has {found} channels; save it with one (grey) or three (RGB)")
    if np.issubdtype(page.dtype, np.complexfloating):
        raise UserError(f"{where} has complex numbers; save their magnitude")
    return channels


def _read(page: "tifffile.TiffPage", channels: int, intensity: Intensity | None) -> np.ndarray:
    """Fills an array of 8 bits, (H, W) or (H, W, 3)."""
    _, _, height, width, _ = page.shaped
    pixels = np.zeros((height, width, channels), np.uint8)
    limits = None
    if intensity is not None and not _has_8_bits(page):
        sampler = Sampler(intensity, (height, width), channels)
        if sampler.samples_values:
            for plane, rows, columns, values in _pieces(page):
                for channel, own in _own_channels(plane, values, channels):
                    sampler.add(channel, own, rows.start, columns.start)
        limits = sampler.limits()
    for plane, rows, columns, values in _pieces(page):
        for channel, own in _own_channels(plane, values, channels):
            if limits is not None:
                own = scale_channel(own, limits[channel])
            pixels[rows, columns, channel] = own
    if page.photometric == 0 and limits is not None:  # white is zero
        np.subtract(255, pixels, out=pixels)
    return pixels[..., 0] if channels == 1 else pixels


def _own_channels(
    plane: int, values: np.ndarray, channels: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The channels of a piece, with their numbers, without transparency."""
    for sample in range(values.shape[2]):
        if plane + sample < channels:  # channels are planes, or samples of one plane
            yield plane + sample, values[..., sample]


def _pieces(page: "tifffile.TiffPage") -> Iterator[Piece]:
    """Yields an image piece by piece."""
    # As in memory: its strips may be as large as the image, and need not be read whole.
    return _bands(page) if page.is_final else _segments(page)


def _bands(page: "tifffile.TiffPage") -> Iterator[Piece]:
    """Yields rows of an image that lies in its file as in memory."""
    planes, _, height, width, samples = page.shaped
    assert page.dtype is not None
    stored = page.dtype.newbyteorder(page.parent.byteorder)
    rows = max(1, READ // (width * samples * stored.itemsize))
    file = page.parent.filehandle
    file.seek(page.dataoffsets[0])
    for plane in range(planes):
        for top in range(0, height, rows):
            shape = (min(rows, height - top), width, samples)
            data = file.read(math.prod(shape) * stored.itemsize)
            values = np.frombuffer(data, stored).reshape(shape)
            yield plane, slice(top, top + shape[0]), slice(0, width), values


def _segments(page: "tifffile.TiffPage") -> Iterator[Piece]:
    """Yields strips or tiles. ``TiffPage.segments`` would read and copy 256 MB of them at once."""
    _, _, height, width, _ = page.shaped
    if len(page.dataoffsets) < math.prod(page.chunked):
        raise ValueError(f"it has {len(page.dataoffsets)} of {math.prod(page.chunked)} pieces")
    tables = {}
    if page.compression in JPEG:
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
    file = page.parent.filehandle
    places = zip(page.dataoffsets, page.databytecounts, strict=False)
    for index, (offset, count) in enumerate(places):
        file.seek(offset)
        data = file.read(count) if offset and count else None  # None: left out of the file
        piece, (plane, _, top, left, _), size = page.decode(data, index, **tables)
        if piece is None:
            piece = np.full(size, page.nodata, page.dtype)
        values = piece[0, : height - top, : width - left]  # tiles reach beyond the image
        bottom, right = top + len(values), left + values.shape[1]
        yield plane, slice(top, bottom), slice(left, right), values


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors an image by its EXIF orientation, without a copy."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
