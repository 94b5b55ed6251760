"""The data sets of the paper's study (its Appendix B), read as their authors distribute them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from naslora.data.layouts import (
    IMAGE_FOLDER,
    MASK_FOLDER,
    REQUIRED_SPLITS,
    DataSet,
    Layout,
    Part,
    Splits,
    find_folders,
    read_layout,
)

# ---- Folders -------------------------------------------------------------------------------------

BOTH = f"{{}}/{IMAGE_FOLDER}", f"{{}}/{MASK_FOLDER}"


def _parts(images: str, masks: str, groups: Sequence[str] = (), **folders: str) -> tuple[Part, ...]:
    """One part a split, or one for each group of it, which is a folder in the split's own.

    The folder takes the place of {} in both paths.
    """
    return tuple(
        Part(split, images.format(name), masks.format(name), group or None)
        for split, folder in folders.items()
        for group in groups or ("",)
        for name in [f"{folder}/{group}".rstrip("/")]
    )


def _pranet(name: str, skip: str) -> Layout:
    """The folders that PraNet's authors distribute for polyps.

    Both data sets share one training folder. There, CVC-ClinicDB's file names are numbers and
    Kvasir's are not. Each data set has a test folder of its own.
    """
    parts = _parts(*BOTH, train="TrainDataset", test=f"TestDataset/{name}")
    return Layout(parts, "threshold", skip=skip, val=0.2, mark="TrainDataset")


ISIC2017 = Layout(
    _parts(
        "ISIC-2017_{}_Data",
        "ISIC-2017_{}_Part1_GroundTruth",
        train="Training",
        val="Validation",
        test="Test_v2",
    ),
    suffix="_segmentation",
    skip="_superpixels$",  # the data folders also contain such a picture for every image
)
KVASIR = (
    _pranet("Kvasir", skip=r"^\d+$"),
    Layout(_parts("images", "masks", train=""), "threshold", test=100 / 1000, val=0.2),
)
CVC_CLINICDB = (
    _pranet("CVC-ClinicDB", skip=r"\D"),
    Layout(_parts("Original", "Ground Truth", train=""), "threshold", test=62 / 612, val=0.2),
)
# COD10K and CAMO for training; CAMO, CHAMELEON and COD10K as groups of the test split.
CAMOUFLAGE = Layout(
    (
        *_parts("{}/Imgs", "{}/GT", train="TrainDataset"),
        *_parts("{}/Imgs", "{}/GT", ("CAMO", "CHAMELEON", "COD10K"), test="TestDataset"),
    ),
    "threshold",
    val=0.1,
)
# With the training masks that SBU's authors recovered.
SBU = Layout(
    _parts("{}/ShadowImages", "{}/ShadowMasks", train="SBUTrain4KRecoveredSmall", test="SBU-Test"),
    "threshold",
    val=0.1,
)
# The paper does not name validation images. A tenth of the training images is our choice.
LEAF = (
    Layout(_parts(*BOTH, train="train", test="test"), "nonzero", val=0.1, mark="train"),
    Layout(_parts(IMAGE_FOLDER, MASK_FOLDER, train=""), "nonzero", test=90 / 588, val=0.1),
)
ROADS = Layout(
    _parts("tiff/{}", "tiff/{}_labels", train="train", val="val", test="test"), "threshold"
)
# The easy and the hard images are groups.
TRANS10K_V1 = Layout(
    (
        *_parts("{}/images", "{}/masks", train="train"),
        *_parts("{}/images", "{}/masks", ("easy", "hard"), val="validation", test="test"),
    ),
    "thirds",
    suffix="_mask",
)
TRANS10K_V2 = Layout(  # its masks are class indices
    _parts("{}/images", "{}/masks_12", train="train", val="validation", test="test"), suffix="_mask"
)


def read_polyp(root: Path) -> Splits:
    """Kvasir-SEG and CVC-ClinicDB together, as Conv-LoRA trains on them.

    The root holds PraNet's folders, or the two original data sets in folders of their names. Each
    is a group of the test split.
    """
    together = find_folders(root, "TrainDataset")
    parts = {
        name: read_layout(layouts, root if together else root / name)
        for name, layouts in (("Kvasir-SEG", KVASIR), ("CVC-ClinicDB", CVC_CLINICDB))
    }
    return {
        split: [
            sample._replace(group=name) if split == "test" else sample
            for name, splits in parts.items()
            for sample in splits[split]
        ]
        for split in REQUIRED_SPLITS
    }


# ---- The table -----------------------------------------------------------------------------------

SALIENCY = ("s_alpha", "e_phi")
TRANS10K = {"train": 5000, "val": 1000, "test": 4428}


def _set(
    layouts: Sequence[Layout] | Callable[[Path], Splits],
    metrics: tuple[str, ...],
    classes: str,
    **counts: int,
) -> DataSet:
    """A data set that is read by its layouts, or by a function, with the names of its classes."""
    read = layouts if callable(layouts) else partial(read_layout, layouts)
    return DataSet(read, metrics, counts, ("background", *classes.split()))


PAPER_SETS = {
    "isic2017": _set(
        (ISIC2017,), ("iou", "t_iou", "dice", "accuracy"), "lesion", train=2000, val=150, test=600
    ),
    "kvasir": _set(KVASIR, SALIENCY, "polyp", train=720, val=180, test=100),
    "cvc-clinicdb": _set(CVC_CLINICDB, SALIENCY, "polyp", train=440, val=110, test=62),
    "polyp": _set(read_polyp, SALIENCY, "polyp", train=1160, val=290, test=162),
    "camouflage": _set(
        (CAMOUFLAGE,),
        (*SALIENCY, "f_w_beta", "f_w_beta_0.3", "mae"),
        "camouflaged",
        **{"train": 3636, "val": 404, "CAMO": 250, "CHAMELEON": 76, "COD10K": 2026},
    ),
    "sbu": _set((SBU,), ("ber", "ber_pooled"), "shadow", train=3677, val=408, test=638),
    "leaf": _set(LEAF, ("iou", "dice", "accuracy"), "disease", train=448, val=50, test=90),
    "roads": _set((ROADS,), ("iou", "dice"), "road", train=1107, val=13, test=48),
    "trans10k-v1": _set(
        (TRANS10K_V1,),
        ("foreground_accuracy", "foreground_miou", "index_mae", "mber"),
        "things stuff",
        **TRANS10K,
    ),
    "trans10k-v2": _set(
        (TRANS10K_V2,),
        ("pixel_accuracy", "miou", "class_iou"),
        "shelf jar freezer window door eyeglass cup wall bowl bottle box",
        **TRANS10K,
    ),
}
