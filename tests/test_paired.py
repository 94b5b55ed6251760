"""Paired differences between methods, and their place in the tables and the report."""

import math

import pytest

from naslora.methods import METHODS
from naslora.report.comparison_report import write_comparison
from naslora.report.tables import Table
from naslora.study.paired import paired_difference, paired_differences, paired_table

TITLES = {method: entry.title for method, entry in METHODS.items()}


def test_the_interval_is_students():
    own = {0: 0.62, 1: 0.60, 2: 0.64, 9: 0.1}
    other = {0: 0.60, 1: 0.59, 2: 0.61, 7: 0.9}
    found = paired_difference("a", own, other)
    assert found.seeds == [0, 1, 2] and found.values == pytest.approx([0.02, 0.01, 0.03])
    # The 97.5 % quantile of Student's t with two degrees of freedom is 4.3027.
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert found.mean == pytest.approx(0.02)
    assert (found.low, found.high) == pytest.approx((0.02 - half, 0.02 + half))


@pytest.mark.parametrize(
    "own, reason", [({3: 0.5}, "no seed is shared"), ({0: 0.5}, "one seed has no interval")]
)
def test_too_few_shared_seeds_have_no_interval_and_a_reason(own, reason):
    found = paired_difference("NAS-LoRA", own, {0: 0.4, 1: 0.6})
    assert found.low is None and found.high is None and found.reason == reason
    assert reason in paired_table("LoRA", [found]).rows[0]


def test_methods_are_compared_with_lora_or_else_with_the_first():
    scores = {"conv-lora": {0: 0.5, 1: 0.6}, "lora": {0: 0.4, 1: 0.5}, "dora": {0: 0.4, 1: 0.4}}
    reference, found = paired_differences(scores, TITLES)
    assert reference == "lora" and [d.title for d in found] == ["Conv-LoRA", "DoRA"]
    del scores["lora"]
    assert paired_differences(scores, TITLES)[0] == "conv-lora"
    assert paired_differences({}, TITLES) == ("lora", [])


def test_the_forest_plot_shows_the_differences_that_have_an_interval(tmp_path):
    scores = {"lora": {0: 0.4, 1: 0.5}, "dora": {0: 0.5, 1: 0.55}, "vera": {2: 0.4}}
    reference, found = paired_differences(scores, TITLES)
    recipe = {"model": "vit_t", "data": "x"}
    table = Table(["Method"], [["LoRA"]])
    for differences, shown in ((found, True), (found[1:], False)):
        write_comparison(
            tmp_path / "report.html", config=recipe, tables={"T": table}, rows=[], notes=[],
            reference=TITLES[reference], differences=differences,
        )  # fmt: skip
        page = (tmp_path / "report.html").read_text()
        assert ("paired over the seeds" in page) == shown
