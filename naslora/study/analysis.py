"""``naslora analyse``: what a run has learned, against the frozen and a random encoder.

encoder.csv, *.png      mean attention distance and log amplitude of each block (Table 4)
gradcam.png             where the encoder's last block sees the foreground (Fig. 4)
convergence.csv, .png   validation Dice by epoch, over the runs' seeds (Fig. C1)
operations.csv, .png    how the search has distributed the operations (Fig. C2)
operation_losses.csv, .png  what the chosen operations are worth, beside random ones
report.html             all of these
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from naslora import results
from naslora.data.dataset import Item
from naslora.data.images import Sample
from naslora.data.masks import has_foreground
from naslora.errors import UserError
from naslora.files import reading, replaced_file, replaced_folder
from naslora.methods import searches
from naslora.records import read_record, write_rows
from naslora.report.figures import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    Curves,
    Drawing,
    draw_curves,
    row_drawing,
)
from naslora.report.page import Part, Pictures, write_page
from naslora.report.run_report import page_title
from naslora.report.tables import Table, number
from naslora.results import CONFIG, HISTORY, OPERATIONS_JSON, REPORT, Epoch, OperationHistory
from naslora.sam.encoders import transformer_blocks
from naslora.sam.export import check_new
from naslora.sam.prompts import PROMPTS
from naslora.sam.segmentation import SamForSegmentation
from naslora.sam.shipped import NONE
from naslora.settings import Count, checked
from naslora.study.encoder_statistics import BlockStatistics, block_statistics
from naslora.study.operation_losses import write_operation_losses
from naslora.trained import load_model
from naslora.training.accelerator import make_accelerator
from naslora.training.resolve import read_config
from naslora.training.run_config import RunConfig
from naslora.training.run_data import find_splits, make_dataset, shown_of
from naslora.training.run_model import build_run_model
from naslora_kernels import OPERATIONS

SHOWN = 4  # images in the picture panels
COLOURS = {"random": MUTED, "frozen": ORANGE, "trained": BLUE}
QUANTITIES = {
    "attention_distance": ("Mean attention distance of each block, in pixels.", "distance, px"),
    "log_amplitude": ("Relative log amplitude of the highest frequency by block.", "log amplitude"),
}
"""Of fields of ``BlockStatistics`` the plot's caption and the name of the axis."""

Statistics = Mapping[str, list[BlockStatistics]]
"""The blocks of each model, by the name of the model."""


def analyse(runs: Sequence[Path], output: Path, images: int = 100) -> None:
    """Analyses a trained run, and the convergence over the seeds of several runs.

    Arguments as the options of ``naslora analyse``. The runs have one configuration and different
    seeds; the first run's encoder is analysed.

    Raises:
        UserError: as ``load_model``; the runs differ in more than their seed; ``output`` is not
            empty.
    """
    checked("images", images, Count)
    model, config = load_model(runs[0])
    if config.task == "promptable":
        raise UserError(f"{runs[0]} {PROMPTS}; analyse takes runs of --task semantic")
    histories = [_read_history(run, config) for run in runs]
    searched = searches(config.method, config.adapter)
    mixtures = [_read_mixture(run) for run in runs if searched]
    check_new(output)
    samples = find_splits(config)["test"]
    order = np.random.default_rng(0).permutation(len(samples))
    drawn = [samples[i] for i in sorted(order[:images])]
    device = make_accelerator(config.training).device
    models = _models(model, config)
    size = config.model.image_size
    statistics = {
        name: block_statistics(own.to(device).image_encoder, _batches(own, config, drawn), size)
        for name, own in models.items()
    }
    heated = [_heat_maps(models, item, config) for item in _shown(config, samples)]
    with replaced_folder(output) as folder:
        sections: dict[str, Sequence[Part]] = {
            "Inductive bias (Table 4)": _write_statistics(statistics, len(drawn), folder),
            "Grad-CAM (Fig. 4)": _write_pictures(folder / "gradcam.png", heated),
            "Convergence (Fig. C1)": [_write_convergence(histories, config, folder)],
        }
        if searched:
            sections["Operations (Fig. C2)"] = [_write_operations(mixtures, folder)]
            sections["Operations moved to skip"] = [write_operation_losses(model, config, folder)]
        for part in chain(*sections.values()):
            if isinstance(part, Drawing):
                part.save(folder)
        values = config.to_dict()
        write_page(folder / REPORT, f"Analysis of {page_title(values)}", values, [], sections)


def _models(trained: SamForSegmentation, config: RunConfig) -> dict[str, SamForSegmentation]:
    """A random, the frozen and the trained model, by name.

    The frozen model of a run without pre-trained weights is random as well.
    """
    # The seed differs from the run's, so that the random encoder is not that frozen one.
    random = build_run_model(replace(config, seed=config.seed + 1), NONE)
    frozen = build_run_model(config)
    return {"random": random.eval(), "frozen": frozen.eval(), "trained": trained}


def _batches(model: Any, config: RunConfig, samples: list[Sample]) -> Iterator[Tensor]:
    """(1, 3, S, S) normalised images, as the encoder takes them."""
    for item in iter(make_dataset(config, samples)):
        image = item["image"].to(model.pixel_mean.device)
        yield ((image - model.pixel_mean) / model.pixel_std)[None]


# ---- Table 4 -------------------------------------------------------------------------------------


def _write_statistics(statistics: Statistics, images: int, output: Path) -> list[Part]:
    named = ((model, block) for model, blocks in statistics.items() for block in blocks)
    rows = [{"model": model, **block._asdict()} for model, block in named]
    write_rows(output / "encoder.csv", rows)
    head, drawings = ["Block", "Window"], []
    for name, (caption, label) in QUANTITIES.items():
        curves: Curves = {
            model: (COLOURS[model], [getattr(block, name) for block in blocks])
            for model, blocks in statistics.items()
        }
        draw = partial(draw_curves, curves=curves, xlabel="block", ylabel=label)
        drawings.append(Drawing(name, caption, draw))
        head += [f"{model}: {label}" for model in statistics]
    table = [
        [str(blocks[0].block), str(blocks[0].window or "global")]
        + [number(getattr(block, name), ".2f") for name in QUANTITIES for block in blocks]
        for blocks in zip(*statistics.values(), strict=True)  # the same block of each model
    ]
    note = f"Means over {images} test images. Distances are also means over heads and queries."
    return [*drawings, Table(head, table), note]


# ---- Pictures ------------------------------------------------------------------------------------


def _shown(config: RunConfig, samples: list[Sample]) -> list[Item]:
    """Test images with some foreground, evenly spread."""
    items = iter(make_dataset(config, samples))
    found = [item for item in items if has_foreground(item["mask"].numpy())]
    places = np.linspace(0, len(found) - 1, min(SHOWN, len(found))).round().astype(int)
    return [found[i] for i in places]


def _write_pictures(path: Path, rows: list[Pictures]) -> list[Part]:
    """Writes pictures of equal size as one PNG file, with white gaps; none without rows."""
    if not rows:
        return ["No test image has any foreground."]
    gap = ((0, 4), (0, 4), (0, 0))
    padded = [[np.pad(own, gap, constant_values=255) for _, own in row.pictures] for row in rows]
    with replaced_file(path) as temporary:
        Image.fromarray(np.vstack([*map(np.hstack, padded)])).save(temporary, format="PNG")
    return list(rows)


def _heat_maps(models: Mapping[str, SamForSegmentation], item: Item, config: RunConfig) -> Pictures:
    image = item["image"][shown_of(config)]
    pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()  # (S, S, 3) RGB
    heated = [(name, _heat_overlay(model, item, pixels)) for name, model in models.items()]
    return Pictures(item["name"], item["name"], [("image", pixels), *heated])


def _heat_overlay(model: SamForSegmentation, item: Item, pixels: np.ndarray) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017) of the foreground's score at the encoder's last block.

    The score is a sum over the foreground's pixels: of logits if the task is binary, else of the
    class map. ``pixels``, the image, and the heat over it are (S, S, 3) uint8 RGB.
    """
    kept: list[Tensor] = []  # the output of the last block, (1, H, W, C)
    last = transformer_blocks(model.image_encoder)[-1]
    hook = last.register_forward_hook(lambda block, inputs, output: kept.append(output))
    # The encoder is frozen, so gradients reach its last block only on the way to the image.
    device = next(model.parameters()).device
    try:
        output = model.eval()(item["image"][None].to(device).requires_grad_(True))
    finally:
        hook.remove()
    scores, labels = output.masks, item["mask"].to(device)
    if output.classes is not None:
        scores = output.class_map()[:, 1:]
    score = sum(scores[0, k][labels == k + 1].sum() for k in range(scores.shape[1]))
    (gradient,) = torch.autograd.grad(score, kept)
    weights = gradient.mean((1, 2), keepdim=True)
    heat = (weights * kept[0]).sum(-1).relu().detach()[:, None]  # (1, 1, H, W)
    heat = F.interpolate(heat, labels.shape, mode="bilinear")[0, 0]
    heat = heat - heat.min()
    colours = matplotlib.colormaps["jet"]((heat / heat.max().clamp_min(1e-7)).float().cpu().numpy())
    return (255 * colours[..., :3] / 2 + pixels / 2).round().astype(np.uint8)


# ---- Convergence ---------------------------------------------------------------------------------


def _read_history(run: Path, first: RunConfig) -> list[Epoch]:
    """The history of a run whose configuration is ``first``, except for the seed."""
    own = replace(read_config(run / CONFIG), seed=first.seed)
    if own.to_dict() != first.to_dict():
        raise UserError(f"{run} is a run of another configuration; give runs that differ in seed")
    if not (run / HISTORY).is_file():
        raise UserError(f"{run} is not finished: it has no {HISTORY}")
    history = results.read_history(run)
    if len(history) != first.training.epochs:
        raise UserError(f"{run / HISTORY} has {len(history)} of {first.training.epochs} epochs")
    return history


def _write_convergence(histories: list[list[Epoch]], config: RunConfig, output: Path) -> Drawing:
    """Writes convergence.csv, the validation Dice by epoch over the seeds, and plots it."""
    curves = np.array([[epoch.val_dice for epoch in history] for history in histories], float)
    seeds, epochs = len(curves), np.arange(curves.shape[1])
    mean = curves.mean(0)  # NaN if a seed has no score
    spread = curves.std(0, ddof=1) if seeds > 1 else np.full(len(mean), np.nan)
    numbers = zip(epochs.tolist(), mean.tolist(), spread.tolist(), strict=True)
    rows = [{"epoch": e, "mean_val_dice": m, "standard_deviation": s} for e, m, s in numbers]
    write_rows(output / "convergence.csv", rows)
    start = config.training.search_start if searches(config.method, config.adapter) else None

    def draw(axes: Axes) -> None:
        axes.plot(epochs, mean, color=BLUE)
        axes.fill_between(epochs, mean - spread, mean + spread, color=BLUE, alpha=0.25, linewidth=0)
        if start is not None and 0 < start < len(mean):
            axes.axvline(start - 0.5, color=MUTED, linestyle="--", linewidth=1)
        axes.set(xlabel="epoch", ylabel="validation Dice")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    caption = f"Validation Dice by epoch, mean and standard deviation of {seeds} seeds."
    return Drawing("convergence", caption, draw)


# ---- Operations ----------------------------------------------------------------------------------


def _read_mixture(run: Path) -> np.ndarray:
    """Reads the weights at the end of the search: (layers, operations)."""
    path = run / OPERATIONS_JSON
    record = read_record(path, OperationHistory)
    with reading(path, "does not hold a mixture of each layer"):
        shape = len(record.layers), len(record.operations)
        return np.array(record.epochs[-1].softmax).reshape(shape)


def _write_operations(mixtures: Sequence[np.ndarray], output: Path) -> Drawing:
    """Writes operations.csv, the weights at the end of each run's search, and plots them."""
    last = np.stack(mixtures)  # (runs, layers, operations)
    runs, layers, count = last.shape
    places, by_operation = np.arange(count), np.moveaxis(last, -1, 0)
    weights = [float(own.mean()) for own in by_operation]
    spread = [float(own.mean(1).std(ddof=1)) if runs > 1 else None for own in by_operation]
    shares = [float((last.argmax(-1) == place).mean()) for place in places]
    names = ("operation", "mean_weight", "spread_over_runs", "share_of_layers_where_largest")
    rows = zip(OPERATIONS, weights, spread, shares, strict=True)
    write_rows(output / "operations.csv", [dict(zip(names, row, strict=True)) for row in rows])

    def draw(axes: Axes) -> None:
        lines = [value or 0 for value in spread]
        axes.barh(
            places - 0.2, weights, 0.38, xerr=lines, color=BLUE, ecolor=INK, label="mean weight"
        )
        axes.barh(places + 0.2, shares, 0.38, color=GREEN, label="share of layers")
        axes.axvline(1 / count, color=ORANGE, linestyle="--", linewidth=1, label="uniform")
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)

    caption = (
        f"Mean of softmax(α) over {layers} layers of {runs} runs, and the share of the "
        "layers in which an operation has the largest weight."
    )
    return row_drawing("operations", caption, OPERATIONS, draw)
