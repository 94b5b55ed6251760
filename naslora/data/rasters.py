"""Files of pixels that are written as their rows come: PNG, TIFF, and labels to read again."""

import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from naslora.choices import Precision
from naslora.data.tiff import GeoTags
from naslora.settings import Settings, Share

SOFTWARE = "naslora predict"
"""The program's name in the files that it writes, by which it knows them."""
COMPRESSION = 3
"""zlib's level in TIFF files. Photographs are as small as with its 6, in a third of the time."""
STRIP = 64
"""Rows of a piece of a TIFF file."""
Rows = Callable[[int, int], np.ndarray]
"""Called as ``rows(top, bottom)``; returns these rows of an image."""


@dataclass(frozen=True)
class OutputConfig(Settings):
    """What predict decides from the scores of the classes, and which it also writes."""

    probabilities: Literal["float32", "uint8"] | None = None
    """Also write NAME_probabilities.tif: a band for each class, the foreground alone of two, in [0,
    1] or 0 to 255. With `flips` or `members`, one more band is the uncertainty: the largest
    standard deviation of a class's probability over them."""
    overlays: bool = True
    """Write NAME_overlay.jpg, the image with the mask painted over it."""
    threshold: Share = 0.5
    """Probability that the foreground must exceed, of two classes."""
    flips: bool = False
    """Average the scores of an image and of its mirror image; after training with `dihedral` also
    of those that are upside down."""
    members: tuple[Path, ...] = ()
    """Further runs or models, with whose scores those of MODEL are averaged."""
    precision: Precision = "no"
    """In which runs and merged models compute; `no` is float32. Exported files have their own."""


DEFAULT_OUTPUTS = OutputConfig()


def rows_of(pixels: np.ndarray) -> Rows:
    """The rows of an image in memory."""
    return lambda top, bottom: pixels[top:bottom]


class LabelFile:
    """(H, W) uint8 labels in a file without a name, so that they need not be in memory."""

    def __init__(self, folder: Path, width: int) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._width = width

    def append(self, rows: np.ndarray) -> None:
        """Writes the next rows, (n, W)."""
        self._file.write(rows.astype(np.uint8).tobytes())

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Reads rows that were written."""
        self._file.seek(top * self._width)
        data = self._file.read((bottom - top) * self._width)
        return np.frombuffer(data, np.uint8).reshape(bottom - top, self._width)


def in_pieces(rows: Rows, height: int, step: int = STRIP) -> Iterator[np.ndarray]:
    """The rows of an image, some at a time."""
    return (rows(top, min(top + step, height)) for top in range(0, height, step))


def write_png(
    path: Path,
    size: tuple[int, int],
    bands: Iterable[np.ndarray],
    palette: Sequence[tuple[int, int, int]] | None = None,
) -> None:
    """Writes greys of 8 or 16 bits as PNG as their rows come. Pillow needs all of them for that.

    ``size`` is height and width. ``bands`` are (n, W) uint8 or uint16, from the top to the bottom.
    Viewers show the RGB colours of ``palette`` in place of greys 0, 1, ...
    """
    with open(path, "wb") as file:

        def write_chunk(kind: bytes, data: bytes) -> None:
            checksum = zlib.crc32(data, zlib.crc32(kind))
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum))

        # Runs alone, without a search for other repetitions.
        compressor, above = zlib.compressobj(strategy=zlib.Z_RLE), None
        for band in bands:
            big = np.ascontiguousarray(band, band.dtype.newbyteorder(">"))
            rows = big.view(np.uint8).reshape(len(band), -1)
            if above is None:
                file.write(b"\x89PNG\r\n\x1a\n")
                kind = 0 if palette is None else 3  # PNG's number for greys, and for a palette
                depth = 8 * band.itemsize
                header = struct.pack(">2I5B", size[1], size[0], depth, kind, 0, 0, 0)
                write_chunk(b"IHDR", header)
                if palette is not None:
                    write_chunk(b"PLTE", np.array(palette, np.uint8).tobytes())
                write_chunk(b"tEXt", f"Software\0{SOFTWARE}".encode())
                above = np.zeros_like(rows[:1])
            # The filter 2 of each row: its difference to the row above.
            filtered = np.full((len(rows), 1 + rows.shape[1]), 2, np.uint8)
            np.subtract(rows, np.concatenate([above, rows[:-1]]), out=filtered[:, 1:])
            above = rows[-1:].copy()
            write_chunk(b"IDAT", compressor.compress(filtered.tobytes()))
        write_chunk(b"IDAT", compressor.flush())
        write_chunk(b"IEND", b"")


def write_tiff(
    path: Path,
    bands: Iterable[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype,
    georeference: GeoTags,
) -> None:
    """Writes a TIFF file as its rows come.

    ``bands`` are (n, W) or (n, W, K) numbers from the top to the bottom, ``shape`` is (H, W) or
    (H, W, K), and ``georeference`` comes from ``read_georeference``; it may be empty.
    """
    import tifffile  # imported here: few images need it

    tifffile.imwrite(
        path,
        _strips(bands),
        shape=shape,
        dtype=dtype,
        photometric="minisblack",
        planarconfig="contig" if len(shape) > 2 else None,
        compression="zlib",
        rowsperstrip=STRIP,
        bigtiff=int(np.prod(shape)) * dtype.itemsize >= 1 << 32,
        metadata=None,
        software=SOFTWARE,
        extratags=georeference,
    )


def _strips(bands: Iterable[np.ndarray]) -> Iterator[bytes]:
    """The compressed pieces of a TIFF file."""
    left: list[np.ndarray] = []
    for band in bands:
        joined = np.concatenate([*left, band])
        whole = len(joined) - len(joined) % STRIP
        for top in range(0, whole, STRIP):
            yield zlib.compress(joined[top : top + STRIP].tobytes(), COMPRESSION)
        left = [joined[whole:].copy()] if whole < len(joined) else []
    for rest in left:
        yield zlib.compress(rest.tobytes(), COMPRESSION)
