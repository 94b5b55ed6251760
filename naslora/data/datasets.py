"""The table of data sets and how their splits are loaded."""

from collections import Counter
from pathlib import Path

from naslora.data.layouts import (
    DataSet,
    Splits,
    read_csv,
    read_folders,
    read_mni152,
)
from naslora.data.masks import Sample
from naslora.data.paper_sets import (
    SALIENCY,
    TRANS10K,
    read_camouflage,
    read_cvc_clinicdb,
    read_isic2017,
    read_kvasir,
    read_leaf,
    read_roads,
    read_sbu,
    read_trans10k_v1,
    read_trans10k_v2,
)
from naslora.errors import UserError


def load_splits(source: str, root: Path) -> Splits:
    """Finds the files of a data set.

    Args:
        source: a key of ``DATASETS``.
        root: the folder of the data set.

    Returns:
        "train", "val", "test" and, where the data set has it, "arch" (the split that the
        architecture is trained on): each a list of at least one sample, all with a mask.

    Raises:
        UserError: the source is unknown; files or folders are missing, which are told with what was
            found instead; images and masks do not pair up, which are named; or an image appears
            twice, in one split or in two.
    """
    splits = find_dataset(source).read(Path(root))
    _check_distinct(splits)
    return splits


def find_dataset(name: str) -> DataSet:
    """An entry of ``DATASETS``.

    Raises:
        UserError: there is none of this name.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; known are: {', '.join(DATASETS)}")
    return DATASETS[name]


def count_differences(source: str, splits: Splits) -> list[str]:
    """Where a data set has another number of images than the paper, in words."""
    found = Counter({split: len(samples) for split, samples in splits.items()})
    found.update(sample.group for sample in splits["test"] if sample.group)
    return [
        f"{found[name]} {name} images instead of {count}"
        for name, count in find_dataset(source).counts.items()
        if found[name] != count
    ]


def _check_distinct(splits: Splits) -> None:
    seen: dict[Path, tuple[str, Sample]] = {}
    for split, samples in splits.items():
        for sample in samples:
            # resolved, so that two spellings of a path, or a link, are one image
            first_split, first = seen.setdefault(sample.image.resolve(), (split, sample))
            if first is sample:
                continue
            what = (
                f"is listed twice in {split}; remove one of the two"
                if split == first_split
                else f"is both in {first_split} and in {split}, so a score on one would be learned "
                "from the other; keep it in one"
            )
            raise UserError(f"{first.origin} and {sample.origin}: the image {sample.image} {what}")


DATASETS: dict[str, DataSet] = {
    "csv": DataSet(read_csv),
    "folders": DataSet(read_folders),
    "mni152": DataSet(read_mni152),
    "isic2017": DataSet(
        read_isic2017,
        metrics=("iou", "t_iou", "dice", "accuracy"),
        counts={"train": 2000, "val": 150, "test": 600},
        class_names=("background", "lesion"),
    ),
    "kvasir": DataSet(
        read_kvasir,
        metrics=SALIENCY,
        counts={"train": 720, "val": 180, "test": 100},
        class_names=("background", "polyp"),
    ),
    "cvc-clinicdb": DataSet(
        read_cvc_clinicdb,
        metrics=SALIENCY,
        counts={"train": 440, "val": 110, "test": 62},
        class_names=("background", "polyp"),
    ),
    "camouflage": DataSet(
        read_camouflage,
        metrics=(*SALIENCY, "f_w_beta", "f_w_beta_0.3", "mae"),
        counts={"train": 3636, "val": 404, "CAMO": 250, "CHAMELEON": 76, "COD10K": 2026},
        class_names=("background", "camouflaged"),
    ),
    "sbu": DataSet(
        read_sbu,
        metrics=("ber", "ber_pooled"),
        counts={"train": 3677, "val": 408, "test": 638},
        class_names=("background", "shadow"),
    ),
    "leaf": DataSet(
        read_leaf,
        metrics=("iou", "dice", "accuracy"),
        counts={"train": 448, "val": 50, "test": 90},
        class_names=("background", "disease"),
    ),
    "roads": DataSet(
        read_roads,
        metrics=("iou", "dice"),
        counts={"train": 1107, "val": 13, "test": 48},
        class_names=("background", "road"),
    ),
    "trans10k-v1": DataSet(
        read_trans10k_v1,
        metrics=("foreground_accuracy", "foreground_miou", "index_mae", "mber"),
        counts=TRANS10K,
        class_names=("background", "things", "stuff"),
    ),
    "trans10k-v2": DataSet(
        read_trans10k_v2,
        metrics=("pixel_accuracy", "miou", "class_iou"),
        counts=TRANS10K,
        class_names=(
            "background",
            "shelf",
            "jar",
            "freezer",
            "window",
            "door",
            "eyeglass",
            "cup",
            "wall",
            "bowl",
            "bottle",
            "box",
        ),
    ),
}
