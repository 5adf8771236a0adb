"""Zeros hold whoever writes: each kind of writer between our hooks, under several methods."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_sparse import DST, FGGP, GMP, SET, FixedMask, RigL, SparseMethod
from lightning_sparse.testing import random_masks
from tests.helpers import ConvToy, ToyModel, make_trainer
from tests.methods.spies import ZeroWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

METHODS: dict[str, Callable[[], SparseMethod]] = {
    "gmp": lambda: GMP(0.8, update_every=2, start=1, stop=11),
    "fggp": lambda: FGGP(0.8, update_every=2, start=1, stop=11),
    "set": lambda: SET(0.8, update_every=2, stop=11),
    "rigl": lambda: RigL(0.8, update_every=2, stop=11),
    "dst": lambda: DST(0.03),
    "fixed": lambda: FixedMask(random_masks(ToyModel())),
}
every_method = pytest.mark.parametrize("name", METHODS)


def train(
    method: SparseMethod, model: L.LightningModule, root: Path, *others: L.Callback, **settings: Any
) -> list[str]:
    """Fit; the warnings of ours. No pruned weight is awake in any forward."""
    watch = ZeroWatch(method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(root, callbacks=[method, *others, watch], **settings).fit(model)
    assert watch.leaks == []
    assert watch.looks > 0
    return [str(w.message) for w in caught if str(w.message).startswith(type(method).__name__)]


# Gradients that are edited after us.


class Noise(L.Callback):
    """Adds noise to the gradients, after every callback that is listed before it."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(torch.randn_like(parameter.grad), alpha=0.01)


class NoisyModule(ToyModel):
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        Noise().on_before_optimizer_step(self.trainer, self, optimizer)


class Replaced(ToyModel):
    """Puts other tensors in the place of the gradients."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad + 0.01


class Centralized(ToyModel):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None and parameter.grad.dim() > 1:
                parameter.grad.sub_(parameter.grad.mean(dim=1, keepdim=True))


@every_method
@pytest.mark.parametrize("model", [NoisyModule, Replaced, Centralized])
def test_gradients_that_the_module_edits_after_us(name: str, model: type[ToyModel], tmp_path: Path) -> None:
    said = train(METHODS[name](), model(), tmp_path)
    if name != "dst":  # whose sleeping weights may move
        assert any("got gradients after this callback had cleared them" in line for line in said)


@every_method
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_gradients_that_a_later_callback_edits(name: str, optimizer: Any, tmp_path: Path) -> None:
    model = ToyModel(lambda parameters: optimizer(parameters, lr=0.05))
    train(METHODS[name](), model, tmp_path, Noise(), gradient_clip_val=0.5)


def test_it_is_said_once_with_the_cause_and_the_moments_are_clear(tmp_path: Path) -> None:
    method = METHODS["fixed"]()
    model = NoisyModule()
    said = train(method, model, tmp_path)
    assert len(said) == 1
    state = model.trainer.optimizers[0].state
    for weight in method.weights:
        assert state[weight.parameter]["momentum_buffer"][~weight.mask].count_nonzero() == 0


def test_clipping_alone_is_nobody_who_writes(tmp_path: Path) -> None:
    assert train(METHODS["fixed"](), ToyModel(), tmp_path, gradient_clip_val=1e-3) == []


@every_method
def test_clipping_by_value_where_a_step_is_left_out(name: str, tmp_path: Path) -> None:
    model = ToyModel()
    train(METHODS[name](), model, tmp_path, gradient_clip_val=0.1, gradient_clip_algorithm="value")
    assert model.trainer.gradient_clip_val == 0.1


# Weights that are written between steps.


def in_place(model: ToyModel) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter)


def by_load(model: ToyModel) -> None:
    model.load_state_dict(ToyModel(seed=3).state_dict())


def by_vector(model: ToyModel) -> None:
    flat = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(flat + 0.1, model.parameters())


def by_data(model: ToyModel) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1


def by_reset(model: ToyModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()


@every_method
@pytest.mark.parametrize("write", [in_place, by_load, by_vector, by_data, by_reset])
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_start"])
def test_weights_that_the_module_writes_in_a_hook(name: str, write: Any, hook: str, tmp_path: Path) -> None:
    class Writes(ToyModel):
        pass

    setattr(Writes, hook, lambda self, *_: write(self) if self.global_step in (0, 8, 13) else None)
    train(METHODS[name](), Writes(), tmp_path)


@every_method
@pytest.mark.parametrize(
    "hook",
    [
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_validation_start",
        "on_train_epoch_end",
    ],
)
@pytest.mark.parametrize("when", [(9,), range(99)], ids=["once", "always"])
def test_weights_that_are_written_around_a_step(name: str, hook: str, when: Any, tmp_path: Path) -> None:
    class Writes(ToyModel):
        pass

    @torch.no_grad()
    def write(self: Any, *_: Any) -> None:
        if self.global_step in when or (hook.startswith(("on_val", "on_train_e")) and self.global_step):
            for parameter in self.parameters():
                parameter.add_(0.01)

    setattr(Writes, hook, write)
    train(METHODS[name](), Writes(), tmp_path)


@every_method
def test_weights_that_are_loaded_within_a_training_step(name: str, tmp_path: Path) -> None:
    class Loads(ToyModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 12 and batch_idx == 4:
                for parameter, other in zip(self.parameters(), ToyModel(seed=3).parameters(), strict=True):
                    parameter.data = other.data  # what autograd has saved stays
            return loss

    train(METHODS[name](), Loads(), tmp_path)


@every_method
def test_who_writes_past_the_counters_is_watched_once_caught(name: str, tmp_path: Path) -> None:
    class Sly(ToyModel):
        def on_train_batch_start(self, *_: Any) -> None:
            for parameter in self.parameters():
                parameter.data.add_(0.01)

    method = METHODS[name]()
    watch = ZeroWatch(method)
    with pytest.warns(UserWarning, match=r"written without autograd's notice"):
        make_trainer(tmp_path, callbacks=[method, watch]).fit(Sly())
    assert len({leak.split(":")[0] for leak in watch.leaks}) <= 2  # in no more forwards than it takes to catch him


def test_a_latent_method_trains_from_what_was_loaded(tmp_path: Path) -> None:
    class Pretrained(ToyModel):
        def on_train_start(self) -> None:
            by_load(self)

    model = Pretrained(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    train(DST(alpha=0.0), model, tmp_path, max_epochs=1)
    for value, loaded in zip(model.parameters(), ToyModel(seed=3).parameters(), strict=True):
        assert torch.equal(value, loaded)


def test_writes_past_the_counters_are_found_at_validation(tmp_path: Path) -> None:
    class Sly(ToyModel):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 8:
                for parameter in self.parameters():
                    parameter.data.add_(0.1)

    method = METHODS["fixed"]()
    seen: list[int] = []

    class Look(L.Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            seen.append(sum(int(w.value[~w.mask].count_nonzero()) for w in method.weights if method.run.active))

    with pytest.warns(UserWarning, match=r"written without autograd's notice"):
        make_trainer(tmp_path, callbacks=[method, Look()]).fit(Sly())
    assert sum(seen) == 0


# Layouts, optimizers, layers.


@pytest.mark.parametrize("name", ["gmp", "fggp", "set", "rigl", "dst"])
def test_weights_that_change_their_order_in_memory(name: str, tmp_path: Path) -> None:
    class Turns(ConvToy):
        def on_train_start(self) -> None:
            self.to(memory_format=torch.channels_last)

    turned, plain = METHODS[name](), METHODS[name]()
    train(turned, Turns(), tmp_path)
    train(plain, ConvToy(), tmp_path)
    assert turned.registry.num_active == pytest.approx(plain.registry.num_active, abs=0 if name != "dst" else 40)


@every_method
def test_an_optimizer_that_takes_the_place_of_another(name: str, tmp_path: Path) -> None:
    class Swaps(ToyModel):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.optimizers = [torch.optim.AdamW(self.parameters(), lr=1e-2)]

    method = METHODS[name]()
    train(method, Swaps(), tmp_path)
    assert method.step == 16
    assert all(isinstance(group.optimizer, torch.optim.AdamW) for group in method.groups)


@pytest.mark.parametrize("name", ["gmp", "rigl", "dst", "fixed"])
def test_a_parameter_of_the_same_shape_takes_over_the_mask(name: str, tmp_path: Path) -> None:
    class Registers(ToyModel):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.network[2].weight = nn.Parameter(torch.randn(8, 16))  # type: ignore[index]
                self.trainer.optimizers[0].param_groups[0]["params"] = list(self.parameters())

    method = METHODS[name]()
    said = train(method, Registers(), tmp_path)
    assert any("network.2.weight was replaced" in line for line in said)
    assert "network.2.weight" in method.registry


@every_method
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start"])
def test_parameters_and_their_optimizer_that_are_replaced_at_once(name: str, hook: str, tmp_path: Path) -> None:
    class Assigns(ToyModel):
        pass

    def assign(self: Any, *_: Any) -> None:
        if self.global_step == 8:
            self.load_state_dict(ToyModel(seed=3).state_dict(), assign=True)
            self.trainer.strategy.setup_optimizers(self.trainer)

    setattr(Assigns, hook, assign)
    method, model = METHODS[name](), Assigns()
    said = train(method, model, tmp_path)
    assert any("network.4.weight was replaced by another parameter of the same shape" in line for line in said)
    assert all(weight.parameter is model.get_parameter(weight.name) for weight in method.weights)
    assert {group.optimizer for group in method.groups} == set(model.trainer.optimizers)
    assert method.step == 16


class Encoder(ToyModel):
    """Two layers of which one could be the other's transpose, or both one."""

    @staticmethod
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 16), nn.Linear(16, 3))


@pytest.mark.parametrize("name", ["gmp", "rigl", "dst"])
def test_layers_that_are_tied_later_have_one_mask(name: str, tmp_path: Path) -> None:
    class Ties(Encoder):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.network[3].weight = self.network[0].weight  # type: ignore[index]

    method = METHODS[name]()
    said = train(method, Ties(), tmp_path)
    assert any("network.3.weight is now tied to a weight that is masked already" in line for line in said)
    assert [weight.name for weight in method.weights] == ["network.0.weight", "network.2.weight", "network.4.weight"]


@pytest.mark.parametrize("name", ["gmp", "rigl", "dst"])
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_start"])
def test_layers_that_are_tied_later_by_their_memory_are_refused(name: str, hook: str, tmp_path: Path) -> None:
    class Ties(Encoder):
        pass

    def tie(self: Any, *_: Any) -> None:
        self.network[2].weight.data = self.network[0].weight.data.t()

    setattr(Ties, hook, tie)
    with pytest.raises(MisconfigurationException, match=r"network\.0\.weight, network\.2\.weight share their memory"):
        make_trainer(tmp_path, callbacks=[METHODS[name]()]).fit(Ties())


@pytest.mark.parametrize("name", ["gmp", "rigl", "dst"])
def test_a_layer_of_another_shape_is_masked_anew(name: str, tmp_path: Path) -> None:
    class Grows(ToyModel):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.network[4] = nn.Linear(8, 5)  # type: ignore[index]
                self.trainer.optimizers[0].param_groups[0]["params"] = list(self.parameters())

    method = METHODS[name]()
    said = train(method, Grows(), tmp_path)
    assert any("network.4.weight was replaced by a layer of another shape" in line for line in said)
    assert tuple(method.registry["network.4.weight"].shape) == (5, 8)


# Copies that somebody averages.


class OwnAverage(L.Callback):
    """An average of somebody's own, swapped in for validation."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.copy = copy.deepcopy(pl_module.network)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        for mine, theirs in zip(self.copy.parameters(), pl_module.network.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.kept = copy.deepcopy(pl_module.network.state_dict())
            pl_module.network.load_state_dict(self.copy.state_dict())

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.kept:
            pl_module.network.load_state_dict(self.kept)


@every_method
@pytest.mark.parametrize("is_first", [True, False])
def test_an_average_of_ones_own_is_sparse_wherever_it_is_evaluated(name: str, is_first: bool, tmp_path: Path) -> None:
    method, average = METHODS[name](), OwnAverage()
    order = [average, method] if is_first else [method, average]
    awake: list[int] = []

    class Look(L.Callback):
        def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if not trainer.sanity_checking:
                awake.append(sum(int(w.value[~w.mask].count_nonzero()) for w in method.weights))

    make_trainer(tmp_path, callbacks=[*order, Look()]).fit(ToyModel())
    assert sum(awake) == 0
    for weight in method.weights:
        copied = average.copy.get_parameter(weight.name.removeprefix("network."))
        assert copied[~weight.mask].count_nonzero() == 0


class Replacing(OwnAverage):
    """An average that puts new parameters into its copy."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        for mine, theirs in zip(self.copy, pl_module.network, strict=True):
            if isinstance(mine, nn.Linear):
                mine.weight = nn.Parameter(mine.weight.detach().lerp(theirs.weight.detach(), 0.1))


@every_method
def test_an_average_may_put_other_parameters_in_place(name: str, tmp_path: Path) -> None:
    method, average = METHODS[name](), Replacing()
    make_trainer(tmp_path, callbacks=[average, method]).fit(ToyModel())
    for weight in method.weights:
        copied = average.copy.get_parameter(weight.name.removeprefix("network."))
        assert copied[~weight.mask].count_nonzero() == 0


class PlainAverage:
    """As timm's first ModelEma: no module, and holds one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        for mine, theirs in zip(self.module.parameters(), module.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)


class ModuleAverage(PlainAverage, nn.Module):
    """As timm's ModelEmaV2: a module around the copy."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = copy.deepcopy(module).requires_grad_(False)


@every_method
@pytest.mark.parametrize("kind", [PlainAverage, ModuleAverage])
@pytest.mark.parametrize("hidden", [True, False])
def test_an_average_that_the_module_keeps_is_sparse(name: str, kind: Any, hidden: bool, tmp_path: Path) -> None:
    class Averaging(ToyModel):
        def on_fit_start(self) -> None:
            average = kind(self.network)
            if hidden:  # as those do who keep it out of the state_dict
                self.__dict__["averages"] = {"slow": average}
            else:
                self.average = average

        def on_train_batch_end(self, *_: Any) -> None:
            self.its_average().update(self.network)

        def its_average(self) -> Any:
            return self.__dict__["averages"]["slow"] if hidden else self.average

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.network.parameters(), lr=0.1)

    method, model = METHODS[name](), Averaging()
    make_trainer(tmp_path, callbacks=[method]).fit(model)
    for weight in method.weights:
        copied = model.its_average().module.get_parameter(weight.name.removeprefix("network."))
        assert copied[~weight.mask].count_nonzero() == 0


def test_an_averaged_model_within_the_module_is_sparse(tmp_path: Path) -> None:
    class Averaging(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.average = AveragedModel(self.network)

        def on_train_batch_end(self, *_: Any) -> None:
            self.average.update_parameters(self.network)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.network.parameters(), lr=0.1)

    method = GMP(0.8, update_every=2, stop=11, include=["network.*"])
    model = Averaging()
    make_trainer(tmp_path, callbacks=[method]).fit(model)
    for weight in method.weights:
        assert model.average.get_parameter(f"module.{weight.name.removeprefix('network.')}")[~weight.mask].any() == 0


def test_a_teacher_is_left_alone(tmp_path: Path) -> None:
    class Taught(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = copy.deepcopy(self.network).requires_grad_(False)

    model = Taught()
    before = copy.deepcopy(model.teacher.state_dict())
    make_trainer(tmp_path, callbacks=[GMP(0.8, update_every=2, stop=11, include=["network.*"])]).fit(model)
    assert all(torch.equal(value, before[name]) for name, value in model.teacher.state_dict().items())


# One Trainer at a time; folds; a fit that is refused.


def test_a_fit_within_a_fit_is_refused(tmp_path: Path) -> None:
    method = METHODS["gmp"]()

    class Nested(ToyModel):
        def on_train_epoch_start(self) -> None:
            make_trainer(tmp_path, callbacks=[method]).fit(ToyModel())

    with pytest.raises(Exception, match="in the middle of a training by another Trainer"):
        make_trainer(tmp_path, callbacks=[method]).fit(Nested())


@pytest.mark.parametrize("name", ["gmp", "fggp", "rigl", "dst"])
def test_a_module_that_is_set_back_is_trained_anew(name: str, tmp_path: Path) -> None:
    method, model = METHODS[name](), ToyModel()
    initial = copy.deepcopy(model.state_dict())
    seen: list[tuple[float, int]] = []

    class First(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            seen.append((method.registry.sparsity, method.step))

    for _ in range(2):
        model.load_state_dict(initial)
        make_trainer(tmp_path, callbacks=[method, First()]).fit(model)
    assert seen[0] == seen[1]


def test_a_fit_that_one_method_refuses_leaves_all_as_it_was(tmp_path: Path) -> None:
    model = ToyModel()
    before = copy.deepcopy(model.state_dict())
    rigl = RigL(0.9, include=["network.0.*"])
    fixed = FixedMask(tmp_path / "missing.masks", exclude=["network.0.*"])
    with pytest.raises(Exception, match="There is no file"):
        make_trainer(tmp_path, callbacks=[rigl, fixed]).fit(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (rigl.last_run, fixed.last_run, rigl.step) == (None, None, 0)


def test_a_second_training_explores_again(tmp_path: Path) -> None:
    method, model = RigL(0.8, update_every=4, stop=14), ToyModel()
    updates: list[int] = []
    for _ in range(2):
        make_trainer(tmp_path, callbacks=[method]).fit(model)
        updates.append(method.registry.num_updates)
    assert updates[0] == updates[1] > 0
    assert method.step == 32


class Hutchinson(torch.optim.Optimizer):
    """Differentiates gradients in its step, as AdaHessian and SophiaH do; keeps the last curvatures."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        used = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if used:
            with torch.enable_grad():
                grads = [p.grad for p in used]
                curvatures = torch.autograd.grad(
                    grads, used, [torch.ones_like(p) for p in used], allow_unused=True, retain_graph=True
                )
            for p, h in zip(used, curvatures, strict=True):
                self.state[p]["h"] = torch.zeros_like(p) if h is None else h.clone()  # pyright: ignore[reportUnnecessaryComparison]
                p.addcdiv_(p.grad.detach(), self.state[p]["h"].abs().add_(1.0), value=-0.1)  # type: ignore[union-attr]
        return loss


class SecondOrder(ToyModel):
    """Trained by an optimizer that differentiates gradients."""

    def __init__(self) -> None:
        super().__init__(Hutchinson)  # type: ignore[arg-type]
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]), create_graph=True)
        optimizer.step()


@every_method
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_an_optimizer_that_differentiates_gradients_trains(name: str, tmp_path: Path) -> None:
    method = METHODS[name]()
    said = train(method, SecondOrder(), tmp_path)
    assert [line for line in said if "plain SGD with the same learning rate" not in line] == []
    assert len(said) == (name == "dst")
    assert method.step == 16


class SAM(torch.optim.SGD):
    """Sharpness-aware: two gradients a step, the second of weights that were moved."""

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        loss = torch.enable_grad()(closure)()
        moved = {p: p.grad * 0.05 for group in self.param_groups for p in group["params"] if p.grad is not None}
        for parameter, by in moved.items():
            parameter.add_(by)
        torch.enable_grad()(closure)()
        for parameter, by in moved.items():
            parameter.sub_(by)
        super().step()
        return loss


class Lookahead(torch.optim.SGD):
    """Every third step goes back half the way to where it was."""

    steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not self.steps:
            self.slow = [p.clone() for p in parameters]
        loss = super().step(closure)
        self.steps += 1
        if self.steps % 3 == 0:
            for parameter, slow in zip(parameters, self.slow, strict=True):
                parameter.copy_(slow.lerp_(parameter, 0.5))
        return loss


@every_method
@pytest.mark.parametrize("kind", [SAM, Lookahead])
def test_optimizers_that_move_weights_about(name: str, kind: Any, tmp_path: Path) -> None:
    model = ToyModel(lambda parameters: kind(list(parameters), lr=0.1, momentum=0.9))
    if (name, kind) == ("dst", SAM):
        with pytest.raises(
            MisconfigurationException, match=r"DST steps its thresholds.* SAM does not take them \(.*'closure'"
        ):
            train(METHODS[name](), model, tmp_path)
    else:
        train(METHODS[name](), model, tmp_path)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_curvatures_are_those_of_the_active_weights(tmp_path: Path) -> None:
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    class Look(L.Callback):
        @torch.enable_grad()
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            inputs, labels = next(iter(pl_module.train_dataloader()))
            weights = [weight.parameter for weight in method.weights]
            loss = nn.functional.cross_entropy(pl_module(inputs), labels)
            grads = torch.autograd.grad(loss, weights, create_graph=True)
            masks = [weight.mask.float() for weight in method.weights]
            rest = [p for p in pl_module.parameters() if all(p is not weight for weight in weights)]
            others = torch.autograd.grad(loss, rest, create_graph=True)
            expected = torch.autograd.grad([*grads, *others], weights, [*masks, *map(torch.ones_like, others)])
            found.update({w.name: (w.parameter, h) for w, h in zip(method.weights, expected, strict=True)})

    method = METHODS["fixed"]()
    model = SecondOrder()
    make_trainer(tmp_path, callbacks=[method, Look()], max_steps=1).fit(model)
    for name, (parameter, expected) in found.items():
        torch.testing.assert_close(model.trainer.optimizers[0].state[parameter]["h"], expected, msg=name)


class KeepsMuch(list[float]):
    """A list that counts how many of its entries are read."""

    read = 0

    def __iter__(self) -> Iterator[float]:
        for value in super().__iter__():
            KeepsMuch.read += 1
            yield value


def test_what_a_callback_keeps_of_each_step_is_not_read_at_each(tmp_path: Path) -> None:
    class Recorder(L.Callback):
        def __init__(self) -> None:
            self.losses = KeepsMuch([0.0] * 10_000)

    KeepsMuch.read = 0
    make_trainer(tmp_path, callbacks=[Recorder(), GMP(0.5)], max_epochs=1).fit(ToyModel())
    assert 0 < KeepsMuch.read < 10_000
