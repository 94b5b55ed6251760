"""``naslora annotate``: a page on this machine on which objects are labelled by clicks."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from PIL import Image

from naslora.errors import UserError
from naslora.instances import build_generator, paint_instances
from naslora.labelling import LabelledSet, Labelling
from naslora.locks import locked
from naslora.prediction import find_images
from naslora.report.pictures import data_uri
from naslora.sam.instance_config import InstanceConfig
from naslora.settings import checked
from naslora.trained import load_predictor
from naslora.training.run_data import scaling_of

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
    path: Path,
    inputs: Sequence[Path],
    output: Path,
    port: int,
    search: InstanceConfig,
    show: bool,
) -> None:
    """Serves the page until the process is interrupted.

    Args:
        path: as in ``load_predictor``.
        inputs: image files, or folders of images.
        output: the folder of the data set, as ``LabelledSet``.
        port: of the loopback address.
        search: how objects are found where the user asks for all, and the image size.
        show: whether to open the page in the user's browser.

    Raises:
        UserError: NiceGUI is missing, the port is in use, there are no images; as
            ``load_predictor`` and ``LabelledSet``.
    """
    checked("port", port, Annotated[int, Meta(ge=1, le=65535)])
    images = find_images(inputs)
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError as error:
            reason = f"port {port} cannot be used ({error.strerror})"
            raise UserError(f"{reason}; give another --port") from error
    try:
        from nicegui import ui
    except ImportError as error:
        raise UserError("annotate needs NiceGUI; run pip install 'naslora[annotate]'") from error
    with locked(output):
        labelled = LabelledSet(output)
        predictor, config = load_predictor(path, search.image_size)
        labelling = Labelling(predictor, scaling_of(config), labelled)
        page = Page(labelling, images, search)
        print(f"label {len(images)} images at http://{HOST}:{port}; Ctrl+C ends", flush=True)
        options = {"reload": False, "show": show, "show_welcome_message": False}
        ui.run(page.build, host=HOST, port=port, title="naslora annotate", **options)


class Page:
    """What all windows of the page share.

    Args:
        labelling: the image that is labelled.
        images: the images in their order. The first that is not labelled is opened.
        search: as in ``annotate``.

    Raises:
        UserError: as ``Labelling.open``.
    """

    def __init__(
        self, labelling: Labelling, images: Sequence[Path], search: InstanceConfig
    ) -> None:
        self.labelling, self.images = labelling, images
        self.generator = build_generator(labelling.predictor, search)
        fresh = (i for i, image in enumerate(images) if image not in labelling.labelled)
        self.index = next(fresh, 0)
        self.lock = asyncio.Lock()
        labelling.open(images[self.index])

    def build(self) -> None:
        """Makes the elements of a window."""
        from nicegui import run, ui

        labelling, start = self.labelling, [0.0, 0.0]

        async def act(action: Callable[..., Any], *arguments: Any) -> None:
            async with self.lock:  # so that actions follow each other
                state.text = "working ..."
                try:
                    await run.io_bound(action, *arguments)
                except UserError as error:
                    ui.notify(str(error), type="negative", multi_line=True)
                refresh()

        async def mouse(event: Any) -> None:
            x, y = event.image_x / self.scale, event.image_y / self.scale
            if event.type == "mousedown":
                start[:] = [x, y]
                return
            left, right = sorted((start[0], x))
            top, bottom = sorted((start[1], y))
            if max(right - left, bottom - top) * self.scale >= LEAST_BOX:
                await act(lambda: labelling.prompt(box=(left, top, right, bottom)))
            elif event.ctrl or event.meta or mode.value == "remove":
                await act(labelling.remove, x, y)
            else:
                background = event.button == 2 or event.shift or mode.value == "background"
                await act(labelling.prompt, (x, y), 0 if background else 1)

        async def key(event: Any) -> None:
            if event.action.keydown and event.key.name in keys:
                await act(*keys[event.key.name])

        actions: dict[str, tuple[Callable[..., Any], ...]] = {
            "Keep": (labelling.keep,),
            "Undo": (labelling.undo,),
            "Find all": (labelling.find, self.generator),
            "Save": (labelling.save,),
            "Previous": (lambda: self.move(-1),),
            "Next": (lambda: self.move(1),),
        }
        names = ("Enter", "Backspace", "f", "s", "ArrowLeft", "ArrowRight")
        keys = dict(zip(names, actions.values(), strict=True))
        with ui.row().classes("items-center"):
            for name, action in actions.items():
                ui.button(name, on_click=lambda action=action: act(*action)).props("dense no-caps")
            mode = ui.toggle(["object", "background", "remove"], value="object").props(
                "dense no-caps"
            )
        state = ui.label()
        view = ui.interactive_image(on_mouse=mouse, events=["mousedown", "mouseup"], sanitize=False)
        view.style(f"max-width: {SIDE}px; width: 100%; cursor: crosshair")
        view.on("contextmenu.prevent", lambda: None)
        ui.label(HELP)
        root = labelling.labelled.root
        ui.label(f"Then: naslora train --data {root} --task promptable --objects numbers")
        ui.keyboard(on_key=key)

        def refresh() -> None:
            view.set_source(self.picture())
            view.set_content(self.marks())
            state.text = self.state()

        refresh()

    @property
    def scale(self) -> float:
        """Pixels on the page for one of the image."""
        return min(1.0, SIDE / max(self.labelling.labels.shape))

    def picture(self) -> str:
        """The image with its objects, as a data URI."""
        pixels, labels = self.labelling.pixels, self.labelling.shown()
        size = [max(1, round(self.scale * side)) for side in labels.shape[::-1]]
        if self.scale < 1:
            pixels = np.asarray(Image.fromarray(pixels).resize(size))
            labels = np.asarray(
                Image.fromarray(labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
            )
        return data_uri(paint_instances(pixels, labels), SIDE)

    def marks(self) -> str:
        """The prompts of the object that is being made, as SVG."""
        if not self.labelling.steps:
            return ""
        step, scale = self.labelling.steps[-1], self.scale
        radius = SIDE / 250 * min(1, max(self.labelling.labels.shape) * scale / SIDE)
        marks = [
            f'<circle cx="{x * scale}" cy="{y * scale}" r="{radius}" '
            f'fill="{"lime" if kind else "red"}" stroke="white"/>'
            for (x, y), kind in zip(step.points, step.kinds, strict=True)
        ]
        if step.box is not None:
            left, top, right, bottom = (scale * side for side in step.box)
            marks.append(
                f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" '
                'fill="none" stroke="lime"/>'
            )
        return "".join(marks)

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
        """Opens another image, and saves this one if it has changed.

        Raises:
            UserError: as ``Labelling.save`` and ``Labelling.open``.
        """
        if self.labelling.changed:
            self.labelling.save()
        index = (self.index + by) % len(self.images)
        self.labelling.open(self.images[index])
        self.index = index
