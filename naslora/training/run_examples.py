"""The test images that a run's report shows: the worst and the best by Dice."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator

from naslora.data.dataset import Item, SegmentationDataset
from naslora.report.pictures import Merged, Panel
from naslora.results import SplitScores
from naslora.sam.segmentation import SamForSegmentation, labels_of, predict_labels
from naslora.training.evaluation import tiled_class_map

EXAMPLES = 6


class Examples:
    """Chosen test images, and what the model predicts for them before and after merging.

    Args:
        model: as it was scored.
        dataset: the test split.
        scores: of the model on the split.
        accelerator: the device and the precision.
    """

    def __init__(
        self,
        model: SamForSegmentation,
        dataset: SegmentationDataset,
        scores: SplitScores,
        accelerator: Accelerator,
    ) -> None:
        self.dataset, self.accelerator = dataset, accelerator
        dice = scores.image_dice or [None] * len(dataset)
        self.chosen = choose(dice, EXAMPLES)
        self.items = [dataset[index] for index in self.chosen]
        ranks = {index: rank for rank, index in enumerate(_ascending(dice), 1)}
        self.panels = [
            Panel(
                name=item["name"],
                image=self._image(item),
                truth=item["mask" if dataset.tiles is None else "truth"].numpy(),
                prediction=self._predict(model, item),
                dice=dice[index],
                rank=ranks.get(index),
            )
            for index, item in zip(self.chosen, self.items, strict=True)
        ]

    def add_merged(self, mode: str, model: SamForSegmentation, scores: SplitScores) -> None:
        """Adds what the merged model predicts, with its scores on the whole split."""
        dice = scores.image_dice or [None] * (max(self.chosen, default=0) + 1)
        for index, item, panel in zip(self.chosen, self.items, self.panels, strict=True):
            panel.merged[mode] = Merged(self._predict(model, item), dice[index])

    def _image(self, item: Item) -> np.ndarray:
        """The image as it is scored, (H, W, 3) uint8."""
        whole = self.dataset.tiles is not None
        pixels = item["pixels"] if whole else (255 * item["image"]).round().byte()
        return pixels.permute(1, 2, 0).numpy()

    def _predict(self, model: SamForSegmentation, item: Item) -> np.ndarray:
        """Labels at the size at which the image is scored, (H, W) int64."""
        if self.dataset.tiles is None:
            return predict_labels(model, item["image"][None])[0].numpy()
        with torch.no_grad():
            bands = tiled_class_map(
                model.eval(), self.dataset, item["pixels"], None, self.accelerator
            )
            return torch.cat([labels_of(band[None])[0] for band in bands]).numpy()


def _ascending(dice: Sequence[float | None]) -> list[int]:
    """The images whose Dice is defined, the worst first."""
    known = [(value, index) for index, value in enumerate(dice) if value is not None]
    return [index for _, index in sorted(known)]


def choose(dice: Sequence[float | None], count: int) -> list[int]:
    """Chooses the worst and the best images, half of ``count`` each, the worst first.

    Without any Dice, as in a split without foreground, the choice is spread over the split.
    """
    order = _ascending(dice)
    if not order:
        spread = np.linspace(0, len(dice) - 1, min(count, len(dice)))
        return [int(index) for index in spread.round()]
    return order if len(order) <= count else [*order[: count // 2], *order[count // 2 - count :]]
