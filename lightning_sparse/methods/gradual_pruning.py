"""Gradual pruning: sparsity grows along a schedule, and a pruned weight stays pruned."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_sparse.functional.masks import largest
from lightning_sparse.masks.randomness import random_scores
from lightning_sparse.masks.registry import MaskedWeight, MaskGroup
from lightning_sparse.masks.succession import inherit_
from lightning_sparse.methods.budgets import (
    budget_of,
    check_budget,
    check_choice,
    check_count,
    check_met,
    layer_budgets,
)
from lightning_sparse.methods.hard_mask import HardMaskMethod
from lightning_sparse.schedules import Duration, Polynomial, Schedule, UpdateTimes, as_schedule, check_fraction

__all__ = ["Allocation", "GradualPruning"]

Allocation = Literal["global", "uniform", "er", "erk"]
"""How a budget is shared among layers: by ranking all weights together, or in stated proportions."""


class GradualPruning(HardMaskMethod):
    r"""Prune a little at a time, until the sparsity of the schedule is reached.

    At each update, :math:`n = R - \lfloor (1 - s_t) N \rfloor` of the :math:`R` active of :math:`N` weights are pruned;
    the subclass says which.

    Args:
        sparsity: The final sparsity, in [0, 1), reached from dense along the cubic
            :math:`s_t = s_f (1 - (1 - p)^3)`; or a schedule of it. A schedule that begins above 0 begins with random
            masks, shared among layers by ``allocation`` (by ERK where it is ``"global"``), unless another
            method has left its own: they are pruned further once the schedule asks for more.
        allocation: Which weights are ranked together: all, or those of a layer, with its share of the budget.
        update_every: Time between updates; ``int`` = optimizer steps, ``float`` = fraction of training.
        start: Time of the first update.
        stop: Time of the last update, at which the final sparsity is reached.
        min_active: Weights that every layer keeps.
        include: Patterns of what is masked.
        exclude: Patterns of what stays dense.
        seed: Seed of random initial masks.
    """

    def __init__(
        self,
        sparsity: float | Schedule,
        *,
        allocation: Allocation,
        update_every: Duration,
        start: Duration,
        stop: Duration,
        min_active: int,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        seed: int,
    ) -> None:
        check_fraction("sparsity", as_schedule(sparsity), below_one=True)
        schedule = sparsity if isinstance(sparsity, Schedule) else Polynomial(0.0, sparsity)
        _check_never_falls(schedule)
        check_choice("allocation", allocation, Allocation)
        check_count("min_active", min_active)
        times = UpdateTimes(every=update_every, start=start, stop=stop)
        super().__init__(times=times, include=include, exclude=exclude, seed=seed)
        self.sparsity = schedule
        self.allocation: Allocation = allocation
        self.min_active = min_active

    @abstractmethod
    def prune(self, weights: Sequence[Tensor], grads: Sequence[Tensor], among: Tensor, n: int) -> Tensor:
        """Choose ``n`` active weights to prune.

        Args:
            weights: The m weights that are ranked together, as flat tensors, one for each layer.
            grads: The gradients of the loss with respect to them, likewise.
            among: ``bool``, shape ``(m,)``: the active ones that may be pruned.
            n: How many to prune, at least 1 and at most ``among.sum()``.

        Returns:
            ``bool``, shape ``(m,)``: the ones to prune, as by :func:`~lightning_sparse.functional.masks.smallest`.
        """

    @final
    @override
    def target_sparsity(self, name: str | None = None) -> float:
        if name is None:
            return self.sparsity(self.progress)
        return self.registry[name].target_sparsity

    @final
    @override
    def training_ended(self) -> None:
        final = self.sparsity(1.0)
        if any(group.num_active > budget_of(group, final) for group in self.groups):
            rank_zero_warn(
                f"{type(self).__name__}: training ended at step {self.step} with sparsity {self.registry.sparsity:.4f}"
                f" instead of {final:.4f}. Train to the last update, or give an earlier stop."
            )

    @final
    @override
    def initialize_masks(self, group: MaskGroup) -> None:
        check_budget(group, self.sparsity(1.0), self.min_active)  # refuse at the start what the end could not do
        sparsity = self.sparsity(0.0)
        if self.inherited or sparsity == 0.0:  # what is pruned stays pruned, and the first update prunes the rest
            inherit_(group, self.inherited, self.seed)
            return
        for weight, budget in zip(group, self._budgets(group, sparsity), strict=True):
            scores = random_scores(weight, self.seed, step=0)
            weight.mask.copy_(largest(scores, budget, among=torch.ones_like(weight.mask)))
            weight.budget = budget

    @final
    @override
    def update_masks(self, group: MaskGroup) -> None:
        sparsity = self.sparsity(self.progress)
        if self.allocation == "global":
            self._prune_together(group, group.num_active - budget_of(group, sparsity))
        else:
            for weight, budget in zip(group, self._budgets(group, sparsity), strict=True):
                self._prune_layer(weight, weight.num_active - budget)
            check_met(group)

    def _prune_together(self, group: MaskGroup, n: int) -> None:
        remaining = group.num_active - max(n, 0)
        if n > 0:
            weights = [weight.flatten(weight.parameter) for weight in group]
            grads = [weight.flatten(weight.grad) for weight in group]
            group.mask &= ~self.prune(weights, grads, self._prunable(group), n)
        group.recount()
        if group.num_active != remaining:
            raise ValueError(
                f"{type(self).__name__}.prune was to leave {remaining} weights active and left {group.num_active}."
                " Scores of NaN cannot be ranked: if there are some, training has diverged; lower the learning rate, or"
                " clip gradients."
            )
        for weight in group:
            weight.budget = weight.num_active

    def _prune_layer(self, weight: MaskedWeight, n: int) -> None:
        if n > 0:
            value, grad, mask = (weight.flatten(t) for t in (weight.parameter, weight.grad, weight.mask))
            weight.mask.masked_fill_(weight.unflatten(self.prune([value], [grad], mask, n)), False)
        weight.budget = weight.num_active - n

    def _prunable(self, group: MaskGroup) -> Tensor:
        """The active weights but for the ``min_active`` largest of each layer."""
        if self.min_active == 0:
            return group.mask
        kept = [
            largest(weight.parameter, min(self.min_active, weight.num_active), weight.mask, key=torch.abs)
            for weight in group
        ]
        return group.mask & ~group.flatten(kept)

    def _budgets(self, group: MaskGroup, sparsity: float) -> list[int]:
        return layer_budgets(
            group, sparsity, "erk" if self.allocation == "global" else self.allocation, self.min_active
        )


def _check_never_falls(schedule: Schedule) -> None:
    values = [schedule(percent / 100) for percent in range(101)]
    for before, after in pairwise(values):
        if after < before:
            raise ValueError(
                f"sparsity falls from {before:g} to {after:g} along {schedule}, but what is pruned stays pruned. Give a"
                " schedule that never falls, or a method that grows weights."
            )
