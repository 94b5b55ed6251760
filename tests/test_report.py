"""The report holds what the run measured, needs nothing beside it, and survives what is absent."""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from naslora.adapter.merging.report import LayerError
from naslora.report.figures import Drawing
from naslora.report.pictures import ERRORS, Merged, Panel, paint_errors
from naslora.report.run_report import write_report
from naslora.results import (
    ClassScores,
    Epoch,
    MergeResult,
    Mixture,
    OperationHistory,
    ParameterCounts,
    RunResult,
    SplitScores,
)
from naslora.training.example_images import choose
from naslora_kernels import OPERATIONS

HEADINGS = ["Scores", "Test images", "Merging", "What next", "Training", "Operations"]
HEADINGS += ["Parameters", "Time", "Configuration"]
LAYERS = [f"encoder.blocks.{index}.attn.qkv" for index in range(3)]
CONFIG = {
    "method": "nas-pc-lora",
    "adapter": {},
    "model": {"name": "vit_t"},
    "training": {"keep": "last"},
    "data": {"dataset": "folders", "root": "/data/he_nuclei"},
}
VOID = {"meta", "img", "wbr"}
HOSTILE = "<script>alert('1')</script>\"&$\\frac{"


class Reader(HTMLParser):
    """Checks that every element is closed in order; collects what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.images, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.images += [attrs] if tag in ("img", "svg") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def scores(dice):
    per_class = {"grey": ClassScores(dice - 0.01, 0.7), "white": ClassScores(0.8, 0.7)}
    return SplitScores(dice=dice, iou=dice / (2 - dice), accuracy=0.9512, per_class=per_class)


def layer_errors(error):
    return [LayerError(name, error, error / 10) for name in LAYERS]


def epoch(index, stage):
    arch_loss = 0.5 if stage == 2 else None
    losses, scores = (1.0 / (1 + index), arch_loss, 0.8), (0.5 + 0.1 * index, 0.4, 0.9)
    return Epoch(index, stage, 1.0, *losses, *scores, 1e-4, 2.0, 2.0, stage - 1.0, 0.5)


def panel(side=24, name="slice 7", dice=0.8765, **parts):
    labels = np.arange(side * side).reshape(side, side) % 3
    image = np.full((side, side, 3), 90, dtype=np.uint8)
    return Panel(name, image, labels.copy(), labels, dice, **parts)


CALIBRATION = [(40.0, 2.0, 6.0), *[(0.0, 0.0, 0.0)] * 13, (60.0, 57.0, 45.0)]
"""40 pixels of confidence 0.05, of which 0.15 are right, and 60 of 0.95, of which 0.75 are."""


@pytest.fixture
def run():
    uniform = [[1 / 8] * 8] * 3
    final = [[0.3] + [0.1] * 7] * 3
    return {
        "config": CONFIG,
        "result": RunResult(
            test=replace(scores(0.8421), image_dice=[0.9, None, 0.7214], calibration=CALIBRATION),
            val=scores(0.8532),
            kept_epoch=2,
            test_merged={"exact": scores(0.8421), "center": scores(0.8021)},
            merge={
                "exact": MergeResult(source="white noise", layers=layer_errors(2e-7)),
                "center": MergeResult(source="white noise", layers=layer_errors(0.45)),
            },
            trainable_parameters=4_123_456,
            parameters=ParameterCounts(
                frozen=5_000_000, decoder=4_000_000, adapter=123_432, architecture=24
            ),
            seconds=171.3,
            weights="shipped:vit_t",
            images={"train": 78, "arch": 20, "val": 21, "test": 24},
        ),
        "history": [epoch(0, 1), epoch(1, 1), epoch(2, 2), epoch(3, 2)],
        "operations": OperationHistory(
            list(OPERATIONS), LAYERS, [Mixture(-1, uniform), Mixture(3, final)]
        ),
        "panels": [
            panel(rank=1, merged={"center": Merged(np.zeros((24, 24), int), 0.25)}),
            panel(name="empty", dice=None),
        ],
        "class_names": ["background", "grey", "white"],
    }


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Writes a report and returns it. Plots take most of the time, and most tests need none."""
    draw = Drawing.svg

    def write(plots=False, **parts):
        monkeypatch.setattr(Drawing, "svg", draw if plots else lambda drawing: "<svg></svg>")
        path = tmp_path / "report.html"
        write_report(path, **parts)
        return path.read_text(encoding="utf-8")

    return write


def table_row(text, first):
    """The cells that follow the row heading ``first``."""
    cells = re.search(rf'<th scope="row">{re.escape(first)}</th>(.*?)</tr>', text).group(1)
    return re.findall(r"<td>(.*?)</td>", cells)


def assert_self_contained(text):
    assert not re.search(r"https?:|<script|<link|@import|<iframe", text)
    assert all(url.startswith("data:image/") for url in re.findall(r'\bsrc="([^"]*)', text))
    assert all(url.startswith("#") for url in re.findall(r'\bhref="([^"]*)', text))
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)", text))


def test_full_report(report, run, monkeypatch):
    # Pyplot would start a user's windows, and keep every figure in memory.
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    text = report(plots=True, **run)
    assert "matplotlib.pyplot" not in sys.modules
    page = Reader(text)
    assert_self_contained(text)
    assert re.findall(r"<h2>(.*?)</h2>", text) == HEADINGS
    for shown in (
        "<h1>nas-pc-lora on vit_t for he_nuclei</h1>",
        '<meta name="viewport"',
        "78 training, 20 architecture, 21 validation, 24 test",
        "2 min 51 s",
        "<small>worst image 0.7214</small>",
        "<dd>0.8021<small>test Dice, center</small>",  # exact leaves another module
        "kept: epoch 2, Dice 0.7000",
        "slice 7 · Dice 0.8765 · rank 1 of 24",
        "ECE 0.1600 over all pixels",  # 0.4 * 0.1 + 0.6 * 0.2
    ):
        assert shown in text
    center = ["0.8421", "0.8021", "−0.0400", "0.45", "0.45", "0.045", "0.045"]
    center += ["–", "white noise"]  # nothing was fitted, so nothing is held out
    assert table_row(text, "center") == center
    assert table_row(text, "exact")[:3] == ["0.8421", "0.8421", "+0.0000"]
    assert "naslora merge " in text and " --mode center --output " in text
    assert table_row(text, "Total trainable") == ["4,123,456"]
    # Times average over the epochs that had such steps.
    assert table_row(text, "Weight steps") == ["8.0", "2.00", "4"]
    assert table_row(text, "Architecture steps") == ["2.0", "1.00", "2"]
    assert table_row(text, "Everything else")[0] == "159.3"  # 171.3 - 8 - 2 - 2
    row = re.search(r'<th scope="row">1</th>(<td style.*?)</tr>', text).group(1)
    assert re.findall(r">(0\.\d+)<", row) == ["0.300"] + ["0.100"] * 7
    assert len(page.ids) == len(set(page.ids))
    # Two curves, two of the search, the lossy merge, bars of the images, and the confidence.
    # 4 pictures of each of the two panels; two before and after merging.
    assert len(page.images) == 7 + 8 + 2
    assert all(picture.get("alt") or picture.get("aria-label") for picture in page.images)
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--blue)" in drawings and not re.search(r"(?:fill|stroke): #", drawings)
    assert report(plots=True, **run) == text


def test_a_method_without_alpha_that_merges_nothing(report, run):
    result = replace(run["result"], merge={}, test_merged={})
    text = report(**{**run, "result": result, "operations": None, "panels": []})
    Reader(text)
    absent = {"Test images", "Merging", "Operations"}
    assert re.findall(r"<h2>(.*?)</h2>", text) == [h for h in HEADINGS if h not in absent]
    assert "naslora merge" not in text


def test_undefined_scores_are_shown_as_such(report, run):
    first = replace(run["history"][0], val_dice=None, val_iou=None, val_accuracy=None)
    result = replace(run["result"], test=SplitScores(per_class={"grey": ClassScores(None, None)}))
    text = report(plots=True, **{**run, "history": [first, *run["history"][1:]], "result": result})
    Reader(text)
    assert table_row(text, "Test")[0] == "–" and ">none</td>" not in text.lower()


def test_hostile_names_stay_text(report, run):
    run["config"] = {**CONFIG, "method": HOSTILE, HOSTILE: HOSTILE}
    run["class_names"] = ["background", HOSTILE, HOSTILE]
    run["panels"] = [panel(name=HOSTILE), panel(name="not UTF-8: \udcff")]
    run["operations"] = replace(
        run["operations"], operations=[HOSTILE, *OPERATIONS[1:]], layers=[HOSTILE, "a", "b"]
    )
    layers = [LayerError(HOSTILE, 0.5, 0.05), *layer_errors(0.5)[1:]]
    run["result"] = replace(
        run["result"],
        test=replace(scores(0.8421), per_class={HOSTILE: ClassScores(0.5, 0.5)}),
        merge={HOSTILE: MergeResult(source=HOSTILE, layers=layers)},
        test_merged={HOSTILE: scores(0.5)},
    )
    text = report(plots=True, **run)
    page = Reader(text)
    assert_self_contained(text)
    assert HOSTILE in "".join(page.text)
    assert "script" not in page.tags


def test_errors_are_painted_by_kind():
    truth = np.array([[0, 0, 1, 1, 2]])
    prediction = np.array([[0, 1, 1, 0, 1]])
    painted = paint_errors(np.full((1, 5, 3), 200, np.uint8), truth, prediction)
    missed, false_alarm, other = ERRORS.values()
    dim = (110, 110, 110)  # 0.55 * 200
    assert [tuple(pixel) for pixel in painted[0]] == [dim, false_alarm, dim, missed, other]


def test_ignored_pixels_are_no_errors(report, run):
    text = report(**run)
    assert "ignored or unknown" not in text
    run["panels"][0].truth[:12] = 255
    ignored = report(**run)
    assert "ignored or unknown" in ignored
    # Where truth and prediction agree or are ignored, both pictures are the same dim grey.
    pattern = r'src="([^"]*)"[^>]*alt="Errors of slice 7"'
    assert re.search(pattern, text)[1] == re.search(pattern, ignored)[1]


def test_merging_is_shown_where_it_changes_most(report, run):
    labels = run["panels"][0].prediction
    changes = [Merged(np.where(np.arange(24) < n, 0, labels), 0.5) for n in (2, 24, 9, 0)]
    run["panels"] = [
        panel(name=f"n{i}", merged={"exact": changes[-1], "center": change})
        for i, change in enumerate(changes)
    ]
    text = report(**run)
    shown = text[text.index("The images that merging changes most") :]
    assert re.findall(r"<figcaption>(n\d) · unchanged by exact<", shown) == ["n1", "n2"]
    share = (labels != 0).mean()
    assert f"center, Dice 0.5000, {share:.2%} changed" in shown
    run["panels"] = [panel(merged={"exact": changes[-1]})]
    assert "No pixel of the images above changes by merging." in report(**run)


# --- The images of the report: the worst and the best, and how merging changes them ---


@pytest.mark.parametrize(
    ("dice", "chosen"),
    [
        ([0.5, 0.1, 0.9, 0.3, 0.7, 0.2], [1, 5, 4, 2]),
        ([0.5, None, 0.9], [0, 2]),  # few images: all that have a Dice, the worst first
        ([0.9, 0.5, 0.7, 0.1], [3, 1, 2, 0]),
        ([None] * 7, [0, 2, 4, 6]),  # no foreground: spread over the split
        ([None, None], [0, 1]),
        ([0.5, 0.5, 0.5, 0.5, 0.5], [0, 1, 3, 4]),  # ties keep the order of the split
        ([], []),
    ],
)
def test_the_worst_and_the_best_are_chosen(dice, chosen):
    assert choose(dice, 4) == chosen
