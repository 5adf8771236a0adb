from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_sparse.zoo import llama
from tests.sharded.processes import Mesh, forked, processes_of, whole


@pytest.mark.parametrize("mesh", [(2, 1), pytest.param((2, 2), marks=pytest.mark.slow)], ids=str)
def test_the_example_keeps_two_of_four(mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run() -> None:
        model = llama.main(["--data", str(mesh[0]), "--tensor", str(mesh[1]), "--steps", "12"])
        weights = {name: whole(value) for name, value in model.named_parameters() if "proj" in name}
        if model.global_rank == 0:
            torch.save(weights, tmp_path / "weights.pt")

    forked(processes_of(mesh), run)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert len(weights) == 14
    for weight in weights.values():
        assert int((weight != 0).unflatten(1, (-1, 4)).sum(2).max()) <= 2
