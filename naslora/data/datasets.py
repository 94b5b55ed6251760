"""The table of all data sets, and their splits: loaded, or drawn at random by shares or as folds.

Where splits are drawn, the images of one group stay together.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from naslora.data.coco import read_categories, read_coco
from naslora.data.demo_data import read_mni152
from naslora.data.images import Sample
from naslora.data.layouts import GROUP, REQUIRED_SPLITS, DataSet, Splits, read_csv, read_folders
from naslora.data.paper_sets import PAPER_SETS
from naslora.data.sampling import HOLD_OUT, seeded_generator
from naslora.data.volumes import DEFAULT_SLICING, Slice, Slicing, check_volume, is_volume
from naslora.errors import UserError
from naslora.records import write_rows

DATASETS: dict[str, DataSet] = {
    "csv": DataSet(read_csv, drawable=True),
    "folders": DataSet(read_folders, drawable=True),
    "coco": DataSet(read_coco, categories=read_categories),
    "mni152": DataSet(read_mni152),
    **PAPER_SETS,
}


def load_splits(
    source: str,
    root: Path,
    class_names: Sequence[str] = (),
    shares: Sequence[float] | None = None,
    group: str = GROUP,
    how: Slicing = DEFAULT_SLICING,
) -> Splits:
    """Locates the files of a data set. It decodes no image.

    Args:
        source, root: a key of ``DATASETS``, and the folder of the data set.
        class_names: the foreground classes of the run, for a data set whose files name more.
        shares: of train, val and test, if they are drawn from all images.
        group: as in ``read_csv``.
        how: how volumes become images.

    Returns:
        "train", "val", "test" and, if the data set has it, "arch", the split that alpha is trained
        on. Each split has at least one sample, and each sample has a mask.

    Raises:
        UserError: the source is unknown, files or folders are missing, an image has no mask or a
            mask no image, a name is not UTF-8, or an image appears twice. The message names the
            files, and for a missing folder the folders that exist. Also as ``check_volume``.
    """
    if shares is not None:
        return split_samples(load_all(source, root, "--split", group, how), shares)
    read = _read(source, root, class_names, group)
    splits = {name: slices_of(samples, how) for name, samples in read.items()}
    missing = [split for split in REQUIRED_SPLITS if split not in splits]
    if missing:
        raise UserError(
            f"{root} has no split {', '.join(missing)}; add it, or give --split 0.7 0.15 0.15 to "
            "draw the splits from all images"
        )
    if DATASETS[source].drawable:  # their groups are not scored
        return {name: [own._replace(group=None) for own in splits[name]] for name in splits}
    return splits


def load_all(
    source: str, root: Path, option: str, group: str = GROUP, how: Slicing = DEFAULT_SLICING
) -> list[Sample]:
    """Locates all samples of a data set, of all splits, so that others can be drawn.

    Arguments as ``load_splits``; ``option`` is what draws the splits, for the message.

    Raises:
        UserError: the data set has splits of its own, or each entry of a column ``group`` that is
            given is another; as ``load_splits``.
    """
    if not DATASETS[source].drawable:
        raise UserError(f"{source} has its own splits; drop {option}")
    found = _read(source, root, group=group).values()
    samples = [sample for part in found for sample in part]
    if group != GROUP and len(group_members(samples)) == len(samples):
        raise UserError(
            f"each group of the column {group!r} has one member, so nothing stays together; name "
            "the column of what must, such as the patient, or drop --group"
        )
    return slices_of(samples, how)


def slices_of(samples: Sequence[Sample], how: Slicing) -> list[Sample]:
    """Replaces volumes by their slices, which are a group if they have none.

    Errors as ``check_volume``.
    """
    found = []
    for sample in samples:
        if not is_volume(sample.image, how):
            found.append(sample)
            continue
        files = [path for path in (*sample.files, sample.mask) if isinstance(path, Path)]
        shape = check_volume(files, how, sample.origin)
        whole = sample._replace(group=sample.group or str(sample.image))
        found += [whole._replace(slice=Slice(index, how)) for index in range(shape[how.axis])]
    return found


def _read(source: str, root: Path, class_names: Sequence[str] = (), group: str = GROUP) -> Splits:
    if source not in DATASETS:
        raise UserError(f"unknown data set {source!r}; the known ones are {', '.join(DATASETS)}")
    dataset = DATASETS[source]
    more: tuple[Any, ...] = () if dataset.categories is None else (class_names,)
    if source == "csv":
        more = (group,)
    elif group != GROUP:
        raise UserError(f"--group names a column of CSV files, and {source} has none; drop it")
    splits = dataset.read(Path(root), *more)
    _check_distinct(splits)
    return splits


def _check_distinct(splits: Splits) -> None:
    seen: dict[Path, tuple[str, Sample]] = {}
    for split, samples in splits.items():
        for sample in samples:
            try:  # results, which are in UTF-8, must be able to name the image
                str(sample.image).encode()
            except UnicodeEncodeError as error:
                shown = str(sample.image).encode(errors="backslashreplace").decode()
                raise UserError(
                    f"{shown}: the name is not UTF-8; rename the file or its folder, for instance "
                    "by convmv"
                ) from error
            # Resolved, because two spellings of a path, or a link, may name one image.
            first_split, first = seen.setdefault(sample.image.resolve(), (split, sample))
            if first is sample:
                continue
            problem = (
                f"is listed twice in {split or 'the data'}; remove one of the two"
                if split == first_split
                else f"is both in {first_split} and in {split}; splits must not share images, so "
                "keep it in one"
            )
            raise UserError(
                f"{first.origin} and {sample.origin}: the image {sample.image} {problem}"
            )


def count_differences(source: str, splits: Splits) -> list[str]:
    """One text for each split, or group of the test split, that has another number of images than
    the paper's."""
    found = Counter({split: len(samples) for split, samples in splits.items()})
    found.update(sample.group for sample in splits["test"] if sample.group)
    return [
        f"{found[name]} {name} images instead of {count}"
        for name, count in DATASETS[source].counts.items()
        if found[name] != count
    ]


# ---- Drawn splits ------------------------------------------------------------------------------


def split_samples(samples: Sequence[Sample], shares: Sequence[float]) -> Splits:
    """Draws train, val and test at random, the same for equal samples and shares.

    Raises:
        UserError: the shares do not sum to 1, or a split would be empty.
    """
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        shown = " ".join(map(str, shares))
        raise UserError(f"split must be three shares above 0 that sum to 1, got {shown}")
    members = group_members(samples)
    chosen: dict[str, list[int]] = {split: [] for split in REQUIRED_SPLITS}
    taken = 0
    for unit in seeded_generator(HOLD_OUT, 0).permutation(len(members)):
        middle = (taken + len(members[unit]) / 2) / len(samples)
        split = "train" if middle <= shares[0] else "val" if middle <= 1 - shares[2] else "test"
        chosen[split] += members[unit]
        taken += len(members[unit])
    empty = [split for split, indices in chosen.items() if not indices]
    if empty:
        raise UserError(
            f"--split leaves {' and '.join(empty)} empty: there are {len(samples)} images in "
            f"{len(members)} groups; add some, or give other shares"
        )
    return {
        split: [samples[index]._replace(group=None) for index in sorted(indices)]
        for split, indices in chosen.items()
    }


def draw_folds(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """Draws folds, the same for equal samples, as equal in size as the groups allow.

    Each group, the largest first, goes to the fold that is the smallest so far.

    Raises:
        UserError: there are fewer groups than folds.
    """
    members = group_members(samples)
    if len(members) < count:
        raise UserError(
            f"{count} folds need as many images, or groups of images, got {len(members)}"
        )
    order = seeded_generator(HOLD_OUT, 0).permutation(len(members))
    folds: list[list[int]] = [[] for _ in range(count)]
    for group in sorted((members[unit] for unit in order), key=len, reverse=True):
        min(folds, key=len).extend(group)
    return [[samples[index] for index in sorted(fold)] for fold in folds]


def group_members(samples: Sequence[Sample]) -> list[list[int]]:
    """The indices of each group's samples; a sample without a group is one of its own."""
    groups: dict[str | int, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.group or index, []).append(index)
    return list(groups.values())


def write_splits(folder: Path, splits: Splits) -> None:
    """Writes a CSV file a split, which ``read_csv`` reads: absolute paths, no groups."""
    for split, samples in splits.items():
        rows = []
        for sample in {own.image: own for own in samples}.values():
            files = {"image": sample.image, "label": sample.mask}
            files |= {f"image{i}": file for i, file in enumerate(sample.further, 2)}
            rows.append({name: os.path.abspath(str(file)) for name, file in files.items()})
        write_rows(folder / f"{split}.csv", rows)
