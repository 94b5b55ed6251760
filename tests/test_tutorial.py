"""docs/tutorial.md is a page, a notebook and a test: its cells run in order, as printed."""

import shlex
from pathlib import Path

import jupytext
import pytest

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
CELLS = [cell for cell in jupytext.read(PAGE).cells if cell.cell_type == "code"]

pytestmark = pytest.mark.usefixtures("tiny_vit")


def test_the_tutorial_is_a_notebook():
    kinds = [cell.source.startswith("%%bash") for cell in CELLS]
    assert kinds == [False, True, False, False, True, True, True, False]


def test_every_cell_runs(naslora, tmp_path, monkeypatch, capsys):
    """With fewer epochs than printed, of a smaller encoder."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for cell in CELLS:
        if not cell.source.startswith("%%bash"):
            exec(cell.source, scope)
            continue
        for line in cell.source.replace("\\\n", "").splitlines()[1:]:
            shorter = line.replace("--epochs 12 --search-start 4", "--epochs 2 --search-start 1")
            program, *arguments = shlex.split(shorter)
            assert program == "naslora"
            result = naslora(*arguments)
            assert result.status == 0, result.err
    printed = capsys.readouterr().out
    assert "test Dice 0." in printed and "merged, calibrated: 0." in printed
    assert printed.count("conv") == 4  # a weight for each operation
    assert 90 < float(printed.splitlines()[-1].split("%")[0]) <= 100
    assert (tmp_path / "runs/dishes/report.html").exists()
    assert len(list((tmp_path / "onnx-masks").glob("*_mask.png"))) == 8
