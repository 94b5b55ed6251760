"""Studies: what they compare, and that their pages show what they print."""

from pathlib import Path

import pytest

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
    starts = tuple(f"| {data} | {name} | " for data in plan.epochs for name in plan.variants)
    page = PAGE.split(section)[1].split("\n## ")[0] if section else PAGE
    shown = [line for line in page.splitlines() if line.startswith(starts)]
    assert shown and not set(shown) - set(printed)


def test_another_reference(tmp_path, capsys):
    options = {"table_only": True, "against": "Conv-LoRA"}
    main("whole-sets", tmp_path, tmp_path, tmp_path, **options)
    assert "| Dice − Conv-LoRA |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no variant of whole-sets has this name"):
        main("whole-sets", tmp_path, tmp_path, tmp_path, **options | {"against": "Conv"})
