"""docs/measured.md is what ``make figures`` writes from benchmarks/results."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import pytest

from benchmarks import figures
from lightning_sparse.methods.catalog import all_methods

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
NETWORKS = ("lenet5", "lenet300")
ANEW = {"DST", "SRSTE", "STR", "TopKAST", "Feather"}  # they choose their masks at each step
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


def mean_accuracy(network: str, method: str, sparsity: float) -> str:
    keys = {"network": network, "method": method, "sparsity": sparsity}
    return f"{mean(row['accuracy'] for row in figures.lines_of('mnist.jsonl') if keys.items() <= row.items()):.2f} %"


def size(file: str, sparsity: float) -> str:
    rows = figures.content_of("files.json")[0]
    return next(f"{row['MB']:.2f} MB" for row in rows if (row["file"], row["sparsity"]) == (file, sparsity))


def extent(values: Iterable[float], digits: int) -> str:
    least, *_, most = sorted(values)
    return f"{least:.{digits}f} to {most:.{digits}f}"


def steps_of(network: str, *, anew: bool) -> list[float]:
    """The steps under SGD of the package's methods: those that choose masks at each step, or the others."""
    names = {method.__name__ for method in all_methods()}
    rows = [row for row in figures.content_of("steps.json")[0] if row["network"].startswith(network)]
    return [
        row["over dense (quartiles)"]["value"]
        for row in rows
        if row["optimizer"] == "SGD" and row["contender"] in names and (row["contender"] in ANEW) is anew
    ]


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    lenet5, lenet300 = ([mean_accuracy(each, *of) for of in (("fggp", 0.95), ("dense", 0.0))] for each in NETWORKS)
    accuracy = "`FGGP` at 95 % zeros reaches {} with LeNet-5 (dense: {}) and {} with LeNet-300-100 (dense: {})"
    assert accuracy.format(*lenet5, *lenet300) in readme
    (command,) = re.findall(r"benchmarks\.inference .*?--networks ([\w \\-]+?) *#", readme)
    shown = set(command.replace("\\", "").split())
    speeds = [
        row
        for row in figures.lines_of("inference.jsonl")
        if (row.get("batch"), row.get("threads"), row.get("sparsity")) == (1, 1, 0.95) and row["network"] in shown
    ]
    assert {row["network"] for row in speeds} == shown
    least, most = extent((row["over torch"] for row in speeds), 1).split(" to ")
    assert f"run {least} (a ViT) to {most} (an MLP) times as fast as in dense torch" in readme
    best = extent((row["over best fp32"] for row in speeds), 1)
    assert f"{best} times as fast as in the best dense engine" in readme
    sizes = size("torch.save", 0.95), size("save_sparse", 0.95), size("save_sparse", 0.999)
    assert "shrinks from {} to {} at 95 % zeros, and to {} at 99.9 %".format(*sizes) in readme
    lenet = extent(steps_of("LeNet", anew=False), 2), extent(steps_of("LeNet", anew=True), 1)
    assert f"{lenet[0]} times as long (two runs)" in readme
    resnet = extent(steps_of("ResNet-18", anew=True), 2)
    assert f"{resnet} times as long for ResNet-18, and {lenet[1]} times for LeNet-300-100" in readme
    rows = [row for row in figures.content_of("whole_runs.json")[0] if row["steps"] == 300 and row["goal"]]
    runs = extent((float(row["whole run over dense"].split()[0]) for row in rows), 2)
    assert f"take {runs} times as long" in readme


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
