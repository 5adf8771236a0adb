"""The budgets of weights that are ranked together: what a sparsity leaves to the whole, and to each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparse.functional.allocation import (
    erdos_renyi,
    erdos_renyi_kernel,
    largest_feasible_sparsity,
    num_active,
    uniform,
)
from lightning_sparse.masks.patterns import AnyPattern, Pattern
from lightning_sparse.masks.pool import MaskPool
from lightning_sparse.masks.remarks import enumerated
from lightning_sparse.masks.weight import MaskedWeight

__all__ = [
    "LayerAllocation",
    "budget_of",
    "check_budget",
    "check_met",
    "feasible_budgets",
    "layer_budgets",
    "told_of_starved",
]

LayerAllocation = Literal["uniform", "er", "erk"]
"""The proportions in which layers share a budget: alike, Erdős–Rényi, Erdős–Rényi–Kernel."""

_STARVED = 8  # a warning names layers with fewer than one weight for so many outputs

_SHARES: dict[LayerAllocation, Callable[..., list[int]]] = {
    "uniform": uniform,
    "er": erdos_renyi,
    "erk": erdos_renyi_kernel,
}


def budget_of(group: MaskPool, sparsity: float) -> int:
    """The weights that ``sparsity`` leaves active in the group, of those that it would have unshared."""
    return min(num_active(sparsity, group.unshared_numel), group.numel)


def layer_budgets(
    group: MaskPool, sparsity: float, allocation: LayerAllocation, min_active: int, *, grow: bool = False
) -> list[int]:
    """One budget for each layer; none above what is active now, unless masks may ``grow``.

    The sum is that of ``sparsity``, or what is active where that is less.
    """
    capacities = [weight.numel if grow else weight.num_active for weight in group]
    return _SHARES[allocation](
        [weight.layer_shape for weight in group],
        min(budget_of(group, sparsity), sum(capacities)),
        capacities=capacities,
        min_active=min_active,
        copies=[weight.copies for weight in group],
    )


def feasible_budgets(
    group: MaskPool, budgets: Sequence[int], pattern: Pattern, allowed: Callable[[MaskedWeight], Tensor]
) -> list[int]:
    """The largest budgets that masks of a pattern can hold, one for each layer.

    A layer may get more than its share, where a pattern leaves no less; the largest of the others give it.

    Args:
        group: The weights.
        budgets: What each layer may hold.
        pattern: What its masks obey.
        allowed: Where masks may be, of each weight: ``bool``, its shape.
    """
    places = [allowed(weight) for weight in group]
    met = group.each(pattern.feasible, budgets, places)
    for layer in sorted(range(len(group)), key=lambda index: -met[index]):
        while sum(met) > sum(budgets):
            less = pattern.feasible(group[layer], met[layer] - 1, places[layer])
            if less >= met[layer]:
                break
            met[layer] = less
    return met


def check_budget(group: MaskPool, sparsity: float, min_active: int, pattern: Pattern | None = None) -> None:
    """Refuse a sparsity that cannot be.

    Raises:
        MisconfigurationException: It leaves no weight, fewer than ``min_active`` in each layer, or fewer than a mask of
            the pattern has.
    """
    shape = AnyPattern() if pattern is None else pattern
    minima = [min(max(min_active, shape.least(weight)), weight.numel) for weight in group]
    least, budget = max(1, sum(minima)), budget_of(group, sparsity)
    if budget < least:
        and_pattern = "" if shape == AnyPattern() else f" and the pattern {shape}"
        raise MisconfigurationException(
            f"Sparsity {sparsity} leaves {budget} of the {group.unshared_numel} weights of one optimizer, but at least"
            f" {least} must stay active (min_active={min_active}{and_pattern} in each of {len(group)} layers). The"
            f" largest feasible sparsity is {largest_feasible_sparsity(least, group.unshared_numel)}."
        )


def told_of_starved(group: MaskPool, budgets: Sequence[int], *, at_random: bool) -> str:
    """A sentence on the small layers that the same sparsity as all others leaves hardly a weight; empty if none.

    Args:
        group: The weights.
        budgets: What each layer holds.
        at_random: Whether training begins with so few, at places that nothing has chosen: one to an output is too few
            then, as a third of the outputs gets none.
    """
    per_output = 1.0 if at_random else 1.0 / _STARVED
    names = [
        f"{weight.name} ({budget} of {weight.numel})"
        for weight, budget in zip(group, budgets, strict=True)
        if 0 < budget < weight.numel and (budget - at_random) * weight.candidate.fan_in < per_output * weight.numel
    ]
    if not names:
        return ""
    few = (
        "no more than one weight per output, at random places"
        if at_random
        else f"fewer than one weight for every {_STARVED} outputs"
    )
    return (
        f"with the same sparsity as all other layers, {enumerated(names)} will have {few}, and hardly any signal"
        " passes. Give allocation='erk', or leave it dense with exclude="
    )


def check_met(group: MaskPool) -> None:
    """Find what a selection on a GPU does not look for: that fewer weights could be ranked than were to be chosen.

    To be called on new masks before they go to other processes.

    Raises:
        ValueError: A layer holds more or fewer weights than its budget.
    """
    for weight, active in zip(group, group.counts([weight.mask for weight in group]), strict=True):
        if active != weight.budget:
            raise ValueError(
                f"{weight.name} has {active} active weights after an update, but its budget is {weight.budget}. If"
                " scores are NaN, which cannot be ranked, training has diverged: lower the learning rate, or clip"
                " gradients. If none is NaN, the method chose another number of weights than it was asked for."
            )
