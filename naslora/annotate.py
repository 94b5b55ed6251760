"""``naslora annotate``: a page on this machine on which objects are labelled by clicks."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from naslora.errors import UserError, imported
from naslora.instances import InstanceFinder
from naslora.labelling import LabelledSet, Labelling
from naslora.locks import locked
from naslora.prediction import find_samples
from naslora.report.pictures import data_uri, in_turn, paint
from naslora.sam.instance_config import InstanceConfig
from naslora.settings import checked

HOST = "127.0.0.1"
SIDE = 1400
"""Longer side of an image on the page, in pixels. Clicks are in pixels of the image itself."""
LEAST_BOX = 6
"""Pixels on the page from which on a drag is a box, and no click."""
HELP = (
    "Click: object. Right click or Shift: background. Drag: box. Ctrl: remove an object. "
    "Enter: keep. Backspace: undo. F: find all. S: save. Arrows: other images, saved if changed."
)


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
        raise UserError(
            f"port {port} cannot be used ({error.strerror}); give another --port"
        ) from error
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
