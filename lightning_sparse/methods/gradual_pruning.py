"""Gradual pruning: sparsity grows along a schedule, and a pruned weight stays pruned."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_sparse.functional.allocation import erdos_renyi, erdos_renyi_kernel, num_active, uniform
from lightning_sparse.functional.masks import largest
from lightning_sparse.masks.randomness import random_scores
from lightning_sparse.masks.registry import MaskedWeight, MaskGroup
from lightning_sparse.methods.hard_mask import HardMaskMethod
from lightning_sparse.schedules import Duration, Polynomial, Schedule, UpdateTimes, check_fraction

__all__ = ["Allocation", "GradualPruning"]

Allocation = Literal["global", "uniform", "er", "erk"]
"""How a budget is shared among layers: by ranking all weights together, or in stated proportions."""

_SHARES: dict[str, Callable[..., list[int]]] = {"uniform": uniform, "er": erdos_renyi, "erk": erdos_renyi_kernel}


class GradualPruning(HardMaskMethod):
    r"""Prune a little at a time, until the sparsity of the schedule is reached.

    At each update, :math:`n = R - \lfloor (1 - s_t) N \rfloor` of the :math:`R` active of :math:`N` weights are pruned;
    the subclass says which.

    Args:
        sparsity: The final sparsity, in [0, 1), reached from dense along the cubic
            :math:`s_t = s_f (1 - (1 - p)^3)`; or a schedule of it. A schedule that begins above 0 begins with random
            masks, shared among layers by ``allocation`` (by ERK where it is ``"global"``).
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
        schedule = sparsity if isinstance(sparsity, Schedule) else Polynomial(0.0, sparsity)
        check_fraction("sparsity", schedule, below_one=True)
        if allocation not in ("global", *_SHARES):
            raise ValueError(f"allocation is {allocation!r}; it is one of 'global', {', '.join(map(repr, _SHARES))}.")
        if min_active < 0:
            raise ValueError(f"min_active is {min_active}; give the number of weights that every layer keeps, ≥ 0.")
        times = UpdateTimes(every=update_every, start=start, stop=stop)
        super().__init__(times=times, include=include, exclude=exclude, seed=seed)
        self.sparsity = schedule
        self.allocation: Allocation = allocation
        self.min_active = min_active

    @abstractmethod
    def prune(self, weight: Tensor, grad: Tensor, among: Tensor, n: int) -> Tensor:
        """Choose ``n`` active weights to prune.

        Args:
            weight: The weights that are ranked together, shape ``(m,)``.
            grad: The gradient of the loss with respect to them, shape ``(m,)``.
            among: ``bool``, shape ``(m,)``: the active ones that may be pruned.
            n: How many to prune, at least 1 and at most ``among.sum()``.

        Returns:
            ``bool``, shape ``(m,)``: the ones to prune.
        """

    @final
    @override
    def target_sparsity(self, name: str | None = None) -> float:
        if name is None:
            return self.sparsity(self.progress)
        weight = self.registry[name]
        return 1.0 - weight.budget / weight.numel

    @final
    @override
    def initialize_masks(self, group: MaskGroup) -> None:
        self._check_feasible(group)
        sparsity = self.sparsity(0.0)
        if sparsity == 0.0:
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
            self._prune_together(group, group.num_active - num_active(sparsity, group.numel))
        else:
            for weight, budget in zip(group, self._budgets(group, sparsity), strict=True):
                self._prune_layer(weight, weight.num_active - budget)

    def _prune_together(self, group: MaskGroup, n: int) -> None:
        if n > 0:
            weight = group.flatten([weight.parameter for weight in group])
            grad = group.flatten([weight.grad for weight in group])
            group.mask &= ~self.prune(weight, grad, self._prunable(group), n)
        group.count()
        for weight in group:
            weight.budget = weight.num_active

    def _prune_layer(self, weight: MaskedWeight, n: int) -> None:
        if n > 0:
            flat = (weight.flatten(tensor) for tensor in (weight.parameter, weight.grad, weight.mask))
            pruned = self.prune(*flat, n)
            weight.mask.masked_fill_(weight.unflatten(pruned), False)
        weight.budget = weight.num_active - n

    def _prunable(self, group: MaskGroup) -> Tensor:
        """The active weights but for the ``min_active`` largest of each layer."""
        if self.min_active == 0:
            return group.mask
        kept = [
            largest(weight.parameter.abs(), min(self.min_active, weight.num_active), among=weight.mask)
            for weight in group
        ]
        return group.mask & ~group.flatten(kept)

    def _budgets(self, group: MaskGroup, sparsity: float) -> list[int]:
        """One budget for each layer; none above what is active, for what is pruned stays pruned."""
        return _SHARES["erk" if self.allocation == "global" else self.allocation](
            [weight.shape for weight in group],
            min(num_active(sparsity, group.numel), group.num_active),
            capacities=[weight.num_active for weight in group],
            min_active=self.min_active,
        )

    def _check_feasible(self, group: MaskGroup) -> None:
        """Refuse at the start what the last update could not do."""
        least = sum(min(self.min_active, weight.numel) for weight in group)
        budget = num_active(self.sparsity(1.0), group.numel)
        if budget < max(least, 1):
            raise MisconfigurationException(
                f"Sparsity {self.sparsity(1.0)} leaves {budget} of {group.numel} weights, but at least {max(least, 1)}"
                f" must stay active (min_active={self.min_active} in each of {len(group)} layers). The largest feasible"
                f" sparsity is {1 - max(least, 1) / group.numel:.6f}."
            )
