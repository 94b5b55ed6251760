"""``bench.study``: what a study compares, and that the documentation shows what it prints."""

from pathlib import Path

import pytest

from bench.last_epoch import stored
from bench.last_epoch import table as table_of_last_epochs
from bench.studies import STUDIES
from bench.study import finished, main, table

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    ("study", "file", "section"),
    [
        ("whole-sets", "whole_sets.csv", ""),
        ("default-rate", "default_rate.csv", "\n## At the default learning rate\n"),
    ],
)
def test_the_evidence_is_what_the_study_prints(tmp_path, study, file, section):
    plan = STUDIES[study]
    printed = table(plan, finished(plan, tmp_path, DOCS / "evidence" / file)).splitlines()
    starts = tuple(f"| {data} | {name} | " for data in plan.datasets for name in plan.variants)
    page = (DOCS / "evidence.md").read_text(encoding="utf-8")
    if section:
        page = page.split(section)[1].split("\n## ")[0]
    shown = [line for line in page.splitlines() if line.startswith(starts)]
    assert shown and not set(shown) - set(printed)


def test_the_last_epochs_are_what_the_file_holds():
    rows = stored(DOCS / "evidence/last_epoch.csv")
    printed = table_of_last_epochs([rows[run] for run in sorted(rows)]).splitlines()
    page = (DOCS / "evidence.md").read_text(encoding="utf-8").splitlines()
    assert len(printed) == 5 and not {line for line in printed if "---" not in line} - set(page)


@pytest.mark.parametrize(
    ("study", "variant", "reference"),
    [
        ("whole-sets", "vit_t, NAS-PC-LoRA", "vit_t, LoRA"),
        ("whole-sets", "vit_t, identity, x 1", "vit_t, LoRA"),
        ("whole-sets", "random vit_t, LoRA", "random vit_t, LoRA"),
        ("suspects", "start: skip", "LoRA"),
        ("merging", "MobileSAM", None),
    ],
)
def test_a_variant_is_compared_with_lora_on_its_encoder(study, variant, reference):
    assert STUDIES[study].reference_of(variant) == reference


def test_another_reference(tmp_path, capsys):
    def printed(against):
        main("whole-sets", tmp_path, tmp_path, tmp_path, table_only=True, against=against)
        return capsys.readouterr().out

    assert "| Dice − Conv-LoRA |" in printed("Conv-LoRA")
    with pytest.raises(SystemExit, match="no variant of whole-sets has this name"):
        printed("Conv")
