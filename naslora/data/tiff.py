"""TIFF files that are read row by row, and their georeference.

They are read with tifffile. Pillow reads no colours of 16 bits and no bands of floating-point
numbers, and decodes an image as a whole.
"""

import functools
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from naslora.data.picture import ImageError, Source, readable

if TYPE_CHECKING:
    import tifffile

PLAIN = (1, 8, 32946)
"""Compressions that need no further package: none and deflate."""
SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 274
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
"""Pixel scale, tie points, transformation, key directory, and the numbers and text of the keys.
They are copied as they are, so that no package is needed to interpret them."""
GeoTags = list[tuple[int, int, int, Any, bool]]
"""Code, type, count, value and True of each tag, as ``tifffile.imwrite`` takes them."""


def open_tiff(file: Path | io.BytesIO, where: str) -> Source | None:
    """Opens a TIFF file of more than 8 bits, or one of plain 8-bit RGB.

    Only the rows that are taken are in memory. A file that is compressed in one piece, or stored
    rotated or mirrored, is in memory as a whole.

    Args:
        file: path or content.
        where: the start of an error message.

    Returns:
        None if Pillow has to read the file: it is no TIFF; it has 8 bits and is not RGB without
        transparency, uncompressed or compressed by deflate; or it has greys of more than 8 bits
        whose compression needs a package that is not installed.

    Raises:
        ImageError: the file has another number of channels than 1 or 3, besides transparency, or
            needs a package that is not installed.
        Exception: the file is damaged; tifffile raises exceptions of many types.
    """
    if not _is_tiff(file):
        return None
    import tifffile  # imported here: few runs need it

    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        plain = (page.photometric, page.samplesperpixel, page.bitspersample) == (2, 3, 8)
        plain = plain and page.dtype == np.uint8 and page.compression in PLAIN
        if page.dtype is None or (page.dtype.itemsize == 1 and not plain):
            return None
        channels = _channels(page, where)
        if page.compression not in PLAIN and importlib.util.find_spec("imagecodecs") is None:
            if channels == 1:
                return None
            raise ImageError(
                f"{where} is compressed with {tifffile.COMPRESSION(page.compression).name}, which "
                "needs imagecodecs; run pip install imagecodecs, or save it with the compression "
                "deflate"
            )
        _, _, height, width, _ = page.shaped
        values, white_is_zero = _rows_of(page, channels), page.photometric == 0
        orientation = page.tags.valueof(ORIENTATION, default=1)
        if orientation == 1:
            return Source(height, width, values, white_is_zero)
        whole = values(0, height)
        if orientation in (5, 6, 7, 8):
            whole = whole.swapaxes(0, 1)
        if orientation in (3, 4, 7, 8):
            whole = whole[::-1]
        if orientation in (2, 3, 6, 7):
            whole = whole[:, ::-1]
        height, width = whole.shape[:2]
        return Source(height, width, lambda top, bottom: whole[top:bottom], white_is_zero)


def read_georeference(path: Path) -> GeoTags:
    """Reads the tags that place an image on the earth.

    Returns:
        The tags. Empty if the file is no TIFF or has none, or if it is stored rotated or mirrored:
        its mask is upright, so that the tags would not fit.

    Raises:
        ImageError: the tags cannot be read.
    """
    if not _is_tiff(path):
        return []
    import tifffile

    with readable(f"the georeference of {path}"), tifffile.TiffFile(path) as tiff:
        tags = tiff.pages.first.tags
        if tags.valueof(ORIENTATION, default=1) != 1:
            return []
        found = [tags[code] for code in GEO_TAGS if code in tags]
        return [(tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in found]


def _is_tiff(file: Path | io.BytesIO) -> bool:
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:4] in SIGNATURES
    try:
        with file.open("rb") as stream:
            return stream.read(4) in SIGNATURES
    except OSError:
        return False  # Pillow reports it


def _channels(page: "tifffile.TiffPage", where: str) -> int:
    """The channels of a page that are taken: those of RGB, or all that are no transparency.

    Raises:
        ImageError: they are neither one nor three, or the numbers are complex.
    """
    planes, depth, _, _, samples = page.shaped
    channels = planes * samples - sum(extra in (1, 2) for extra in page.extrasamples)
    channels = 3 if page.photometric == 2 else channels
    if depth != 1 or channels not in (1, 3):
        found = channels if depth == 1 else f"the axes {page.axes} and so other"
        raise ImageError(f"{where} has {found} channels; save it with one (grey) or three (RGB)")
    if np.issubdtype(page.dtype, np.complexfloating):
        raise ImageError(f"{where} has complex numbers; save their magnitude")
    return channels


def _rows_of(page: "tifffile.TiffPage", channels: int) -> Callable[[int, int], np.ndarray]:
    """Makes the function that reads rows of a page as it is stored."""
    planes, _, height, width, samples = page.shaped
    file = page.parent.filehandle
    assert page.dtype is not None
    stored = page.dtype.newbyteorder(page.parent.byteorder)
    # Tiles, or strips, lie row by row, plane after plane.
    side = page.tilelength if page.is_tiled else min(page.rowsperstrip, height)
    across = -(-width // page.tilewidth) if page.is_tiled else 1
    down = -(-height // side)

    @functools.lru_cache(across * planes)  # a tile reaches beyond the rows that are taken
    def piece_of(index: int) -> tuple[np.ndarray, int, int]:
        """The (h, w, samples) values of a piece, and its first row and column."""
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        file.seek(offset)
        data = file.read(count) if offset and count else None  # None: left out of the file
        piece, (_, _, top, left, _), size = page.decode(data, index)
        piece = np.full(size, page.nodata, page.dtype) if piece is None else piece
        return piece[0, : height - top, : width - left], top, left  # tiles reach beyond the image

    def values(top: int, bottom: int) -> np.ndarray:
        rows = np.empty((bottom - top, width, planes * samples), page.dtype)
        file.open()
        for plane in range(planes):
            own = rows[:, :, plane * samples : (plane + 1) * samples]
            if page.is_final:  # as in memory: its one strip need not be read as a whole
                before = (plane * height + top) * width * samples * stored.itemsize
                read = file.read_array(stored, own.size, offset=page.dataoffsets[0] + before)
                own[:] = read.reshape(own.shape)
                continue
            ends = [(plane * down + row) * across for row in (top // side, -(-bottom // side))]
            for index in range(*ends):
                piece, first, left = piece_of(index)
                start = max(first - top, 0)
                part = piece[max(top - first, 0) : bottom - first]
                own[start : start + len(part), left : left + part.shape[1]] = part
        file.close()
        return rows[..., :channels]

    return values
