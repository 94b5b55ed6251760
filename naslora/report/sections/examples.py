"""Section "Test images": the worst and the best, with truth, prediction and errors."""

from dataclasses import replace
from html import escape

import numpy as np
from PIL import Image

from naslora.report.html import note, section
from naslora.report.numbers import is_known, number
from naslora.report.pictures import (
    CHANGED,
    ERRORS,
    PICTURE_SIDE,
    UNKNOWN_COLOUR,
    Merged,
    Panel,
    class_colour,
    data_uri,
    paint,
    paint_errors,
    unknown,
)


def examples_section(panels: list[Panel], class_names: list[str], images: int | None) -> str:
    """The panels below a legend of the classes and errors; empty without panels.

    Args:
        panels: examples, the worst first.
        class_names: names of the labels 0, 1, ...
        images: number of test images; None if unknown.
    """
    if not panels:
        return ""
    labels = [label for panel in panels for label in (panel.truth, panel.prediction)]
    unnamed = any(unknown(label, class_names).any() for label in labels if label is not None)
    legend = [(name, class_colour(index)) for index, name in enumerate(class_names) if index > 0]
    legend += [("ignored or unknown", UNKNOWN_COLOUR)] if unnamed else []
    body = _legend(legend)
    if any(panel.truth is not None for panel in panels):
        kinds = list(ERRORS.items())[: 3 if len(class_names) > 2 else 2]
        body += _legend([(f"error: {name}", colour) for name, colour in kinds])
    for title, group in _groups(panels, images).items():
        figures = "".join(_panel(shrink(panel), class_names, images) for panel in group)
        body += f'<h3>{title}</h3><div class="panels">{figures}</div>'
    return section("Test images", body)


def _legend(entries: list[tuple[str, tuple[int, int, int]]]) -> str:
    swatches = "".join(
        f'<li><i style="background: rgb{colour}"></i>{escape(name)}</li>'
        for name, colour in entries
    )
    return f'<ul class="legend">{swatches}</ul>'


def _groups(panels: list[Panel], images: int | None) -> dict[str, list[Panel]]:
    """The worst and the best apart, if images in between are left out."""
    if images is None or images <= len(panels) or any(panel.rank is None for panel in panels):
        return {"Worst first" if any(panel.rank for panel in panels) else "Examples": panels}
    half = len(panels) // 2
    return {"Worst": panels[:half], "Best": panels[half:]}


def shrink(panel: Panel) -> Panel:
    """Shrinks the pictures of a panel to at most ``PICTURE_SIDE`` pixels a side."""
    height, width = panel.image.shape[:2]
    scale = min(1.0, PICTURE_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))

    def resize(labels: np.ndarray) -> np.ndarray:
        pixels = Image.fromarray(np.asarray(labels, dtype=np.int32))
        return np.asarray(pixels.resize(size, Image.Resampling.NEAREST))

    return replace(
        panel,
        image=np.asarray(Image.fromarray(panel.image).resize(size, Image.Resampling.LANCZOS)),
        truth=None if panel.truth is None else resize(panel.truth),
        prediction=resize(panel.prediction),
        merged={
            mode: Merged(resize(merged.prediction), merged.dice)
            for mode, merged in panel.merged.items()
        },
    )


def _panel(panel: Panel, class_names: list[str], images: int | None) -> str:
    pictures = [picture("Image", panel.name, panel.image)]
    if panel.truth is None:
        pictures.append("<div><span>Truth: none</span></div>")
    else:
        pictures.append(picture("Truth", panel.name, paint(panel.image, panel.truth, class_names)))
    painted = paint(panel.image, panel.prediction, class_names)
    pictures.append(picture("Prediction", panel.name, painted))
    if panel.truth is not None:
        # What is to be ignored is no error.
        known = np.where(unknown(panel.truth, class_names), panel.prediction, panel.truth)
        errors = paint_errors(panel.image, known, panel.prediction)
        pictures.append(picture("Errors", panel.name, errors))
    dice = f"Dice {number(panel.dice)}" if is_known(panel.dice) else "no Dice"
    rank = "" if panel.rank is None or images is None else f" · rank {panel.rank} of {images}"
    return (
        f'<figure><div class="pictures">{"".join(pictures)}</div>'
        f"<figcaption>{escape(panel.name)} · {dice}{rank}</figcaption></figure>"
    )


def merged_pictures(panels: list[Panel], class_names: list[str], most: int = 2) -> str:
    """The images whose prediction merging changes most, before and after; empty if none changes.

    Args:
        panels: examples with predictions by way of merging.
        class_names: names of the labels 0, 1, ...
        most: how many images to show.
    """
    changed = [panel for panel in panels if _most_changed(panel) > 0]
    chosen = sorted(changed, key=_most_changed, reverse=True)[:most]
    if not chosen:
        same = any(panel.merged for panel in panels)
        return note("No pixel of the images above changes by merging.") if same else ""
    figures = "".join(_before_and_after(panel, class_names) for panel in chosen)
    legend = _legend([("changed by the merge", CHANGED)])
    return f'<h3>Before and after merging</h3>{legend}<div class="panels">{figures}</div>'


def _changed(panel: Panel, mode: str) -> float:
    """The share of pixels whose label a merge changes."""
    return float((panel.merged[mode].prediction != panel.prediction).mean())


def _most_changed(panel: Panel) -> float:
    return max((_changed(panel, mode) for mode in panel.merged), default=0.0)


def _before_and_after(panel: Panel, class_names: list[str]) -> str:
    small = shrink(panel)
    before = paint(small.image, small.prediction, class_names)
    pictures = [picture(f"Before, Dice {number(panel.dice)}", panel.name, before)]
    for mode, merged in small.merged.items():
        share = _changed(panel, mode)
        if share > 0:
            after = paint(small.image, merged.prediction, class_names)
            after[merged.prediction != small.prediction] = CHANGED
            label = f"{mode}, Dice {number(merged.dice)}, {share:.2%} changed"
            pictures.append(picture(label, panel.name, after))
    same = [mode for mode in panel.merged if _changed(panel, mode) == 0]
    unchanged = f" · unchanged by {', '.join(same)}" if same else ""
    return (
        f'<figure><div class="pictures">{"".join(pictures)}</div>'
        f"<figcaption>{escape(panel.name + unchanged)}</figcaption></figure>"
    )


def picture(kind: str, name: str, pixels: np.ndarray) -> str:
    """A picture of an image, with a line below it that says what it shows."""
    height, width = pixels.shape[:2]
    return (
        f'<div><img src="{data_uri(pixels)}" width="{width}" height="{height}"'
        f' alt="{escape(kind)} of {escape(name)}"><span>{escape(kind)}</span></div>'
    )
