"""Volumes, of which single slices are read: NIfTI files, and TIFF files whose pages are slices."""

import functools
import gzip
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from naslora.data.picture import ImageError, readable
from naslora.data.rasters import SOFTWARE
from naslora.errors import imported

NIFTI = (".nii", ".nii.gz")
TIFF = (".tif", ".tiff")
UNITS = {"mm": (1.0, "mm"), "meter": (1e3, "mm"), "micron": (1e-3, "mm"), "voxels": (1.0, "voxels")}
"""The factor of a unit of NIfTI, or of TIFF, and the unit that it then has."""
SAME_PLACE = 1e-3
"""Largest difference of two affines' entries, in millimetres: programs round them differently."""
_LOCK = threading.Lock()


class Slicing(NamedTuple):
    """How volumes become images."""

    axis: int = 2
    """The axis along which slices follow each other."""
    neighbours: int = 0
    """Slices on each side that are further channels."""
    stacks: bool = False
    """Whether TIFF files are volumes. Their axes are those of an image, x and y, and the pages."""


DEFAULT_SLICING = Slicing()


class Slice(NamedTuple):
    """A slice of a volume."""

    number: int
    """From 0."""
    how: Slicing


def is_volume(path: Path, how: Slicing) -> bool:
    """Whether a file is a volume by its name."""
    return is_nifti(path) or (how.stacks and path.suffix.lower() in TIFF)


def is_nifti(path: Path) -> bool:
    """Whether a file is NIfTI by its name."""
    return path.name.lower().endswith(NIFTI)


def stem_of(path: Path) -> str:
    """The name without its suffix, without both of ``.nii.gz``."""
    return path.stem[:-4] if path.name.lower().endswith(".nii.gz") else path.stem


def check_volume(files: Sequence[Path], how: Slicing, where: str) -> tuple[int, ...]:
    """Returns the shape of a volume, and of those that lie on it, such as its mask.

    Raises:
        UserError: nibabel is not installed.
        ImageError: a file cannot be read, or has other than three axes, another shape or another
            affine than the first.
    """
    shape: tuple[int, ...] = ()
    affine = np.eye(4)
    for file in files:
        if not is_volume(file, how) or is_nifti(file) != is_nifti(files[0]):
            raise ImageError(f"{where}: {files[0]} is a volume, and {file} is none; save it so")
        with readable(f"{where}: {file}"):
            own, its, _ = _geometry(file)
        if len(own) != 3:
            raise ImageError(f"{where}: {file} has {len(own)} axes; save volumes of three")
        both, remedy = f"{where}: {files[0]} and {file} have", "resample one to the other"
        if file == files[0]:
            shape, affine = own, its
        if own != shape:
            sizes = " and ".join("x".join(map(str, size)) for size in (shape, own))
            raise ImageError(f"{both} {sizes} voxels; {remedy}")
        if not np.allclose(affine, its, rtol=0, atol=SAME_PLACE):
            raise ImageError(f"{both} other affines, so they lie elsewhere; {remedy}")
    return shape


def _geometry(path: Path) -> tuple[tuple[int, ...], np.ndarray, str]:
    """The shape, the affine and its unit; of a TIFF file the identity, in voxels."""
    if is_nifti(path):
        (nibabel,) = imported("volumes", "nibabel")
        image = nibabel.load(path)
        return image.shape, image.affine, image.header.get_xyzt_units()[0]
    import tifffile  # imported here: few runs need it

    with tifffile.TiffFile(path) as tiff:
        shape = tiff.series[0].shape
    return ((1,) * (len(shape) == 2) + shape)[::-1], np.eye(4), "voxels"  # one page is a slice


def spacing_of(path: Path, axis: int, size: Sequence[int]) -> tuple[tuple[float, ...], str]:
    """The size of an element of slices that are stacked along ``axis``, as in ``Slicing``.

    ``size`` is the height and width of the slices, which may have been resized.

    Returns:
        The size along the slices, the rows and the columns, and its unit: "mm", "voxels" for TIFF
        files, or "header units" if a NIfTI file names none.
    """
    shape, affine, unit = _geometry(path)
    factor, unit = UNITS.get(unit, (1.0, "header units"))
    sides = factor * np.linalg.norm(affine[:3, :3], axis=0)
    wide, high = np.delete(sides * shape, axis)
    return (float(sides[axis]), float(high / size[0]), float(wide / size[1])), unit


@functools.lru_cache(4)
def _values(path: Path, _: int) -> Any:
    """The voxels, (X, Y, Z). Of an uncompressed file only what is taken is read."""
    if not is_nifti(path):
        import tifffile  # imported here: few runs need it

        try:
            pages: np.ndarray = tifffile.memmap(path, mode="r")
        except ValueError:  # compressed, or not in one piece
            pages = tifffile.imread(path)
        return pages.reshape(-1, *pages.shape[-2:]).T
    (nibabel,) = imported("volumes", "nibabel")
    values = nibabel.load(path).dataobj
    return np.asanyarray(values) if path.suffix.lower() == ".gz" else values


def read_slice(path: Path, cut: Slice, where: str) -> np.ndarray:
    """Reads a slice and its N neighbours on each side as (H, W, 2 N + 1) numbers.

    Beyond the volume its outer slices repeat. The rows are the last of the other two axes.

    Raises:
        ImageError: the file is damaged.
    """
    axis, count, _ = cut.how
    with readable(where):
        with _LOCK:  # so that threads do not decompress the same file
            values = _values(path, path.stat().st_mtime_ns)
        numbers = np.arange(cut.number - count, cut.number + count + 1)
        places = [(slice(None),) * axis + (n,) for n in numbers.clip(0, values.shape[axis] - 1)]
        return np.stack([np.asarray(values[place]).T for place in places], axis=2)


def write_volume(path: Path, source: Path, slices: Sequence[np.ndarray], axis: int) -> None:
    """Writes slices as a volume with the geometry of another one, as compressed NIfTI or TIFF.

    Of NIfTI the header of ``source`` is taken, except for the type of the numbers and their range.
    Slices are (H, W) or (H, W, K) numbers, as ``read_slice`` turns them, along ``axis``.
    """
    values = np.stack([own.swapaxes(0, 1) for own in slices], axis)
    if not is_nifti(source):
        import tifffile  # imported here: few runs need it

        tifffile.imwrite(
            path,
            values.swapaxes(0, 2),
            photometric="minisblack",
            planarconfig="contig" if values.ndim > 3 else None,
            compression="zlib",
            software=SOFTWARE,
        )
        return
    (nibabel,) = imported("volumes", "nibabel")
    image = nibabel.load(source)
    header = image.header.copy()
    header.set_data_dtype(values.dtype)
    header["cal_min"] = header["cal_max"] = 0
    content = type(image)(values, image.affine, header).to_bytes()
    path.write_bytes(gzip.compress(content, mtime=0))
