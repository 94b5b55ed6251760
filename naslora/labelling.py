"""Labelling by clicks: the objects of an image, and the data set that they are saved to."""

import csv
import io
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

from naslora.data.images import Sample, open_picture
from naslora.data.layouts import read_every_csv
from naslora.data.masks import read_numbers
from naslora.data.objects import numbered
from naslora.data.picture import Intensity
from naslora.errors import UserError
from naslora.files import write_text
from naslora.instances import find_instances, label_image, write_labels

ORDER = ("train", "val", "test", "train", "train")
"""The splits of new images in turn, so that three images are a data set. 3 of 5 train."""


class LabelledSet:
    """A folder with train.csv, val.csv and test.csv, and label images in the folder ``masks``.

    Args:
        root: the folder; new, or one that holds such files.

    Raises:
        UserError: as ``read_every_csv``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._rows: dict[Path, tuple[str, Path]] = {}  # split and label image, by the image
        if (root / "train.csv").is_file():
            for image, mask, origin, *_ in read_every_csv(root):
                assert isinstance(mask, Path)
                self._rows[image.resolve()] = (origin.partition(".")[0], mask)

    def __contains__(self, image: Path) -> bool:
        return image.resolve() in self._rows

    def counts(self) -> Counter[str]:
        """The number of images of each split."""
        return Counter(split for split, _ in self._rows.values())

    def read(self, image: Path) -> np.ndarray | None:
        """The (H, W) uint16 numbers of an image's objects; None if it is not labelled.

        Raises:
            UserError: as ``read_numbers``.
        """
        if image not in self:
            return None
        split, mask = self._rows[image.resolve()]
        values, _ = read_numbers(Sample(image, mask, f"{split}.csv"))
        return numbered(values).astype(np.uint16)

    def save(self, image: Path, labels: np.ndarray) -> None:
        """Writes the (H, W) numbers of an image's objects. A new image gets a split.

        Raises:
            UserError: a file cannot be written.
        """
        resolved = image.resolve()
        if resolved not in self._rows:
            taken = {mask for _, mask in self._rows.values()}
            names = (f"{image.stem}{i or ''}.png" for i in range(len(taken) + 1))
            path = next(
                self.root / "masks" / n for n in names if self.root / "masks" / n not in taken
            )
            self._rows[resolved] = (ORDER[len(self._rows) % len(ORDER)], path)
        split, path = self._rows[resolved]
        write_labels(path, labels)
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("image", "label"))
        for other, (of, mask) in self._rows.items():
            if of == split:
                writer.writerow((_from(self.root, other), _from(self.root, mask)))
        write_text(self.root / f"{split}.csv", table.getvalue())


def _from(root: Path, path: Path) -> str:
    """A path relative to a folder."""
    try:
        return Path(os.path.relpath(path, root)).as_posix()
    except ValueError:  # on another drive of Windows
        return path.as_posix()


class Step(NamedTuple):
    """The mask of an object after some prompts."""

    points: list[tuple[float, float]]
    """x and y in pixels."""
    kinds: list[int]
    """Of each point: 1 in the object, 0 in the background."""
    box: tuple[float, float, float, float] | None
    """Left, top, right and bottom in pixels."""
    mask: np.ndarray
    """(H, W) bool."""
    logits: np.ndarray
    """(1, S/4, S/4), for the next step."""


class Labelling:
    """The objects of one image at a time.

    Args:
        predictor: the model.
        intensity: as in ``open_picture``.
        labelled: where the objects are saved.

    Attributes:
        pixels: the image, (H, W, 3) uint8 RGB.
        labels: (H, W) uint16 numbers of the objects that are kept.
        steps: the prompts of the object that is being made, with the masks after each.
        changed: whether something is not saved.
    """

    def __init__(
        self, predictor: SamPredictor, intensity: Intensity | None, labelled: LabelledSet
    ) -> None:
        self.predictor, self.intensity, self.labelled = predictor, intensity, labelled
        self.steps: list[Step] = []
        self.changed = False

    def open(self, image: Path) -> None:
        """Opens an image, with its objects if it is labelled.

        Raises:
            UserError: the image or its mask cannot be read, or they differ in size.
        """
        pixels = open_picture(Sample(image, None, "input"), self.intensity).rows()
        labels = self.labelled.read(image)
        if labels is not None and labels.shape != pixels.shape[:2]:
            raise UserError(f"{image} and its mask differ in size; remove its row")
        self.image, self.pixels = image, pixels
        self.labels = np.zeros(pixels.shape[:2], np.uint16) if labels is None else labels
        self.steps, self.changed = [], False
        self.predictor.set_image(pixels)

    def prompt(
        self,
        point: tuple[float, float] | None = None,
        kind: int = 1,
        box: tuple[float, float, float, float] | None = None,
    ) -> None:
        """Changes the mask of the object by a point or a box. Arguments as in ``Step``."""
        last = self.steps[-1] if self.steps else None
        points = [*(last.points if last else []), *([point] if point else [])]
        kinds = [*(last.kinds if last else []), *([kind] if point else [])]
        box = box or (last.box if last else None)
        masks, scores, logits = self.predictor.predict(
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
        """The (H, W) numbers of all objects; the one that is being made has the last number.

        Kept objects keep their pixels.
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
        height, width = self.labels.shape
        number = self.labels[min(int(y), height - 1), min(int(x), width - 1)]
        self.labels = np.where(self.labels == number, 0, self.labels).astype(np.uint16)
        self.changed = True

    def find(self, generator: SamAutomaticMaskGenerator) -> None:
        """Adds the objects that the model finds where none is."""
        found = label_image(find_instances(generator, self.pixels), self.labels.shape)
        self.predictor.set_image(self.pixels)  # the generator forgets it
        taken = np.unique(found[self.labels > 0])
        new = np.where(np.isin(found, taken), 0, found.astype(np.int64) + self.labels.max())
        self.labels = np.where(new > self.labels.max(), new, self.labels).astype(np.uint16)
        self.changed = True

    def save(self) -> None:
        """Saves the objects, with the one that is being made, numbered from 1 on.

        Raises:
            UserError: as ``LabelledSet.save``.
        """
        self.keep()
        numbers = np.unique(np.append(self.labels, 0))
        self.labels = np.searchsorted(numbers, self.labels).astype(np.uint16)
        small = self.labels.max() < 256
        self.labelled.save(self.image, self.labels.astype(np.uint8) if small else self.labels)
        self.changed = False
