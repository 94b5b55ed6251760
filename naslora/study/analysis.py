"""``naslora analyse``: what a run has learned, against the frozen and a random encoder.

encoder.csv, *.png      mean attention distance and log amplitude of each block (Table 4)
gradcam.png             where the encoder's last block sees the foreground (Fig. 4)
predictions.png         test images, truth and prediction (Fig. 3)
convergence.csv, .png   validation Dice by epoch, over the runs' seeds (Fig. C1)
operations.csv, .png    how the search has distributed the operations (Fig. C2)
operation_losses.csv, .png  what the chosen operations are worth, beside random ones
report.html             all of these
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from naslora.data.dataset import Item
from naslora.data.images import Sample
from naslora.data.masks import has_foreground
from naslora.errors import UserError
from naslora.files import replaced_file, replaced_folder
from naslora.methods import searches
from naslora.records import write_rows
from naslora.report.figures import BLUE, MUTED, ORANGE, Drawing
from naslora.report.pictures import Picture, paint
from naslora.report.study_report import Part, write_study
from naslora.report.tables import Table
from naslora.results import REPORT
from naslora.sam.segmentation import SamForSegmentation, build_model
from naslora.sam.shipped import NONE
from naslora.study.encoder_statistics import BlockStatistics, block_statistics
from naslora.study.grad_cam import heat_map, heat_overlay
from naslora.study.operation_losses import write_operation_losses
from naslora.study.seeds import read_history, read_operations, write_convergence, write_operations
from naslora.trained import load_model
from naslora.training.accelerator import make_accelerator
from naslora.training.resolve import checkpoint_of
from naslora.training.run import check_output
from naslora.training.run_config import RunConfig
from naslora.training.run_data import find_splits, make_dataset

SHOWN = 4  # images in the picture panels
SIZE = (4.6, 3)  # of a plot, in inches
COLOURS = {"random": MUTED, "frozen": ORANGE, "trained": BLUE}
Statistics = dict[str, list[BlockStatistics]]
"""The blocks of each model, by the name of the model."""

"""An item of a ``SegmentationDataset``."""


def analyse(runs: Sequence[Path], output: Path, images: int = 100, seed: int = 0) -> None:
    """Analyses a trained run, and the convergence over the seeds of several runs.

    Args:
        runs: folders of runs of one configuration with different seeds. The first run's encoder is
            analysed.
        output: must be new or empty.
        images: how many test images the encoders are measured on, at most.
        seed: of the draw of the images and of the random encoder.

    Raises:
        UserError: as ``load_model``; the runs differ in more than their seed; ``output`` is not
            empty.
    """
    if images < 1:
        raise UserError(f"images must be at least 1, got {images}")
    model, config = load_model(runs[0])
    histories = [read_history(run, config) for run in runs]
    mixtures = read_operations(runs) if searches(config.method, config.adapter) else None
    check_output(config, output, resume=False)
    samples = find_splits(config)["test"]
    drawn = _draw_samples(samples, images, seed)
    device = make_accelerator(config.training).device
    models = _models(model, config, seed)
    statistics = {
        name: block_statistics(
            other.to(device).image_encoder, _batches(other, config, drawn), config.model.image_size
        )
        for name, other in models.items()
    }
    with replaced_folder(output) as folder:
        sections: dict[str, list[Part]] = {
            "Inductive bias (Table 4)": _write_statistics(statistics, len(drawn), folder),
            "Grad-CAM (Fig. 4)": _write_heat_maps(models, config, samples, folder),
            "Predictions (Fig. 3)": _write_predictions(model, config, samples, folder),
            "Convergence (Fig. C1)": write_convergence(histories, config, folder),
        }
        if mixtures is not None:
            sections["Operations (Fig. C2)"] = write_operations(mixtures, folder)
            losses = write_operation_losses(model, config, seed, folder)
            sections["Operations moved to skip"] = losses
        title = f"Analysis of {config.method} on {config.model.name}"
        write_study(folder / REPORT, title, sections, config.to_dict())


def _draw_samples(samples: list[Sample], count: int, seed: int) -> list[Sample]:
    chosen = np.random.default_rng(seed).permutation(len(samples))[:count]
    return [samples[i] for i in sorted(chosen)]


def _models(
    trained: SamForSegmentation, config: RunConfig, seed: int
) -> dict[str, SamForSegmentation]:
    """A random, the frozen and the trained model, by name.

    The frozen model of a run without pre-trained weights is random as well.
    """
    build = partial(
        build_model,
        config.model.name,
        config.model.image_size,
        config.data.num_classes,
        attention=config.model.attention,
    )
    # The seed differs from the run's, so that the random encoder is not that frozen one.
    models = {"random": build(NONE, config.seed + 1 + seed)}
    models["frozen"] = build(checkpoint_of(config.model), config.seed)
    return {**{name: model.eval() for name, model in models.items()}, "trained": trained}


def _items(config: RunConfig, samples: list[Sample]) -> Iterator[Item]:
    dataset = make_dataset(config, samples)
    return (dataset[index] for index in range(len(dataset)))


def _batches(model: Any, config: RunConfig, samples: list[Sample]) -> Iterator[Tensor]:
    """(1, 3, S, S) normalised images, as the encoder takes them."""
    for item in _items(config, samples):
        image = item["image"].to(model.pixel_mean.device)
        yield ((image - model.pixel_mean) / model.pixel_std)[None]


# ---- Table 4 -------------------------------------------------------------------------------------


def _write_statistics(statistics: Statistics, images: int, output: Path) -> list[Part]:
    rows = [
        {"model": name, **block._asdict()}
        for name, blocks in statistics.items()
        for block in blocks
    ]
    write_rows(output / "encoder.csv", rows)
    drawings = [
        Drawing(
            "attention_distance",
            "Mean attention distance of each block, in pixels.",
            partial(
                _draw_blocks,
                statistics=statistics,
                quantity=lambda block: block.attention_distance,
                label="attention distance, pixels",
            ),
            SIZE,
        ),
        Drawing(
            "log_amplitude",
            "Relative log amplitude of the highest frequency after each block.",
            partial(
                _draw_blocks,
                statistics=statistics,
                quantity=lambda block: block.log_amplitude,
                label="log amplitude",
            ),
            SIZE,
        ),
    ]
    for drawing in drawings:
        drawing.save(output / f"{drawing.name}.png")
    note = f"Means over {images} test images. Distances are also means over heads and queries."
    return [*drawings, _table_4(statistics), note]


def _table_4(statistics: Statistics) -> Table:
    head = ["Block", "Window"]
    for quantity in ("distance, px", "log amplitude"):
        head += [f"{name}: {quantity}" for name in statistics]
    rows = []
    for blocks in zip(*statistics.values(), strict=True):  # the same block of each model
        first = blocks[0]
        cells = [str(first.block), "global" if first.window is None else str(first.window)]
        cells += [f"{block.attention_distance:.1f}" for block in blocks]
        rows.append([*cells, *(f"{block.log_amplitude:.2f}" for block in blocks)])
    return Table(head, rows)


def _draw_blocks(
    axes: Axes, statistics: Statistics, quantity: Callable[[BlockStatistics], float], label: str
) -> None:
    for name, blocks in statistics.items():
        numbers = [block.block for block in blocks]
        axes.plot(numbers, list(map(quantity, blocks)), "o-", color=COLOURS[name], label=name)
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(label)
    axes.legend()


# ---- Pictures ------------------------------------------------------------------------------------


def _shown(config: RunConfig, samples: list[Sample]) -> list[Item]:
    """Test images with some foreground, evenly spread."""
    found = [item for item in _items(config, samples) if has_foreground(item["mask"].numpy())]
    places = np.linspace(0, len(found) - 1, min(SHOWN, len(found))).round().astype(int)
    return [found[i] for i in places]


def _pixels(item: Item) -> np.ndarray:
    """(S, S, 3) uint8 RGB."""
    return (255 * item["image"]).round().byte().permute(1, 2, 0).numpy()


def _write_pictures(path: Path, rows: list[tuple[str, list[np.ndarray]]]) -> list[Part]:
    """Writes a grid of pictures with white gaps as one PNG file, and returns it for the report.

    Args:
        path: the file; not written without rows.
        rows: caption and (S, S, 3) uint8 pictures of each row.
    """
    if not rows:
        return ["No test image has any foreground."]
    gap = ((0, 4), (0, 4), (0, 0))
    lines = [
        np.concatenate([np.pad(picture, gap, constant_values=255) for picture in row], 1)
        for _, row in rows
    ]
    with replaced_file(path) as temporary:
        Image.fromarray(np.concatenate(lines)).save(temporary, format="PNG")
    return [Picture(caption, np.concatenate(row, axis=1)) for caption, row in rows]


def _write_predictions(
    model: Any, config: RunConfig, samples: list[Sample], output: Path
) -> list[Part]:
    names = ["background", *config.data.class_names]
    rows = []
    for item in _shown(config, samples):
        with torch.no_grad():
            image = item["image"][None].to(model.pixel_mean.device)
            labels = model.eval()(image).labels()[0].cpu().numpy()
        pixels = _pixels(item)
        row = [pixels, paint(pixels, item["mask"].numpy(), names), paint(pixels, labels, names)]
        rows.append((f"{item['name']}: image, truth, prediction", row))
    return _write_pictures(output / "predictions.png", rows)


def _write_heat_maps(
    models: dict[str, SamForSegmentation], config: RunConfig, samples: list[Sample], output: Path
) -> list[Part]:
    rows = []
    for item in _shown(config, samples):
        pixels = _pixels(item)
        heats = [heat_map(model, item["image"], item["mask"]) for model in models.values()]
        row = [pixels, *(heat_overlay(pixels, heat) for heat in heats)]
        rows.append((f"{item['name']}: image, {', '.join(models)}", row))
    return _write_pictures(output / "gradcam.png", rows)
