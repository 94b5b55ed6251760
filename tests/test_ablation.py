"""Ablations: what is varied, what an operation that is left out does, and the sweep's folder."""

import statistics
from pathlib import Path

import pytest
import torch
from conftest import csv_rows, succeed
from run_configs import run_config

from naslora import NASLoRAConfig
from naslora.adapter.layer.modules import arch_parameters
from naslora.files import read_json
from naslora.records import read_record
from naslora.results import RunNumbers
from naslora.study import compare
from naslora.study.rows import ABLATIONS, BASE, ablation_rows
from naslora.training.run_model import build_adapted_model
from naslora_kernels import OPERATIONS

SMALL = ("--model", "vit_t", "--image-size", 32, "--workers", 0, "--batch-size", 2)


TINY = run_config(name="vit_t", image_size=32, training={"epochs": 30, "search_start": 10})


def test_ranks_and_ratios_are_the_papers():
    ranks = [row.config.adapter for row in ablation_rows("rank", run_config())]
    # Two thirds of the channels pass through the cell
    assert [(c.rank, c.cell_channels) for c in ranks] == [(3, 2), (6, 4), (12, 8), (24, 16)]
    ratios = [row.config.adapter for row in ablation_rows("channel-ratio", run_config())]
    assert [c.cell_channels for c in ratios] == [3, 2, 1]


@pytest.mark.parametrize("name", ABLATIONS)
def test_exactly_one_row_is_the_unchanged_method(name):
    rows = ablation_rows(name, TINY)
    assert [row.config for row in rows if row.name == BASE] == [TINY]
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize("preset", ["linear", "paper"])
def test_what_is_left_out_stays_out_through_training(tiny_sam, preset):
    adapter = NASLoRAConfig(operations=OPERATIONS[4:], preset=preset)
    config = run_config(name="vit_t", image_size=32, adapter=adapter)
    model = build_adapted_model(config).train()
    alpha = arch_parameters(model)
    optimizer = torch.optim.Adam(alpha, lr=0.1, weight_decay=1e-3)
    weights = [p for p in model.parameters() if p.requires_grad and all(p is not a for a in alpha)]
    for parameter in weights:  # lora_B is zero at the start, and would give alpha no gradient
        torch.nn.init.normal_(parameter, std=0.1)
    start = [a.detach().clone() for a in alpha]
    for _ in range(20):
        model(torch.rand(1, 3, 32, 32)).masks.square().mean().backward()
        assert all(a.grad[:4].eq(0).all() for a in alpha)
        optimizer.step()
        optimizer.zero_grad()
    for before, after in zip(start, alpha, strict=True):
        mixture = after.detach().softmax(0)
        assert mixture[:4].eq(0).all() and mixture.isfinite().all()
        assert float(mixture.sum()) == pytest.approx(1)
        assert not torch.equal(before[4:], after[4:])


def ablate(clean_data, output, name, *more):
    arguments = ("--data", clean_data, "--output", output, "--seeds", 0, 1, *SMALL)
    return succeed("ablate", name, *arguments, "--epochs", 1, "--search-start", 0, *more)


@pytest.fixture(scope="module")
def study(clean_data, tiny_sam, tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("study") / "out"
    return output, ablate(clean_data, output, "channel-ratio").out


def test_the_table_is_that_of_the_runs(study):
    output, printed = study
    assert "2/3 (2 of 3 channels) | 2 |" in printed
    assert printed == (output / "channel-ratio/table.md").read_text()
    tables = output / "channel-ratio"
    gains = {r["title"][:3]: float(r["mean"]) for r in csv_rows(tables / "differences.csv")}
    rows = csv_rows(tables / "table.csv")
    for row, folder in zip(rows, ("ratio-3-3", "base", "ratio-1-3"), strict=True):
        files = [[output / f"runs/{f}/{s}/metrics.json" for s in (0, 1)] for f in (folder, "base")]
        dice, base = ([read_json(file)["test"]["dice"] for file in own] for own in files)
        assert float(row["dice"]) == pytest.approx(statistics.mean(dice))
        assert float(row["dice_spread"]) == pytest.approx(statistics.stdev(dice))
        if folder != "base":
            difference = statistics.mean([a - b for a, b in zip(dice, base, strict=True)])
            assert gains[row["title"][:3]] == pytest.approx(difference, abs=1e-12)
    report = (output / "channel-ratio/report.html").read_text()
    assert "Ablation of nas-pc-lora on vit_t for " in report and "<svg" in report


def test_a_sweep_resumes_and_keeps_finished_cells(clean_data, tiny_sam, study):
    output, printed = study
    (output / "runs/ratio-1-3/1/numbers.json").unlink()
    again = ablate(clean_data, output, "channel-ratio", "--resume")
    assert again.out == printed, again.out
    assert again.err.count("ablate channel-ratio: run") == 1
    assert "run 1 of 1: 1/3 (1 of 3 channels), seed 1" in again.err


def test_ablations_share_the_runs_of_the_unchanged_method(clean_data, tiny_sam, study, monkeypatch):
    output, _ = study
    trained = []

    def run(config, directory, costs):
        trained.append(directory.relative_to(output / "runs").as_posix())
        directory.mkdir(parents=True)
        return read_record(output / "runs/base/0/numbers.json", RunNumbers)

    monkeypatch.setattr(compare, "run_and_measure", run)
    ablate(clean_data, output, "blocks", "--resume")
    assert trained == ["first-half/0", "last-half/0", "first-half/1", "last-half/1"]
