"""Volumes in NIfTI files, of which single slices are read."""

import functools
import gzip
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from naslora.data.picture import ImageError, readable
from naslora.errors import imported

NIFTI = (".nii", ".nii.gz")
SAME_PLACE = 1e-3
"""Largest difference of two affines' entries, in millimetres: programs round them differently."""
_LOCK = threading.Lock()


class Slicing(NamedTuple):
    """How volumes become images."""

    axis: int = 2
    """The axis along which slices follow each other."""
    neighbours: int = 0
    """Slices on each side that are further channels."""


DEFAULT_SLICING = Slicing()


class Slice(NamedTuple):
    """A slice of a volume."""

    number: int
    """From 0."""
    how: Slicing


def is_volume(path: Path) -> bool:
    """Whether a file is NIfTI by its name."""
    return path.name.lower().endswith(NIFTI)


def stem_of(path: Path) -> str:
    """The name without its suffix, without both of ``.nii.gz``."""
    return path.stem[:-4] if path.name.lower().endswith(".nii.gz") else path.stem


def check_volume(files: Sequence[Path], where: str) -> tuple[int, ...]:
    """Returns the shape of a volume, and of those that lie on it, such as its mask.

    Raises:
        UserError: nibabel is not installed.
        ImageError: a file cannot be read, or has other than three axes, another shape or another
            affine than the first.
    """
    (nibabel,) = imported("volumes", "nibabel")
    shape, affine = (), np.eye(4)
    for file in files:
        if not is_volume(file):
            raise ImageError(f"{where}: {files[0]} is a volume, and {file} is none; save it so")
        with readable(f"{where}: {file}"):
            image = nibabel.load(file)
        if len(image.shape) != 3:
            raise ImageError(f"{where}: {file} has {len(image.shape)} axes; save volumes of three")
        both, remedy = f"{where}: {files[0]} and {file} have", "resample one to the other"
        if file == files[0]:
            shape, affine = image.shape, image.affine
        if image.shape != shape:
            sizes = " and ".join("x".join(map(str, size)) for size in (shape, image.shape))
            raise ImageError(f"{both} {sizes} voxels; {remedy}")
        if not np.allclose(affine, image.affine, rtol=0, atol=SAME_PLACE):
            raise ImageError(f"{both} other affines, so they lie elsewhere; {remedy}")
    return shape


@functools.lru_cache(4)
def _values(path: Path, _: int) -> Any:
    """The voxels, (X, Y, Z). Of an uncompressed file only what is taken is read."""
    (nibabel,) = imported("volumes", "nibabel")
    values = nibabel.load(path).dataobj
    return np.asanyarray(values) if path.suffix.lower() == ".gz" else values


def read_slice(path: Path, cut: Slice, where: str) -> np.ndarray:
    """Reads a slice and its neighbours; beyond the volume its outer slices repeat.

    Returns:
        (H, W, 2 N + 1) numbers for N neighbours. The rows are the last of the other two axes.

    Raises:
        ImageError: the file is damaged.
    """
    (axis, count), planes = cut.how, []
    with readable(where):
        with _LOCK:  # so that threads do not decompress the same file
            values = _values(path, path.stat().st_mtime_ns)
        for number in range(cut.number - count, cut.number + count + 1):
            place: list[Any] = [slice(None)] * 3
            place[axis] = min(max(number, 0), values.shape[axis] - 1)
            planes.append(np.asarray(values[tuple(place)]).T)
    return np.stack(planes, axis=2)


def write_volume(path: Path, source: Path, slices: Sequence[np.ndarray], axis: int) -> None:
    """Writes slices as a volume with the geometry of another one, as compressed NIfTI.

    Args:
        source: its header is taken, except for the type of the numbers and their range.
        slices: (H, W) or (H, W, K) numbers, as ``read_slice`` turns them.
        axis: as in ``Slicing``.
    """
    (nibabel,) = imported("volumes", "nibabel")
    image = nibabel.load(source)
    values = np.stack([own.swapaxes(0, 1) for own in slices], axis)
    header = image.header.copy()
    header.set_data_dtype(values.dtype)
    header["cal_min"] = header["cal_max"] = 0
    content = type(image)(values, image.affine, header).to_bytes()
    path.write_bytes(gzip.compress(content, mtime=0))
