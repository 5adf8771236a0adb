from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.functional import zero_pruned_
from lightning_sparse.masks.moments import clear_moments, keeps_zeros, skipped_step

SHAPE = (6, 5)
MASK = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5

ALL: list[type[Optimizer]] = [
    kind
    for _, kind in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(kind, Optimizer) and kind is not Optimizer
]

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5}],
    "ASGD": [{}, {"t0": 2.0}],
    "Adam": [{}, {"amsgrad": True}, {"fused": True}, {"fused": True, "amsgrad": True}],
    "AdamW": [{}, {"amsgrad": True}, {"fused": True}],
    "NAdam": [{}, {"decoupled_weight_decay": True}],
    "RAdam": [{}, {"decoupled_weight_decay": True}],
    "RMSprop": [{}, {"centered": True}, {"momentum": 0.9}, {"centered": True, "momentum": 0.9}],
    "Adagrad": [{}, {"lr_decay": 0.1}, {"initial_accumulator_value": 0.1}],
}
COMMON: list[dict[str, Any]] = [
    {"weight_decay": 0.1, "foreach": foreach, "maximize": maximize}
    for foreach, maximize in product((False, True), (False, True))
]


def make(kind: type[Optimizer], parameter: nn.Parameter, **settings: Any) -> Optimizer:
    known = inspect.signature(kind).parameters
    settings = {name: value for name, value in settings.items() if name in known}
    if settings.get("fused"):
        settings.pop("foreach", None)
    return kind([parameter], **settings)


def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def variants() -> list[Any]:
    keeping = [kind for kind in ALL if keeps_zeros(make(kind, nn.Parameter(torch.zeros(SHAPE)), lr=0.1))]
    return [
        pytest.param(kind, {"lr": 0.1} | own | common, id=f"{kind.__name__}-{own | common}")
        for kind in keeping
        for own in SETTINGS.get(kind.__name__, [{}])
        for common in COMMON
    ]


@pytest.mark.parametrize(("kind", "settings"), variants())
def test_an_optimizer_that_is_said_to_keep_zeros_keeps_them_exactly(
    kind: type[Optimizer], settings: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(noise(SHAPE, generator))
    optimizer = make(kind, parameter, **settings)
    for _ in range(5):  # moments are built while the weight is dense
        parameter.grad = noise(SHAPE, generator)
        optimizer.step()
    with torch.no_grad():
        zero_pruned_(parameter, MASK)
    clear_moments(optimizer, parameter, ~MASK)
    for _ in range(20):
        parameter.grad = zero_pruned_(noise(SHAPE, generator), MASK)
        optimizer.step()
        assert not parameter[~MASK].any(), "a pruned weight moved"
    assert parameter.isfinite().all()
    assert parameter[MASK].all()


def test_most_optimizers_of_torch_are_known_to_keep_zeros() -> None:
    unknown = {kind.__name__ for kind in ALL if not keeps_zeros(make(kind, nn.Parameter(torch.zeros(SHAPE)), lr=0.1))}
    assert unknown <= {"LBFGS", "Muon", "SparseAdam"}


def test_a_subclass_is_not_trusted_to_keep_zeros() -> None:
    class Noisy(torch.optim.SGD):
        pass

    assert not keeps_zeros(Noisy([nn.Parameter(torch.zeros(2))], lr=0.1))


DIVIDING = [kind for kind in ALL if "eps" in inspect.signature(kind).parameters and kind.__name__ != "SparseAdam"]


@pytest.mark.parametrize("kind", DIVIDING)
def test_an_optimizer_without_eps_may_divide_zero_by_zero(kind: type[Optimizer]) -> None:
    eps = (0.0, 1e-3) if kind.__name__ == "Adafactor" else 0.0
    assert not keeps_zeros(make(kind, nn.Parameter(torch.zeros(SHAPE)), lr=0.1, eps=eps))


def test_one_parameter_group_without_eps_is_enough_to_distrust() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(2))]}, {"params": [nn.Parameter(torch.zeros(2))], "eps": 0.0}]
    assert not keeps_zeros(torch.optim.Adam(groups))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_moves_pruned_weights_and_is_known_to() -> None:
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(zero_pruned_(noise(SHAPE, generator), MASK))
    optimizer = torch.optim.Muon([parameter], lr=0.1)
    parameter.grad = zero_pruned_(noise(SHAPE, generator), MASK)
    optimizer.step()
    assert parameter[~MASK].any()
    assert not keeps_zeros(optimizer)


# clear_moments


def stepped(kind: type[Optimizer], **settings: Any) -> tuple[Optimizer, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(noise(SHAPE, generator))
    optimizer = make(kind, parameter, lr=0.1, **settings)
    for _ in range(3):
        parameter.grad = noise(SHAPE, generator)
        optimizer.step()
    return optimizer, parameter


DENSE = [kind for kind in ALL if kind.__name__ not in ("LBFGS", "SparseAdam")]


@pytest.mark.parametrize("kind", DENSE)
def test_clearing_zeroes_the_changed_entries_of_every_moment_and_no_other(kind: type[Optimizer]) -> None:
    optimizer, parameter = stepped(kind, momentum=0.9, amsgrad=True, centered=True)
    before = {key: value.clone() for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
    clear_moments(optimizer, parameter, ~MASK)
    for key, old in before.items():
        new = optimizer.state[parameter][key]
        fresh = 0.1 if key == "step_size" else 0.0  # Rprop's step sizes begin at the learning rate
        assert torch.equal(new, old.where(MASK, fresh) if old.shape == parameter.shape else old), key


class Wrapper(Optimizer):
    """Steps another optimizer, as Lookahead does; that one's state is its own."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.inner.step(closure)


def test_moments_of_an_optimizer_that_is_wrapped_are_cleared() -> None:
    inner, parameter = stepped(torch.optim.Adam)
    clear_moments(Wrapper(Wrapper(inner)), parameter, ~MASK)
    for key in ("exp_avg", "exp_avg_sq"):
        assert inner.state[parameter][key][~MASK].count_nonzero() == 0
        assert inner.state[parameter][key][MASK].count_nonzero() > 0


@pytest.mark.parametrize("kind", DENSE)
def test_clearing_nothing_changes_nothing(kind: type[Optimizer]) -> None:
    optimizer, parameter = stepped(kind, momentum=0.9)
    before = {key: value.clone() for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
    clear_moments(optimizer, parameter, torch.zeros(SHAPE, dtype=torch.bool))
    assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in before.items())


@pytest.mark.parametrize("kind", DENSE)
def test_clearing_before_the_first_step_does_nothing(kind: type[Optimizer]) -> None:
    parameter = nn.Parameter(torch.ones(SHAPE))
    optimizer = make(kind, parameter, lr=0.1)
    clear_moments(optimizer, parameter, ~MASK)
    assert torch.equal(parameter, torch.ones(SHAPE))


def test_the_parameter_itself_is_not_cleared() -> None:
    optimizer, parameter = stepped(torch.optim.Adam)
    before = parameter.detach().clone()
    clear_moments(optimizer, parameter, ~MASK)
    assert torch.equal(parameter, before)


def test_the_step_count_of_adam_survives() -> None:
    optimizer, parameter = stepped(torch.optim.Adam)
    clear_moments(optimizer, parameter, torch.ones(SHAPE, dtype=torch.bool))
    assert optimizer.state[parameter]["step"] == 3


def test_moments_in_channels_last_are_cleared_at_the_right_places() -> None:
    parameter = nn.Parameter(torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.arange(1.0, 49.0).view(4, 3, 2, 2)
    optimizer.step()
    changed = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    clear_moments(optimizer, parameter, changed)
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], parameter.grad.where(~changed, 0.0))


def test_a_weight_that_grows_under_rprop_can_still_move_at_the_learning_rate() -> None:
    optimizer, parameter = stepped(torch.optim.Rprop)
    clear_moments(optimizer, parameter, torch.ones(SHAPE, dtype=torch.bool))
    before = parameter.detach().clone()
    parameter.grad = torch.ones(SHAPE)
    optimizer.step()
    assert ((parameter - before).abs() >= 0.05).all()  # a fresh Rprop moves by its learning rate of 0.1


# skipped_step


@pytest.mark.parametrize(
    ("found_inf", "skipped"), [(None, False), (torch.tensor(0.0), False), (torch.tensor(1.0), True)]
)
def test_a_fused_step_is_skipped_where_the_scaler_found_inf(found_inf: Tensor | None, skipped: bool) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    if found_inf is not None:
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    assert skipped_step(optimizer) is skipped


def test_every_optimizer_of_torch_is_covered_by_a_test() -> None:
    covered: set[Callable[..., Any]] = {*DENSE, torch.optim.LBFGS, torch.optim.SparseAdam}
    assert covered == set(ALL)
