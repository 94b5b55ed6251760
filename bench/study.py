"""Trains every cell of a study - variants x data sets x seeds - and prints its table as Markdown.

    python -m bench.study search-start --data DIR --weights mobile_sam.safetensors --output DIR

DIR of ``--data`` holds the data sets as folders (train.csv, val.csv, test.csv). Finished cells are
kept: an interrupted study continues where it was, and two processes may share one ``--output``.
"""

import dataclasses
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro

from naslora import NASLoRAConfig, merge
from naslora.files import read_json, write_json
from naslora.trained import evaluate_model, load_model
from naslora.training.run import train
from naslora.training.run_config import RunConfig
from naslora.training.run_data import calibration, find_splits
from naslora.training.search_config import SearchConfig

Settings = dict[str, dict[str, Any]]  # of RunConfig ("run"), of the adapter, of the search
Column = Callable[[dict[str, Any], list[dict[str, Any]]], float | None]  # of metrics and history

DONE = "study.json"  # a finished cell's metrics
# A LoRA whose gain is that of a mixture of which 3/8 pass the signal on.
LEVEL_GAIN = 32.0 * 8 / 3


TRAINING: dict[str, Column] = {
    "loss, epochs 2-5": lambda _, history: statistics.mean(r["train_loss"] for r in history[2:6]),
    "last loss": lambda _, history: history[-1]["train_loss"],
    "test Dice": lambda metrics, _: metrics["test"]["dice"],
    "test IoU": lambda metrics, _: metrics["test"]["iou"],
    "Dice after center": lambda metrics, _: _merged(metrics, "center"),
    "entropy": lambda _, history: history[-1]["entropy"],
}


def _merged(metrics: dict[str, Any], mode: str) -> float | None:
    """Test Dice after a merge."""
    return metrics.get("test_merged", {}).get(mode, {}).get("dice")


def _mean(metrics: dict[str, Any], mode: str, error: str) -> float:
    """Mean over the layers of an error of a merge."""
    return statistics.mean(layer[error] for layer in metrics["merge"][mode]["layers"])


MERGING: dict[str, Column] = {
    "before": lambda metrics, _: metrics["test"]["dice"],
    "exact": lambda metrics, _: _merged(metrics, "exact"),
    "center": lambda metrics, _: _merged(metrics, "center"),
    "calibrated, 8": lambda metrics, _: _merged(metrics, "calibrated, 8"),
    "calibrated, 16": lambda metrics, _: _merged(metrics, "calibrated"),
    "error of exact": lambda metrics, _: _mean(metrics, "exact", "update_error"),
    "of center": lambda metrics, _: _mean(metrics, "center", "update_error"),
    "of calibrated, 8": lambda metrics, _: _mean(metrics, "calibrated, 8", "held_out_error"),
    "of calibrated, 16": lambda metrics, _: _mean(metrics, "calibrated", "held_out_error"),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """A table: rows are variants, columns data sets; every cell is trained with each seed."""

    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    common: Settings
    variants: dict[str, Settings]
    epochs: dict[str, int]
    columns: dict[str, Column] = dataclasses.field(default_factory=lambda: TRAINING)
    few_images: int | None = None
    """Also merges with ``calibrated`` on so many images."""


def _adapter(method: str, **adapter: Any) -> Settings:
    return {"run": {"method": method}, "adapter": adapter}


# Plain LoRA in the fused kernels.
LORA = _adapter("nas-pc-lora", channel_ratio=0.0)

STUDIES = {
    "class-loss": Study(
        datasets=("mni152",),
        seeds=(0, 1, 2),
        common={
            "run": {"model": "vit_t", "image_size": 256, "num_classes": 3},
            "search": {"learning_rate": 1e-3},
        },
        variants={
            "matching": {"search": {"class_loss": "matching"}},
            "pixel": {"search": {"class_loss": "pixel"}},
        },
        epochs={"mni152": 6},
    ),
    "search-start": Study(
        datasets=("brain_deepgrey",),
        seeds=(0, 1, 2),
        common={
            "run": {"model": "mobile_sam", "image_size": 256},
            "search": {"learning_rate": 3e-4, "search_start": 1000, "arch_fraction": 0.0},
        },
        variants={
            "LoRA": LORA,
            "NAS-LoRA, kaiming": _adapter("nas-lora", cell_init="kaiming"),
            "NAS-LoRA, kaiming, scaling x 8/3": _adapter(
                "nas-lora", cell_init="kaiming", lora_alpha=LEVEL_GAIN
            ),
            "NAS-LoRA, identity": _adapter("nas-lora", cell_init="identity"),
            "NAS-PC-LoRA, kaiming": _adapter("nas-pc-lora", cell_init="kaiming"),
            "NAS-PC-LoRA, identity": _adapter("nas-pc-lora", cell_init="identity"),
        },
        epochs={"brain_deepgrey": 16},
    ),
    "alpha-rate": Study(
        datasets=("mni152",),
        seeds=(0, 1, 2),
        common={
            "run": {"model": "vit_t", "image_size": 256, "num_classes": 3},
            "search": {"learning_rate": 1e-3, "search_start": 3},
        },
        variants={
            # Five epochs of four steps: Adam moves a logit by at most 20 x the rate.
            f"alpha rate {rate:g}": {"search": {"alpha_learning_rate": rate}}
            for rate in (3e-4, 0.025, 0.075, 0.225)
        },
        epochs={"mni152": 8},
    ),
    "small-sets": Study(
        datasets=("he_nuclei", "roads"),
        seeds=(0, 1, 2),
        common={
            "run": {"model": "mobile_sam", "image_size": 512},
            "search": {"learning_rate": 5e-4, "batch_size": 2, "mixed_precision": "bf16"},
        },
        variants={
            "NAS-PC-LoRA": _adapter("nas-pc-lora"),
            "NAS-PC-LoRA, nothing held out": {"search": {"arch_fraction": 0.0}},
            "LoRA": LORA,
            "decoder only": _adapter("decoder-only"),
        },
        epochs={"he_nuclei": 24, "roads": 16},
    ),
    # Test Dice before and after merging, then the layers' mean relative error of the update; of
    # `calibrated` on held-out tokens.
    "merging": Study(
        datasets=("he_nuclei", "brain_deepgrey"),
        seeds=(0, 1, 2),
        common={
            "run": {"image_size": 256},
            "search": {"batch_size": 2, "arch_fraction": 0.0},
        },
        variants={
            f"{title}{', annealed' * (anneal > 0)}": {
                "run": {"model": model},
                "search": {"learning_rate": rate, "anneal_epochs": anneal},
            }
            for title, model, rate in (("MobileSAM", "mobile_sam", 5e-4), ("vit_t", "vit_t", 1e-3))
            for anneal in (0, 6)
        },
        epochs={"he_nuclei": 24, "brain_deepgrey": 16},
        columns=MERGING,
        few_images=8,
    ),
}


def main(
    study: tyro.conf.Positional[str],
    data: Path,
    weights: Path,
    output: Path,
    seed: tuple[int, ...] | None = None,
    variant: tuple[str, ...] | None = None,
    table_only: bool = False,
) -> None:
    """Trains a study and prints its table.

    Args:
        study: its name, a key of ``STUDIES``.
        data: folder of the data sets' folders.
        weights: MobileSAM's checkpoint.
        output: folder for the runs.
        seed: only these seeds; for sharing the work among processes.
        variant: only these rows.
        table_only: train nothing, print what is there.
    """
    plan = STUDIES[study]
    for number in () if table_only else seed or plan.seeds:
        for dataset in plan.datasets:
            for name in variant or plan.variants:
                _train_cell(plan, dataset, name, number, data, weights, output / study)
    print(table(plan, output / study))


def _train_cell(
    plan: Study, dataset: str, name: str, seed: int, data: Path, weights: Path, output: Path
) -> None:
    directory = _directory(output, dataset, name, seed)
    if (directory / DONE).exists():
        return
    variant = plan.variants[name]
    merged = {
        part: plan.common.get(part, {}) | variant.get(part, {})
        for part in ("run", "adapter", "search")
    }
    search = {
        "epochs": plan.epochs[dataset],
        "search_start": plan.epochs[dataset] // 3,
        "workers": 0,
    }
    if dataset == "mni152":
        source = {"dataset": "mni152", "root": output.parent / "mni152"}
    else:
        source = {"data": data / dataset}
        if merged["run"]["model"] == "mobile_sam":
            source["checkpoint"] = weights
    config = RunConfig(
        **source,
        adapter=NASLoRAConfig(seed=seed, **merged["adapter"]),
        search=SearchConfig(**search | merged["search"]),
        **merged["run"],
    )
    print(f"== {dataset}, {name}, seed {seed}", flush=True)
    metrics = train(config, directory, resume=directory.exists())
    if plan.few_images is not None:
        _merge_with(plan.few_images, directory, metrics)
    write_json(directory / DONE, metrics)


def _merge_with(images: int, directory: Path, metrics: dict[str, Any]) -> None:
    """Adds a merge on fewer images to the metrics of a finished run."""
    model, config = load_model(directory)
    splits = find_splits(config)
    batches = calibration(config, splits, "calibrated", torch.device("cpu"), images)
    name = f"calibrated, {images}"
    metrics["merge"][name] = merge(model, "calibrated", batches).to_dict()
    metrics["test_merged"][name] = evaluate_model(model, config, splits["test"])


def _directory(output: Path, dataset: str, name: str, seed: int) -> Path:
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    return output / dataset / slug / str(seed)


def table(plan: Study, output: Path) -> str:
    """Mean and standard deviation over the seeds, of what tells the variants apart."""
    header = ["data", "variant", "seeds", *plan.columns]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for dataset in plan.datasets:
        for name in plan.variants:
            folders = [_directory(output, dataset, name, seed) for seed in plan.seeds]
            folders = [folder for folder in folders if (folder / DONE).exists()]
            if folders:
                cells = [_spread(_values(column, folders)) for column in plan.columns.values()]
                row = " | ".join([dataset, name, str(len(folders)), *cells])
                lines.append(f"| {row} |")
    return "\n".join(lines)


def _values(column: Column, folders: list[Path]) -> list[float | None]:
    return [
        column(
            read_json(folder / DONE),
            torch.load(folder / "last.pt", weights_only=True)["history"],
        )
        for folder in folders
    ]


def _spread(values: list[float | None]) -> str:
    if None in values:
        return "-"
    if max(values) < 1e-3:  # rounding
        return f"{max(values):.0e}"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tyro.cli(main)
