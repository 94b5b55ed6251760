"""The data sets of the paper's study (its Appendix B), read as their authors distribute them."""

from pathlib import Path

from naslora.data.images import Sample
from naslora.data.layouts import (
    IMAGE_FOLDER,
    MASK_FOLDER,
    REQUIRED_SPLITS,
    DataSet,
    Splits,
    has_folder,
    locate_folders,
    pair_files,
)
from naslora.data.sampling import hold_out

SPLIT_SEED = 0  # The paper draws some splits at random; a fixed seed gives the same split each run.


def with_validation(train: list[Sample], test: list[Sample], share: float) -> Splits:
    """Draws the validation images at random from the training images, as the paper does.

    Args:
        train: the training images of the data set.
        test: the test images.
        share: share of ``train`` to draw, in (0, 1).
    """
    train, val = hold_out(train, share, SPLIT_SEED)
    return {"train": train, "val": val, "test": test}


# ---- Skin lesions --------------------------------------------------------------------------------


def read_isic2017(root: Path) -> Splits:
    """ISIC 2017, part 1."""
    parts = {"train": "Training", "val": "Validation", "test": "Test_v2"}
    located = locate_folders(
        root,
        *(
            (f"ISIC-2017_{part}_Data", f"ISIC-2017_{part}_Part1_GroundTruth")
            for part in parts.values()
        ),
    )
    return {
        # The data folders also contain a picture of superpixels for every image.
        split: pair_files(
            folders, folders.images.name, suffix="_segmentation", skip="_superpixels$"
        )
        for split, folders in zip(parts, located, strict=True)
    }


# ---- Polyps --------------------------------------------------------------------------------------


def read_kvasir(root: Path) -> Splits:
    """Kvasir-SEG: PraNet's folders, or the original ones with a test split drawn at random."""
    if has_folder(root, "TrainDataset"):
        return _read_pranet(root, "Kvasir", skip=r"^\d+$")
    (folders,) = locate_folders(root, ("images", "masks"))
    return split_polyps(pair_files(folders, "images", "threshold"), share=100 / 1000)


def read_cvc_clinicdb(root: Path) -> Splits:
    """CVC-ClinicDB: PraNet's folders, or the original ones with a test split drawn at random."""
    if has_folder(root, "TrainDataset"):
        return _read_pranet(root, "CVC-ClinicDB", skip=r"\D")
    (folders,) = locate_folders(root, ("Original", "Ground Truth"))
    return split_polyps(pair_files(folders, "Original", "threshold"), share=62 / 612)


def read_polyp(root: Path) -> Splits:
    """Kvasir-SEG and CVC-ClinicDB together, as Conv-LoRA trains on them.

    The root holds PraNet's folders, or the two original data sets in folders of their names. Each
    is a group of the test split.
    """
    together = has_folder(root, "TrainDataset")
    parts = {
        name: read(root if together else root / name)
        for name, read in (("Kvasir-SEG", read_kvasir), ("CVC-ClinicDB", read_cvc_clinicdb))
    }
    return {
        split: [
            sample._replace(group=name) if split == "test" else sample
            for name, splits in parts.items()
            for sample in splits[split]
        ]
        for split in REQUIRED_SPLITS
    }


def _read_pranet(root: Path, name: str, skip: str) -> Splits:
    """Reads the folders that PraNet's authors distribute.

    Both data sets share one training folder. There, CVC-ClinicDB's file names are numbers and
    Kvasir's are not. Each data set has a test folder of its own.
    """
    train_folders, test_folders = locate_folders(
        root,
        (f"TrainDataset/{IMAGE_FOLDER}", f"TrainDataset/{MASK_FOLDER}"),
        (f"TestDataset/{name}/{IMAGE_FOLDER}", f"TestDataset/{name}/{MASK_FOLDER}"),
    )
    train = pair_files(train_folders, "TrainDataset", "threshold", skip=skip)
    test = pair_files(test_folders, f"TestDataset/{name}", "threshold")
    return with_validation(train, test, share=0.2)


def split_polyps(samples: list[Sample], share: float) -> Splits:
    """Draws the test images, then a fifth of the rest as validation images.

    Args:
        samples: all images of the data set.
        share: share of the test images, in (0, 1).
    """
    train, test = hold_out(samples, share, SPLIT_SEED)
    return with_validation(train, test, share=0.2)


# ---- Camouflaged objects -------------------------------------------------------------------------


def read_camouflage(root: Path) -> Splits:
    """COD10K and CAMO for training; CAMO, CHAMELEON and COD10K as groups of the test split."""
    names = ("CAMO", "CHAMELEON", "COD10K")
    train_folders, *test_folders = locate_folders(
        root,
        ("TrainDataset/Imgs", "TrainDataset/GT"),
        *((f"TestDataset/{name}/Imgs", f"TestDataset/{name}/GT") for name in names),
    )
    train = pair_files(train_folders, "TrainDataset", "threshold")
    test = [
        sample
        for name, folders in zip(names, test_folders, strict=True)
        for sample in pair_files(folders, f"TestDataset/{name}", "threshold", group=name)
    ]
    return with_validation(train, test, share=0.1)


# ---- Shadows -------------------------------------------------------------------------------------


def read_sbu(root: Path) -> Splits:
    """SBU, with the training masks that its authors recovered."""
    parts = ("SBUTrain4KRecoveredSmall", "SBU-Test")
    located = locate_folders(
        root, *((f"{part}/ShadowImages", f"{part}/ShadowMasks") for part in parts)
    )
    train, test = (
        pair_files(folders, part, "threshold") for part, folders in zip(parts, located, strict=True)
    )
    return with_validation(train, test, share=0.1)


# ---- Leaf diseases -------------------------------------------------------------------------------


def read_leaf(root: Path) -> Splits:
    """Leaf disease segmentation, with train and test folders, or with a test split drawn at random.

    The paper does not name validation images. A tenth of the training images is our choice.
    """
    if has_folder(root, "train"):
        parts = ("train", "test")
        located = locate_folders(
            root, *((f"{part}/{IMAGE_FOLDER}", f"{part}/{MASK_FOLDER}") for part in parts)
        )
        train, test = (
            pair_files(folders, part, "nonzero")
            for part, folders in zip(parts, located, strict=True)
        )
    else:
        (folders,) = locate_folders(root, (IMAGE_FOLDER, MASK_FOLDER))
        train, test = hold_out(pair_files(folders, "images", "nonzero"), 90 / 588, SPLIT_SEED)
    return with_validation(train, test, share=0.1)


# ---- Roads ---------------------------------------------------------------------------------------


def read_roads(root: Path) -> Splits:
    """The Massachusetts roads data set."""
    located = locate_folders(
        root, *((f"tiff/{split}", f"tiff/{split}_labels") for split in REQUIRED_SPLITS)
    )
    return {
        split: pair_files(folders, f"tiff/{split}", "threshold")
        for split, folders in zip(REQUIRED_SPLITS, located, strict=True)
    }


# ---- Transparent objects -------------------------------------------------------------------------


def read_trans10k_v1(root: Path) -> Splits:
    """Trans10K; the easy and hard images are groups of the test split."""
    parts = {
        "train": ("train",),
        "val": ("validation/easy", "validation/hard"),
        "test": ("test/easy", "test/hard"),
    }
    paths = [path for group in parts.values() for path in group]
    folders = locate_folders(root, *((f"{path}/images", f"{path}/masks") for path in paths))
    samples = {
        path: pair_files(pair, path, "thirds", suffix="_mask", group=path.partition("/")[2] or None)
        for path, pair in zip(paths, folders, strict=True)
    }
    return {
        split: [sample for path in group for sample in samples[path]]
        for split, group in parts.items()
    }


def read_trans10k_v2(root: Path) -> Splits:
    """Trans10K-v2, whose masks are class indices."""
    parts = {"train": "train", "val": "validation", "test": "test"}
    located = locate_folders(
        root, *((f"{part}/images", f"{part}/masks_12") for part in parts.values())
    )
    return {
        split: pair_files(folders, parts[split], suffix="_mask")
        for split, folders in zip(parts, located, strict=True)
    }


# ---- The table -----------------------------------------------------------------------------------

SALIENCY = ("s_alpha", "e_phi")
TRANS10K = {"train": 5000, "val": 1000, "test": 4428}

PAPER_SETS: dict[str, DataSet] = {
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
    "polyp": DataSet(
        read_polyp,
        metrics=SALIENCY,
        counts={"train": 1160, "val": 290, "test": 162},
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
