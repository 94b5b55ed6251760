"""TIFF files of which windows are read, and their georeference.

They are read with tifffile. Pillow reads no colours of 16 bits and no bands of floating-point
numbers, and decodes an image as a whole.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from naslora.data.picture import ImageError, Source, joined, readable

if TYPE_CHECKING:
    import tifffile

PLAIN = (1, 8, 32946)
"""Compressions that need no further package: none and deflate."""
SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PLAIN_PIXELS = ((2, 3, 8), (1, 1, 8))
"""Photometric interpretation, samples and bits of the images of 8 bits that are read here."""
ORIENTATION = 274
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
"""Pixel scale, tie points, transformation, key directory, and the numbers and text of the keys.
They are copied as they are, so that no package is needed to interpret them."""
GeoTags = list[tuple[int, int, int, Any, bool]]
"""Code, type, count, value and True of each tag, as ``tifffile.imwrite`` takes them."""


def open_tiff(path: Path, where: str, channels: int | None = None) -> Source | None:
    """Opens a TIFF file of more than 8 bits, of plain RGB or greys of 8, or of many channels.

    Only the windows that are taken are in memory. A file that is compressed in one piece, or stored
    rotated or mirrored, is in memory as a whole.

    ``where`` is the start of an error message. The number of ``channels`` decides whether
    transparency is one of them, and pages of the same size are; 0 for unknown. None takes those of
    RGB, or those of the first page.

    Returns:
        None if Pillow has to read the file: it is no TIFF; it has 8 bits, one or three channels,
        and is not RGB or grey without transparency, uncompressed or compressed by deflate; or it
        has greys of more than 8 bits whose compression needs a package that is not installed.

    Raises:
        ImageError: the file has further axes, or needs a package that is not installed.
        Exception: the file is damaged; tifffile raises exceptions of many types.
    """
    if not starts_with(path, SIGNATURES):
        return None
    import tifffile  # imported here: few runs need it

    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        plain = (page.photometric, page.samplesperpixel, page.bitspersample) in PLAIN_PIXELS
        plain = plain and page.dtype == np.uint8 and page.compression in PLAIN
        pages, count = [page], _channels(page, where, channels)
        if channels is not None and count == 1 != channels:
            pages = [own.aspage() for own in tiff.pages if own.shape == page.shape]
        several = channels is not None and (len(pages) > 1 or count not in (1, 3))
        if page.dtype is None or (page.dtype.itemsize == 1 and not plain and not several):
            return None
        if page.compression not in PLAIN and importlib.util.find_spec("imagecodecs") is None:
            if count == len(pages) == 1:
                return None
            raise ImageError(
                f"{where} is compressed with {tifffile.COMPRESSION(page.compression).name}, which "
                "needs imagecodecs; run pip install imagecodecs, or save it with the compression "
                "deflate"
            )
        return joined([_source(own, count) for own in pages], where)


def _source(page: "tifffile.TiffPage", channels: int) -> Source:
    """The channels of a page, upright."""
    _, _, height, width, _ = page.shaped
    values, white_is_zero = _windows_of(page, channels), page.photometric == 0
    orientation = page.tags.valueof(ORIENTATION, default=1)
    if orientation == 1:
        return Source(height, width, values, white_is_zero, not page.is_tiled and not page.is_final)
    whole = values(0, height, 0, width)
    if orientation in (5, 6, 7, 8):
        whole = whole.swapaxes(0, 1)
    down, right = (-1 if orientation in own else 1 for own in ((3, 4, 7, 8), (2, 3, 6, 7)))
    whole = whole[::down, ::right]
    height, width = whole.shape[:2]
    return Source(height, width, lambda t, b, le, r: whole[t:b, le:r], white_is_zero)


def read_georeference(path: Path) -> GeoTags:
    """Reads the tags that place an image on the earth.

    Returns:
        The tags. Empty if the file is no TIFF or has none, or if it is stored rotated or mirrored:
        its mask is upright, so that the tags would not fit.

    Raises:
        ImageError: the tags cannot be read.
    """
    if not starts_with(path, SIGNATURES):
        return []
    import tifffile

    with readable(f"the georeference of {path}"), tifffile.TiffFile(path) as tiff:
        tags = tiff.pages.first.tags
        if tags.valueof(ORIENTATION, default=1) != 1:
            return []
        found = [tags[code] for code in GEO_TAGS if code in tags]
        return [(tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in found]


def software_of(path: Path) -> str:
    """The program that wrote a TIFF file."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        return tiff.pages.first.software


def starts_with(path: Path, signatures: tuple[bytes, ...]) -> bool:
    """Whether a file starts with one of some bytes. False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(max(map(len, signatures))).startswith(signatures)
    except OSError:
        return False  # Pillow reports it


def _channels(page: "tifffile.TiffPage", where: str, wanted: int | None) -> int:
    """The number of channels of a page that are taken, the first ones.

    Raises:
        ImageError: the page has further axes, or the numbers are complex.
    """
    planes, depth, _, _, samples = page.shaped
    if depth != 1:
        raise ImageError(f"{where} has the axes {page.axes}; save it with rows and columns alone")
    if page.dtype is not None and np.issubdtype(page.dtype, np.complexfloating):
        raise ImageError(f"{where} has complex numbers; save their magnitude")
    if planes * samples == wanted:
        return wanted
    if wanted is None and page.photometric == 2:
        return 3
    return planes * samples - sum(extra in (1, 2) for extra in page.extrasamples)


def _windows_of(
    page: "tifffile.TiffPage", channels: int
) -> Callable[[int, int, int, int], np.ndarray]:
    """Makes the function that reads windows of a page as it is stored."""
    planes, _, height, width, samples = page.shaped
    file = page.parent.filehandle
    assert page.dtype is not None
    stored = page.dtype.newbyteorder(page.parent.byteorder)
    # Tiles, or strips, lie row by row, plane after plane.
    side, broad = min(page.rowsperstrip, height), width
    if page.is_tiled:
        side, broad = page.tilelength, page.tilewidth
    down, across = -(-height // side), -(-width // broad)

    @functools.lru_cache(across * planes)  # a tile reaches beyond the rows that are taken
    def piece_of(index: int) -> np.ndarray:
        """The (h, w, samples) values of a piece."""
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        file.seek(offset)
        data = file.read(count) if offset and count else None  # None: left out of the file
        piece, (_, _, top, left, _), size = page.decode(data, index)
        piece = np.full(size, page.nodata, page.dtype) if piece is None else piece
        return piece[0, : height - top, : width - left]  # tiles reach beyond the image

    def values(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        window = np.empty((bottom - top, right - left, planes * samples), page.dtype)
        columns = range(left // broad, -(-right // broad))
        file.open()
        for plane in range(planes):
            own = window[:, :, plane * samples : (plane + 1) * samples]
            for row in range(top, bottom) if page.is_final else ():  # as in memory: no whole strip
                before = ((plane * height + row) * width + left) * samples * stored.itemsize
                offset = page.dataoffsets[0] + before
                read = file.read_array(stored, own[0].size, offset=offset)
                own[row - top] = read.reshape(own[0].shape)
            rows = () if page.is_final else range(top // side, -(-bottom // side))
            for row, column in itertools.product(rows, columns):
                y, x = row * side - top, column * broad - left  # where the piece starts
                piece = piece_of((plane * down + row) * across + column)
                part = piece[max(-y, 0) : bottom - top - y, max(-x, 0) : right - left - x]
                y, x = max(y, 0), max(x, 0)
                own[y : y + part.shape[0], x : x + part.shape[1]] = part
        file.close()
        return window[..., :channels]

    return values
