from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from rich.console import Console

from lightning_sparse import load_sparse
from lightning_sparse.execution import AccelerationReport
from lightning_sparse.execution.kernels import available_kernels
from lightning_sparse.zoo import demo
from lightning_sparse.zoo.networks import LeNet300100

EPOCHS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def run(folder: Path, epochs: int) -> str:
    console = Console(width=100, record=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "Console", lambda: console)
        assert demo.main(folder, epochs=epochs) == 0
    return console.export_text()


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    return run(folder, EPOCHS)


def cells(output: str, first: str) -> list[str]:
    """The cells of the last row that begins so."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines()]
    return [row for row in rows if row and row[0] == first][-1]


@pytest.fixture
def no_llvmlite(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "llvmlite" else find_spec(name, *more)
    )


def test_the_demo_shows_exactly_95_percent(output: str) -> None:
    row = next(line.replace("│", " ").split() for line in output.splitlines() if "sparse network" in line)
    assert row[2:5] == ["50,200", "2,510", "95.00%"]


def test_the_demo_draws_a_picture(folder: Path, output: str) -> None:
    picture = folder / "training.png"
    assert str(picture) in output.replace("\n", "")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def test_the_demo_says_how_to_start_tensorboard(folder: Path, output: str) -> None:
    command = output.split("What the zeros bring:")[0].replace("\n", "").split("The curves:")[1].split()
    assert command[0].endswith("tensorboard")
    assert command[1:] == ["--logdir", str(folder / "logs")]


def test_the_log_holds_the_curves_of_both_runs(folder: Path, output: str) -> None:
    dense, sparse = (demo.read_curves(str(folder / "logs" / name / "version_0")) for name in ("dense", "fggp"))
    assert len(dense["val_accuracy"].values) == EPOCHS
    assert sparse["sparsity"].values[0] == 0
    assert sparse["sparsity"].values[-1] == pytest.approx(0.95)


def test_the_demo_ends_with_the_size_of_both_files(folder: Path, output: str) -> None:
    dense, sparse = (cells(output, f"{name} network") for name in ("dense", "sparse"))
    assert dense[2] == f"{(folder / 'dense.pt').stat().st_size / 1000:.1f} kB"
    assert sparse[2] == f"{(folder / 'fggp.sparse').stat().st_size / 1000:.1f} kB"
    assert float(sparse[2].split()[0]) < float(dense[2].split()[0]) / 8


def test_the_sparse_file_of_the_demo_has_its_weights(folder: Path, output: str) -> None:
    network = LeNet300100(in_features=64)
    load_sparse(folder / "fggp.sparse", into=network)
    weights = [network.get_parameter(f"{layer}.weight") for layer in ("fc1", "fc2", "fc3")]
    assert sum(int(weight.count_nonzero()) for weight in weights) == 2_510


def test_the_demo_ends_with_the_time_of_both_networks(output: str) -> None:
    assert "It gives the same answer as before on 360 of 360 unseen images" in " ".join(output.split())
    assert cells(output, "")[3].endswith("times as fast") or "not faster here" in cells(output, "")[3]


def test_times_are_compared_in_words() -> None:
    report = AccelerationReport([], "llvm", 1, [(64, 64)], dense_seconds=170e-6, fast_seconds=20e-6)
    assert demo.times(report) == ("170 µs", "20 µs", "8.5 times as fast")
    assert demo.times(AccelerationReport([], "llvm", 1, [(64, 64)])) == ("", "", "not faster here")


@pytest.mark.usefixtures("no_llvmlite")
def test_without_llvmlite_the_demo_says_what_it_would_bring(tmp_path: Path) -> None:
    assert available_kernels() == ("torch_csr",)
    output = run(tmp_path, epochs=1)
    assert cells(output, "sparse network")[2].endswith("kB")
    assert "pip install llvmlite" in output


@pytest.mark.skipif("llvm" not in available_kernels(), reason="llvmlite is not installed")
def test_with_llvmlite_the_demo_says_nothing_of_it(output: str) -> None:
    assert "llvmlite" not in output
