"""Trains every cell of a study - variants x data sets x seeds - and prints its table as Markdown.

    python -m bench.study search-start --data DIR --weights mobile_sam.safetensors --output DIR

DIR of ``--data`` holds the data sets as folders (train.csv, val.csv, test.csv). Finished cells are
kept: an interrupted study continues where it was, and two processes may share one ``--output``.
"""

import dataclasses
import os
import statistics
from pathlib import Path
from typing import Any

import torch
import tyro

from naslora import NASLoRAConfig
from naslora.files import read_json
from naslora.run import RunConfig, train
from naslora.search import SearchConfig

Settings = dict[str, dict[str, Any]]  # of RunConfig ("run"), of the adapter, of the search

# A LoRA whose gain is that of a mixture of which 3/8 pass the signal on.
LEVEL_GAIN = 32.0 * 8 / 3


@dataclasses.dataclass(frozen=True)
class Study:
    """A table: rows are variants, columns data sets; every cell is trained with each seed."""

    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    common: Settings
    variants: dict[str, Settings]
    epochs: dict[str, int]


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
    if (directory / "metrics.json").exists():
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
        source = {"data": data / dataset, "checkpoint": weights}
    config = RunConfig(
        **source,
        adapter=NASLoRAConfig(seed=seed, **merged["adapter"]),
        search=SearchConfig(**search | merged["search"]),
        **merged["run"],
    )
    print(f"== {dataset}, {name}, seed {seed}", flush=True)
    train(config, directory, resume=directory.exists())


def _directory(output: Path, dataset: str, name: str, seed: int) -> Path:
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    return output / dataset / slug / str(seed)


def table(plan: Study, output: Path) -> str:
    """Mean and standard deviation over the seeds, of what tells the variants apart."""
    lines = [
        "| data | variant | seeds | loss, epochs 2-5 | last loss | test Dice | test IoU "
        "| Dice after center | entropy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for dataset in plan.datasets:
        for name in plan.variants:
            folders = [_directory(output, dataset, name, seed) for seed in plan.seeds]
            folders = [folder for folder in folders if (folder / "metrics.json").exists()]
            if folders:
                lines.append(_row(dataset, name, folders))
    return "\n".join(lines)


def _row(dataset: str, name: str, folders: list[Path]) -> str:
    metrics = [read_json(folder / "metrics.json") for folder in folders]
    histories = [torch.load(folder / "last.pt", weights_only=True)["history"] for folder in folders]
    early = [statistics.mean(r["train_loss"] for r in history[2:6]) for history in histories]
    entropies = [history[-1]["entropy"] for history in histories]
    merged = [m["test_merged"]["center"]["dice"] for m in metrics if "test_merged" in m]
    cells = [
        dataset,
        name,
        str(len(folders)),
        _spread(early),
        _spread([history[-1]["train_loss"] for history in histories]),
        _spread([m["test"]["dice"] for m in metrics]),
        _spread([m["test"]["iou"] for m in metrics]),
        _spread(merged) if merged else "-",
        "-" if entropies[0] is None else _spread(entropies),
    ]
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tyro.cli(main)
