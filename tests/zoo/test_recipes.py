from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

import lightning_sparse
from lightning_sparse import SparsityMonitor
from lightning_sparse.cli import SparseCLI
from lightning_sparse.methods import SparseMethod
from lightning_sparse.zoo import Classifier, MNISTDataModule, list_recipes, recipe_path
from tests.zoo.idx_files import write_mnist

EVERY_RECIPE = pytest.mark.parametrize("name", list_recipes())
SPARSE_RECIPES = pytest.mark.parametrize("name", [name for name in list_recipes() if not name.endswith("dense")])
TINY = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=8",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parsed(name: str, *options: str) -> SparseCLI:
    return SparseCLI(["--config", name, *options, *TINY], run=False)


def methods_of(cli: SparseCLI) -> list[SparseMethod]:
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, SparseMethod)]  # pyright: ignore[reportAttributeAccessIssue]


def test_there_is_a_recipe_for_each_network_and_method() -> None:
    pairs = product(("lenet300", "lenet5"), ("dense", "gmp", "fggp"))
    assert set(list_recipes()) == {"digits-fggp", *map("-".join, pairs)}


@EVERY_RECIPE
def test_a_recipe_makes_the_method_that_its_name_says(name: str) -> None:
    expected = name.split("-")[1].upper()
    assert [type(method).__name__ for method in methods_of(parsed(name))] == ([] if expected == "DENSE" else [expected])


@SPARSE_RECIPES
def test_the_last_epoch_of_a_recipe_is_95_percent_sparse(name: str) -> None:
    (method,) = methods_of(parsed(name))
    assert vars(method)["sparsity"](1.0) == pytest.approx(0.95)


@SPARSE_RECIPES
def test_sparsity_can_be_set_on_the_command_line(name: str) -> None:
    (method,) = methods_of(parsed(name, "--trainer.callbacks.sparsity=0.5"))
    assert vars(method)["sparsity"](1.0) == pytest.approx(0.5)


@EVERY_RECIPE
def test_a_recipe_logs_under_its_own_name(name: str) -> None:
    logger = parsed(name).trainer.logger
    assert logger is not None
    assert logger.name == name


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("lenet")])
def test_mnist_recipes_train_as_the_code_of_dst_does(name: str) -> None:
    cli = SparseCLI(["--config", name], run=False)
    assert isinstance(cli.model, Classifier)
    assert isinstance(cli.datamodule, MNISTDataModule)
    optimizer = cli.model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    settings = [optimizer.defaults[key] for key in ("lr", "momentum", "weight_decay", "nesterov")]
    assert [cli.trainer.max_epochs, cli.datamodule.batch_size, *settings] == [20, 64, 0.01, 0.9, 0, False]


@SPARSE_RECIPES
def test_sparse_recipes_log_their_sparsity(name: str) -> None:
    cli = parsed(name)
    assert any(isinstance(callback, SparsityMonitor) for callback in cli.trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["digits-fggp", "lenet300-gmp", "lenet5-fggp"])
def test_a_recipe_trains_to_its_sparsity(name: str, tmp_path: Path) -> None:
    write_mnist(tmp_path / "data")
    cli = parsed(name, "--data.batch_size=8")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    (method,) = methods_of(cli)
    assert method.registry.num_active == int(0.05 * method.registry.numel + 1e-9)


def test_an_unknown_recipe_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no recipe named 'lenet'\. The recipes are digits-fggp, lenet300-dense"):
        recipe_path("lenet")


@EVERY_RECIPE
def test_a_recipe_is_a_file_of_the_package(name: str) -> None:
    assert recipe_path(name).is_file()
    assert Path(lightning_sparse.__file__).parent in recipe_path(name).parents
