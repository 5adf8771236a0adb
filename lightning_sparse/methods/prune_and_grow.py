"""Prune and grow: the number of active weights is constant, their places are not."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sparse.functional.allocation import share
from lightning_sparse.functional.masks import largest, smallest
from lightning_sparse.masks.randomness import random_scores
from lightning_sparse.masks.registry import MaskedWeight, MaskGroup
from lightning_sparse.methods.budgets import LayerAllocation, check_budget, check_choice, check_count, layer_budgets
from lightning_sparse.methods.hard_mask import HardMaskMethod
from lightning_sparse.schedules import Constant, Cosine, Duration, Schedule, UpdateTimes, as_schedule, check_fraction

__all__ = ["PruneAndGrow"]


class PruneAndGrow(HardMaskMethod):
    r"""Explore topologies at constant sparsity: in each layer, prune a fraction of the active weights, grow as many.

    Training begins with random masks. At an update at time :math:`t`, in a layer of :math:`n` active weights, the
    :math:`k = \lfloor f(t)\, n \rfloor` with the smallest magnitude are pruned, and the :math:`k` inactive ones grown
    for which the subclass finds the largest scores. Grown weights begin at zero with cleared moments.

    Args:
        sparsity: Sparsity, in [0, 1), of the masked weights together.
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
    """

    def __init__(
        self,
        sparsity: float,
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
    ) -> None:
        check_fraction("sparsity", Constant(sparsity), below_one=True)
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
        times = UpdateTimes(every=update_every, start=0, stop=stop, least=10)
        super().__init__(times=times, replaces_step=update_replaces_step, include=include, exclude=exclude, seed=seed)
        self.sparsity = sparsity
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
        return self.sparsity

    @final
    @override
    def training_ended(self) -> None:
        """The sparsity was there from the start."""

    @final
    @override
    def initialize_masks(self, group: MaskGroup) -> None:
        check_budget(group, self.sparsity, self.min_active)
        budgets = layer_budgets(group, self.sparsity, self.allocation, self.min_active)
        for weight, budget in zip(group, budgets, strict=True):
            scores = random_scores(weight, self.seed, step=0)
            weight.mask.copy_(largest(scores, budget, among=torch.ones_like(weight.mask)))
            weight.budget = budget
        group.updated_at = 0  # the first exchange comes after a first stretch of training

    @final
    @override
    def update_masks(self, group: MaskGroup) -> None:
        fraction = self.drop_fraction(self.progress)
        for weight in group:
            k = share(fraction, weight.num_active)
            if not self.regrow:
                k = min(k, weight.numel - weight.num_active)
            pruned = smallest(weight.parameter.abs(), k, among=weight.mask)
            free = ~weight.mask | pruned if self.regrow else ~weight.mask
            grown = largest(self.grow_scores(weight), k, among=free)
            weight.mask.copy_(weight.mask & ~pruned | grown)
