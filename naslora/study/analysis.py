"""``naslora analyse``: what a run has learned, against the frozen and a random encoder.

encoder.csv, *.png      mean attention distance and log amplitude of each block (Table 4)
gradcam.png             where the encoder's last block sees the foreground (Fig. 4)
predictions.png         test images, truth and prediction (Fig. 3)
convergence.csv, .png   validation Dice by epoch, over the runs' seeds (Fig. C1)
operations.csv, .png    how the search has distributed the operations (Fig. C2)
report.html             all of it
"""

import csv
import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor, nn

from naslora.data.masks import Sample
from naslora.errors import UserError
from naslora.files import read_json, replaced_file, write_text
from naslora.report.figures import BLUE, GREEN, INK, MUTED, ORANGE, Drawing
from naslora.report.page import Part, Table, write_study
from naslora.report.pictures import Picture, paint
from naslora.sam.segmentation import SamForSegmentation, build_model
from naslora.study.encoder_statistics import BlockStatistics, block_statistics
from naslora.trained import load_model
from naslora.training.accelerator import make_accelerator
from naslora.training.run import check_output
from naslora.training.run_config import RunConfig
from naslora.training.run_data import find_splits, make_dataset

SHOWN = 4  # images in the picture panels
COLOURS = {"random": MUTED, "frozen": ORANGE, "trained": BLUE}
Statistics = dict[str, list[BlockStatistics]]  # by model


def analyse(runs: Sequence[Path], output: Path, images: int = 100, seed: int = 0) -> None:
    """Analyses a trained run, and how it converged over the seeds of several.

    Args:
        runs: folders of runs of one configuration with different seeds; the first is analysed
            itself.
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
    histories = [_read_history(run, config) for run in runs]
    check_output(config, output, resume=False)
    samples = find_splits(config)["test"]
    drawn = _draw(samples, images, seed)
    device = make_accelerator(config.search).device
    models = _encoders(model, config, seed)
    statistics = {
        name: block_statistics(
            other.to(device).image_encoder, _batches(other, config, drawn), config.image_size
        )
        for name, other in models.items()
    }
    sections: dict[str, list[Part]] = {
        "Inductive bias (Table 4)": _write_statistics(statistics, len(drawn), output),
        "Grad-CAM (Fig. 4)": _write_heat_maps(models, config, samples, output),
        "Predictions (Fig. 3)": _write_predictions(model, config, samples, output),
        "Convergence (Fig. C1)": _write_convergence(histories, config, output),
    }
    if config.searches:
        sections["Operations (Fig. C2)"] = _write_operations(runs, output)
    title = f"Analysis of {config.method} on {config.model}"
    write_study(output / "report.html", title, sections, config.to_dict())


def _draw(samples: list[Sample], count: int, seed: int) -> list[Sample]:
    chosen = np.random.default_rng(seed).permutation(len(samples))[:count]
    return [samples[i] for i in sorted(chosen)]


def _encoders(
    trained: SamForSegmentation, config: RunConfig, seed: int
) -> dict[str, SamForSegmentation]:
    """From random weights over the frozen ones to the trained; frozen ones may be random, too."""
    build = partial(build_model, config.model, config.image_size, config.num_classes)
    # A seed apart from the run's: without a checkpoint its frozen encoder is the random one.
    models = {"random": build(seed=config.adapter.seed + 1 + seed)}
    models["frozen"] = build(config.checkpoint, config.adapter.seed)
    return {**{name: model.eval() for name, model in models.items()}, "trained": trained}


def _batches(
    model: SamForSegmentation, config: RunConfig, samples: list[Sample]
) -> Iterator[Tensor]:
    """One image at a time, as the encoder takes it."""
    for item in make_dataset(config, samples):
        image = item["image"].to(model.pixel_mean.device)
        yield ((image - model.pixel_mean) / model.pixel_std)[None]


# ---- Table 4 ------------------------------------------------------------------------------------


def _write_statistics(statistics: Statistics, images: int, output: Path) -> list[Part]:
    rows = [
        {"model": name, **block._asdict()}
        for name, blocks in statistics.items()
        for block in blocks
    ]
    write_text(output / "encoder.csv", _as_csv(rows))
    names = {
        "attention_distance": "Mean attention distance of each block, in pixels.",
        "log_amplitude": "Relative log amplitude of the highest frequency after each block.",
    }
    drawings = [
        Drawing(name, caption, partial(_draw_blocks, statistics=statistics, key=name))
        for name, caption in names.items()
    ]
    for drawing in drawings:
        drawing.save(output / f"{drawing.name}.png")
    note = f"Means over {images} test images; for the attention, over heads and queries as well."
    return [*drawings, _table_4(statistics), note]


def _table_4(statistics: Statistics) -> Table:
    head = ["Block", "Window"]
    for quantity in ("distance, px", "log amplitude"):
        head += [f"{name}: {quantity}" for name in statistics]
    rows = []
    for blocks in zip(*statistics.values(), strict=True):
        cells = [
            str(blocks[0].block),
            "global" if blocks[0].window is None else str(blocks[0].window),
        ]
        cells += [f"{block.attention_distance:.1f}" for block in blocks]
        rows.append([*cells, *(f"{block.log_amplitude:.2f}" for block in blocks)])
    return Table(head, rows)


def _draw_blocks(axes: Axes, statistics: Statistics, key: str) -> None:
    for name, blocks in statistics.items():
        numbers = [block.block for block in blocks]
        values = [getattr(block, key) for block in blocks]
        axes.plot(numbers, values, "o-", color=COLOURS[name], label=name)
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    unit = ", pixels" if key == "attention_distance" else ""
    axes.set_ylabel(key.replace("_", " ") + unit)
    axes.legend()


# ---- Pictures -----------------------------------------------------------------------------------


def _shown(config: RunConfig, samples: list[Sample]) -> list[dict[str, Any]]:
    """Test images with some foreground, evenly spread."""
    items = (item for item in make_dataset(config, samples) if item["mask"].any())
    found = list(items)
    places = np.linspace(0, len(found) - 1, min(SHOWN, len(found))).round().astype(int)
    return [found[i] for i in places]


def _pixels(item: dict[str, Any]) -> np.ndarray:
    return (255 * item["image"]).round().byte().permute(1, 2, 0).numpy()


def _write_pictures(path: Path, rows: list[list[np.ndarray]]) -> None:
    """A grid of pictures with white gaps, as one PNG."""
    lines = [
        np.concatenate([np.pad(p, ((0, 4), (0, 4), (0, 0)), constant_values=255) for p in row], 1)
        for row in rows
    ]
    with replaced_file(path) as temporary:
        Image.fromarray(np.concatenate(lines)).save(temporary, format="PNG")


def _write_predictions(
    model: SamForSegmentation, config: RunConfig, samples: list[Sample], output: Path
) -> list[Part]:
    names = ["background", *config.foreground_names]
    rows, parts = [], []
    for item in _shown(config, samples):
        with torch.no_grad():
            image = item["image"][None].to(model.pixel_mean.device)
            labels = model.eval()(image).labels()[0].cpu().numpy()
        pixels = _pixels(item)
        row = [pixels, paint(pixels, item["mask"].numpy(), names), paint(pixels, labels, names)]
        rows.append(row)
        parts.append(
            Picture(f"{item['name']}: image, truth, prediction", np.concatenate(row, axis=1))
        )
    if not rows:
        return ["No test image has any foreground."]
    _write_pictures(output / "predictions.png", rows)
    return parts


class _Foreground(nn.Module):
    """Images to (B, K, S, S) scores that have gradients everywhere: logits where it is binary."""

    def __init__(self, model: SamForSegmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return output.masks if output.classes is None else output.class_map()


def heat_map(model: SamForSegmentation, image: Tensor, mask: Tensor) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017) of the foreground's score at the encoder's last block.

    Args:
        model: trained or not.
        image: (3, S, S) in [0, 1].
        mask: (S, S) labels; the score is summed over the pixels of the truth's foreground.

    Returns:
        (S, S) in [0, 1].
    """
    from pytorch_grad_cam import GradCAM  # it imports for seconds

    encoder = model.image_encoder
    last = encoder.blocks[-1] if hasattr(encoder, "blocks") else encoder.stages[-1].blocks[-1]

    def target(scores: Tensor) -> Tensor:
        if scores.shape[0] == 1:
            return scores[0][mask.to(scores.device) > 0].sum()
        return sum(scores[k][mask.to(scores.device) == k].sum() for k in range(1, len(scores)))

    # Frozen encoders have gradients only towards an input that wants them.
    images = image[None].to(model.pixel_mean.device).requires_grad_(True)
    layers = {"target_layers": [last], "reshape_transform": lambda x: x.permute(0, 3, 1, 2)}
    with GradCAM(_Foreground(model.eval()), **layers) as cam:
        heat = cam(images, [target])[0]
    model.zero_grad(set_to_none=True)
    return heat


def _write_heat_maps(
    models: dict[str, SamForSegmentation], config: RunConfig, samples: list[Sample], output: Path
) -> list[Part]:
    from pytorch_grad_cam.utils.image import show_cam_on_image

    rows, parts = [], []
    for item in _shown(config, samples):
        pixels = _pixels(item)
        row = [pixels]
        for model in models.values():
            heat = heat_map(model, item["image"], item["mask"])
            row.append(show_cam_on_image(np.float32(pixels) / 255, heat, use_rgb=True))
        rows.append(row)
        caption = f"{item['name']}: image, {', '.join(models)}"
        parts.append(Picture(caption, np.concatenate(row, axis=1)))
    if not rows:
        return ["No test image has any foreground."]
    _write_pictures(output / "gradcam.png", rows)
    return parts


# ---- Convergence and operations -----------------------------------------------------------------


def _read_history(run: Path, first: RunConfig) -> list[dict[str, str]]:
    config = RunConfig.from_dict(read_json(run / "config.json"))
    given, own = config.to_dict(), first.to_dict()
    given["adapter"]["seed"] = own["adapter"]["seed"]
    if given != own:
        raise UserError(f"{run} is a run of another configuration; give runs that differ in seed")
    try:
        with (run / "history.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{run} is not finished: it has no history.csv") from error


def _write_convergence(
    histories: list[list[dict[str, str]]], config: RunConfig, output: Path
) -> list[Part]:
    curves = np.array([[float(row["val_dice"] or "nan") for row in rows] for rows in histories])
    mean = curves.mean(0)
    spread = curves.std(0, ddof=1) if len(curves) > 1 else np.full(len(mean), np.nan)
    rows = [
        {"epoch": epoch, "mean_val_dice": m, "standard_deviation": s}
        for epoch, (m, s) in enumerate(zip(mean, spread, strict=True))
    ]
    write_text(output / "convergence.csv", _as_csv(rows))
    start = config.search.search_start if config.searches else None
    caption = f"Validation Dice by epoch, mean of {len(curves)} seeds and standard deviation."
    draw = partial(_draw_convergence, mean=mean, spread=spread, start=start)
    drawing = Drawing("convergence", caption, draw)
    drawing.save(output / "convergence.png")
    return [drawing]


def _draw_convergence(axes: Axes, mean: np.ndarray, spread: np.ndarray, start: int | None) -> None:
    epochs = np.arange(len(mean))
    axes.plot(epochs, mean, color=BLUE)
    if np.isfinite(spread).any():
        axes.fill_between(epochs, mean - spread, mean + spread, color=BLUE, alpha=0.25, linewidth=0)
    if start is not None and 0 < start < len(mean):
        axes.axvline(start - 0.5, color=MUTED, linestyle="--", linewidth=1)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation Dice")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _write_operations(runs: Sequence[Path], output: Path) -> list[Part]:
    stored = [read_json(run / "operations.json") for run in runs]
    names = stored[0]["operations"]
    last = np.array([run["epochs"][-1]["softmax"] for run in stored])  # (runs, layers, operations)
    chosen = last.argmax(-1)
    rows = [
        {
            "operation": name,
            "mean_weight": last[..., i].mean(),
            "spread_over_runs": last[..., i].mean(1).std(ddof=1) if len(runs) > 1 else None,
            "share_of_layers_where_largest": (chosen == i).mean(),
        }
        for i, name in enumerate(names)
    ]
    write_text(output / "operations.csv", _as_csv(rows))
    caption = (
        f"Mean of softmax(α) over {last.shape[1]} layers of {len(runs)} runs, and the share of the "
        "layers in which an operation has the largest weight."
    )
    drawing = Drawing("operations", caption, partial(_draw_operations, rows=rows), (5.4, 3.2))
    drawing.save(output / "operations.png")
    return [drawing]


def _draw_operations(axes: Axes, rows: list[dict[str, Any]]) -> None:
    places = np.arange(len(rows))
    weights = [row["mean_weight"] for row in rows]
    spread = [row["spread_over_runs"] or 0 for row in rows]
    axes.barh(places - 0.2, weights, 0.38, xerr=spread, color=BLUE, ecolor=INK, label="mean weight")
    shares = [row["share_of_layers_where_largest"] for row in rows]
    axes.barh(places + 0.2, shares, 0.38, color=GREEN, label="share of layers")
    axes.axvline(1 / len(rows), color=ORANGE, linestyle="--", linewidth=1, label="uniform")
    axes.set_yticks(places, [row["operation"] for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)


def _as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
