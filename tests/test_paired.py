"""Paired differences between methods, and their place in the tables and the report."""

import math

import pytest

from naslora.methods import METHODS
from naslora.report.comparison_report import write_comparison
from naslora.report.tables import Table
from naslora.study.paired import (
    error_over_images,
    paired_difference,
    paired_differences,
    paired_table,
)

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


def test_the_error_over_images_averages_the_seeds_first():
    # Of four images one is undefined in a run; the others differ by 0.1, 0.3 and 0.2 in the mean.
    own = {0: [0.6, 0.7, 0.5, 0.9], 1: [0.6, 0.9, 0.9, None], 7: [0.0] * 4}
    other = {0: [0.5, 0.5, 0.5, 0.1], 1: [0.5, 0.5, 0.5, 0.5]}
    assert error_over_images(own, other) == pytest.approx(0.1 / math.sqrt(3))


@pytest.mark.parametrize(
    "own, other",
    [
        ({}, {}),
        ({0: [0.1, 0.2]}, {1: [0.1, 0.2]}),  # no shared seed
        ({0: [0.1, 0.2]}, {0: [0.1, 0.2, 0.3]}),  # other test images
        ({0: [0.1, 0.2]}, {0: [None, 0.2]}),  # one image is left
        ({0: []}, {0: []}),
    ],
)
def test_no_error_over_images(own, other):
    assert error_over_images(own, other) is None


def test_the_table_has_the_error_over_images_where_it_is_known():
    scores = {"lora": {0: 0.4, 1: 0.5}, "dora": {0: 0.5, 1: 0.55}, "vera": {0: 0.4, 1: 0.5}}
    images = {"lora": {0: [0.4, 0.4]}, "dora": {0: [0.5, 0.7]}}
    table = paired_table("LoRA", paired_differences(scores, TITLES, images)[1])
    assert table.head[3] == "± over images"
    assert [row[3] for row in table.rows] == ["0.1000", "–"]
    plain = paired_table("LoRA", paired_differences(scores, TITLES)[1])
    assert plain.head == [name for name in table.head if name != "± over images"]


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
