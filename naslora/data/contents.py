"""What the files of a data set hold: copies between splits, empty masks, changes since a start.

Files are compared by their bytes. A copy that was saved anew, for instance as another format, is
not found.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from naslora.data.dataset import SegmentationDataset
from naslora.data.images import Annotation, Sample
from naslora.data.objects import Counts
from naslora.data.picture import readable
from naslora.errors import UserError, listing

MOST_THREADS = 8
"""Each holds a decoded image and its mask."""

DIM = 4095
"""Values of images that fill at most 12 of their 16 bits: 16 of 255."""


class Content(NamedTuple):
    """One sample's files."""

    image: str
    """Path of the image, with the number of the slice."""
    image_digest: str
    """BLAKE2b of the bytes of the image's files, 32 hexadecimal digits."""
    mask_digest: str | None
    """The same of the mask; None without a mask."""
    foreground: bool
    """Whether the mask has a pixel of another class than 0."""
    highest: int | None = None
    """The highest value of an image of 16 bits that ``--intensity`` does not scale."""
    objects: Counts | None = None
    """None if masks hold class indices."""


Contents = Mapping[str, Sequence[Content]]
"""The samples of each split, in order."""


def read_contents(dataset: SegmentationDataset) -> Iterator[Content]:
    """Reads every sample once, in threads, so that a bad file is found before a long run starts.

    Errors as ``SegmentationDataset.check``, for the first bad sample in their order.
    """

    def read(sample: Sample) -> Content:
        found = dataset.check(sample)
        mask = None if sample.mask is None else digest((sample.mask,), sample.origin)
        name = f"{sample.image}{sample.at}"
        return Content(name, digest(sample.files, sample.origin), mask, *found)

    digest = functools.lru_cache(2 * MOST_THREADS)(_digest)  # once for the slices of a volume

    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        yield from threads.map(read, dataset.samples)  # which cancels the others after an error


def _digest(files: tuple[Path | Annotation, ...], origin: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with readable(f"{origin}: {file}"), file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def warnings_about(contents: Contents) -> list[str]:
    """A line for each split without foreground, for copies of training images, and for images that
    are nearly black."""
    lines = [
        f"all {len(split)} masks of the split {name!r} are empty, so it has no Dice; check the "
        "masks and --num-classes"
        for name, split in contents.items()
        if split and not any(content.foreground for content in split)
    ]
    everything = [content for split in contents.values() for content in split]
    deep = [content.highest for content in everything if content.highest is not None]
    if deep and max(deep) <= DIM:
        lines.append(
            f"the {len(deep)} images of 16 bits hold values up to {max(deep)} of 65535, so they "
            f"are nearly black; give --intensity window 0 {max(deep)}, or percentile"
        )
    trained = {
        content.image_digest: content.image
        for name in ("train", "arch")
        for content in contents.get(name, ())
    }
    for name in ("val", "test"):
        copies = [own for own in contents.get(name, ()) if own.image_digest in trained]
        if copies:
            first = copies[0]
            lines.append(
                f"{len(copies)} of {len(contents[name])} images of the split {name!r} are copies "
                f"of training images, first {first.image} of {trained[first.image_digest]}; its "
                "scores are too good; remove them from one of the splits"
            )
    return lines


def check_unchanged(before: Contents, now: Contents) -> None:
    """Checks that the data is the data that a run was started with.

    Raises:
        UserError: images or masks changed, are missing or are new. The message names the first.
    """
    names = dict.fromkeys([*before, *now])
    changes = [c for name in names for c in _changes(before.get(name, ()), now.get(name, ()))]
    if changes:
        raise UserError(
            f"the data has changed since the run was started: {listing(changes, limit=4)}; restore "
            "it, or start a new run with another --output"
        )


def _changes(before: Sequence[Content], now: Sequence[Content]) -> list[str]:
    old, new = ({content.image: content for content in split} for split in (before, now))
    changes = [f"{image} is missing" for image in old.keys() - new.keys()]
    changes += [f"{image} is new" for image in new.keys() - old.keys()]
    for image in old.keys() & new.keys():
        if old[image].image_digest != new[image].image_digest:
            changes.append(f"{image} has another content")
        elif old[image].mask_digest != new[image].mask_digest:
            changes.append(f"the mask of {image} has another content")
    if not changes and [*old] != [*new]:
        changes.append(f"{now[0].image} and others are in another order")
    return changes
