from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_sparse import GMP
from lightning_sparse.report import CheckpointError, LayerSparsity, checkpoint_sparsity, sparsity_table
from tests.helpers import ToyModel, make_trainer


def half_zero(*shape: int) -> Tensor:
    values = torch.ones(shape)
    values.view(-1)[::2] = 0
    return values


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {"conv.weight": half_zero(4, 2, 3, 3), "conv.bias": torch.zeros(4), "steps": torch.zeros(2, 2).long()}


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "file.ckpt")
    return folder / "file.ckpt"


def test_a_checkpoint_of_ours_is_as_sparse_as_the_method_made_it(tmp_path: Path) -> None:
    method = GMP(sparsity=0.75)
    trainer = make_trainer(tmp_path, callbacks=[method])
    trainer.fit(ToyModel())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    layers = checkpoint_sparsity(tmp_path / "last.ckpt")
    assert {layer.name: layer.num_active for layer in layers} == {
        name: weight.num_active for name, weight in method.registry.items()
    }


def test_zeros_of_a_bare_state_dict_are_counted(tmp_path: Path, state: dict[str, Tensor]) -> None:
    assert checkpoint_sparsity(saved(tmp_path, state)) == [LayerSparsity("conv.weight", (4, 2, 3, 3), num_active=36)]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_state_dicts_are_found_under_the_usual_keys(tmp_path: Path, state: dict[str, Tensor], key: str) -> None:
    (layer,) = checkpoint_sparsity(saved(tmp_path, {"epoch": 3, key: state}))
    assert layer.name == "conv.weight"


def test_all_tensors_means_all(tmp_path: Path, state: dict[str, Tensor]) -> None:
    layers = checkpoint_sparsity(saved(tmp_path, state), all_tensors=True)
    assert [(layer.name, layer.num_active) for layer in layers] == [("conv.weight", 36), ("conv.bias", 0), ("steps", 0)]


def test_masks_of_torchs_own_pruning_are_applied(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    prune.l1_unstructured(network[0], "weight", amount=0.75)
    layers = checkpoint_sparsity(saved(tmp_path, network.state_dict()))
    assert {layer.name: layer.num_active for layer in layers} == {"0.weight": 8, "1.weight": 16}


@pytest.mark.parametrize(("num_active", "sparsity"), [(0, 1.0), (5, 0.75), (20, 0.0)])
def test_sparsity_is_the_fraction_of_zeros(num_active: int, sparsity: float) -> None:
    assert LayerSparsity("w", (4, 5), num_active).sparsity == sparsity


def test_an_empty_tensor_is_not_sparse() -> None:
    assert LayerSparsity("w", (0, 5), 0).sparsity == 0


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no file .*nowhere\.ckpt"):
        checkpoint_sparsity(tmp_path / "nowhere.ckpt")


def test_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder; give the file itself"):
        checkpoint_sparsity(tmp_path)


@pytest.mark.parametrize("size", [0, 10, 700, -40], ids=["empty", "start", "half", "without its end"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, state: dict[str, Tensor], size: int) -> None:
    path = saved(tmp_path, state)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"file\.ckpt is damaged or is not a checkpoint"):
        checkpoint_sparsity(path)


def test_a_file_that_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    path.write_text("trainer:\n  max_epochs: 1\n")
    with pytest.raises(CheckpointError, match="is damaged or is not a checkpoint"):
        checkpoint_sparsity(path)


def test_python_objects_are_refused_with_a_way_out(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": {"w": torch.eye(2)}, "model": nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match=r"could run code.*weights_only=False\)\['state_dict'\]"):
        checkpoint_sparsity(path)


@pytest.mark.parametrize("content", [{"epoch": 1}, [1, 2], torch.eye(2)])
def test_a_file_without_a_state_dict_is_an_error(tmp_path: Path, content: object) -> None:
    with pytest.raises(CheckpointError, match="holds no state dict"):
        checkpoint_sparsity(saved(tmp_path, content))


def test_a_state_dict_without_weights_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has 1 tensors.*--all"):
        checkpoint_sparsity(saved(tmp_path, {"bias": torch.zeros(3)}))


def test_names_in_brackets_are_shown_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(sparsity_table([LayerSparsity("a[b]", (2, 2), 2)], title="run[1].ckpt"))
    shown = console.export_text()
    assert "run[1].ckpt" in shown
    assert "a[b]" in shown


def test_the_table_ends_with_the_total() -> None:
    table = sparsity_table([LayerSparsity("a", (10, 100), 250), LayerSparsity("b", (10, 100), 150)])
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(table)
    total = console.export_text().splitlines()[-2]
    assert total.replace("│", " ").split() == ["total", "2,000", "400", "80.00%"]
