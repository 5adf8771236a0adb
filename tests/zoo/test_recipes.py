from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import MultiStepLR

import lightning_sparse
from lightning_sparse import ACDC, DST, EAST, DyReLUPhasing, SparsityMonitor, WeightSharing
from lightning_sparse.cli import SparseCLI
from lightning_sparse.functional.masks import row_counts
from lightning_sparse.masks import select_weights
from lightning_sparse.methods import SparseMethod
from lightning_sparse.methods.catalog import all_methods
from lightning_sparse.methods.growing import GrowingMethod
from lightning_sparse.methods.scored import ScoredMethod
from lightning_sparse.schedules import Cyclic, as_schedule
from lightning_sparse.zoo import CIFAR10DataModule, Classifier, MNISTDataModule, list_recipes, recipe_path
from lightning_sparse.zoo.data import InMemoryDataModule
from tests.zoo.cifar_files import expect_small_files, write_binary
from tests.zoo.idx_files import write_mnist

METHODS_OF = {
    "digits": ("fggp",),
    **dict.fromkeys(("lenet300", "lenet5"), ("dense", "gmp", "fggp", "dst")),
    **dict.fromkeys(("lstm-a", "lstm-b", "vgg16", "wrn16-8", "wrn28-8"), ("dense", "dst")),
    "wrn22-2": ("srigl",),
    "wrn28-2": ("dsr", "snfs"),
    "resnet20": ("dense", "set", "rigl", "east", "feather", "acdc"),
    "resnet34": ("dense", "set", "rigl", "east"),
    "resnet50": ("dense", "set", "rigl", "east", "gmp", "fggp", "granet", "snip", "grasp", "synflow"),
    "vgg19": ("dense", "gmp", "fggp", "granet", "snip", "grasp", "synflow", "mest"),
}
NAMES = {f"{method}-{network}" for network, methods in METHODS_OF.items() for method in methods}
TINY = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=8",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
]
NARROW = "--model.network.width=4"
NARROW_OF = {"vgg": NARROW, "resnet": NARROW, "wrn": "--model.network.widen_factor=1"}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parsed(name: str, *options: str) -> SparseCLI:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lightning-sparse"])  # LightningCLI warns of a command line beside its arguments
        return SparseCLI(["--config", name, "--trainer.accelerator=cpu", *options], run=False)


def narrow(name: str) -> list[str]:
    """The option that makes a recipe's network narrow, if it is for CIFAR-10."""
    return [option for network, option in NARROW_OF.items() if f"-{network}" in name]


def callbacks_of(cli: SparseCLI) -> list[object]:
    return [*cli.trainer.callbacks]  # pyright: ignore[reportAttributeAccessIssue]


def methods_of(cli: SparseCLI) -> list[SparseMethod]:
    return [callback for callback in callbacks_of(cli) if isinstance(callback, SparseMethod)]


def optimizer_of(cli: SparseCLI) -> tuple[torch.optim.Optimizer, dict[int, float]]:
    """The optimizer that a recipe makes, and the factors of its learning rate by epoch."""
    made = cli.model.configure_optimizers()
    if isinstance(made, torch.optim.Optimizer):
        return made, {}
    assert isinstance(made, dict)
    scheduler = made["lr_scheduler"]["scheduler"]  # pyright: ignore[reportTypedDictNotRequiredAccess,reportIndexIssue,reportArgumentType,reportCallIssue]
    assert isinstance(scheduler, MultiStepLR)
    return made["optimizer"], {epoch: scheduler.gamma**times for epoch, times in scheduler.milestones.items()}


def settings_of(cli: SparseCLI, *keys: str) -> list[object]:
    """Epochs, batch size, and settings of the optimizer."""
    assert isinstance(cli.datamodule, InMemoryDataModule)
    optimizer, _ = optimizer_of(cli)
    return [cli.trainer.max_epochs, cli.datamodule.batch_size, *(optimizer.defaults[key] for key in keys)]


def test_there_is_a_recipe_for_each_method_that_a_paper_has_on_a_network() -> None:
    assert set(list_recipes()) == NAMES


@pytest.fixture(scope="module", params=list_recipes())
def cli(request: pytest.FixtureRequest) -> SparseCLI:
    """Each recipe in turn, parsed once for all tests of the class, with a narrow network to save time."""
    return parsed(request.param, *narrow(request.param))


@pytest.fixture(scope="module")
def name(cli: SparseCLI) -> str:
    return Path(str(cli.config["config"][0])).stem


class TestRecipe:
    def test_makes_the_method_that_its_name_says(self, cli: SparseCLI, name: str) -> None:
        prefix = name.partition("-")[0]
        expected = (
            [] if prefix == "dense" else [method for method in all_methods() if method.__name__.lower() == prefix]
        )
        assert [type(method) for method in methods_of(cli)] == expected
        assert expected or prefix == "dense"

    def test_gives_its_method_last_and_logs_what_it_does(self, cli: SparseCLI) -> None:
        given = [callback["class_path"].rpartition(".")[2] for callback in cli.config["trainer"]["callbacks"] or []]
        expected = [type(method).__name__ for method in methods_of(cli)]
        assert given == (["SparsityMonitor", *expected] if expected else [])
        assert any(isinstance(callback, SparsityMonitor) for callback in callbacks_of(cli)) == bool(expected)

    def test_logs_under_its_own_name(self, cli: SparseCLI, name: str) -> None:
        assert cli.trainer.logger is not None
        assert cli.trainer.logger.name == name

    def test_leaves_dense_what_is_there(self, cli: SparseCLI) -> None:
        for method in methods_of(cli):
            dense = select_weights(cli.model, include=method.include, exclude=method.exclude)
            assert len(select_weights(cli.model).masked) - len(dense.masked) == len(method.exclude or ())

    def test_names_itself_and_its_source_in_the_header(self, name: str) -> None:
        header = recipe_path(name).read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
        assert all(line.startswith("#") for line in header)
        assert any(f"lightning-sparse fit --config {name} " in line for line in header)
        years = ("2016", "2019", "2020", "2021", "2023", "2024", "2025")
        assert any(year in " ".join(header) for year in years) or name.endswith("digits")

    def test_is_a_file_of_the_package(self, name: str) -> None:
        assert Path(lightning_sparse.__file__).parent in recipe_path(name).parents


@pytest.mark.parametrize("name", ["fggp-digits", "gmp-lenet300", "set-resnet20", "rigl-resnet20"])
def test_sparsity_can_be_set_on_the_command_line(name: str) -> None:
    (method,) = methods_of(parsed(name, "--trainer.callbacks.sparsity=0.5"))
    assert isinstance(method, (ScoredMethod, GrowingMethod))
    assert as_schedule(method.sparsity)(1.0) == 0.5


def test_a_recipe_of_dst_can_be_given_a_sparsity_instead_of_its_alpha() -> None:
    cli = parsed("dst-lenet300", "--trainer.callbacks.alpha=null", "--trainer.callbacks.sparsity=0.95")
    (method,) = methods_of(cli)
    assert isinstance(method, DST)
    assert method.sparsity == 0.95


@pytest.mark.parametrize("name", sorted(name for name in NAMES if "lenet" in name))
def test_the_lenets_train_as_the_code_of_dst_does(name: str) -> None:
    cli = parsed(name)
    assert isinstance(cli.datamodule, MNISTDataModule)
    assert settings_of(cli, "lr", "momentum", "weight_decay", "nesterov") == [20, 64, 0.01, 0.9, 0, False]
    assert optimizer_of(cli)[1] == {}


@pytest.mark.parametrize("name", ["-".join(pair) for pair in product(("dense", "dst"), ("lstm-a", "lstm-b"))])
def test_the_lstms_train_as_the_code_of_dst_does(name: str) -> None:
    cli = parsed(name)
    assert isinstance(cli.model, Classifier)
    assert isinstance(optimizer_of(cli)[0], torch.optim.Adam)
    assert settings_of(cli, "lr", "weight_decay") == [20, 100, 1e-3, 0]
    assert cli.model.network.get_submodule("classifier").in_features == {"a": 128, "b": 256}[name[-1]]


# Epochs, batch size, learning rate, momentum, weight decay, Nesterov; where the learning rate falls; to what
# fraction; clipping.
CIFAR = {
    "acdc-resnet20": ([200, 128, 0.1, 0.9, 5e-4, False], [65, 125, 185], 0.1, None),
    **dict.fromkeys(("dsr-wrn28-2", "snfs-wrn28-2"), ([200, 100, 0.1, 0.9, 5e-4, True], [60, 120, 160], 0.2, None)),
    "srigl-wrn22-2": ([250, 128, 0.1, 0.9, 5e-4, False], [77, 154, 231], 0.2, None),
    "dense-vgg16": ([160, 64, 0.1, 0.9, 1e-4, False], [80, 120], 0.1, None),
    "dst-wrn16-8": ([160, 64, 0.1, 0.9, 1e-4, False], [80, 120], 0.1, None),
    "dense-resnet20": ([164, 128, 0.1, 0.9, 1e-4, False], [82, 123], 0.1, None),
    "rigl-resnet34": ([250, 128, 0.1, 0.9, 1e-4, True], [125, 187], 0.1, 1.0),
    "dense-resnet50": ([160, 64, 0.1, 0.9, 5e-4, True], [80, 120], 0.1, None),
    "gmp-vgg19": ([160, 64, 0.1, 0.9, 5e-4, True], [80, 120], 0.1, None),
    **dict.fromkeys(
        ("granet-vgg19", "snip-resnet50", "grasp-vgg19", "synflow-resnet50"),
        ([160, 128, 0.1, 0.9, 5e-4, True], [80, 120], 0.1, None),
    ),
}


@pytest.mark.parametrize("name", CIFAR)
def test_networks_for_cifar_train_as_their_papers_state(name: str) -> None:
    cli = parsed(name, *narrow(name))
    settings, milestones, factor, clipping = CIFAR[name]
    assert isinstance(cli.datamodule, CIFAR10DataModule)
    assert cli.datamodule.augment
    assert settings_of(cli, "lr", "momentum", "weight_decay", "nesterov") == settings
    assert optimizer_of(cli)[1] == dict.fromkeys(milestones, factor)
    assert cli.trainer.gradient_clip_val == clipping


@pytest.mark.parametrize(
    ("name", "alpha"), [("dst-lenet300", 1e-3), ("dst-lenet5", 1e-3), ("dst-lstm-a", 7e-4), ("dst-wrn28-8", 5e-6)]
)
def test_recipes_of_dst_have_the_alpha_that_ends_near_the_published_row(name: str, alpha: float) -> None:
    (method,) = methods_of(parsed(name, *narrow(name)))
    assert isinstance(method, DST)
    assert method.alpha == alpha


@pytest.mark.parametrize("name", ["east-resnet34", "east-resnet50"])
def test_recipes_of_east_have_the_settings_of_its_code(name: str) -> None:
    cli = parsed(name, *narrow(name))
    (method,) = methods_of(cli)
    assert isinstance(method, EAST)
    assert method.sparsity == Cyclic(0.999, cycles=2, length=0.2, multiplier=3.0)
    assert [method.times.every, method.times.before and method.times.before.every] == [4000, 100]
    assert cli.trainer.gradient_clip_val == 1.0
    assert [type(part) for part in method.companions()] == [WeightSharing, DyReLUPhasing]


@pytest.mark.parametrize(("name", "every"), [("rigl-resnet34", 4000), ("set-resnet34", 1500)])
def test_what_east_compares_with_is_set_as_itop_has_it(name: str, every: int) -> None:
    (method,) = methods_of(parsed(name, *narrow(name)))
    assert isinstance(method, GrowingMethod)
    assert as_schedule(method.sparsity)(1.0) == 0.999
    fraction = as_schedule(method.drop_fraction)
    assert [fraction(0.0), fraction(1.0)] == [0.5, 0.005]
    assert [method.times.every, method.times.stop, method.replaces_step] == [every, 1.0, False]


# With one sparsity for all layers, a network as narrow as these has too few weights in its shortcuts.
BY_ERK = ["--trainer.callbacks.sparsity=0.95", "--trainer.callbacks.allocation=erk"]
TRAINED = {
    "fggp-digits": [],
    "gmp-lenet300": [],
    "fggp-lenet5": [],
    # A layer of a network as narrow as these may lose all of its weights; whether one does is a matter of rounding.
    "fggp-resnet50": ["--trainer.callbacks.update_every=4", "--trainer.callbacks.min_active=8"],
    "gmp-vgg19": ["--trainer.callbacks.update_every=4", "--trainer.callbacks.min_active=8"],
    "rigl-resnet34": ["--trainer.callbacks.update_every=10", "--trainer.callbacks.sparsity=0.95"],
    "feather-resnet20": [],
    "set-resnet20": ["--trainer.callbacks.update_every=10", "--trainer.callbacks.sparsity=0.95"],
    "granet-resnet50": ["--trainer.callbacks.update_every=10"],
    "acdc-resnet20": ["--trainer.callbacks.min_active=8"],
    "dsr-wrn28-2": [*BY_ERK, "--trainer.callbacks.update_every=4"],
    "snfs-wrn28-2": [*BY_ERK, "--trainer.callbacks.update_every=4"],
    "mest-vgg19": ["--trainer.callbacks.min_active=8", "--trainer.callbacks.sparsity=0.95"],
    "snip-vgg19": ["--trainer.callbacks.min_active=8"],
    "grasp-resnet50": ["--trainer.callbacks.min_active=8"],
    "synflow-vgg19": ["--trainer.callbacks.min_active=8", "--trainer.callbacks.iterations=10"],
    "east-resnet20": [
        "--trainer.callbacks.update_every=3",
        "--trainer.callbacks.cycle_update_every=1",
        "--trainer.callbacks.sparsity=0.95",
    ],
}


def trained(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> SparseMethod:
    """The method of a recipe, after two short epochs of its narrow network on small files."""
    expect_small_files(monkeypatch)
    write_mnist(tmp_path / "data")
    write_binary(tmp_path / "data")
    cli = parsed(name, *narrow(name), "--data.batch_size=8", *options, *TINY)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    (method,) = methods_of(cli)
    return method


@pytest.mark.filterwarnings("ignore:Feather.* no active weight left")  # the narrow network has few weights
@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_trains_to_its_sparsity(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = trained(name, tmp_path, monkeypatch, *TRAINED[name])
    assert method.registry.num_active == int(0.05 * method.registry.unshared_numel + 1e-9)


def test_the_recipe_of_srigl_trains_to_its_sparsity_with_constant_fan_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = trained("srigl-wrn22-2", tmp_path, monkeypatch, "--trainer.callbacks.update_every=4")
    numel = method.registry.numel
    assert 0.045 * numel < method.registry.num_active <= 0.05 * numel  # each layer rounds down
    for weight in method.registry.values():
        assert len(set(row_counts(weight.rows(weight.mask)).tolist()) - {0}) == 1


def test_the_recipe_of_acdc_has_the_phases_of_its_authors() -> None:
    (method,) = methods_of(parsed("acdc-resnet20"))
    assert isinstance(method, ACDC)
    times = [method.start, method.update_every, method.last_dense, method.stop]
    assert [round(200 * float(time)) for time in times] == [10, 20, 150, 170]


@pytest.mark.parametrize("name", ["dst-vgg16", "dst-wrn16-8", "dst-lstm-a"])
def test_a_recipe_of_dst_learns_thresholds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = trained(name, tmp_path, monkeypatch)
    assert isinstance(method, DST)
    assert all(threshold.any() for threshold in method.thresholds.values())
    assert 0 < method.registry.num_active < method.registry.numel


def test_an_unknown_recipe_is_an_error_that_lists_the_known_ones() -> None:
    first = "acdc-resnet20, dense-lenet300, dense-lenet5"
    with pytest.raises(ValueError, match=rf"no recipe named 'lenet'\. The recipes are {first}, .*"):
        recipe_path("lenet")
