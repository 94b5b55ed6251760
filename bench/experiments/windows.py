"""Reading a 40,000 x 40,000 tiled TIFF, 1024 rows at a time: time and peak memory of three readers.

    pip install rasterio 'pyvips[binary]'
    python -m bench.experiments.windows /tmp/large.tif

RGB of 8 bits in tiles of 256 x 256, deflated; 2 cores of an AMD EPYC, each reader in a process of
its own:

| reader | first 1024 rows | all rows | peak | installed | licence |
| -- | -- | -- | -- | -- | -- |
| tifffile 2026.3 | 0.4 s | 9 s | 0.15 GiB | 2 MB | BSD-3 |
| rasterio 1.4 | 1.7 s | 15 s | 1.37 GiB | 108 MB | BSD-3, GDAL: MIT |
| pyvips 3.2 | 0.6 s | 18 s | 0.24 GiB | 19 MB | MIT, libvips: LGPL |

naslora reads TIFF with tifffile. GDAL does not apply the orientation of a TIFF file, and libvips
drops the tags of GeoTIFF, turns palette indices into colours, and starts threads, which the
processes of a data loader do not inherit. tifffile has no LZW without imagecodecs (80 MB): there
Pillow reads 8 bits and greys.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile

from naslora.data.tiff import open_tiff

SIDE, WINDOW, TILE = 40_000, 1024, 256


def write(path: Path) -> None:
    """Writes a tiled RGB file, deflated; 4.8 GB of pixels."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 256, (8, TILE // 8, TILE // 8, 3), dtype=np.uint8)
    kinds = kinds.repeat(8, axis=1).repeat(8, axis=2)
    tifffile.imwrite(
        path,
        (kinds[index % 8] for index in range((-(-SIDE // TILE)) ** 2)),
        shape=(SIDE, SIDE, 3),
        dtype=np.uint8,
        tile=(TILE, TILE),
        photometric="rgb",
        compression="zlib",
        bigtiff=True,
    )


def reader_of(name: str, path: str) -> Callable[[int, int], np.ndarray]:
    """A function that reads rows as a (rows, 40000, 3) array."""
    if name == "rasterio":
        import rasterio
        from rasterio.windows import Window

        source = rasterio.open(path, driver="GTiff")
        return lambda top, bottom: np.moveaxis(
            source.read(window=Window(0, top, SIDE, bottom - top)), 0, 2
        )
    if name == "pyvips":
        import pyvips

        image = pyvips.Image.new_from_file(path)
        return lambda top, bottom: image.crop(0, top, SIDE, bottom - top).numpy()
    pixels = open_tiff(Path(path), path)
    assert pixels is not None
    return pixels.values


def measure(name: str, path: str) -> None:
    start = time.perf_counter()
    read = reader_of(name, path)
    total = int(read(0, WINDOW).sum(dtype=np.int64))
    first = time.perf_counter() - start
    for top in range(WINDOW, SIDE, WINDOW):
        total += int(read(top, min(top + WINDOW, SIDE)).sum(dtype=np.int64))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(f"| {name} | {first:.2f} s | {seconds:.1f} s | {peak:.2f} GiB | {total} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measure(*sys.argv[1:])
    else:
        if not Path(sys.argv[1]).exists():
            write(Path(sys.argv[1]))
        for name in ("tifffile", "rasterio", "pyvips"):
            subprocess.run([sys.executable, "-m", __spec__.name, name, sys.argv[1]], check=True)
