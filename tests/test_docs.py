"""The table of pitfalls in `docs/methods.md` has all of them, each with tests that exist."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT

HEAD = "## Pitfalls, and what keeps us from them"
SECTION = (ROOT / "docs/methods.md").read_text().partition(HEAD)[2].partition("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| \d.*", SECTION, re.M)]


def test_all_pitfalls_are_there_in_order():
    assert [row[0] for row in ROWS] == [str(number) for number in range(1, 28)]
    assert all(len(row) == 4 and all(row) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_pitfalls_tests_exist(row):
    named = re.findall(r"`([\w/]+)::(\w+)`", row[3])
    assert named and row[3].count("`") == 2 * len(named)
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / f"{file}.py").read_text(), re.MULTILINE), name
