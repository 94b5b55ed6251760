"""The built-in demo data set: axial slices of the MNI152 brain with its grey and white matter."""

import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from naslora.errors import UserError

# Axial slices of the 1 mm volume, both ends included: a test block in the middle of the brain, and
# 4 slices left out between any two blocks, so that no slice has a near copy in another split.
BLOCKS = (
    ("train", 20, 43),
    ("val", 48, 59),
    ("train", 64, 79),
    ("test", 84, 101),
    ("train", 106, 117),
    ("arch", 122, 137),
    ("train", 142, 149),
)
SPLITS = ("train", "arch", "val", "test")

# Rows and columns, of a slice turned upright, that hold the brain with a margin of 5 pixels or more
WINDOW = (slice(19, 211), slice(2, 194))

README = """\
Axial slices, 1 mm apart, of the MNI ICBM152 2009a nonlinear T1 template, an average of 152 adult
brains (Fonov et al., NeuroImage 54, 2011), from the copy that the Python package nilearn
holds. The masks are the most probable of three classes by the template's own tissue maps:
0 everything else, 1 grey matter, 2 white matter. The front of the head is up, its left on the left.
One averaged brain shows that a method runs and learns; it says nothing about new patients.
"""


def write_mni152(directory: Path) -> None:
    """Writes the demo as a data set of CSV files, from files inside nilearn, without the network.

    The axial slices that hold brain are cut into contiguous blocks, from the neck upwards: train
    (24 slices), val (12), train (16), test (18), train (12), arch (16), train (8), with 4 slices
    left out between blocks. Images are 8-bit greys and masks class indices (0 everything else, 1
    grey matter, 2 white matter), both PNG, cut to the 192 x 192 pixels around the brain.

    The directory appears whole or not at all; one that is already there is left alone.

    Args:
        directory: to be made; will hold ``train.csv``, ``arch.csv``, ``val.csv``, ``test.csv``,
            ``images``, ``masks`` and ``README.txt``.

    Raises:
        UserError: nilearn is not installed, or the directory holds something else.
    """
    directory = Path(directory)
    if _is_complete(directory):
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not the demo data set; choose another folder")
    volumes = _load_volumes()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mni152-", dir=directory.parent) as temporary:
        whole = Path(temporary, "mni152")
        _write(whole, volumes)
        try:
            whole.rename(directory)
        except OSError:
            # Another process may have been quicker
            if not _is_complete(directory):
                raise


def _is_complete(directory: Path) -> bool:
    return all((directory / f"{split}.csv").is_file() for split in SPLITS)


def _write(directory: Path, volumes: list[np.ndarray]) -> None:
    for folder in (directory, directory / "images", directory / "masks"):
        folder.mkdir()
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for split, z, image, mask in _slices(*volumes):
        row = (f"images/z{z:03d}.png", f"masks/z{z:03d}.png")
        for name, pixels in zip(row, (image, mask), strict=True):
            Image.fromarray(pixels).save(directory / name)
        rows[split].append(row)
    for split in SPLITS:
        with (directory / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("image", "label"), *rows[split]])
    (directory / "README.txt").write_text(README, encoding="utf-8")


def _slices(
    t1: np.ndarray, grey: np.ndarray, white: np.ndarray
) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """Yields split, z, image and mask, both (192, 192) uint8."""
    for split, first, last in BLOCKS:
        for z in range(first, last + 1):
            tissue = np.stack([grey[..., z], white[..., z]])
            classes = np.argmax(np.stack([1 - tissue.sum(0), *tissue]), axis=0)
            image = np.rint(t1[..., z] * 255)
            yield split, z, _upright(image), _upright(classes)


def _load_volumes() -> list[np.ndarray]:
    """T1 intensity, grey and white matter probability: (197, 233, 189) in [0, 1] along x, y, z."""
    try:
        from nilearn import datasets
        from nilearn.image import get_data
    except ImportError as error:
        raise UserError(
            f'the demo data needs nilearn ({error}); install it with: pip install "naslora[demo]"'
        ) from error
    # 1 mm is the resolution stored, so nothing is resampled
    volumes = (
        datasets.load_mni152_template(resolution=1),
        datasets.load_mni152_gm_template(resolution=1),
        datasets.load_mni152_wm_template(resolution=1),
    )
    return [get_data(volume) for volume in volumes]


def _upright(plane: np.ndarray) -> np.ndarray:
    """(197, 233) along x, y -> (192, 192) uint8 with the front of the head up."""
    return np.ascontiguousarray(np.rot90(plane)[WINDOW], dtype=np.uint8)
