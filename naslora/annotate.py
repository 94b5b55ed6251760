"""``naslora annotate``: a page on which objects are labelled by clicks, and saved as a data set."""

import asyncio
import csv
import io
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from msgspec import Meta
from PIL import Image

from naslora.data.images import Sample, open_picture
from naslora.data.layouts import read_csv
from naslora.data.masks import read_numbers
from naslora.data.objects import numbered
from naslora.errors import UserError, imported
from naslora.files import replaced_file, write_text
from naslora.instances import InstanceFinder, label_image
from naslora.locks import locked
from naslora.prediction import find_samples
from naslora.report.pictures import data_uri, in_turn, paint
from naslora.sam.instance_config import InstanceConfig
from naslora.settings import checked
from naslora.training.run_data import scaling_of

ORDER = ("train", "val", "test", "train", "train")
"""The splits of new images in turn, so that three images are a data set. 3 of 5 train."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""
HOST = "127.0.0.1"
SIDE = 1400
"""Longer side of an image on the page, in pixels. Clicks are in pixels of the image itself."""
LEAST_BOX = 6
"""Pixels on the page from which on a drag is a box, and no click."""
HELP = (
    "Click: object. Right click or Shift: background. Drag: box. Ctrl: remove an object. "
    "Enter: keep. Backspace: undo. F: find all. S: save. Arrows: other images, saved if changed."
)


# ---- The objects ---------------------------------------------------------------------------------


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


# ---- The page ------------------------------------------------------------------------------------


def annotate(
    path: Path, inputs: Sequence[Path], output: Path, port: int, search: InstanceConfig, show: bool
) -> None:
    """Serves the page until the process is interrupted.

    Arguments are the options of ``naslora annotate``; ``show`` opens the user's browser.

    Raises:
        UserError: NiceGUI is missing, the port is in use, there are no images; as
            ``InstanceFinder``, ``LabelledSet`` and ``Labelling.open``.
    """
    checked("port", port, Annotated[int, Meta(ge=1, le=65535)])
    images = [sample.image for sample in find_samples(inputs)]
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        reason = f"port {port} cannot be used ({error.strerror})"
        raise UserError(f"{reason}; give another --port") from error
    (nicegui,) = imported("annotate", "nicegui")
    with locked(output):
        page = Page(Labelling(InstanceFinder(path, search), LabelledSet(output)), images)
        print(f"label {len(images)} images at http://{HOST}:{port}; Ctrl+C ends", flush=True)
        options: dict[str, Any] = {"reload": False, "show": show, "show_welcome_message": False}
        nicegui.ui.run(page.build, host=HOST, port=port, title="naslora annotate", **options)


class Page:
    """What all windows of the page share.

    The first of the images that is not labelled is opened; errors as in ``Labelling.open``.
    """

    def __init__(self, labelling: Labelling, images: Sequence[Path]) -> None:
        self.labelling, self.images = labelling, images
        fresh = (i for i, image in enumerate(images) if image not in labelling.labelled)
        self.index = next(fresh, 0)
        self.lock = asyncio.Lock()
        labelling.open(images[self.index])

    def build(self) -> None:
        """Makes the elements of a window."""
        from nicegui import run, ui

        labelling, start = self.labelling, [0.0, 0.0]

        async def act(action: Callable[[], None]) -> None:
            async with self.lock:  # so that actions follow each other
                state.text = "working ..."
                try:
                    await run.io_bound(action)
                except UserError as error:
                    ui.notify(str(error), type="negative", multi_line=True)
                refresh()

        async def mouse(event: Any) -> None:
            x, y = event.image_x * self.step, event.image_y * self.step
            if event.type == "mousedown":
                start[:] = [x, y]
                return
            left, right = sorted((start[0], x))
            top, bottom = sorted((start[1], y))
            if max(right - left, bottom - top) >= LEAST_BOX * self.step:
                await act(lambda: labelling.prompt(box=(left, top, right, bottom)))
            elif event.ctrl or event.meta or mode.value == "remove":
                await act(lambda: labelling.remove(x, y))
            else:
                background = event.button == 2 or event.shift or mode.value == "background"
                await act(lambda: labelling.prompt((x, y), 0 if background else 1))

        async def key(event: Any) -> None:
            if event.action.keydown and event.key.name in keys:
                await act(keys[event.key.name])

        actions: tuple[tuple[str, str, Callable[[], None]], ...] = (
            ("Keep", "Enter", labelling.keep),
            ("Undo", "Backspace", labelling.undo),
            ("Find all", "f", labelling.find),
            ("Save", "s", labelling.save),
            ("Previous", "ArrowLeft", lambda: self.move(-1)),
            ("Next", "ArrowRight", lambda: self.move(1)),
        )
        keys = {key: action for _, key, action in actions}
        with ui.row().classes("items-center"):
            for name, _, action in actions:
                ui.button(name, on_click=lambda action=action: act(action)).props("dense no-caps")
            mode = ui.toggle(["object", "background", "remove"], value="object")
        state = ui.label()
        view = ui.interactive_image(on_mouse=mouse, events=["mousedown", "mouseup"], sanitize=False)
        view.style(f"max-width: {SIDE}px; width: 100%; cursor: crosshair")
        view.on("contextmenu.prevent", lambda: None)
        root = labelling.labelled.root
        ui.label(HELP)
        ui.label(f"Then: naslora train --data {root} --task promptable --objects numbers")
        ui.keyboard(on_key=key)

        def refresh() -> None:
            view.set_source(self.picture())
            view.set_content(self.marks())
            state.text = self.state()

        refresh()

    @property
    def step(self) -> int:
        """Every how many pixels of the image one is on the page."""
        return -(-max(self.labelling.labels.shape) // SIDE)

    def picture(self) -> str:
        """The image with its objects, as a data URI."""
        step = self.step
        labels, names = in_turn(self.labelling.shown()[::step, ::step])
        return data_uri(paint(self.labelling.pixels[::step, ::step], labels, names), SIDE)

    def marks(self) -> str:
        """The prompts of the object that is being made, as SVG."""
        if not self.labelling.steps:
            return ""
        last, width = self.labelling.steps[-1], max(self.labelling.labels.shape) / 300
        marks = [
            f'<circle cx="{x}" cy="{y}" r="{width}" fill="{"lime" if kind else "red"}"/>'
            for (x, y), kind in zip(last.points, last.kinds, strict=True)
        ]
        if last.box is not None:
            left, top, right, bottom = last.box
            size = f'x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"'
            marks.append(f'<rect {size} fill="none" stroke="lime" stroke-width="{width / 2}"/>')
        return f'<g transform="scale({1 / self.step})">{"".join(marks)}</g>'

    def state(self) -> str:
        """What the window says."""
        labelling, labelled = self.labelling, self.labelling.labelled
        saved = "saved" if labelling.image in labelled else "new"
        counts = [f"{count} {split}" for split, count in labelled.counts().items()]
        return (
            f"{labelling.image.name}, {self.index + 1} of {len(self.images)}, "
            f"{'changed' if labelling.changed else saved}; "
            f"objects: {len(np.setdiff1d(labelling.labels, 0))}; "
            f"labelled images: {', '.join(counts) or 0}"
        )

    def move(self, by: int) -> None:
        """Opens another image, and saves this one if it has changed. Errors as in ``save`` and
        ``open`` of ``Labelling``."""
        if self.labelling.changed:
            self.labelling.save()
        index = (self.index + by) % len(self.images)
        self.labelling.open(self.images[index])
        self.index = index
