"""Volumes of which single slices are read: NIfTI files, and TIFF files whose pages are slices."""

import functools
import gzip
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from naslora.data.picture import ImageError, readable
from naslora.data.rasters import SOFTWARE
from naslora.errors import imported

NIFTI = (".nii", ".nii.gz")
TIFF = (".tif", ".tiff")
SAME_PLACE = 1e-3
"""Largest difference of two affines' entries, in millimetres: programs round them differently."""
_LOCK = threading.Lock()


class Slicing(NamedTuple):
    """How volumes become images."""

    axis: int = 2
    """The axis along which slices follow each other."""
    neighbours: int = 0
    """Slices on each side that are further channels."""
    tiff: bool = False
    """Whether TIFF files are volumes, too."""


class Slice(NamedTuple):
    """A slice of a volume."""

    number: int
    """From 0."""
    how: Slicing


def is_nifti(path: Path) -> bool:
    """Whether a file is NIfTI by its name."""
    return path.name.lower().endswith(NIFTI)


def is_volume(path: Path, how: Slicing) -> bool:
    """Whether a file is a volume by its name."""
    return is_nifti(path) or (how.tiff and path.suffix.lower() in TIFF)


def stem_of(path: Path) -> str:
    """The name without its suffix, without both of ``.nii.gz``."""
    return path.stem[:-4] if path.name.lower().endswith(".nii.gz") else path.stem


def _load(path: Path) -> Any:
    (nibabel,) = imported("volumes", "nibabel")
    return nibabel.load(path)


def check_volume(files: list[Path], where: str) -> tuple[int, ...]:
    """Reads the headers of a volume, of further ones of the same place, and of the mask.

    Returns:
        The shape.

    Raises:
        UserError: nibabel is not installed.
        ImageError: a file cannot be read, or has other than three axes, another shape or another
            affine than the first.
    """
    headers = [_header(file, where) for file in files]
    (shape, affine), *others = headers
    for file, (own, its) in zip(files[1:], others, strict=True):
        if own != shape:
            sizes = " and ".join("x".join(map(str, size)) for size in (shape, own))
            raise ImageError(
                f"{where}: {files[0]} and {file} have {sizes} voxels; resample one to the other"
            )
        if not np.allclose(affine, its, rtol=0, atol=SAME_PLACE):
            raise ImageError(
                f"{where}: {files[0]} and {file} have other affines, so they do not lie on each "
                "other; resample one to the other"
            )
    return shape


def _header(path: Path, where: str) -> tuple[tuple[int, ...], np.ndarray]:
    """The shape, and the affine, which is the identity in a TIFF file."""
    if is_nifti(path):
        imported("volumes", "nibabel")
        with readable(f"{where}: {path}"):
            image = _load(path)
            shape, affine = image.shape, image.affine
    else:
        import tifffile  # imported here: few runs need it

        with readable(f"{where}: {path}"), tifffile.TiffFile(path) as tiff:
            shape, affine = tiff.series[0].shape[::-1], np.eye(4)
    if len(shape) != 3:
        raise ImageError(f"{where}: {path} has {len(shape)} axes; save volumes of three")
    return shape, affine


@functools.lru_cache(4)
def _values(path: Path, _: int) -> Any:
    """The voxels, (X, Y, Z). Of an uncompressed NIfTI file only what is taken is read."""
    if not is_nifti(path):
        import tifffile

        return tifffile.imread(path).T
    values = _load(path).dataobj
    return np.asanyarray(values) if path.suffix.lower() == ".gz" else values


def read_slice(path: Path, cut: Slice, where: str) -> np.ndarray:
    """Reads a slice and its neighbours; beyond the volume its outer slices repeat.

    Returns:
        (H, W, 2 N + 1) numbers for N neighbours: the rows are the last of the other two axes.

    Raises:
        ImageError: the file is damaged.
    """
    count, planes = cut.how.neighbours, []
    with readable(where):
        with _LOCK:  # so that threads do not decompress the same file
            values = _values(path, path.stat().st_mtime_ns)
        for index in range(cut.number - count, cut.number + count + 1):
            place: list[Any] = [slice(None)] * 3
            place[cut.how.axis] = min(max(index, 0), values.shape[cut.how.axis] - 1)
            planes.append(np.asarray(values[tuple(place)]).T)
    return np.stack(planes, axis=2)


def write_volume(path: Path, source: Path, slices: list[np.ndarray], axis: int) -> None:
    """Writes slices as a volume that lies where another one does.

    Args:
        path: the file: compressed NIfTI, or TIFF if ``source`` is.
        source: its header is taken, except for the type of the numbers and their range.
        slices: (H, W) or (H, W, K) numbers, as ``read_slice`` turns them.
        axis: as in ``Slicing``.
    """
    values = np.stack([own.swapaxes(0, 1) for own in slices], axis)
    if not is_nifti(source):
        import tifffile

        values = np.ascontiguousarray(values.T)
        tifffile.imwrite(
            path, values, photometric="minisblack", compression="zlib", software=SOFTWARE
        )
        return
    image = _load(source)
    header = image.header.copy()
    header.set_data_dtype(values.dtype)
    header["cal_min"] = header["cal_max"] = 0
    content = type(image)(values, image.affine, header).to_bytes()
    path.write_bytes(gzip.compress(content, mtime=0))
