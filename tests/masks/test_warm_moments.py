"""A grown weight's second moment begins with those of its neighbours, so that its steps are as long as theirs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse import SET, RigL
from lightning_sparse.masks.moments import as_stepped_on, clear_moments, warm_moments
from tests.helpers import ToyModel, make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

GROWN = torch.tensor([0, 0, 0, 0, 1, 1, 0, 0], dtype=torch.bool)
SURVIVORS = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
GRADIENT = torch.tensor([9.0, 9.0, 9.0, 9.0, 3.0, -1.0, 9.0, 9.0])


def stateful(**state: list[float]) -> tuple[Optimizer, nn.Parameter]:
    """An optimizer with such a state of eight weights."""
    parameter = nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {key: torch.tensor(values) for key, values in state.items()}
    return optimizer, parameter


def warmed(state: dict[str, list[float]], survivors: Tensor = SURVIVORS) -> dict[str, list[float]]:
    optimizer, parameter = stateful(**state)
    warm_moments(optimizer, parameter, GROWN, survivors, GRADIENT)
    return {key: value.tolist() for key, value in optimizer.state[parameter].items()}


@pytest.mark.parametrize("key", ["exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance", "exp_avg_var"])
def test_a_second_moment_begins_at_the_squared_gradient_or_the_mean_of_the_survivors(key: str) -> None:
    # The three survivors have 1, 2 and 6, 3 in the mean; the grown have g² = 9 and 1.
    assert warmed({key: [1.0, 2.0, 6.0, 0, 0, 0, 0, 0]})[key] == [1.0, 2.0, 6.0, 0, 9.0, 3.0, 0, 0]


def test_the_root_of_one_begins_at_the_gradients_magnitude() -> None:
    assert warmed({"exp_inf": [1.0, 2.0, 3.0, 0, 0, 0, 0, 0]})["exp_inf"] == [1.0, 2.0, 3.0, 0, 3.0, 2.0, 0, 0]


def test_where_none_survive_it_begins_at_the_squared_gradient() -> None:
    none = torch.zeros(8, dtype=torch.bool)
    assert warmed({"exp_avg_sq": [0.0] * 8}, none)["exp_avg_sq"] == [0, 0, 0, 0, 9.0, 1.0, 0, 0]


@pytest.mark.parametrize("key", ["exp_avg", "momentum_buffer", "grad_avg", "acc_delta", "prev", "ax", "velocity"])
def test_what_is_no_second_moment_is_left_alone(key: str) -> None:
    state = [1.0, 2.0, 6.0, 0, 0, 0, 0, 0]
    assert warmed({key: state})[key] == state


def test_what_has_another_shape_is_left_alone() -> None:
    assert warmed({"step_sum": [3.0], "row_var": [2.0, 2.0]}) == {"step_sum": [3.0], "row_var": [2.0, 2.0]}


def test_in_bfloat16_the_mean_is_of_wide_numbers() -> None:
    optimizer, parameter = stateful(exp_avg_sq=[0.0])
    numel = 4096
    parameter.data = torch.zeros(numel)
    state = torch.ones(numel, dtype=torch.bfloat16)
    optimizer.state[parameter]["exp_avg_sq"] = state
    survivors = torch.arange(numel) > 0  # in bfloat16 a sum of ones ends at 256
    warm_moments(optimizer, parameter, ~survivors, survivors, torch.zeros(numel))
    assert state.tolist() == [1.0] * numel


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adam": partial(torch.optim.Adam),
    "adam-fused": partial(torch.optim.Adam, fused=True),
    "adam-foreach": partial(torch.optim.Adam, foreach=True),
    "adamw-amsgrad": partial(torch.optim.AdamW, amsgrad=True),
    "nadam": partial(torch.optim.NAdam),
    "radam": partial(torch.optim.RAdam),
    "adamax": partial(torch.optim.Adamax),
    "rmsprop": partial(torch.optim.RMSprop),
    "rmsprop-centered": partial(torch.optim.RMSprop, centered=True, momentum=0.5),
    "adagrad": partial(torch.optim.Adagrad),
}


def longest_steps(make: Callable[..., Optimizer], *, warm: bool) -> tuple[float, float]:
    """The mean step of grown weights in their longest of twenty steps, and of survivors, in learning rates."""
    draws = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.float64))
    survivors = torch.arange(1000) < 500
    lr = 1e-3
    optimizer = make([parameter], lr=lr)
    slope = 0.3 * torch.randn(1000, generator=draws, dtype=torch.float64)
    slope[500:] *= 3.0  # weights grow where gradients are large

    def step(active: Tensor) -> Tensor:
        before = parameter.detach().clone()
        noise = torch.randn(1000, generator=draws, dtype=torch.float64)
        parameter.grad = (slope + noise).where(active, 0.0)
        optimizer.step()
        return (parameter.detach() - before).abs() / lr

    for _ in range(400):
        step(survivors)
    clear_moments(optimizer, parameter, ~survivors)
    if warm:
        gradient = slope + torch.randn(1000, generator=draws, dtype=torch.float64)
        warm_moments(optimizer, parameter, ~survivors, survivors, gradient)
    steps = [step(torch.ones_like(survivors)) for _ in range(20)]
    return max(float(s[~survivors].mean()) for s in steps), sum(float(s[survivors].mean()) for s in steps) / 20


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_twenty_steps_of_grown_weights_are_those_of_their_neighbours(name: str) -> None:
    young, old = longest_steps(OPTIMIZERS[name], warm=True)
    assert 0.0 < young <= 2.0
    assert young <= 5.0 * old


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_with_cleared_moments_they_would_be_far_longer(name: str) -> None:
    young, old = longest_steps(OPTIMIZERS[name], warm=False)
    assert young > 2.0
    assert young > 5.0 * old


# In a training


class Ages(L.Callback):
    """The lengths of the steps that weights take in their first twenty, and when they are older, in learning rates."""

    def __init__(self, method: Any, lr: float) -> None:
        self.method, self.lr = method, lr
        self.before: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.young: list[float] = []
        self.old: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        for name, weight in self.method.registry.items():
            mask, value = weight.mask.clone(), weight.value.clone()
            age = torch.full(mask.shape, 1000)
            if name in self.before:
                was, old_value, age = self.before[name]
                age = torch.where(mask & ~was, 0, age + 1)
                moved = (value - old_value).abs() / self.lr
                young, old = mask & was & (age <= 20), mask & was & (age > 40)
                if trainer.global_step > 100 and young.any() and old.any():
                    self.young.append(float(moved[young].mean()))
                    self.old.append(float(moved[old].mean()))
            self.before[name] = mask, value, age


def trained(method: Any, root: Path, adam: Callable[[Iterable[nn.Parameter]], Optimizer]) -> tuple[float, float]:
    ages = Ages(method, lr=1e-3)
    make_trainer(root, callbacks=[method, ages], max_epochs=40).fit(ToyModel(adam))
    return sum(ages.young) / len(ages.young), sum(ages.old) / len(ages.old)


ADAM = partial(torch.optim.Adam, lr=1e-3)


@pytest.mark.parametrize("kind", [RigL, SET])
def test_in_a_training_grown_weights_step_like_others(kind: type[RigL] | type[SET], tmp_path: Path) -> None:
    young, old = trained(kind(0.75, update_every=30, stop=1.0), tmp_path, ADAM)
    assert young <= 2.0
    assert young <= 5.0 * old
    cold, _ = trained(kind(0.75, update_every=30, stop=1.0, warm_moments=False), tmp_path, ADAM)
    assert cold > 2.0 * young


# What the optimizer sees


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [3.0, 4.0]),
        ({"gradient_clip_val": 1.0}, [0.6, 0.8]),  # of norm 5
        ({"gradient_clip_val": 10.0}, [3.0, 4.0]),
        ({"gradient_clip_val": 3.5, "gradient_clip_algorithm": "value"}, [3.0, 3.5]),
    ],
    ids=str,
)
def test_gradients_are_clipped_as_the_trainer_will(settings: Any, expected: list[float], tmp_path: Path) -> None:
    seen: list[Tensor] = []
    raw = torch.tensor([3.0, 4.0])

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            for parameter in pl_module.parameters():
                assert parameter.grad is not None
                parameter.grad.zero_()
            next(pl_module.parameters()).grad.flatten()[:2] = raw  # type: ignore[union-attr]
            seen.append(as_stepped_on(trainer, optimizer)(raw))

    make_trainer(tmp_path, callbacks=[Look()], max_steps=1, **settings).fit(ToyModel())
    assert seen[0].tolist() == pytest.approx(expected, rel=1e-5)
