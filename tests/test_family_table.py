"""The table in docs/families.md is what its checks find."""

import re
from pathlib import Path

import pytest

from bench.families import HEAD, HOSTS, row

PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


STATED = {cells(line)[0]: cells(line) for line in PAGE.splitlines() if line.startswith("| ")}


def test_the_table_has_all_families():
    assert STATED["family"] == list(HEAD)
    assert {host.title for host in HOSTS} <= STATED.keys()


QUICK = ("SAM 2, 2.1", "Sam2Model", "DINOv3 (")


@pytest.mark.parametrize(
    "host",
    [
        pytest.param(host, marks=() if host.title.startswith(QUICK) else pytest.mark.campaign)
        for host in HOSTS
    ],
    ids=lambda host: host.title,
)
def test_a_row_is_what_its_checks_find(host):
    assert STATED[host.title] == row(host)
