"""Trains every cell of a study - variants x data sets x seeds - and prints its table as Markdown.

    python -m bench.study search-start --data DIR --weights mobile_sam.safetensors --output DIR

DIR of ``--data`` holds the data sets as folders (train.csv, val.csv, test.csv). Finished cells are
kept, so an interrupted study can continue. Two processes can share one ``--output``.
"""

import csv
import dataclasses
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from naslora import NASLoRAConfig, merge
from naslora.data.layouts import REQUIRED_SPLITS
from naslora.records import read_record, read_rows, write_record, write_rows
from naslora.report.numbers import MISSING
from naslora.report.tables import Table, markdown_table
from naslora.results import HISTORY, Epoch, MergeResult, RunResult
from naslora.sam.shipped import NONE
from naslora.study.paired import paired_difference
from naslora.study.sweep import mean_and_spread, mean_text
from naslora.trained import evaluate_model, load_model
from naslora.training.run import train
from naslora.training.run_config import RunConfig
from naslora.training.run_data import calibration, find_splits
from naslora.training.search_config import SearchConfig

Settings = dict[str, dict[str, Any]]
"""Fields of RunConfig ("run"), of its adapter ("adapter") and of its search ("search")."""
Numbers = dict[str, float | None]
"""The columns of a finished cell."""
Column = Callable[[RunResult, list[Epoch]], float | None]
"""A number of a finished run."""


class Key(NamedTuple):
    """Names a cell."""

    data: str
    variant: str
    seed: int


Cells = dict[Key, Numbers]
DONE = "study.json"  # what a finished cell reports
# At the start 3/8 of the mixture pass the signal on. This lora_alpha restores the gain of LoRA.
LEVEL_GAIN = 32.0 * 8 / 3


def _dice(result: RunResult, mode: str | None = None) -> float | None:
    """Test Dice, after a merge if ``mode`` is given."""
    scores = result.test if mode is None else (result.test_merged or {}).get(mode)
    return scores.dice if scores else None


TRAINING: dict[str, Column] = {
    "loss, epochs 2-5": lambda _, history: statistics.mean(e.train_loss for e in history[2:6]),
    "last loss": lambda _, history: history[-1].train_loss,
    "test Dice": lambda result, _: _dice(result),
    "test IoU": lambda result, _: result.test.iou if result.test else None,
    "Dice after center": lambda result, _: _dice(result, "center"),
    "entropy": lambda _, history: history[-1].entropy,
}


def _error(result: RunResult, mode: str, held_out: bool = False) -> float | None:
    """Mean over the layers of the update's relative error after a merge."""
    layers = (result.merge or {})[mode].layers or []
    if held_out:
        return mean_and_spread([layer.held_out_error for layer in layers]).mean
    return statistics.mean(layer.update_error for layer in layers)


MERGING: dict[str, Column] = {
    "before": lambda result, _: _dice(result),
    "exact": lambda result, _: _dice(result, "exact"),
    "center": lambda result, _: _dice(result, "center"),
    "calibrated, 8": lambda result, _: _dice(result, "calibrated, 8"),
    "calibrated, 16": lambda result, _: _dice(result, "calibrated"),
    "error of exact": lambda result, _: _error(result, "exact"),
    "of center": lambda result, _: _error(result, "center"),
    "of calibrated, 8": lambda result, _: _error(result, "calibrated, 8", held_out=True),
    "of calibrated, 16": lambda result, _: _error(result, "calibrated", held_out=True),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """Variants, each trained on every data set with every seed."""

    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    common: Settings
    variants: dict[str, Settings]
    epochs: dict[str, int]
    columns: dict[str, Column] = dataclasses.field(default_factory=lambda: TRAINING)
    few_images: int | None = None
    """If given, models are also merged with ``calibrated`` on this number of images."""
    train_images: int | None = None
    """If given, so many of the training images are used, evenly spread, and as large a part of the
    validation images."""
    reference: str | dict[str, str] | None = None
    """The variant from which the paired differences of the others are taken, in test Dice; or that
    of each variant that is compared."""

    def reference_of(self, variant: str) -> str | None:
        """The variant from which a variant's paired difference is taken."""
        if isinstance(self.reference, dict):
            return self.reference.get(variant)
        return self.reference


def _adapter(method: str, **adapter: Any) -> Settings:
    return {"run": {"method": method}, "adapter": adapter}


# Plain LoRA in the fused kernels.
LORA = _adapter("nas-pc-lora", channel_ratio=0.0)

RANDOM_VIT_T = {"model": "vit_t", "checkpoint": Path(NONE)}
# Encoders of the study "pretrained": with convolutions, without, and without pre-trained weights.
ENCODERS: dict[str, dict[str, Any]] = {
    "MobileSAM": {"model": "mobile_sam"},
    "vit_t": {"model": "vit_t"},
    "random vit_t": RANDOM_VIT_T,
}

# Settings of version 0.1.0.
COUPLED = {
    "optimizer": "adam",
    "cell_weight_decay": 1e-4,
    "alpha_weight_decay": 1e-3,
}
CONSTANT_ALPHA = {"alpha_schedule": "constant"}
# Its rate of alpha in the 48 steps of "suspects", where a logit could travel 2.
SLOW_ALPHA = {"alpha_learning_rate": 0.042}

STUDIES = {
    "class-loss": Study(
        datasets=("mni152",),
        seeds=(0, 1, 2),
        common={
            "run": RANDOM_VIT_T | {"image_size": 256, "num_classes": 3},
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
            "search": {"learning_rate": 3e-4, "search_start": 1000},
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
            "run": RANDOM_VIT_T | {"image_size": 256, "num_classes": 3},
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
            "NAS-PC-LoRA": {"search": {"arch_data": "hold-out"}},
            "NAS-PC-LoRA, nothing held out": {"search": {"arch_fraction": 1.0}},
            "LoRA": LORA,
            "decoder only": _adapter("decoder-only"),
        },
        epochs={"he_nuclei": 24, "roads": 16},
    ),
    # What held NAS-PC-LoRA back: each suspect with and without, on a part of the training images.
    "suspects": Study(
        datasets=("kvasir_seg", "leaf_disease"),
        seeds=(0, 1, 2, 3, 4),
        common={
            "run": {"model": "mobile_sam", "image_size": 224},
            "search": {"learning_rate": 5e-4, "mixed_precision": "no"},
        },
        variants={
            "LoRA": LORA,
            "NAS-PC-LoRA": {},
            "all of 0.1.0": {
                "search": COUPLED | {"arch_data": "hold-out"} | CONSTANT_ALPHA | SLOW_ALPHA
            },
            "coupled weight decay": {"search": COUPLED},
            "alpha: hold-out": {"search": {"arch_data": "hold-out"}},
            "alpha: rotate": {"search": {"arch_data": "rotate"}},
            "alpha: constant rate": {"search": CONSTANT_ALPHA},
            # A third of the default: a logit can travel 1.6 in the 48 steps, not 4.8.
            "alpha: slow": {"search": {"alpha_learning_rate": 0.1}},
            "alpha: never": {"search": {"search_start": 1000}},
            "start: skip": _adapter("nas-pc-lora", cell_init="skip"),
            "cell's rate x 4": {"search": {"cell_learning_rate": 2e-3}},
            "cell's rate x 10": {"search": {"cell_learning_rate": 5e-3}},
            "NAS-LoRA": _adapter("nas-lora"),
            "in bf16": {"search": {"mixed_precision": "bf16"}},
        },
        epochs={"kvasir_seg": 6, "leaf_disease": 6},
        train_images=240,
        reference="LoRA",
    ),
    # What the weights of vit_t in the package are worth, and whether NAS-PC-LoRA gains more over
    # LoRA on an encoder without convolutions.
    "pretrained": Study(
        datasets=("kvasir_seg", "leaf_disease"),
        seeds=(0, 1, 2, 3, 4),
        common={
            "run": {"image_size": 256},
            "search": {"learning_rate": 5e-4, "mixed_precision": "no"},
        },
        variants={
            f"{encoder}, {method}": {
                "run": run | settings.get("run", {}),
                "adapter": settings.get("adapter", {}),
            }
            for encoder, run in ENCODERS.items()
            for method, settings in (("LoRA", LORA), ("NAS-PC-LoRA", {}))
        },
        epochs={"kvasir_seg": 6, "leaf_disease": 6},
        train_images=240,
        reference={f"{encoder}, NAS-PC-LoRA": f"{encoder}, LoRA" for encoder in ENCODERS},
    ),
    # Test Dice before and after merging, then the mean relative error of the layers' updates. That
    # of `calibrated` is on held-out tokens.
    "merging": Study(
        datasets=("he_nuclei", "brain_deepgrey"),
        seeds=(0, 1, 2),
        common={
            "run": {"image_size": 256},
            "search": {"batch_size": 2, "arch_fraction": 1.0},
        },
        variants={
            f"{title}{', annealed' * (anneal > 0)}": {
                "run": run,
                "search": {"learning_rate": rate, "anneal_epochs": anneal},
            }
            for title, run, rate in (
                ("MobileSAM", {"model": "mobile_sam"}, 5e-4),
                ("vit_t", RANDOM_VIT_T, 1e-3),
            )
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
    dataset: tuple[str, ...] | None = None,
    save: Path | None = None,
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
        dataset: only these data sets.
        save: CSV file with one row a finished cell. Cells in it are not trained again. It is
            written at the end.
        table_only: train nothing, print what is there.
    """
    plan = STUDIES[study]
    done = finished(plan, output / study, save)
    for number in () if table_only else seed or plan.seeds:
        for folder in dataset or plan.datasets:
            for name in variant or plan.variants:
                if Key(folder, name, number) not in done:
                    _train_cell(plan, folder, name, number, data, weights, output / study)
    done = finished(plan, output / study, save)
    if save is not None:
        save_cells(done, save)
    print(table(plan, done))


def _train_cell(
    plan: Study, dataset: str, name: str, seed: int, data: Path, weights: Path, output: Path
) -> None:
    directory = _directory(output, dataset, name, seed)
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
        source = {"data": _part(data / dataset, plan.train_images, output / "data")}
        if merged["run"]["model"] == "mobile_sam":
            source["checkpoint"] = weights
    config = RunConfig(
        **source,
        adapter=NASLoRAConfig(seed=seed, **merged["adapter"]),
        search=SearchConfig(**search | merged["search"]),
        **merged["run"],
    )
    print(f"== {dataset}, {name}, seed {seed}", flush=True)
    result = train(config, directory, resume=directory.exists())
    if plan.few_images is not None:
        result = _merged_with(plan.few_images, directory, result)
    write_record(directory / DONE, result)


def _part(folder: Path, count: int | None, output: Path) -> Path:
    """The folder of a data set, or a new one that lists ``count`` of its training images, and as
    large a part of its validation images."""
    if count is None:
        return folder
    part = output / f"{folder.name}-{count}"
    for split in REQUIRED_SPLITS:
        with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if split == "train":
            step = max(len(rows) / count, 1)
        if split != "test":
            rows = [rows[int(i * step)] for i in range(round(len(rows) / step))]
        named = [{name: str((folder / path).resolve()) for name, path in r.items()} for r in rows]
        write_rows(part / f"{split}.csv", named)
    return part


def _merged_with(images: int, directory: Path, result: RunResult) -> RunResult:
    """The result of a finished run, with a merge on fewer images added."""
    model, config = load_model(directory)
    splits = find_splits(config)
    batches = calibration(config, splits, "calibrated", torch.device("cpu"), images)
    name = f"calibrated, {images}"
    report = merge(model, "calibrated", batches)
    merged = MergeResult(report.mode, report.source, report.layers, report.warning)
    scores = evaluate_model(model, config, splits["test"])
    return dataclasses.replace(
        result,
        merge={**(result.merge or {}), name: merged},
        test_merged={**(result.test_merged or {}), name: scores},
    )


def _directory(output: Path, dataset: str, name: str, seed: int) -> Path:
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    return output / dataset / slug / str(seed)


def finished(plan: Study, output: Path, save: Path | None) -> Cells:
    """The numbers of the cells that have run: those in ``save``, and those in ``output``."""
    cells: Cells = {}
    if save is not None and save.is_file():
        with save.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                key = Key(row.pop("data"), row.pop("variant"), int(row.pop("seed")))
                cells[key] = {name: float(text) if text else None for name, text in row.items()}
    for dataset in plan.datasets:
        for name in plan.variants:
            for seed in plan.seeds:
                folder = _directory(output, dataset, name, seed)
                if (folder / DONE).exists():
                    run = read_record(folder / DONE, RunResult), read_rows(folder / HISTORY, Epoch)
                    numbers = {title: column(*run) for title, column in plan.columns.items()}
                    cells[Key(dataset, name, seed)] = numbers
    return cells


def save_cells(cells: Cells, path: Path) -> None:
    """Writes one row a cell, sorted."""
    rows = [
        {"data": key.data, "variant": key.variant, "seed": key.seed, **cells[key]}
        for key in sorted(cells)
    ]
    write_rows(path, rows)


def table(plan: Study, cells: Cells) -> str:
    """The numbers of the finished cells in Markdown: mean ± standard deviation over the seeds."""
    rows = []
    for dataset in plan.datasets:
        for name in plan.variants:
            own = _by_seed(cells, dataset, name)
            if own:
                numbers = [[cell[title] for cell in own.values()] for title in plan.columns]
                rows.append([dataset, name, str(len(own)), *map(_text, numbers)])
                if plan.reference is not None:
                    reference = plan.reference_of(name)
                    others = {} if reference is None else _by_seed(cells, dataset, reference)
                    rows[-1].append(_gain(own, others))
    head = ["data", "variant", "seeds", *plan.columns]
    if plan.reference is not None:
        head.append(f"Dice − {plan.reference}" if isinstance(plan.reference, str) else "paired")
    return markdown_table(Table(head, rows))


def _by_seed(cells: Cells, dataset: str, name: str) -> dict[int, Numbers]:
    return {k.seed: cells[k] for k in sorted(cells) if (k.data, k.variant) == (dataset, name)}


def _gain(own: Mapping[int, Numbers], others: Mapping[int, Numbers]) -> str:
    """Mean and 95 % interval of the difference in test Dice, over the seeds of both."""
    ours, theirs = (
        {seed: numbers["test Dice"] or 0.0 for seed, numbers in part.items()}
        for part in (own, others)
    )
    difference = paired_difference("", ours, theirs)
    if difference.low is None or ours == theirs:
        return MISSING
    return f"{difference.mean:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"


def _text(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) == len(values) and max(known) < 1e-3:  # rounding
        return f"{max(known):.0e}"
    return mean_text(mean_and_spread(values))


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tyro.cli(main)
