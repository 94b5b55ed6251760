"""Splits that are drawn at random: by shares, or as folds. Images of one group stay together."""

import os
from collections.abc import Sequence
from pathlib import Path

from naslora.data.images import Sample
from naslora.data.layouts import REQUIRED_SPLITS, Splits
from naslora.data.sampling import HOLD_OUT, seeded_generator
from naslora.errors import UserError
from naslora.records import write_rows


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
