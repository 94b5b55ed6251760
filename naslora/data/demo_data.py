"""The demo data set: axial slices of the MNI152 brain template, with grey and white matter."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from naslora.data.layouts import Splits, read_csv
from naslora.errors import UserError
from naslora.records import write_rows

# Blocks of axial slices of the 1 mm volume: split, first and last slice. The test block is in the
# middle of the brain. 4 slices between two blocks are unused, because neighbouring slices are
# almost equal and must not lie in different splits.
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

# Rows and columns of an upright slice that contain the brain with a margin of at least 5 pixels.
WINDOW = (slice(19, 211), slice(2, 194))

README = """\
Axial slices, 1 mm apart, of the MNI ICBM152 2009a nonlinear T1 template, an average of 152 adult
brains (Fonov et al., NeuroImage 54, 2011), from the copy that the Python package nilearn
holds. The masks are the most probable of three classes by the template's own tissue maps:
0 everything else, 1 grey matter, 2 white matter. The front of the head is up, its left on the left.
One averaged brain shows that a method runs and learns; it says nothing about new patients.
"""


def read_mni152(root: Path) -> Splits:
    """Reads the demo data set from ``root``, after ``write_mni152`` if necessary."""
    write_mni152(root)
    return read_csv(root)


def write_mni152(directory: Path) -> None:
    """Writes the demo data set with CSV files. It uses files inside nilearn and no network.

    The axial slices of the brain form contiguous ``BLOCKS``, from the neck upwards. Images are
    8-bit greys, masks class indices, which ``README`` names. Both are PNG files of the 192 x 192
    pixels around the brain.

    The directory is created complete or not at all, with ``train.csv``, ``arch.csv``, ``val.csv``,
    ``test.csv``, ``images``, ``masks`` and ``README.txt``. An existing one is not changed.

    Raises:
        UserError: nilearn is not installed, or the directory contains something else.
    """
    if _is_complete(directory):
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not the demo data set; choose another folder")
    try:  # nilearn is an optional package
        from nilearn import datasets
        from nilearn.image import get_data
    except ImportError as error:
        raise UserError(
            f"the demo data needs nilearn ({error}); run pip install nilearn"
        ) from error
    loaders = (
        datasets.load_mni152_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
    )
    # nilearn stores the templates at 1 mm, so this resolution resamples nothing.
    volumes = [get_data(load(resolution=1)) for load in loaders]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mni152-", dir=directory.parent) as temporary:
        whole = Path(temporary, "mni152")
        _write(whole, volumes)
        try:
            whole.rename(directory)
        except OSError:
            # Another process may have created the directory in the meantime.
            if not _is_complete(directory):
                raise


def _is_complete(directory: Path) -> bool:
    return all((directory / f"{split}.csv").is_file() for split in SPLITS)


def _write(directory: Path, volumes: list[np.ndarray]) -> None:
    """Volumes of T1 intensity, grey and white matter: (197, 233, 189) in [0, 1], axes x, y, z."""
    for folder in (directory, directory / "images", directory / "masks"):
        folder.mkdir()
    t1, grey, white = volumes
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for split, first, last in BLOCKS:
        for z in range(first, last + 1):
            tissue = np.stack([grey[..., z], white[..., z]])
            classes = np.argmax(np.stack([1 - tissue.sum(0), *tissue]), axis=0)
            row = {"image": f"images/z{z:03d}.png", "label": f"masks/z{z:03d}.png"}
            for name, plane in zip(row.values(), (np.rint(t1[..., z] * 255), classes), strict=True):
                # (197, 233), axes x and y, to (192, 192) with the front of the head up
                pixels = np.ascontiguousarray(np.rot90(plane)[WINDOW], dtype=np.uint8)
                Image.fromarray(pixels).save(directory / name)
            rows[split].append(row)
    for split, own in rows.items():
        write_rows(directory / f"{split}.csv", own)
    (directory / "README.txt").write_text(README, encoding="utf-8")
