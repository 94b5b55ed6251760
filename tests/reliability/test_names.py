"""Names that act: formulas in a spreadsheet, escape codes of a terminal, markup."""

from dataclasses import dataclass

import pytest
from conftest import succeed

from naslora.errors import one_line
from naslora.records import as_csv, read_rows, write_rows
from naslora.report.tables import Table, markdown_table
from reliability.conftest import TRAIN

ACTS = ["=1+1", "+1", "-x", "@SUM(A1)", "\t=1", "\r=1", "'", "'=1", "''"]
HARMLESS = ["a", "a=1", "-", "it's", "1,5", "\ufeff=1"]


@dataclass
class Named:
    name: str
    number: float = -1.5


@pytest.mark.parametrize("name", ACTS + HARMLESS)
def test_no_cell_is_a_formula_and_all_read_back(tmp_path, name):
    write_rows(tmp_path / "a.csv", [Named(name)])
    assert read_rows(tmp_path / "a.csv", Named) == [Named(name)]
    cell = as_csv([{name: name}]).splitlines()[0].lstrip('"')
    assert cell.startswith("'") == (name in ACTS)
    assert as_csv([{"number": -1.5}]) == "number\n-1.5\n"


LINES = {
    "\x1b]0;title\x07a\x1b[31m": r"\x1b]0;title\x07a\x1b[31m",
    "a\nnaslora: error: b\r\n": "a naslora: error: b",
    "\u202egnp.exe": r"\u202egnp.exe",
    "\udcff.png": r"\udcff.png",
    "\x9b31m": r"\x9b31m",
    "[red]é漢[/]": "[red]é漢[/]",
}


@pytest.mark.parametrize("text", LINES)
def test_messages_are_one_line_that_can_be_printed(text):
    assert one_line(text) == LINES[text]


def test_paths_and_class_names_are_no_markup(clean_world, tmp_path, tiny_sam):
    output = tmp_path / "run[" / "]:smile:[red]"
    names = ("--num-classes", 2, "--class-names", "[/]\x1b[31m", "--metrics", "class_iou")
    options = (*names, "--epochs", 1, "--search-start", 0)
    command = ("train", "--data", clean_world / "data", *TRAIN, *options)
    result = succeed(*command, "--output", output)
    assert "run[/]:smile:[red]/report.html" in result.out.replace("\n", "")
    assert r"[/]\x1b[31m" in result.out and "\x1b[31m" not in result.out + result.err


def test_a_cell_of_a_table_stays_one():
    table = Table(["a|b"], [["c|\nd"]])
    assert markdown_table(table) == "| a\\|b |\n| --- |\n| c\\| d |"
