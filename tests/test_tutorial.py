"""docs/tutorial.md is a page, a notebook and a test: its cells run in order, as printed."""

import shlex
from pathlib import Path

import jupytext
import pytest
from conftest import succeed

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
CELLS = [cell for cell in jupytext.read(PAGE).cells if cell.cell_type == "code"]

pytestmark = pytest.mark.usefixtures("tiny_sam")


# What is printed takes minutes: fewer and smaller images, one epoch, beside the smaller model.
SHORTER = {
    '"train": 24, "val": 8, "test": 8': '"train": 8, "val": 4, "test": 4',
    "--epochs 12": "--epochs 1",
    "--image-size 160": "--image-size 64",
    "\\\n": "",
}


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    assert all(printed in PAGE.read_text() for printed in SHORTER)
    for cell in CELLS:
        source = cell.source
        for printed, shorter in SHORTER.items():
            source = source.replace(printed, shorter)
        if not source.startswith("%%bash"):
            exec(source, scope)
            continue
        for line in source.splitlines()[1:]:
            program, *arguments = shlex.split(line)
            assert program == "naslora"
            succeed(*arguments)
    out = capsys.readouterr().out
    assert "test Dice 0." in out and "merged, calibrated: 0." in out
    assert out.count("conv") == 4  # a weight for each operation
    assert 90 < float(out.splitlines()[-1].split("%")[0]) <= 100
    assert (tmp_path / "runs/dishes/report.html").exists()
    assert len(list((tmp_path / "onnx-masks").glob("*_mask.png"))) == 4
