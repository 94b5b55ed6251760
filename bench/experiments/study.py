"""Trains every cell of a study - variants x data sets x seeds - and prints its table as Markdown.

    python -m bench.experiments.study whole-sets --data DIR \\
        --weights mobile_sam.safetensors --output DIR

DIR of ``--data`` holds the data sets as folders (train.csv, val.csv, test.csv). Finished cells are
kept, so an interrupted study can continue. Two processes can share one ``--output``.
"""

import collections
import csv
import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import tyro
from torch import Tensor

from bench.experiments.studies import SHUFFLED, STUDIES, Numbers, Settings, Study, joined
from naslora import NASLoRAConfig, NASLoRALinear, merge
from naslora.adapter.layer.cell import LinearCell
from naslora.data.layouts import REQUIRED_SPLITS
from naslora.methods import configure
from naslora.records import read_record, read_rows, write_record, write_rows
from naslora.report.tables import MISSING, Table, markdown_table
from naslora.results import HISTORY, Epoch, MergeResult, RunResult
from naslora.study.differences import paired_difference
from naslora.study.summary import mean_and_spread, mean_text
from naslora.trained import evaluate_model, load_model
from naslora.training.resolve import LEARNING_TRAVEL
from naslora.training.run import train
from naslora.training.run_config import DataConfig, ModelConfig, RunConfig, TrainConfig
from naslora.training.run_data import calibration, find_splits


class Key(NamedTuple):
    """Names a cell."""

    data: str
    variant: str
    seed: int


Cells = dict[Key, Numbers]
MERGE_MODES = "naslora.training.run.merge_modes"
FITTED = "naslora.training.resolve.LEARNING_TRAVEL"
DONE = "study.json"  # what a finished cell reports
# Fields of DataConfig that belong to a data set.
OF_DATA: dict[str, dict[str, int]] = {"camvid": {"num_classes": 11, "ignore_index": 11}}


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
    against: str | None = None,
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
        against: the variant to compare with, instead of the study's own; without the encoder's name
            in a study of several encoders.
    """
    plan = STUDIES[study]
    plan = dataclasses.replace(plan, reference=against or plan.reference)
    if against is not None and not {*map(plan.reference_of, plan.variants)} & {*plan.variants}:
        raise SystemExit(f"--against {against}: no variant of {study} has this name")
    done = finished(plan, output / study, save)
    for number in () if table_only else seed or range(plan.seeds):
        for folder in dataset or plan.epochs:
            for name in variant or plan.variants:
                if Key(folder, name, number) not in done:
                    _train_cell(plan, folder, name, number, data, weights, output / study)
    done = finished(plan, output / study, save)
    if save is not None:
        write_rows(save, [{**key._asdict(), **done[key]} for key in sorted(done)])
    print(table(plan, done))


def _train_cell(
    plan: Study, dataset: str, name: str, seed: int, data: Path, weights: Path, output: Path
) -> None:
    directory = _directory(output, dataset, name, seed)
    start: Settings = {
        "data": {"root": _part(data / dataset, plan, output / "data")} | OF_DATA.get(dataset, {}),
        "training": {"epochs": plan.epochs[dataset], "workers": 0},
    }
    special, variant = plan.of_data.get(dataset, {}), plan.variants[name]
    parts = collections.defaultdict(dict, joined(start, plan.common, special, variant))
    if parts["model"]["name"] == "mobile_sam":
        parts["model"].setdefault("checkpoint", str(weights))
    method = parts["run"].get("method", RunConfig.method)
    config = RunConfig(
        **parts["run"],
        seed=seed,
        data=DataConfig(**parts["data"]),
        model=ModelConfig(**parts["model"]),
        adapter=configure(method, NASLoRAConfig(**parts["adapter"])),
        training=TrainConfig(**parts["training"]),
    )
    print(f"== {dataset}, {name}, seed {seed}", flush=True)
    with (
        shuffled_neighbours() if name.endswith(SHUFFLED) else nullcontext(),
        nullcontext() if plan.merges else patch(MERGE_MODES, lambda *_: []),
        patch(FITTED, parts["fitted"].get("travel", LEARNING_TRAVEL)),
    ):
        result = train(config, directory, resume=directory.exists())
    if plan.few_images is not None:
        result = _merged_with(plan.few_images, directory, result)
    write_record(directory / DONE, result)


@contextmanager
def shuffled_neighbours() -> Iterator[None]:
    """Lets every cell see its tokens in a random order, always the same: neighbours say nothing."""
    fused = NASLoRALinear._fused

    def shuffled(layer: NASLoRALinear, tokens: Tensor, cell: LinearCell | None) -> Tensor:
        flat = tokens.flatten(1, 2)
        order = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0))
        h = fused(layer, flat[:, order].view_as(tokens), cell)
        return h.flatten(1, 2)[:, order.argsort()].view_as(h)

    with patch.object(NASLoRALinear, "_fused", shuffled):
        yield


def _part(folder: Path, plan: Study, output: Path) -> Path:
    """The folder of a data set, or a new one that lists so many of its images, evenly spread."""
    if plan.train_images is None:
        return folder
    part = output / f"{folder.name}-{plan.train_images}"
    for split in REQUIRED_SPLITS:
        with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if split == "train":
            share = min(plan.train_images / len(rows), 1)
        count = round(len(rows) * share)
        if split == "test":
            count = min(plan.test_images or len(rows), len(rows))
        rows = [rows[i * len(rows) // count] for i in range(count)]
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
        merge={**result.merge, name: merged},
        test_merged={**result.test_merged, name: scores},
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
    for dataset in plan.epochs:
        for name in plan.variants:
            for seed in range(plan.seeds):
                folder = _directory(output, dataset, name, seed)
                if (folder / DONE).exists():
                    run = read_record(folder / DONE, RunResult), read_rows(folder / HISTORY, Epoch)
                    numbers = {title: column(*run) for title, column in plan.columns.items()}
                    cells[Key(dataset, name, seed)] = numbers
    return cells


def table(plan: Study, cells: Cells) -> str:
    """The numbers of the finished cells in Markdown: mean ± standard deviation over the seeds."""
    rows = []
    for dataset in plan.epochs:
        for name in plan.variants:
            own = _by_seed(cells, dataset, name)
            if own:
                numbers = [[cell[title] for cell in own.values()] for title in plan.columns]
                rows.append([dataset, name, str(len(own)), *map(_text, numbers)])
                rows[-1] += [_gain(own, own, pair) for pair in plan.gains]
                if plan.reference is not None:
                    reference = plan.reference_of(name)
                    others = {} if reference is None else _by_seed(cells, dataset, reference)
                    rows[-1].append(_gain(own, others))
    head = ["data", "variant", "seeds", *plan.columns, *(f"{a} − {b}" for a, b in plan.gains)]
    if plan.reference is not None:
        head.append(f"Dice − {plan.reference}")
    return markdown_table(Table(head, rows))


def _by_seed(cells: Cells, dataset: str, name: str) -> dict[int, Numbers]:
    return {k.seed: cells[k] for k in sorted(cells) if (k.data, k.variant) == (dataset, name)}


def _gain(
    own: Mapping[int, Numbers],
    others: Mapping[int, Numbers],
    columns: tuple[str, str] = ("test Dice", "test Dice"),
) -> str:
    """Mean and 95 % interval of the difference of two columns, over the seeds of both."""
    ours, theirs = (
        {seed: numbers[column] or 0.0 for seed, numbers in part.items()}
        for part, column in zip((own, others), columns, strict=True)
    )
    difference = paired_difference("", ours, theirs)
    if difference.low is None or ours == theirs:
        return MISSING
    return f"{difference.mean:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"


def _text(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) == len(values) and max(known) < 1e-3:  # rounding
        return f"{max(known):.0e}"
    return mean_text(*mean_and_spread(values))


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tyro.cli(main)
