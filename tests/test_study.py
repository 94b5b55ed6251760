"""Studies: what they compare, and that their pages show what they print."""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from bench.experiments.outlines import outline
from bench.experiments.studies import STUDIES
from bench.experiments.study import finished, main, table

PAGES = Path(__file__).parents[1] / "bench/experiments"
PAGE = (PAGES / "evidence.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("study", "file", "section"),
    [
        ("whole-sets", "whole_sets.csv", ""),
        ("default-rate", "default_rate.csv", "\n## At the default learning rate\n"),
    ],
)
def test_the_evidence_is_what_the_study_prints(tmp_path, study, file, section):
    plan = STUDIES[study]
    printed = table(plan, finished(plan, tmp_path, PAGES / "results" / file)).splitlines()
    starts = tuple(f"| {data} | {name} | " for data in plan.datasets for name in plan.variants)
    page = PAGE.split(section)[1].split("\n## ")[0] if section else PAGE
    shown = [line for line in page.splitlines() if line.startswith(starts)]
    assert shown and not set(shown) - set(printed)


def test_pairs_scatter_less_than_runs_of_different_seeds():
    plan = STUDIES["whole-sets"]
    cells = finished(plan, PAGES, PAGES / "results/whole_sets.csv")
    for method in ("NAS-PC-LoRA", "Conv-LoRA"):
        own, lora = (
            [cells["crackforest", f"MobileSAM, {name}", seed]["test Dice"] for seed in range(16)]
            for name in (method, "LoRA")
        )
        paired = statistics.stdev(a - b for a, b in zip(own, lora, strict=True))
        unpaired = math.sqrt(statistics.variance(own) + statistics.variance(lora))
        assert f"{paired:.4f}" in PAGE and f"{unpaired:.4f}" in PAGE


@pytest.mark.parametrize(
    ("study", "variant", "reference"),
    [
        ("whole-sets", "vit_t, NAS-PC-LoRA", "vit_t, LoRA"),
        ("whole-sets", "random vit_t, LoRA", "random vit_t, LoRA"),
        ("default-rate", "NAS-PC-LoRA", "LoRA"),
        ("default-rate", "rate x 5, NAS-PC-LoRA", "rate x 5, LoRA"),
        ("merging", "MobileSAM", None),
    ],
)
def test_a_variant_is_compared_with_lora_on_its_encoder_and_at_its_rate(study, variant, reference):
    assert STUDIES[study].reference_of(variant) == reference


def test_another_reference(tmp_path, capsys):
    options = {"table_only": True, "against": "Conv-LoRA"}
    main("whole-sets", tmp_path, tmp_path, tmp_path, **options)
    assert "| Dice − Conv-LoRA |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no variant of whole-sets has this name"):
        main("whole-sets", tmp_path, tmp_path, tmp_path, **options | {"against": "Conv"})


def test_an_outline_is_on_both_sides_of_a_change():
    labels = np.zeros((5, 8), int)
    labels[1:4, 1:4], labels[1:4, 4:7] = 1, 2
    expected = ["01111110", "11111111", "11011011", "11111111", "01111110"]
    found = outline(labels) // 255
    assert ["".join(map(str, row)) for row in found] == expected
