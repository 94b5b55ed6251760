"""Labelling by clicks: the objects of an image, and the data set that they are saved to."""

import csv
import io
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from naslora.data.images import Sample, open_picture
from naslora.data.layouts import read_csv
from naslora.data.masks import read_numbers
from naslora.data.objects import numbered
from naslora.errors import UserError
from naslora.files import replaced_file, write_text
from naslora.instances import InstanceFinder, label_image
from naslora.training.run_data import scaling_of

ORDER = ("train", "val", "test", "train", "train")
"""The splits of new images in turn, so that three images are a data set. 3 of 5 train."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""


class LabelledSet:
    """A folder with train.csv, val.csv and test.csv, and label images in the folder ``masks``.

    ``root`` is new, or holds such files; errors as in ``read_csv``.
    """

    def __init__(self, root: Path) -> None:
        splits = read_csv(root) if (root / "train.csv").is_file() else {}
        self.root = root
        self._rows = {  # the mask and the split of each image
            sample.image.resolve(): (Path(str(sample.mask)), split)
            for split, samples in splits.items()
            for sample in samples
        }

    def __contains__(self, image: Path) -> bool:
        return image.resolve() in self._rows

    def counts(self) -> Counter[str]:
        """The number of images of each split."""
        return Counter(split for _, split in self._rows.values())

    def read(self, image: Path) -> np.ndarray | None:
        """The (H, W) uint16 numbers of an image's objects; None if it is not labelled. Errors as in
        ``read_numbers``."""
        if image not in self:
            return None
        sample = Sample(image, self._rows[image.resolve()][0], str(self.root))
        return numbered(read_numbers(sample)[0]).astype(np.uint16)

    def save(self, image: Path, labels: np.ndarray) -> None:
        """Writes the (H, W) numbers of an image's objects. A new image gets a split.
        Errors as in ``replaced_file``."""
        key, folder, name = image.resolve(), self.root / "masks", image.stem
        if key not in self._rows:
            used = {mask for mask, _ in self._rows.values()}
            while folder / f"{name}.png" in used:  # by an image of another folder
                name += "_"
            self._rows[key] = folder / f"{name}.png", ORDER[len(self._rows) % len(ORDER)]
        target, split = self._rows[key]
        with replaced_file(target) as temporary:
            Image.fromarray(labels).save(temporary, "PNG")
        table = io.StringIO()
        rows = [(i, mask) for i, (mask, own) in self._rows.items() if own == split]
        csv.writer(table, lineterminator="\n").writerows(
            [("image", "label"), *(tuple(self._from_root(path) for path in row) for row in rows)]
        )
        write_text(self.root / f"{split}.csv", table.getvalue())

    def _from_root(self, path: Path) -> str:
        try:
            return Path(os.path.relpath(path, self.root)).as_posix()
        except ValueError:  # on another drive of Windows
            return path.as_posix()


class Step(NamedTuple):
    """The mask of an object after some prompts."""

    points: list[tuple[float, float]]
    """x and y in pixels."""
    kinds: list[int]
    """Of each point: 1 in the object, 0 in the background."""
    box: Box | None
    mask: np.ndarray
    """(H, W) bool."""
    logits: np.ndarray
    """(1, 4g, 4g), for the next step."""


class Labelling:
    """The objects of one image at a time, found by a model, and saved to a data set.

    Attributes:
        pixels: the image, (H, W, 3) uint8 RGB.
        labels: (H, W) uint16 numbers of the objects that are kept.
        steps: the prompts of the object that is being made, with the masks after each.
        changed: whether something is not saved.
    """

    def __init__(self, finder: InstanceFinder, labelled: LabelledSet) -> None:
        self.finder, self.labelled = finder, labelled

    def open(self, image: Path) -> None:
        """Opens an image, with its objects if it is labelled. Raises a ``UserError`` if one of them
        cannot be read, or they differ in size."""
        sample = Sample(image, None, "input")
        pixels = open_picture(sample, scaling_of(self.finder.config)).rows()
        labels = self.labelled.read(image)
        if labels is not None and labels.shape != pixels.shape[:2]:
            raise UserError(f"{image} and its mask differ in size; remove its row")
        self.finder.predictor.set_image(pixels)
        self.image, self.pixels, self.changed = image, pixels, False
        self.labels = np.zeros(pixels.shape[:2], np.uint16) if labels is None else labels
        self.steps: list[Step] = []

    def prompt(
        self, point: tuple[float, float] | None = None, kind: int = 1, box: Box | None = None
    ) -> None:
        """Changes the mask of the object by a point or a box. Arguments as in ``Step``."""
        last = self.steps[-1] if self.steps else None
        points = [*(last.points if last else []), *([point] if point else [])]
        kinds = [*(last.kinds if last else []), *([kind] if point else [])]
        box = box or (last.box if last else None)
        masks, scores, logits = self.finder.predictor.predict(
            np.array(points) if points else None,
            np.array(kinds) if points else None,
            None if box is None else np.array(box),
            None if last is None else last.logits,
            multimask_output=len(points) == 1 and box is None,
        )
        best = int(scores.argmax())
        self.steps.append(Step(points, kinds, box, masks[best], logits[best : best + 1]))
        self.changed = True

    def undo(self) -> None:
        """Takes the last prompt back."""
        del self.steps[-1:]

    def shown(self) -> np.ndarray:
        """The numbers of all objects, of which kept ones keep their pixels.

        The object that is being made has the last number.
        """
        if not self.steps:
            return self.labels
        new = self.steps[-1].mask & (self.labels == 0)
        return np.where(new, self.labels.max() + 1, self.labels).astype(np.uint16)

    def keep(self) -> None:
        """Adds the object that is being made to those that are kept."""
        self.labels, self.steps = self.shown(), []

    def remove(self, x: float, y: float) -> None:
        """Removes the kept object at a pixel."""
        rows, columns = self.labels.shape
        self.labels[self.labels == self.labels[min(int(y), rows - 1), min(int(x), columns - 1)]] = 0
        self.changed = True

    def find(self) -> None:
        """Adds the objects that the model finds where none is."""
        found = label_image(self.finder.find(self.pixels), self.labels.shape).astype(np.uint16)
        self.finder.predictor.set_image(self.pixels)  # the search forgets it
        new = (found > 0) & ~np.isin(found, found[self.labels > 0])
        self.labels = np.where(new, found + self.labels.max(), self.labels)
        self.changed = True

    def save(self) -> None:
        """Saves the objects, with the one that is being made, numbered from 1 on. Errors as in
        ``LabelledSet.save``."""
        self.keep()
        self.labels = numbered(self.labels).astype(np.uint16)
        smallest = np.min_scalar_type(self.labels.max())  # uint8 or uint16
        self.labelled.save(self.image, self.labels.astype(smallest))
        self.changed = False
