"""The paper's data sets (its Appendix B), read as their authors distribute them."""

from pathlib import Path

from naslora.data.layouts import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    REQUIRED_SPLITS,
    Splits,
    has_folder,
    locate_folders,
    pair_files,
)
from naslora.data.masks import Sample
from naslora.data.sampling import hold_out

SPLIT_SEED = 0  # of the splits that the paper draws at random; ours are the same in every run


def read_isic2017(root: Path) -> Splits:
    parts = {"train": "Training", "val": "Validation", "test": "Test_v2"}
    wanted = [
        f"ISIC-2017_{part}_{kind}"
        for part in parts.values()
        for kind in ("Data", "Part1_GroundTruth")
    ]
    folders = locate_folders(root, *wanted)
    return {
        # The data folders also hold a picture of superpixels for every image.
        split: pair_files(images, masks, images.name, suffix="_segmentation", skip="_superpixels$")
        for split, images, masks in zip(parts, folders[::2], folders[1::2], strict=True)
    }


def read_kvasir(root: Path) -> Splits:
    if has_folder(root, "TrainDataset"):
        return _read_polyps(root, "Kvasir", skip=r"^\d+$")
    images, masks = locate_folders(root, "images", "masks")
    return _split_polyps(pair_files(images, masks, "images", "threshold"), share=100 / 1000)


def read_cvc_clinicdb(root: Path) -> Splits:
    if has_folder(root, "TrainDataset"):
        return _read_polyps(root, "CVC-ClinicDB", skip=r"\D")
    images, masks = locate_folders(root, "Original", "Ground Truth")
    return _split_polyps(pair_files(images, masks, "Original", "threshold"), share=62 / 612)


def _read_polyps(root: Path, name: str, skip: str) -> Splits:
    """PraNet's folders: one for training that both data sets share, where CVC-ClinicDB's images are
    numbered and Kvasir's are not, and one for testing each."""
    folders = locate_folders(
        root,
        f"TrainDataset/{IMAGE_FOLDERS}",
        f"TrainDataset/{MASK_FOLDERS}",
        f"TestDataset/{name}/{IMAGE_FOLDERS}",
        f"TestDataset/{name}/{MASK_FOLDERS}",
    )
    train = pair_files(*folders[:2], "TrainDataset", "threshold", skip=skip)
    test = pair_files(*folders[2:], f"TestDataset/{name}", "threshold")
    return _with_validation(train, test, share=0.2)


def _split_polyps(samples: list[Sample], share: float) -> Splits:
    train, test = hold_out(samples, share, SPLIT_SEED)
    return _with_validation(train, test, share=0.2)


def read_camouflage(root: Path) -> Splits:
    names = ("CAMO", "CHAMELEON", "COD10K")
    tests = [f"TestDataset/{name}/{kind}" for name in names for kind in ("Imgs", "GT")]
    folders = locate_folders(root, "TrainDataset/Imgs", "TrainDataset/GT", *tests)
    train = pair_files(*folders[:2], "TrainDataset", "threshold")
    test = [
        sample
        for name, images, masks in zip(names, folders[2::2], folders[3::2], strict=True)
        for sample in pair_files(images, masks, f"TestDataset/{name}", "threshold", group=name)
    ]
    return _with_validation(train, test, share=0.1)


def read_sbu(root: Path) -> Splits:
    parts = ("SBUTrain4KRecoveredSmall", "SBU-Test")
    wanted = [f"{part}/{kind}" for part in parts for kind in ("ShadowImages", "ShadowMasks")]
    folders = locate_folders(root, *wanted)
    train = pair_files(*folders[:2], parts[0], "threshold")
    return _with_validation(train, pair_files(*folders[2:], parts[1], "threshold"), share=0.1)


def read_leaf(root: Path) -> Splits:
    if has_folder(root, "train"):
        parts = ("train", "test")
        folders = locate_folders(
            root, *(f"{part}/{kind}" for part in parts for kind in (IMAGE_FOLDERS, MASK_FOLDERS))
        )
        train, test = (
            pair_files(*folders[:2], "train", "nonzero"),
            pair_files(*folders[2:], "test", "nonzero"),
        )
    else:
        folders = locate_folders(root, IMAGE_FOLDERS, MASK_FOLDERS)
        train, test = hold_out(pair_files(*folders, "images", "nonzero"), 90 / 588, SPLIT_SEED)
    # The paper names no images to validate on; a tenth of the training images is ours.
    return _with_validation(train, test, share=0.1)


def read_roads(root: Path) -> Splits:
    wanted = [f"tiff/{split}{kind}" for split in REQUIRED_SPLITS for kind in ("", "_labels")]
    folders = locate_folders(root, *wanted)
    return {
        split: pair_files(images, masks, f"tiff/{split}", "threshold")
        for split, images, masks in zip(REQUIRED_SPLITS, folders[::2], folders[1::2], strict=True)
    }


def read_trans10k_v1(root: Path) -> Splits:
    parts = {"train": ("train",)}
    for split in ("validation", "test"):
        parts[split] = tuple(f"{split}/{group}" for group in ("easy", "hard"))
    wanted = [
        f"{p}/{kind}" for part in parts.values() for p in part for kind in ("images", "masks")
    ]
    folders = iter(locate_folders(root, *wanted))
    pairs = {
        split: [
            sample
            for part in group
            for sample in pair_files(
                next(folders),
                next(folders),
                part,
                "thirds",
                suffix="_mask",
                group=part.partition("/")[2] or None,
            )
        ]
        for split, group in parts.items()
    }
    return {"train": pairs["train"], "val": pairs["validation"], "test": pairs["test"]}


def read_trans10k_v2(root: Path) -> Splits:
    parts = {"train": "train", "val": "validation", "test": "test"}
    wanted = [f"{part}/{kind}" for part in parts.values() for kind in ("images", "masks_12")]
    folders = locate_folders(root, *wanted)
    return {
        split: pair_files(images, masks, parts[split], suffix="_mask")
        for split, images, masks in zip(parts, folders[::2], folders[1::2], strict=True)
    }


def _with_validation(train: list[Sample], test: list[Sample], share: float) -> Splits:
    """Draws the validation images from the training images, as the paper does."""
    train, val = hold_out(train, share, SPLIT_SEED)
    return {"train": train, "val": val, "test": test}


SALIENCY = ("s_alpha", "e_phi")


TRANS10K = {"train": 5000, "val": 1000, "test": 4428}
