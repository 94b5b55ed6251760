"""Small copies of the paper's data sets, with the folders and file names that are distributed, and
the check that a run makes of its files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from naslora.data.contents import read_contents
from naslora.data.dataset import SegmentationDataset

SIZE = (24, 32)  # height, width
DISC = np.hypot(*(np.mgrid[: SIZE[0], : SIZE[1]] - np.array([[[12]], [[16]]]))) < 9
BINARY = 255 * DISC.astype(np.uint8)
LEFT = np.mgrid[: SIZE[0], : SIZE[1]][1] < 16
# Background 0, things (left half of the disc) 1, stuff (right half) 2
CLASSES = np.where(DISC, np.where(LEFT, 1, 2), 0).astype(np.uint8)
V1_COLOURS = np.array([(0, 0, 0), (255, 0, 0), (255, 255, 255)], dtype=np.uint8)


def picture(path: Path, seed: int = 0, **options) -> None:
    """Writes a bright disc on dark noise; the suffix selects the format."""
    noise = np.random.default_rng(seed).integers(0, 50, (*SIZE, 3))
    save(path, (180 * DISC[..., None] + noise).astype(np.uint8), **options)


def sample(root: Path, image: str, mask: str, seed: int, labels: npt.ArrayLike = BINARY) -> None:
    """Writes a picture and its mask."""
    picture(root / image, seed)
    save(root / mask, labels)


def save(path: Path, pixels: npt.ArrayLike, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


def noise(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Images of random pixels, (height, width)."""
    rng = np.random.default_rng(0)
    return [save(folder / f"{i:02}.png", rng.integers(0, 256, (*size, 3))) for i in range(count)]


def as_tiff(data: Path, folder: Path, change: Callable, **options) -> Path:
    """A CSV data set as TIFF files of what ``change`` makes of its images, (H, W, 3) float32."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").symlink_to(data / "masks")
    for path in sorted((data / "images").iterdir()):
        values = change(np.asarray(Image.open(path), np.float32)).astype(np.float32)
        tifffile.imwrite(folder / f"images/{path.stem}.tif", values, **options)
    for path in data.glob("*.csv"):
        (folder / path.name).write_text(path.read_text().replace(".png,", ".tif,"))
    return folder


def isic2017(root: Path) -> None:
    numbers = iter(range(10))
    for part, count in (("Training", 4), ("Validation", 1), ("Test_v2", 2)):
        for number in (next(numbers) for _ in range(count)):
            name = f"ISIC_{number:07d}"
            picture(root / f"ISIC-2017_{part}_Data/{name}.jpg", number)
            picture(root / f"ISIC-2017_{part}_Data/{name}_superpixels.png", number)
            mask = root / f"ISIC-2017_{part}_Part1_GroundTruth/{name}_segmentation.png"
            save(mask, BINARY)
        (root / f"ISIC-2017_{part}_Data/ISIC-2017_{part}_Data_metadata.csv").write_text("image_id")


def check_samples(samples, num_classes, palette=None, ignore_index=None):
    """Reads every sample once, as ``naslora train`` does before a run.

    Returns whether each has foreground."""
    dataset = SegmentationDataset(samples, 16, num_classes, palette, ignore_index=ignore_index)
    return [content.foreground for content in read_contents(dataset)]


def pranet(root: Path) -> None:
    for i in range(5):
        for name in (f"cju{i}qkwl35piu0993l0dewei2", str(i)):
            sample(root / "TrainDataset", f"image/{name}.png", f"masks/{name}.png", i)
    for folder, name in (("Kvasir", "cju9a"), ("CVC-ClinicDB", "99"), ("ETIS", "1")):
        sample(root / "TestDataset" / folder, f"images/{name}.png", f"masks/{name}.png", 9)


def kvasir_raw(root: Path) -> None:
    for i in range(10):
        picture(root / f"images/cju{i}.jpg", i)
        # Colour JPEGs: the compression makes grey values at edges.
        save(root / f"masks/cju{i}.jpg", np.stack([BINARY] * 3, 2), quality=75)
    (root / "kavsir_bboxes.json").write_text("{}")


def polyps_raw(root: Path) -> None:
    kvasir_raw(root / "Kvasir-SEG")
    cvc_raw(root / "CVC-ClinicDB")


def cvc_raw(root: Path) -> None:
    for i in range(1, 11):
        sample(root, f"Original/{i}.tif", f"Ground Truth/{i}.tif", i)


def camouflage(root: Path) -> None:
    soft = np.where(DISC, 250, 3)  # smoothed masks
    for name in (f"camourflage_{i:05d}" for i in range(10)):
        sample(root / "TrainDataset", f"Imgs/{name}.jpg", f"GT/{name}.png", int(name[-2:]), soft)
    tests = root / "TestDataset"
    for folder, name in (("CAMO", "camourflage_1"), ("CHAMELEON", "animal-1"), ("COD10K", "COD-1")):
        sample(tests / folder, f"Imgs/{name}.jpg", f"GT/{name}.png", 10)
    # The original also has names that differ in case.
    sample(tests / "CHAMELEON", "Imgs/animal-2.JPG", "GT/Animal-2.png", 11)


def sbu(root: Path) -> None:
    for folder, count in (("SBUTrain4KRecoveredSmall", 10), ("SBU-Test", 2)):
        for i in range(count):
            sample(root / folder, f"ShadowImages/lssd{i}.jpg", f"ShadowMasks/lssd{i}.png", i)


def leaf(root: Path) -> None:
    for folder, count in (("train", 10), ("test", 2)):
        leaf_flat(root / folder, folder, count)


def leaf_flat(root: Path, prefix: str = "", count: int = 12) -> None:
    for i in range(count):
        name = f"{prefix}{i:05d}"
        sample(root, f"images/{name}.jpg", f"masks/{name}.png", i, DISC[..., None] * (128, 0, 0))


def roads(root: Path) -> None:
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        for i in range(count):
            name = f"{split}_{i}_15.tif"
            sample(root / "tiff", f"{split}/{name}f", f"{split}_labels/{name}", i)


def trans10k_v1(root: Path) -> None:
    parts = [f"{split}/{group}" for split in ("validation", "test") for group in ("easy", "hard")]
    for part, count in {"train": 3, **dict.fromkeys(parts, 1)}.items():
        for i in range(count):
            sample(root / part, f"images/{i}.jpg", f"masks/{i}_mask.png", i, V1_COLOURS[CLASSES])


def trans10k_v2(root: Path) -> None:
    for part, count in (("train", 3), ("validation", 1), ("test", 1)):
        for i in range(count):
            picture(root / part / f"images/{i}.jpg", i)
            path = root / part / f"masks_12/{i}_mask.png"
            save(path, CLASSES)
            mask = Image.fromarray(np.where(CLASSES == 2, 11, CLASSES).astype(np.uint8))
            mask.putpalette(bytes(range(30, 66)))  # for display; the indices are the classes
            mask.save(path)


TREES: dict[str, Callable[[Path], None]] = {
    "isic2017": isic2017,
    "kvasir": pranet,
    "cvc-clinicdb": pranet,
    "camouflage": camouflage,
    "sbu": sbu,
    "leaf": leaf,
    "roads": roads,
    "trans10k-v1": trans10k_v1,
    "trans10k-v2": trans10k_v2,
}
"""By the name of the data set, the function that writes its folders."""
