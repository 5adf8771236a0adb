from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.tuner.tuning import Tuner
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_sparse import EAST, FGGP, DyReLUPhasing
from lightning_sparse.modules import PhasedReLU
from tests.helpers import ConvToy, SeedPerRank, ToyModel, fit_two_processes, make_trainer
from tests.methods.spies import Kill, KilledError, StepIndexedToy, TwoOptimizers

if TYPE_CHECKING:
    from pathlib import Path

# The data are those of a step's number, so an epoch can be entered in the middle.
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Betas(L.Callback):
    """Notes beta and the state's keys before each step."""

    def __init__(self) -> None:
        self.betas: list[float] = []
        self.keys: list[int] = []

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        site = cast("Any", pl_module).network[1]
        self.betas.append(site.beta.item() if isinstance(site, PhasedReLU) else 0.0)
        self.keys.append(len(pl_module.state_dict()))


def fit(model: Any, root: Path, *callbacks: L.Callback, **overrides: Any) -> Any:
    make_trainer(root, callbacks=list(callbacks), **overrides).fit(model)
    return model


def test_beta_falls_evenly_from_start_to_stop(tmp_path: Path) -> None:
    watch = Betas()
    fit(ToyModel(), tmp_path, DyReLUPhasing(4, 8), watch)
    assert watch.betas == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25, *[0] * 8])


def test_the_state_is_that_of_the_plain_module_from_the_end_of_the_phase_on(tmp_path: Path) -> None:
    watch = Betas()
    plain = len(ToyModel().state_dict())
    fit(ToyModel(), tmp_path, DyReLUPhasing(4, 8), watch)
    assert watch.keys[7] == plain + 5  # beta, and two linear layers
    assert watch.keys[8:] == [plain] * 8


def test_when_the_fit_ends_the_module_has_its_relu_again(tmp_path: Path) -> None:
    model = ToyModel()
    relu = model.network[1]
    fit(model, tmp_path, DyReLUPhasing(4, 8))
    assert model.network[1] is relu
    assert list(model.state_dict()) == list(ToyModel().state_dict())
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


def test_when_the_fit_ends_its_parameters_are_let_go(tmp_path: Path) -> None:
    site: Any = None

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            nonlocal site
            site = weakref.ref(cast("Any", pl_module).network[1])

    phasing = DyReLUPhasing(4, 8)
    fit(ToyModel(), tmp_path, phasing, Look())
    gc.collect()
    assert site() is None
    assert phasing.state_dict() == {"sites": ["network.1"]}  # for a checkpoint that is written now


def test_after_the_phase_the_optimizer_remembers_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "end.ckpt"
    trainer = make_trainer(tmp_path, callbacks=[DyReLUPhasing(4, 8)])
    trainer.fit(ToyModel())
    trainer.save_checkpoint(path)
    (optimizer,) = torch.load(path, weights_only=True)["optimizer_states"]
    assert len(optimizer["state"]) == len(list(ToyModel().parameters()))


def test_a_fit_that_ends_within_the_phase_keeps_what_it_needs_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"training ended at beta 0\.\d+, and the module still holds"):
        model = fit(ToyModel(), tmp_path, DyReLUPhasing(4, 30))
    assert isinstance(model.network[1], PhasedReLU)


def test_it_learns_otherwise_than_relu(tmp_path: Path) -> None:
    phased, plain = fit(ToyModel(), tmp_path, DyReLUPhasing(4, 8)), fit(ToyModel(), tmp_path)
    assert not torch.equal(phased.network[0].weight, plain.network[0].weight)


def test_frozen_dynamic_relus_learn_until_beta_falls(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            seen.append(cast("Any", pl_module).network[1].dyrelu["16"].excite.weight.detach().clone())

    fit(ToyModel(), tmp_path, DyReLUPhasing(4, 12, freeze=True), Watch())
    moved = [not torch.equal(before, after) for before, after in pairwise(seen)]
    assert moved == [True] * 4 + [False] * 11


@pytest.mark.parametrize("step", [2, 3, 5, 8, 11])
def test_resuming_before_within_and_after_the_phase_equals_the_uninterrupted_run(step: int, tmp_path: Path) -> None:
    def callbacks(seed: int = 0) -> list[L.Callback]:
        return [DyReLUPhasing(3, 8, seed=seed), FGGP(0.8, update_every=2, stop=12)]

    path = tmp_path / "killed.ckpt"
    whole = fit(StepIndexedToy(), tmp_path, *callbacks())
    with pytest.raises(KilledError):
        fit(StepIndexedToy(), tmp_path, *callbacks(), Kill(step, path))
    resumed: Any = StepIndexedToy(seed=5)
    make_trainer(tmp_path, callbacks=callbacks(seed=5)).fit(resumed, ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("step", [2, 5, 10])
def test_resuming_on_two_processes_equals_the_uninterrupted_run(step: int, tmp_path: Path) -> None:
    path = tmp_path / "killed.ckpt"
    whole, _ = fit_two_processes(StepIndexedToy(batch_size=4), tmp_path, [DyReLUPhasing(3, 8)])
    with pytest.raises(Exception, match="KilledError"):
        fit_two_processes(StepIndexedToy(batch_size=4), tmp_path, [DyReLUPhasing(3, 8), Kill(step, path)])
    resumed = StepIndexedToy(batch_size=4, seed=5)
    settings = {"strategy": "ddp_fork", "devices": 2}
    make_trainer(tmp_path, callbacks=[SeedPerRank(), DyReLUPhasing(3, 8)], **settings).fit(resumed, ckpt_path=path)
    for name, value in whole["weights"].items():
        assert torch.equal(value, cast("Any", resumed).state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:.*is left without the Dynamic ReLUs")
def test_two_processes_that_end_within_the_phase_give_back_what_the_main_process_can_hold(tmp_path: Path) -> None:
    model: Any = ToyModel()
    make_trainer(tmp_path, strategy="ddp_fork", devices=2, callbacks=[DyReLUPhasing(4, 50)]).fit(model)
    assert isinstance(model.network[1], nn.ReLU)
    assert not torch.equal(model.network[0].weight, cast("Any", ToyModel()).network[0].weight)


def test_two_processes_train_like_one_with_twice_the_batch_and_agree(tmp_path: Path) -> None:
    alone = fit(StepIndexedToy(batch_size=16), tmp_path, DyReLUPhasing(0, 3), precision="64-true", max_epochs=2)
    first, second = fit_two_processes(
        StepIndexedToy(batch_size=8), tmp_path, [DyReLUPhasing(0, 3)], precision="64-true", max_epochs=2
    )
    for name, value in alone.state_dict().items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        assert_close(first["weights"][name], value)


def test_two_processes_agree_where_batches_are_accumulated(tmp_path: Path) -> None:
    settings = {"precision": "64-true", "accumulate_grad_batches": 2}
    alone = fit(StepIndexedToy(batch_size=16), tmp_path, DyReLUPhasing(1, 3), **settings)
    both = fit_two_processes(StepIndexedToy(batch_size=8), tmp_path, [DyReLUPhasing(1, 3)], **settings)
    for name, value in alone.state_dict().items():
        assert torch.equal(both[0]["weights"][name], both[1]["weights"][name]), name
        assert_close(both[0]["weights"][name], value)


def test_a_second_fit_of_the_same_module_goes_on_with_relu(tmp_path: Path) -> None:
    phasing, model = DyReLUPhasing(4, 8), ToyModel()
    fit(model, tmp_path, phasing)
    watch = Betas()
    fit(model, tmp_path, phasing, watch)
    assert watch.betas == [0.0] * 16


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_those_of_the_changed_module(first: bool, tmp_path: Path) -> None:
    average, phasing = EMAWeightAveraging(decay=0.5), DyReLUPhasing(4, 8)
    model = fit(ToyModel(), tmp_path, *([average, phasing] if first else [phasing, average]))
    alone = fit(ToyModel(), tmp_path, DyReLUPhasing(4, 8))
    assert list(model.state_dict()) == list(ToyModel().state_dict())
    assert not torch.equal(model.network[0].weight, alone.network[0].weight)


def test_a_checkpoint_of_the_phase_is_validated_as_it_computed(tmp_path: Path) -> None:
    path = tmp_path / "at.ckpt"
    losses: list[float] = []

    class Save(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if not trainer.sanity_checking and not losses:
                losses.append(float(trainer.callback_metrics["val_loss"]))
                trainer.save_checkpoint(path)

    fit(ToyModel(), tmp_path, DyReLUPhasing(4, 12), Save())
    model = ToyModel(seed=3)
    (metrics,) = make_trainer(tmp_path, callbacks=[DyReLUPhasing(4, 12)]).validate(model, ckpt_path=path, verbose=False)
    assert metrics["val_loss"] == pytest.approx(losses[0], abs=1e-7)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*network\.1\.dyrelu"):
        ToyModel.load_from_checkpoint(path)  # loudly: as a plain network it would compute something else


def test_validating_leaves_a_plain_module_as_it_is(tmp_path: Path) -> None:
    model = ToyModel()
    relu = model.network[1]
    (before,) = make_trainer(tmp_path).validate(model, verbose=False)
    (after,) = make_trainer(tmp_path, callbacks=[DyReLUPhasing()]).validate(model, verbose=False)
    assert before == after
    assert model.network[1] is relu


class Functional(ToyModel):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(F.relu(inputs))


def test_calls_of_the_function_are_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"relu is called as a function by Functional, and stays"):
        fit(Functional(), tmp_path, DyReLUPhasing(4, 8))


def test_relus_of_positions_and_features_stay_and_are_named(tmp_path: Path) -> None:
    class Positions(ToyModel):
        @staticmethod
        def build() -> nn.Sequential:
            body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            return nn.Sequential(
                nn.Unflatten(1, (3, 4)), body, nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
            )

    kinds: list[type] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            network = cast("Any", pl_module).network
            kinds.extend([type(network[1][1]), type(network[4])])

    with pytest.warns(UserWarning, match=r"network\.1\.1 stay ReLUs, because their inputs have features in the last"):
        fit(Positions(), tmp_path, DyReLUPhasing(4, 8), Look())
    assert kinds == [nn.ReLU, PhasedReLU]


def test_a_relu_that_is_used_twice_takes_both_numbers_of_channels(tmp_path: Path) -> None:
    class Twice(ToyModel):
        @staticmethod
        def build() -> nn.Sequential:
            relu = nn.ReLU()
            return nn.Sequential(nn.Linear(12, 16), relu, nn.Linear(16, 8), relu, nn.Linear(8, 3))

    sites: list[Any] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            network = cast("Any", pl_module).network
            sites.extend([network[1], network[3]])

    model = fit(Twice(), tmp_path, DyReLUPhasing(4, 8), Look())
    assert sites[0] is sites[1]
    assert set(sites[0].dyrelu) == {"16", "8"}
    assert model.network[1] is model.network[3]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "mapping"])
def test_convolutions_and_example_inputs(kind: str, tmp_path: Path) -> None:
    model, inputs = ConvToy(), torch.zeros(2, 2, 6, 6)
    examples = {"tensor": inputs, "tuple": (inputs,), "list": [inputs], "mapping": {"inputs": inputs}}
    model.example_input_array = examples[kind]  # type: ignore[assignment]
    relus = [type(module) for module in model.modules()]
    fit(model, tmp_path, DyReLUPhasing(4, 8), FGGP(0.5, update_every=2, stop=12))
    assert [type(module) for module in model.modules()] == relus


def test_a_forward_that_fails_tells_how_to_show_what_it_takes(tmp_path: Path) -> None:
    class Picky(ToyModel):
        def forward(self, inputs: torch.Tensor, more: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self.network(inputs + more)

    with pytest.raises(MisconfigurationException, match=r"but Picky could not be run: .*example_input_array"):
        fit(Picky(), tmp_path, DyReLUPhasing())


def test_an_optimizer_made_of_a_list_of_before_is_refused(tmp_path: Path) -> None:
    class Early(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.mine = list(self.parameters())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.mine, lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"DyReLUPhasing has added at network\.1.*self\.parameters\(\)"):
        fit(Early(), tmp_path, DyReLUPhasing())


def test_a_checkpoint_of_a_run_without_it_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.fit(ToyModel())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    sentence = r"holds no Dynamic ReLUs at network\.1, so its optimizers lack .*load_from_checkpoint"
    with pytest.raises(MisconfigurationException, match=sentence):
        make_trainer(tmp_path, max_epochs=3, callbacks=[DyReLUPhasing()]).fit(
            ToyModel(), ckpt_path=tmp_path / "plain.ckpt"
        )


def test_patterns_choose_and_wrong_ones_are_named(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"include='net\.\*' matches none of the ReLUs: network\.1"):
        fit(ToyModel(), tmp_path, DyReLUPhasing(include=["net.*"]))
    watch = Betas()
    with pytest.warns(UserWarning, match="has no nn.ReLU"):
        fit(ToyModel(), tmp_path, DyReLUPhasing(exclude=["network.1"]), watch)
    assert watch.betas == [0.0] * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0.6, "stop": 0.5}, r"start \(0\.6\) comes after stop"),
        ({"stop": 1.5}, r"stop is 1\.5"),
        ({"reduction": 0}, r"reduction is 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DyReLUPhasing(**arguments)


def test_it_can_be_copied_and_pickled() -> None:
    assert copy.deepcopy(DyReLUPhasing()).times == pickle.loads(pickle.dumps(DyReLUPhasing())).times


def test_global_random_numbers_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    fit(ToyModel(), tmp_path)
    plain = torch.rand(3)
    torch.manual_seed(7)
    fit(ToyModel(), tmp_path, DyReLUPhasing(4, 8))
    assert torch.equal(torch.rand(3), plain)


@pytest.mark.parametrize("own", [None, ["network.0.bias"]])
def test_what_the_user_hides_from_ddp_stays_hidden(own: Any, tmp_path: Path) -> None:
    class Hides(ToyModel):
        _ddp_params_and_buffers_to_ignore = ("network.2.bias",)

    model: Any = Hides()
    if own is not None:
        model._ddp_params_and_buffers_to_ignore = own
    phasing = DyReLUPhasing(4, 8)
    make_trainer(tmp_path, callbacks=[phasing]).validate(model, verbose=False)
    fit(model, tmp_path, phasing)
    make_trainer(tmp_path, callbacks=[phasing]).validate(model, verbose=False)
    assert model._ddp_params_and_buffers_to_ignore == (own or ("network.2.bias",))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_second_fit_in_another_precision(precision: str, tmp_path: Path) -> None:
    phasing, model = DyReLUPhasing(4, 8), ToyModel()
    fit(model, tmp_path, phasing, precision=precision)
    fit(model, tmp_path, phasing, precision=precision)
    assert isinstance(cast("Any", model).network[1], nn.ReLU)


def test_batches_of_several_data_loaders(tmp_path: Path) -> None:
    class Pairs(ToyModel):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch["first"], batch_idx)

    model, watch = Pairs(), Betas()
    loaders = {"first": model.train_dataloader(), "second": model.train_dataloader()}
    make_trainer(tmp_path, callbacks=[DyReLUPhasing(4, 8), watch]).fit(model, loaders)
    assert watch.betas[5:8] == [0.75, 0.5, 0.25]


def test_time_is_counted_in_batches_where_several_optimizers_step(tmp_path: Path) -> None:
    phasing, betas = DyReLUPhasing(0.25, 0.75), list[float]()

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            betas.append(phasing.beta)

    fit(TwoOptimizers(), tmp_path, phasing, Watch())
    assert betas == pytest.approx([1, 1, 1, 1, *(1 - step / 8 for step in range(8)), 0, 0, 0, 0])


def test_a_fit_that_fails_before_its_first_step_leaves_relus(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise KilledError

    model: Any = ToyModel()
    relu = model.network[1]
    with pytest.raises(KilledError):
        fit(model, tmp_path, DyReLUPhasing(4, 8), Fails())
    assert model.network[1] is relu


def test_the_learning_rate_finder_leaves_relus_and_changes_nothing(tmp_path: Path) -> None:
    class Tunable(ToyModel):
        lr = 0.1

    model, phasing = Tunable(), DyReLUPhasing(0.25, 0.5)
    trainer = make_trainer(tmp_path, callbacks=[phasing])
    Tuner(trainer).lr_find(model, num_training=12, update_attr=False)
    assert isinstance(cast("Any", model).network[1], nn.ReLU)
    trainer.fit(model)
    alone = fit(Tunable(), tmp_path, DyReLUPhasing(0.25, 0.5))
    for name, value in alone.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_weights_that_the_module_loads_in_its_setup_do_not_end_the_phase(tmp_path: Path) -> None:
    class Pretrained(ToyModel):
        def setup(self, stage: str) -> None:
            self.load_state_dict(ToyModel(seed=5).state_dict())

    watch = Betas()
    fit(Pretrained(), tmp_path, DyReLUPhasing(4, 8), watch)
    assert watch.betas[:8] == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_a_relu_that_computes_something_else_stays(tmp_path: Path) -> None:
    class Shifted(nn.ReLU):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return F.relu(inputs) - 0.5

    class Shifts(ToyModel):
        @staticmethod
        def build() -> nn.Sequential:
            return nn.Sequential(nn.Linear(12, 16), Shifted(), nn.Linear(16, 3))

    watch = Betas()
    with pytest.warns(UserWarning, match="has no nn.ReLU"):
        fit(Shifts(), tmp_path, DyReLUPhasing(4, 8), watch)
    assert watch.betas == [0.0] * 16


def test_two_that_differ_are_refused_and_leave_the_module_as_it_was(tmp_path: Path) -> None:
    model: Any = ToyModel()
    east = EAST(0.5, sharing=False, cycles=0)
    with pytest.raises(
        MisconfigurationException, match=r"2 DyReLUPhasing that differ in times. .*EAST\(\.\.\., phasing="
    ):
        fit(model, tmp_path, DyReLUPhasing(4, 8), east)
    assert isinstance(model.network[1], nn.ReLU)


def test_a_module_that_cannot_be_copied_is_told(tmp_path: Path) -> None:
    model: Any = ToyModel()
    model.lock = threading.Lock()
    with pytest.raises(MisconfigurationException, match=r"ToyModel cannot be copied: .*locks"):
        fit(model, tmp_path, DyReLUPhasing(4, 8))


def test_two_that_do_the_same_leave_nothing_behind(tmp_path: Path) -> None:
    model = fit(ToyModel(), tmp_path, DyReLUPhasing(4, 8), EAST(0.5, sharing=False, phasing=DyReLUPhasing(4, 8)))
    assert isinstance(model.network[1], nn.ReLU)
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
