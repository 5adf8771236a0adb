"""docs/measured.md is what ``make figures`` writes from benchmarks/results."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import figures

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if "python -m" in line
]


def test_the_page_is_what_the_results_say() -> None:
    assert figures.page() == PAGE, "docs/measured.md is out of date: run make figures"


def test_every_table_is_shown() -> None:
    assert set(figures.MARKER.findall(figures.TEMPLATE.read_text(encoding="utf-8"))) == set(figures.TABLES)


def test_every_table_but_the_summary_says_what_it_was_measured_with() -> None:
    for name, table in figures.TABLES.items():
        assert name == "goals" or re.search(r"\n\nMeasured on .+, with Python [\d.]+, torch .+\.$", table()), name


def test_the_figures_of_the_readme_are_measured_ones() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## What it gives\n(.*?)^## ", readme, re.MULTILINE | re.DOTALL)
    shown = re.findall(r"\d+\.\d+", section)
    assert len(shown) > 10
    assert [number for number in shown if number not in PAGE] == []


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_there(command: list[str]) -> None:
    assert importlib.util.find_spec(command[command.index("-m") + 1])


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("-0.00", "0.00"),
        ("+0.00", "0.00"),
        ("-0.25", "−0.25"),
        ("0.900000", "0.9"),
        ("0.000000", "0"),
        ("98.30", "98.30"),
    ],
)
def test_numbers_are_written_as_one_reads_them(written: str, read: str) -> None:
    assert figures.number(written) == read
