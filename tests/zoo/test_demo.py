from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from lightning_sparse.zoo import demo

EPOCHS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    console = Console(width=100, record=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "Console", lambda: console)
        assert demo.main(folder, epochs=EPOCHS) == 0
    return console.export_text()


def test_the_demo_shows_exactly_95_percent(output: str) -> None:
    (row,) = [line.replace("│", " ").split() for line in output.splitlines() if "sparse network" in line]
    assert row[2:5] == ["50,200", "2,510", "95.00%"]


def test_the_demo_draws_a_picture(folder: Path, output: str) -> None:
    picture = folder / "training.png"
    assert str(picture) in output.replace("\n", "")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def test_the_demo_says_how_to_start_tensorboard(folder: Path, output: str) -> None:
    command = output.replace("\n", "").split("The curves:")[1].split()
    assert command[0].endswith("tensorboard")
    assert command[1:] == ["--logdir", str(folder / "logs")]


def test_the_log_holds_the_curves_of_both_runs(folder: Path, output: str) -> None:
    dense, sparse = (demo.read_curves(str(folder / "logs" / name / "version_0")) for name in ("dense", "fggp"))
    assert len(dense["val_accuracy"].values) == EPOCHS
    assert sparse["sparsity"].values[0] == 0
    assert sparse["sparsity"].values[-1] == pytest.approx(0.95)
