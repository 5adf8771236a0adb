"""Writers to weights and gradients that were reported or that stand to reason: no pruned weight is ever awake."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sparse.testing import OPTIMIZERS, ToyModel, make_trainer
from tests.methods.test_guard import METHODS, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

adamw = OPTIMIZERS["adamw"]


class Clips(torch.optim.AdamW):
    """Weights are clipped within the optimizer's step, and moved."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.clamp_(-0.5, 0.5).add_(1e-3)
        return loss


class ClippedWeights(ToyModel):
    def configure_optimizers(self) -> Any:
        return Clips(self.parameters(), lr=0.01)


class UsersHook(ToyModel):
    """A hook of the user's own after each step."""

    def configure_optimizers(self) -> Any:
        optimizer: Any = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: _add(self))
        return optimizer


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                with torch.no_grad():
                    parameter.mul_(0.999).add_(1e-4)


class ScheduledDecay(ToyModel):
    """A schedule that decays weights."""

    def configure_optimizers(self) -> Any:
        optimizer: Any = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Schedule(optimizer, float), "interval": "step"}}


class Accumulates(ToyModel):
    """Hooks of tensors: on gradients, and after they were accumulated on weights."""

    def on_fit_start(self) -> None:
        for parameter in self.parameters():
            parameter.register_hook(lambda grad: grad + 0.01)
            parameter.register_post_accumulate_grad_hook(_decay)


class OwnStep(ToyModel):
    """Gradient surgery in a closure of the module's own."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Any:
            loss = optimizer_closure()
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad - parameter.grad.mean()
            return loss

        optimizer.step(closure=closure)


class SkipsSteps(ToyModel):
    """Steps of the optimizer are left out now and then."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 3 == 0:
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)


class RollsBack(ToyModel):
    """Weights go back to what they were."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == 5:
            self.kept = copy.deepcopy(self.state_dict())
        if self.global_step == 13:
            self.load_state_dict(self.kept)


class ForgetsMoments(ToyModel):
    """The state of the optimizer goes back, and is lost."""

    def on_train_batch_start(self, *_: Any) -> None:
        optimizer: Any = self.trainer.optimizers[0]
        if self.global_step == 3:
            self.kept = copy.deepcopy(optimizer.state_dict())
        if self.global_step == 9:
            optimizer.load_state_dict(self.kept)
        if self.global_step == 12:
            optimizer.state.clear()


class SwapsPastTheCounters(ToyModel):
    """An average of tensors, swapped in and out by ``.data``, as torch_ema does."""

    def on_fit_start(self) -> None:
        self.slow = [p.detach().clone() for p in self.parameters()]

    def on_train_batch_end(self, *_: Any) -> None:
        for mine, parameter in zip(self.slow, self.parameters(), strict=True):
            mine.lerp_(parameter.detach(), 0.1)

    def on_validation_epoch_start(self) -> None:
        self.kept = [p.detach().clone() for p in self.parameters()]
        self._put(self.slow)

    def on_validation_epoch_end(self) -> None:
        self._put(self.kept)

    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.data.copy_(value)


class Merges(ToyModel):
    """An update of low rank is merged into a weight."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            layer: Any = self.network[2]
            with torch.no_grad():
                layer.weight += torch.ones(8, 1) @ torch.ones(1, 16)


class Compiles(ToyModel):
    """The network is compiled while training runs."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            self.network = torch.compile(self.network, backend="eager")  # type: ignore[assignment]


class Manual(ToyModel):
    """Several steps a batch, and a raw write between them."""

    def __init__(self) -> None:
        super().__init__(adamw)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        for _ in range(3):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


class NoLoss(ToyModel):
    """No loss now and then."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


class SetsUpAgain(ToyModel):
    """The strategy makes new optimizers."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            self.trainer.strategy.setup_optimizers(self.trainer)


class ScheduleFree(torch.optim.Optimizer):
    """Trains at a point between a fast sequence and its average; ``eval`` moves the weights to the average."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(list(parameters), {"lr": lr})
        self.fast = [(p, p.detach().clone()) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def eval(self) -> None:
        for parameter, fast in self.fast:
            parameter.lerp_(fast, 1.0 - 1.0 / 0.9)

    @torch.no_grad()
    def train(self) -> None:
        for parameter, fast in self.fast:
            parameter.lerp_(fast, 0.1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for parameter, fast in self.fast:
            if parameter.grad is not None:
                fast.sub_(parameter.grad, alpha=0.1)
                parameter.lerp_(fast, 0.2)
        return loss


class EvaluatesTheAverage(ToyModel):
    """A schedule-free optimizer, which is told when evaluation begins and ends."""

    def __init__(self) -> None:
        super().__init__(ScheduleFree)  # type: ignore[arg-type]

    def on_validation_epoch_start(self) -> None:
        self.trainer.optimizers[0].eval()  # type: ignore[attr-defined]

    def on_validation_epoch_end(self) -> None:
        self.trainer.optimizers[0].train()  # type: ignore[attr-defined]


class Perturbs(ToyModel):
    """Weights are perturbed for as long as gradients are computed, and set back."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.before = [p.detach().clone() for p in self.parameters()]
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), self.before, strict=True):
                parameter.add_(0.01)
                parameter.copy_(value)


def _decay(parameter: Tensor) -> None:
    parameter.data.mul_(0.999)


def _add(module: L.LightningModule) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1e-3)


WRITERS: list[Callable[[], ToyModel]] = [
    ClippedWeights,
    UsersHook,
    ScheduledDecay,
    Accumulates,
    OwnStep,
    SkipsSteps,
    RollsBack,
    ForgetsMoments,
    SwapsPastTheCounters,
    Merges,
    Compiles,
    Manual,
    NoLoss,
    SetsUpAgain,
    EvaluatesTheAverage,
    Perturbs,
]


@pytest.mark.filterwarnings("ignore:.*training_step. returned")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("writer", WRITERS)
def test_zeros_hold(name: str, writer: Callable[[], ToyModel], tmp_path: Path) -> None:
    train(METHODS[name](), writer(), tmp_path)


# Optimizers that are no plain ones of torch.


class Wrapper(torch.optim.Optimizer):
    """Wraps another and never calls ``Optimizer.__init__``, as Opacus' does: it has no hooks."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.inner.state)  # type: ignore[assignment]
    defaults = property(lambda self: self.inner.defaults)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


class Lookahead(torch.optim.Optimizer):
    """Wraps another, whose moments are its own, and goes half the way back at every third step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.steps = inner, 0
        self.slow = [(p, p.detach().clone()) for group in inner.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.inner.step(closure)
        self.steps += 1
        for parameter, slow in self.slow if self.steps % 3 == 0 else ():
            parameter.copy_(slow.lerp_(parameter, 0.5))
        return loss


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dst"])
@pytest.mark.parametrize("wrap", [Wrapper, Lookahead])
def test_zeros_hold_under_an_optimizer_that_wraps_another(name: str, wrap: Any, tmp_path: Path) -> None:
    model = ToyModel(lambda parameters: wrap(adamw(parameters)))
    method = METHODS[name]()
    train(method, model, tmp_path)
    inner = model.trainer.optimizers[0].inner  # type: ignore[attr-defined]
    for weight in method.weights:
        assert inner.state[weight.parameter]["exp_avg"][~weight.mask].count_nonzero() == 0


def test_thresholds_of_weights_in_a_wrapped_optimizer_are_refused_in_words(tmp_path: Path) -> None:
    model = ToyModel(lambda parameters: Lookahead(adamw(parameters)))
    with pytest.raises(MisconfigurationException, match=r"DST steps its thresholds.*Give the masked weights to SGD"):
        make_trainer(tmp_path, callbacks=[METHODS["dst"]()]).fit(model)


class Ignores(torch.optim.SGD):
    """A step with an argument for a closure that it does not call."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step()


class Calls(Ignores):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure() if closure else None
        super().step()
        return loss


class StepsByHand(ToyModel):
    def __init__(self, optimizer: type[torch.optim.Optimizer]) -> None:
        super().__init__(lambda parameters: optimizer(parameters, lr=0.1))  # type: ignore[call-arg]
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("by_hand", [False, True])
def test_an_optimizer_that_ignores_its_closure_is_refused_with_what_helps(
    name: str, by_hand: bool, tmp_path: Path
) -> None:
    model = StepsByHand(Ignores) if by_hand else ToyModel(lambda parameters: Ignores(parameters, lr=0.1))
    sentence = r"Ignores\.step\(\) does not call the closure.* begin with loss = closure\(\) if closure else None"
    with pytest.raises(MisconfigurationException, match=sentence):
        make_trainer(tmp_path, callbacks=[METHODS[name]()]).fit(model)
    method = METHODS[name]()
    train(method, StepsByHand(Calls), tmp_path)
    assert method.step == 16
