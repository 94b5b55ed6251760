"""The georeference of a TIFF file: read from an image, written to its mask.

GeoTIFF keeps it in tags of the file. They are copied as they are, so that no package is needed that
knows coordinate systems.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from naslora.data.images import large_images, open_image, unreadable
from naslora.data.tiff import is_tiff

GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
"""Pixel scale, tie points, transformation, key directory, and the numbers and text of the keys."""
STRIP_ROWS = 64

GeoTags = list[tuple[int, int, int, Any, bool]]
"""Code, type, count, value and True of each tag, as ``tifffile.imwrite`` takes them."""


def read_georeference(path: Path) -> GeoTags:
    """Reads the tags that place an image on the earth.

    Returns:
        The tags. Empty if the file is no TIFF or has none, or if it is stored rotated or mirrored:
        its mask is upright, so that the tags would not fit.

    Raises:
        UserError: the tags cannot be read.
    """
    if not is_tiff(path):
        return []
    import tifffile  # imported here: few images need it

    try:
        with tifffile.TiffFile(path) as tiff:
            tags = tiff.pages.first.tags
            if tags.valueof(274, default=1) != 1:
                return []
            found = [tags[code] for code in GEO_TAGS if code in tags]
            return [(tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in found]
    except Exception as error:  # tifffile raises exceptions of many types
        raise unreadable(f"the georeference of {path}", error) from error


def write_geotiff(path: Path, mask: Path, tags: GeoTags, software: str) -> None:
    """Writes a mask with a georeference, from its PNG file.

    Args:
        path: the file.
        mask: an image of 8-bit greys, of any size.
        tags: from ``read_georeference``.
        software: the name of the program, which the file keeps.
    """
    import tifffile

    with large_images(), open_image(mask) as image:
        width, height = image.size

        def strips() -> Iterator[bytes]:  # compressed here: the array of all rows is not needed
            for top in range(0, height, STRIP_ROWS):
                rows = image.crop((0, top, width, min(top + STRIP_ROWS, height)))
                yield zlib.compress(rows.tobytes())

        tifffile.imwrite(
            path,
            strips(),
            shape=(height, width),
            dtype=np.uint8,
            photometric="minisblack",
            compression="zlib",
            rowsperstrip=STRIP_ROWS,
            metadata=None,
            software=software,
            extratags=tags,
        )
