"""Prune and grow: the number of active weights is given, their places are found."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_sparse.functional.allocation import share
from lightning_sparse.functional.masks import largest, smallest
from lightning_sparse.masks.randomness import random_scores
from lightning_sparse.masks.registry import MaskedWeight, MaskGroup
from lightning_sparse.masks.succession import inherit_
from lightning_sparse.methods.budgets import (
    LayerAllocation,
    budget_of,
    check_budget,
    check_choice,
    check_count,
    check_met,
    layer_budgets,
)
from lightning_sparse.methods.hard_mask import HardMaskMethod
from lightning_sparse.schedules import Cosine, Duration, Schedule, UpdateTimes, as_schedule, check_fraction

__all__ = ["PruneAndGrow"]


class PruneAndGrow(HardMaskMethod):
    r"""Explore topologies: in each layer, prune a fraction of the active weights, grow as many.

    Training begins with random masks. At an update at time :math:`t`, in a layer of :math:`n` active weights, the
    :math:`k = \lfloor f(t)\, n \rfloor` with the smallest magnitude are pruned, and the :math:`k` inactive ones grown
    for which the subclass finds the largest scores. Grown weights begin at zero with cleared moments.

    Where the sparsity of a schedule has changed a layer's budget since the last update, an update does not exchange: it
    prunes or grows, by the same scores, as many as the budget asks for.

    Args:
        sparsity: Sparsity, in [0, 1), of the masked weights together; or a schedule of it, such as
            :class:`~lightning_sparse.schedules.Cyclic`, over the time to ``stop``.
        allocation: How the budget is shared among layers.
        drop_fraction: Fraction of a layer's active weights that an update exchanges, in [0, 1], annealed to 0 along a
            cosine; or a schedule of it.
        update_every: Time between updates; ``int`` = optimizer steps, ``float`` = fraction of training, 10 steps at
            least.
        stop: Time after which the masks stay.
        regrow: Whether a weight that the update has just pruned may be grown by it; its value is then kept.
        update_replaces_step: Whether the optimizer takes no step at an update.
        min_active: Weights that every layer holds at least.
        include: Patterns of what is masked.
        exclude: Patterns of what stays dense.
        seed: Seed of the initial masks and of random growth.
        before: Times of updates at another pace, before those of ``update_every``, which begin where these stop.
    """

    def __init__(
        self,
        sparsity: float | Schedule,
        *,
        allocation: LayerAllocation,
        drop_fraction: float | Schedule,
        update_every: Duration,
        stop: Duration,
        regrow: bool,
        update_replaces_step: bool,
        min_active: int,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        seed: int,
        before: UpdateTimes | None = None,
    ) -> None:
        check_fraction("sparsity", as_schedule(sparsity), below_one=True)
        check_fraction("drop_fraction", as_schedule(drop_fraction), below_one=False)
        schedule = drop_fraction if isinstance(drop_fraction, Schedule) else Cosine(drop_fraction, 0.0)
        check_choice("allocation", allocation, LayerAllocation)
        check_count("min_active", min_active)
        if update_replaces_step and update_every == 1:
            raise ValueError(
                "update_every is 1 and update_replaces_step is on, so the optimizer would never step. Give an"
                " update_every of 10 steps or more, or update_replaces_step=False."
            )
        # What has just been grown needs steps to grow in.
        start = 0 if before is None else before.stop
        times = UpdateTimes(every=update_every, start=start, stop=stop, least=10, before=before)
        super().__init__(times=times, replaces_step=update_replaces_step, include=include, exclude=exclude, seed=seed)
        self.sparsity = as_schedule(sparsity)
        self.allocation: LayerAllocation = allocation
        self.drop_fraction = schedule
        self.regrow = regrow
        self.min_active = min_active

    @abstractmethod
    def grow_scores(self, weight: MaskedWeight) -> Tensor:
        """The score of each weight for growth, larger first; shape of the weight."""

    @final
    @override
    def target_sparsity(self, name: str | None = None) -> float:
        if name is not None:
            return self.registry[name].target_sparsity
        return self.sparsity(self.progress)

    @final
    @override
    def training_ended(self) -> None:
        final = self.sparsity(1.0)
        if any(group.num_active != budget_of(group, final) for group in self.groups):
            rank_zero_warn(
                f"{type(self).__name__}: training ended at step {self.step} with sparsity {self.registry.sparsity:.4f}"
                f" instead of {final:.4f}. Train to the last update, or give an earlier stop."
            )

    @final
    @override
    def initialize_masks(self, group: MaskGroup) -> None:
        for percent in range(101):  # refuse at the start what could not be done later
            check_budget(group, self.sparsity(percent / 100), self.min_active)
        budgets = layer_budgets(group, self.sparsity(0.0), self.allocation, self.min_active)
        for weight, budget in zip(group, budgets, strict=True):
            scores = random_scores(weight, self.seed, step=0)
            weight.mask.copy_(largest(scores, budget, among=torch.ones_like(weight.mask)))
            weight.budget = budget
        inherit_(group, self.inherited, self.seed)
        group.updated_at = 0  # the first exchange comes after a first stretch of training

    @final
    @override
    def update_masks(self, group: MaskGroup) -> None:
        fraction = self.drop_fraction(self.progress)
        for weight, budget in zip(group, self._budgets(group), strict=True):
            missing = budget - weight.num_active
            if missing > 0:
                weight.mask |= largest(self.grow_scores(weight), missing, among=~weight.mask)
            elif missing < 0:
                weight.mask &= ~smallest(weight.parameter, -missing, among=weight.mask, key=torch.abs)
            else:
                self._exchange(weight, share(fraction, weight.num_active))
            weight.budget = budget
        check_met(group)

    def _exchange(self, weight: MaskedWeight, k: int) -> None:
        if not self.regrow:
            k = min(k, weight.numel - weight.num_active)
        pruned = smallest(weight.parameter, k, among=weight.mask, key=torch.abs)
        free = ~weight.mask | pruned if self.regrow else ~weight.mask
        grown = largest(self.grow_scores(weight), k, among=free)
        weight.mask.copy_(weight.mask & ~pruned | grown)

    def _budgets(self, group: MaskGroup) -> list[int]:
        sparsity = self.sparsity(self.progress)
        if group.num_active == budget_of(group, sparsity):
            return [weight.num_active for weight in group]
        return layer_budgets(group, sparsity, self.allocation, self.min_active, grow=True)
