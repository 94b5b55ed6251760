"""COCO's annotation files: which images they name, and which instances each image has.

``regions.py`` draws the instances.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from naslora.data.images import Annotation, Sample
from naslora.data.layouts import OPTIONAL_SPLIT, REQUIRED_SPLITS, Splits, check_folder
from naslora.data.masks import IGNORED
from naslora.data.regions import MOST_PIXELS, Drawing, Instance
from naslora.errors import UserError, listing

OTHER_NAMES = {"val": ("val", "valid", "validation")}
"""Names of a split's files and folders, where they differ from the split's own."""


class Picture(msgspec.Struct):
    id: int | str
    file_name: str
    height: Annotated[int, Meta(ge=1)]
    width: Annotated[int, Meta(ge=1)]


class Category(msgspec.Struct):
    id: int
    name: str


class File(msgspec.Struct):
    """The parts of an annotation file that masks need."""

    images: list[Picture]
    annotations: list[Instance]
    categories: list[Category]


class _Split(NamedTuple):
    path: Path
    file: File
    folders: list[Path]
    """Where its images may be."""


# ---- Reading -------------------------------------------------------------------------------------


def read_coco(root: Path, class_names: Sequence[str] = ()) -> Splits:
    """Reads train, val, test and, if it exists, arch, each from its annotation file.

    The file of a split is SPLIT.json, annotations/SPLIT.json, annotations/instances_SPLIT*.json (as
    COCO has it) or SPLIT/_annotations.coco.json (as Roboflow has it). Its images are in the folder
    of that file, in the root, or in a folder below the root that is called ``images``, like the
    split, or like the split and a year.

    The categories of ``class_names`` become the classes 1, 2, ... in this order. The others are
    background. Without ``class_names`` all categories are classes, in the order of their ids.

    Raises:
        UserError: a file is missing, is no such file, or names what does not exist; categories
            collide; an annotation has no segmentation.
    """
    files = _read_files(root)
    labels = _labels(files["train"], class_names)
    return {split: _samples(one, labels) for split, one in files.items()}


def read_categories(root: Path) -> tuple[str, ...]:
    """Reads the names of the categories, in the order of their ids. Errors as ``read_coco``."""
    return tuple(category.name for category in _read_files(root)["train"].file.categories)


def _read_files(root: Path) -> dict[str, _Split]:
    check_folder(root)
    files = {}
    for split in (*REQUIRED_SPLITS, OPTIONAL_SPLIT):
        names = OTHER_NAMES.get(split, (split,))
        paths = [
            path
            for name in names
            for path in (
                root / f"{name}.json",
                root / "annotations" / f"{name}.json",
                *sorted((root / "annotations").glob(f"instances_{name}*.json")),
                root / name / "_annotations.coco.json",
            )
            if path.is_file()
        ]
        if not paths and split == OPTIONAL_SPLIT:
            continue
        if len(paths) != 1:
            found = listing(str(path.relative_to(root)) for path in paths or root.iterdir())
            raise UserError(
                f"{root}: expected one annotation file of {split} (SPLIT.json, annotations/"
                "SPLIT.json, annotations/instances_SPLIT*.json or SPLIT/_annotations.coco.json), "
                f"found {found}"
            )
        folders = [paths[0].parent, root, root / "images", *(root / name for name in names)]
        folders += [folder for name in names for folder in sorted(root.glob(f"{name}[0-9]*"))]
        files[split] = _Split(paths[0], _read_file(paths[0]), folders)
    _check_categories(files)
    return files


def _read_file(path: Path) -> File:
    try:
        file = msgspec.json.decode(path.read_bytes(), type=File)
    except (OSError, RecursionError, msgspec.MsgspecError) as error:
        raise UserError(f"{path} is no file of COCO annotations: {error}") from error
    file.categories.sort(key=lambda category: category.id)
    return file


def _check_categories(files: dict[str, _Split]) -> None:
    """Checks that categories are distinct, and the same in every split."""
    first = files["train"]
    expected = {category.id: category.name for category in first.file.categories}
    if not expected:
        raise UserError(f"{first.path} has no categories")
    for path, file, _ in files.values():
        own = {category.id: category.name for category in file.categories}
        if not len(set(own.values())) == len(own) == len(file.categories):
            names = listing(f"{category.id} {category.name}" for category in file.categories)
            raise UserError(f"{path}: categories collide, ids and names must differ: {names}")
        if own != expected:
            id = min(key for key in own.keys() | expected if own.get(key) != expected.get(key))
            raise UserError(
                f"the categories of {first.path} and {path} collide: {id} is "
                f"{expected.get(id, 'missing')} and {own.get(id, 'missing')}; give both the same"
            )


def _labels(split: _Split, class_names: Sequence[str]) -> dict[int, int]:
    """The class of each category; categories without one are background."""
    path, ids = split.path, {category.name: category.id for category in split.file.categories}
    unknown = [name for name in class_names if name not in ids]
    if unknown:
        raise UserError(
            f"{path} has no category {listing(unknown)} of --class-names, it has {listing(ids)}"
        )
    if len(class_names or ids) >= IGNORED - 1:
        raise UserError(f"{path} has {len(ids)} categories; choose at most 253 with --class-names")
    labels = {ids[name]: label for label, name in enumerate(class_names or ids, start=1)}
    return {id: labels.get(id, 0) for id in ids.values()}


def _samples(split: _Split, labels: dict[int, int]) -> list[Sample]:
    path, file, folders = split
    regions: dict[int | str, list[Instance]] = {}
    for picture in file.images:
        if picture.id in regions:
            raise UserError(f"{path}: two images have the id {picture.id}; give each its own")
        if picture.height * picture.width > MOST_PIXELS:
            raise UserError(
                f"{path}: image {picture.id} has {picture.width}x{picture.height} pixels (width x "
                f"height), and masks are drawn up to {MOST_PIXELS} pixels; correct the numbers, "
                "cut the image, or save its mask as a file"
            )
        regions[picture.id] = []
    if not regions:
        raise UserError(f"{path} names no images")
    for region in file.annotations:
        name = f"{path}: annotation {region.id}"
        if region.image_id not in regions:
            raise UserError(f"{name} belongs to image {region.image_id}, which the file lacks")
        if region.category_id not in labels:
            raise UserError(f"{name} has the category {region.category_id}, which the file lacks")
        if not region.segmentation:
            raise UserError(f"{name} has no segmentation, only a box; draw a polygon, or remove it")
        regions[region.image_id].append(region)
    samples = []
    for picture in file.images:
        paths = [folder / picture.file_name for folder in folders]
        found = [path for path in paths if os.path.isfile(path)]  # the name may be too long
        if not found:
            raise UserError(
                f"{path} names {picture.file_name}, which is in none of the folders "
                f"{listing(str(folder) for folder in folders)}"
            )
        instances = [(labels[region.category_id], region) for region in regions[picture.id]]
        drawing = msgspec.json.encode(Drawing(picture.height, picture.width, instances))
        origin = f"{path.name} image {picture.id}"
        samples.append(Sample(found[0], Annotation(path, drawing), origin))
    return samples
