"""The table of all data sets, and the loading of their splits."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from naslora.data.coco import read_categories, read_coco
from naslora.data.demo_data import read_mni152
from naslora.data.images import Sample
from naslora.data.layouts import GROUP, REQUIRED_SPLITS, DataSet, Splits, read_csv, read_folders
from naslora.data.paper_sets import PAPER_SETS
from naslora.data.splits import group_members, split_samples
from naslora.data.volumes import DEFAULT_SLICING, Slice, Slicing, check_volume, is_volume
from naslora.errors import UserError

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
        UserError: files or folders are missing, an image has no mask or a mask no image, a name is
            not UTF-8, or an image appears twice. The message names the files, and for a missing
            folder the folders that exist. Also as ``check_volume``.
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
