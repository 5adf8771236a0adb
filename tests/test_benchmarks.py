"""The benchmarks run, and count what they say they count; how long anything takes is asserted nowhere."""

from __future__ import annotations

import gzip
import json
import struct
from typing import TYPE_CHECKING

import pytest

from benchmarks import (
    contenders,
    dst,
    files,
    guard,
    inference,
    limits,
    memory,
    mnist,
    overhead,
    scaling,
    sharded,
    sync,
    update,
    whole_runs,
)
from benchmarks.runs import read

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


@pytest.mark.slow
@pytest.mark.parametrize(
    "benchmark", [overhead, whole_runs, update, memory, sync, scaling, sharded, inference, limits, files, guard]
)
def test_the_smallest_case_runs_and_writes_its_figures(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.main(["--smallest", "--json", str(tmp_path / "figures.json")])
    content = json.loads((tmp_path / "figures.json").read_text())
    assert content["rows"]
    for row in content["rows"]:
        assert {"torch", "lightning", "cpus", "threads"} <= content["conditions"].keys() | row.keys()


def test_whose_updates_are_timed_are_also_weighed_and_timed_between_updates() -> None:
    assert update.METHODS.keys() <= contenders.METHODS.keys()


@pytest.fixture
def tiny_mnist(tmp_path: Path) -> Path:
    """A folder of the four files in the real format, with 128 training and 32 test images of constant grey."""
    for part, count in (("train", 128), ("t10k", 32)):
        labels = bytes(index % 10 for index in range(count))
        images = b"".join(bytes([25 * label]) * 784 for label in labels)
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images))
        header = struct.pack(">II", 2049, count)
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels))
    return tmp_path


def test_a_run_on_mnist_counts_its_own_zeros(tiny_mnist: Path) -> None:
    result = mnist.train(mnist.Run("lenet300", "fggp", 0.9, seed=0, epochs=10), tiny_mnist)
    assert sum(result["active"].values()) == 26_620
    assert result["weights"] == 266_200
    assert 0.0 <= result["accuracy"] <= 100.0


def test_finished_runs_are_read_back_and_cut_lines_are_not(tmp_path: Path) -> None:
    run = mnist.Run("lenet5", "gmp", 0.95, seed=1, epochs=20)
    line = json.dumps({"network": "lenet5", "method": "gmp", "sparsity": 0.95, "seed": 1, "epochs": 20})
    (tmp_path / "out.jsonl").write_text(line + "\n" + line[:30])
    assert list(read(tmp_path / "out.jsonl", mnist.Run)) == [run]


def test_a_run_of_dst_tells_each_epoch_what_is_left(tiny_mnist: Path) -> None:
    result = dst.train(dst.Run("lenet300", 0.01, seed=0, epochs=3), tiny_mnist)
    assert len(result["epochs_accuracy"]) == len(result["epochs_remaining"]) == 3
    assert result["epochs_remaining"][-1] < 99.0
    assert result["accuracy"] == result["epochs_accuracy"][-1]


def test_the_table_of_dst_puts_sparse_runs_beside_dense_ones(tmp_path: Path) -> None:
    common = {"network": "lstm-a", "cpu_seconds": 1.0}
    dense = {**common, "alpha": None, "epochs_accuracy": [98.0, 97.0], "epochs_remaining": [100.0, 100.0]}
    sparse = {**common, "alpha": 1e-4, "epochs_accuracy": [97.5, 96.5], "epochs_remaining": [5.0, 2.0]}
    table = dst.tabulate([{**dense, "seed": 0}, {**sparse, "seed": 0}, {**dense, "seed": 1}, {**sparse, "seed": 1}])
    rows = [[str(cell) for cell in column.cells] for column in table.columns]
    assert [column[1] for column in rows] == [
        "lstm-a", "alpha 0.0001", "2.00 ± 0.00", "96.50 ± 0.00", "-0.50", "97.50 ± 0.00 (5.00 % left)",
        "96.50 ± 0.00 (2.00 % left)", "2",
    ]  # fmt: skip
