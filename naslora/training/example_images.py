"""The worst and the best test images of a run, for its report."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from naslora.report.page import Pictures
from naslora.report.pictures import Panel
from naslora.report.sections.examples import draw_clicks
from naslora.results import SplitScores
from naslora.sam.objects import PADDING, POSITIVE
from naslora.sam.prompts import AnySam, PromptableSam
from naslora.sam.segmentation import labels_of, predict_labels
from naslora.training.clicks import play
from naslora.training.evaluation import tiled_class_map
from naslora.training.interactive import objects_of
from naslora.training.run_data import shown_of
from naslora.training.trainer import Trainer

EXAMPLES = 6
"""Number of test images in the report."""
SHOWN_CLICKS = (1, 3)
"""Clicks whose masks the report of a promptable run shows."""


def panels_of(trainer: Trainer, scores: SplitScores) -> dict[int, Panel]:
    """The worst and the best test images by their index, as the model segments them."""
    data = trainer.data["test"]
    dice = scores.image_dice or [None] * len(data)
    ranks = {index: rank for rank, index in enumerate(_ascending(dice), 1)}
    panels = {}
    for index in choose(dice, EXAMPLES):
        item = data[index]
        whole = data.tiles is not None
        pixels = item["pixels"] if whole else (255 * item["image"]).round().byte()  # (C, H, W)
        panels[index] = Panel(
            name=item["name"],
            image=pixels[shown_of(trainer.run_config)].permute(1, 2, 0).numpy(),
            truth=item["truth" if whole else "mask"].numpy(),
            prediction=labels_of_image(trainer, index),
            dice=dice[index],
            rank=ranks.get(index),
        )
    return panels


def labels_of_image(trainer: Trainer, index: int) -> np.ndarray:
    """Labels of a test image at the size at which it is scored, (H, W) int64."""
    model, data, accelerator = trainer.model, trainer.data["test"], trainer.accelerator
    item = data[index]
    if data.tiles is None:
        return predict_labels(model, item["image"][None])[0].numpy()
    model.eval()

    def segment(image: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            output = model(image.to(accelerator.device))
        return output.class_map()

    with torch.no_grad():
        bands = tiled_class_map(segment, data, item["pixels"], item["truth"])
        return torch.cat([labels_of(band[None])[0] for band in bands]).numpy()


def prompted_pictures(
    trainer: Trainer, models: Mapping[str, AnySam], scores: SplitScores
) -> list[Pictures]:
    """The worst and the best test images with the masks of some clicks, by each of the models."""
    data, found = trainer.data["test"], []
    if not trainer.accelerator.is_main_process:
        return []
    for index in choose(scores.image_dice or [], EXAMPLES):
        item = data[index]
        image = item["image"][None]
        pixels = (255 * item["image"]).round().byte().permute(1, 2, 0).numpy()
        objects = objects_of(item["mask"][None].to(trainer.accelerator.device))
        pictures = [("Truth", draw_clicks(pixels, _numbers(objects.masks), []))]
        turns = {
            name: list(play(model, image, objects, trainer.accelerator, max(SHOWN_CLICKS)))
            for name, model in models.items()
            if isinstance(model, PromptableSam)
        }
        for clicks, (name, played) in itertools.product(SHOWN_CLICKS, turns.items()):
            turn = played[clicks - 1]
            points, labels = turn.prompts.points.flatten(0, 1), turn.prompts.labels.flatten()
            dots = [
                (x, y, label == POSITIVE)
                for (x, y), label in zip(points.tolist(), labels.tolist(), strict=True)
                if label != PADDING
            ]
            title = f"{clicks} click{'s' if clicks > 1 else ''}, {name}"
            pictures.append((title, draw_clicks(pixels, _numbers(turn.logits > 0), dots)))
        found.append(Pictures(item["name"], item["name"], pictures))
    return found


def _numbers(masks: torch.Tensor) -> np.ndarray:
    """(H, W) numbers 1, 2, ... of the objects with the (N, H, W) masks; of several the last."""
    numbers = torch.arange(1, len(masks) + 1, device=masks.device)
    return (masks * numbers[:, None, None]).amax(0).cpu().numpy()


def choose(dice: Sequence[float | None], count: int) -> list[int]:
    """Chooses the worst and the best images, half of ``count`` each, the worst first.

    Without any Dice, as in a split without foreground, the choice is spread over the split.
    """
    order = _ascending(dice)
    if not order:
        spread = np.linspace(0, len(dice) - 1, min(count, len(dice)))
        return [int(index) for index in spread.round()]
    return order if len(order) <= count else [*order[: count // 2], *order[count // 2 - count :]]


def _ascending(dice: Sequence[float | None]) -> list[int]:
    """The images whose Dice is defined, the worst first."""
    known = [(value, index) for index, value in enumerate(dice) if value is not None]
    return [index for _, index in sorted(known)]
