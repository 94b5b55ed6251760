"""``naslora analyse``: what a run has learned, against the frozen and a random encoder.

encoder.csv, *.png      mean attention distance and log amplitude of each block (Table 4)
gradcam.png             where the encoder's last block sees the foreground (Fig. 4)
predictions.png         test images, truth and prediction (Fig. 3)
convergence.csv, .png   validation Dice by epoch, over the runs' seeds (Fig. C1)
operations.csv, .png    how the search has distributed the operations (Fig. C2)
operation_losses.csv, .png  what the chosen operations are worth, beside random ones
report.html             all of these
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
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
from naslora.report.numbers import number
from naslora.report.page import Part, Pictures, write_page
from naslora.report.pictures import paint
from naslora.report.run_report import page_title
from naslora.report.tables import Table
from naslora.results import REPORT
from naslora.sam.segmentation import SamForSegmentation, build_model, predict_labels
from naslora.sam.shipped import NONE
from naslora.study.encoder_statistics import BlockStatistics, block_statistics
from naslora.study.grad_cam import heat_overlay
from naslora.study.operation_losses import write_operation_losses
from naslora.study.seeds import read_history, read_operations, write_convergence, write_operations
from naslora.trained import load_model
from naslora.training.accelerator import make_accelerator
from naslora.training.resolve import checkpoint_of
from naslora.training.run import check_output
from naslora.training.run_config import RunConfig
from naslora.training.run_data import find_splits, make_dataset

SHOWN = 4  # images in the picture panels
COLOURS = {"random": MUTED, "frozen": ORANGE, "trained": BLUE}
QUANTITIES = {
    "attention_distance": ("Mean attention distance of each block, in pixels.", "distance, px"),
    "log_amplitude": (
        "Relative log amplitude of the highest frequency after each block.",
        "log amplitude",
    ),
}
"""Of fields of ``BlockStatistics`` the plot's caption and the name of the axis."""

Statistics = Mapping[str, list[BlockStatistics]]
"""The blocks of each model, by the name of the model."""


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
    order = np.random.default_rng(seed).permutation(len(samples))
    drawn = [samples[i] for i in sorted(order[:images])]
    device = make_accelerator(config.training).device
    models = _models(model, config, seed)
    statistics = {
        name: block_statistics(
            other.to(device).image_encoder, _batches(other, config, drawn), config.model.image_size
        )
        for name, other in models.items()
    }
    shown = _shown(config, samples)
    with replaced_folder(output) as folder:
        sections: dict[str, Sequence[Part]] = {
            "Inductive bias (Table 4)": _write_statistics(statistics, len(drawn), folder),
            "Grad-CAM (Fig. 4)": _write_pictures(
                folder / "gradcam.png",
                [_heat_maps(models, item) for item in shown],
            ),
            "Predictions (Fig. 3)": _write_pictures(
                folder / "predictions.png",
                [_prediction(model, config, item) for item in shown],
            ),
            "Convergence (Fig. C1)": write_convergence(histories, config, folder),
        }
        if mixtures is not None:
            sections["Operations (Fig. C2)"] = write_operations(mixtures, folder)
            losses = write_operation_losses(model, config, seed, folder)
            sections["Operations moved to skip"] = losses
        for part in chain(*sections.values()):
            if isinstance(part, Drawing):
                part.save(folder)
        values = config.to_dict()
        write_page(folder / REPORT, f"Analysis of {page_title(values)}", values, [], sections)


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
        Drawing(name, caption, partial(_draw_blocks, statistics=statistics, name=name, label=label))
        for name, (caption, label) in QUANTITIES.items()
    ]
    head = ["Block", "Window"]
    head += [f"{model}: {label}" for _, label in QUANTITIES.values() for model in statistics]
    table = []
    for blocks in zip(*statistics.values(), strict=True):  # the same block of each model
        cells = [str(blocks[0].block), str(blocks[0].window or "global")]
        for name in QUANTITIES:
            cells += [number(getattr(block, name), ".2f") for block in blocks]
        table.append(cells)
    note = f"Means over {images} test images. Distances are also means over heads and queries."
    return [*drawings, Table(head, table), note]


def _draw_blocks(axes: Axes, statistics: Statistics, name: str, label: str) -> None:
    for model, blocks in statistics.items():
        values = [getattr(block, name) for block in blocks]
        axes.plot([own.block for own in blocks], values, "o-", color=COLOURS[model], label=model)
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


def _write_pictures(path: Path, rows: list[Pictures]) -> list[Part]:
    """Writes pictures of equal size as one PNG file, with white gaps; none without rows."""
    if not rows:
        return ["No test image has any foreground."]
    gap = ((0, 4), (0, 4), (0, 0))
    lines = [
        np.concatenate([np.pad(pixels, gap, constant_values=255) for _, pixels in row.pictures], 1)
        for row in rows
    ]
    with replaced_file(path) as temporary:
        Image.fromarray(np.concatenate(lines)).save(temporary, format="PNG")
    return list(rows)


def _prediction(model: SamForSegmentation, config: RunConfig, item: Item) -> Pictures:
    names, pixels = ["background", *config.data.class_names], _pixels(item)
    labels = predict_labels(model, item["image"][None])[0].numpy()
    pictures = [
        ("image", pixels),
        ("truth", paint(pixels, item["mask"].numpy(), names)),
        ("prediction", paint(pixels, labels, names)),
    ]
    return Pictures(item["name"], item["name"], pictures)


def _heat_maps(models: Mapping[str, SamForSegmentation], item: Item) -> Pictures:
    pixels = _pixels(item)
    pictures = [("image", pixels)]
    for name, model in models.items():
        pictures.append((name, heat_overlay(model, item["image"], item["mask"], pixels)))
    return Pictures(item["name"], item["name"], pictures)
