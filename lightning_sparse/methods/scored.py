"""Methods that rank weights by scores: prune to what is kept, grow to the budget, both by scores."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from itertools import pairwise
from typing import Any, ClassVar, Literal, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_sparse.arguments import check_whole
from lightning_sparse.functional.selection import Scores
from lightning_sparse.masks.budgets import (
    budget_of,
    check_budget,
    check_met,
    feasible_budgets,
    layer_budgets,
    told_of_starved,
)
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.inheritance import inherit_
from lightning_sparse.masks.patterns import AnyPattern, Pattern, as_pattern
from lightning_sparse.masks.plan import Candidate
from lightning_sparse.masks.pool import MaskPool
from lightning_sparse.masks.randomness import random_scores
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.checks import check_choice, check_count
from lightning_sparse.methods.hard_mask import HardMaskMethod
from lightning_sparse.methods.state import check_budgets
from lightning_sparse.schedules import (
    Duration,
    Polynomial,
    Schedule,
    UpdateTimes,
    as_number,
    as_schedule,
    check_fraction,
)

__all__ = ["Allocation", "ScoredMethod"]

Allocation = Literal["global", "uniform", "er", "erk"]
"""How a budget is shared among layers, by ranking all weights together or in stated proportions."""


@method
class ScoredMethod(HardMaskMethod, ABC):
    r"""Prunes, and optionally grows, by scores, to exact budgets along a schedule of sparsity.

    At an update, each layer with budget :math:`b` is pruned to as many weights as :meth:`kept` says, those with the
    smallest :meth:`drop_scores` first. Then it is grown to :math:`b`, weights with the largest :meth:`grow_scores`
    first. With ``allocation="global"``, the weights of all layers are first ranked together, and those are pruned that
    the schedule asks for.

    Scores are compared by magnitude: :math:`w` ranks like :math:`|w|`, without a copy.

    Attributes:
        grows: Whether an update may make pruned weights active; otherwise pruned weights stay pruned.
        begins_dense: Whether a number as ``sparsity`` is the end of a cubic from 0; otherwise it is constant.
    """

    sparsity: float | Schedule = field(
        kw_only=False,
        metadata=doc(
            "Sparsity of all masked weights together, in [0, 1); or a schedule of it over the time to ``stop``."
        ),
    )
    allocation: Allocation = field(
        default="erk",
        metadata=doc(
            'How layers share the budget: ``"global"`` ranks all weights together; ``"uniform"`` gives each layer the'
            ' same sparsity; with ``"er"`` (Erdős–Rényi) and ``"erk"`` (with kernels) small layers keep more.'
        ),
    )
    pattern: Pattern | str = field(
        default="any",
        metadata=doc(
            'Which masks a layer may have: ``"any"``; ``"2:4"`` and other N:M along the inputs;'
            " :class:`~lightning_sparse.masks.patterns.ConstantFanIn` or"
            " :class:`~lightning_sparse.masks.patterns.Filters`. A layer whose shape does not fit stays dense."
        ),
    )
    update_every: Duration = field(
        default=0.01,
        metadata=doc(
            "Time between updates; ``int`` = optimizer steps, ``float`` = fraction of training, at least 10 steps."
        ),
    )
    start: Duration = field(default=0.0, metadata=doc("Time of the first update."))
    stop: Duration = field(
        default=0.8, metadata=doc("Time of the last update, at which the final sparsity is reached.")
    )
    min_active: int = field(default=0, metadata=doc("The least number of weights that each layer keeps."))
    seed: int = field(default=0, metadata=doc("Seed of every random choice."))

    grows: ClassVar[bool] = True
    begins_dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("sparsity", as_schedule(self.sparsity), below_one=True)
        if not isinstance(self.sparsity, Schedule):
            number = as_number(self.sparsity)
            self.sparsity = Polynomial(0.0, number) if self.begins_dense else as_schedule(number)
        if not self.grows:
            _check_never_falls(self.sparsity)
        check_choice("allocation", self.allocation, Allocation)
        check_count("min_active", self.min_active)
        self.seed = check_whole("seed", self.seed, least=-(1 << 63))
        self.pattern = as_pattern(self.pattern)
        if self.allocation == "global" and self._shaped:
            raise ValueError(
                f"pattern is {self.pattern} and allocation 'global', but a pattern is chosen layer by layer. Give"
                " allocation='uniform' or 'erk'."
            )
        _ = self.times  # refuses what are no durations

    # What a method says.

    def drop_scores(self, weight: MaskedWeight) -> Tensor:
        """Scores for pruning, smallest magnitude first; shaped like ``weight.value``."""
        return weight.value

    def dropped(self, pool: MaskedWeight | MaskPool, among: Tensor, n: int) -> Tensor:
        """The mask of the ``n`` weights to prune, among those that ``pool`` ranks together.

        Args:
            pool: One layer, or all of them.
            among: ``bool``: the active weights that may be pruned; shaped like a layer's value, or flat for all layers.
            n: The number of weights to prune, at least 1.
        """
        return pool.smallest(self.ranked(pool, self.drop_scores), n, among, key=torch.abs)

    def pattern_scores(self, weight: MaskedWeight, keep: int) -> Tensor:
        """Scores for pruning with a :attr:`pattern`, in place of :meth:`dropped`: the largest magnitudes stay active.

        Args:
            weight: One layer.
            keep: How many weights stay active.
        """
        return self.drop_scores(weight)

    def grow_scores(self, weight: MaskedWeight) -> Tensor:
        """Scores for growth, largest magnitude first; shaped like ``weight.value``."""
        return random_scores(weight, self.seed, self.step)

    def budgets(self, group: MaskGroup) -> list[int]:
        """The number of active weights of each layer after this update; with a :attr:`pattern`, the largest number."""
        if self.allocation == "global":
            return self._budgets_together(group)
        if self.grows and group.num_active == budget_of(group, self.sparsity_now) and not self._shaped:
            return [weight.num_active for weight in group]
        return layer_budgets(group, self.sparsity_now, self.allocation, self.min_active, grow=self.grows)

    def kept(self, group: MaskGroup, budgets: Sequence[int]) -> list[int]:
        """How many weights pruning leaves in each layer, before growth fills it up to its budget."""
        return [min(weight.num_active, budget) for weight, budget in zip(group, budgets, strict=True)]

    # What the family does.

    @property
    def sparsity_now(self) -> float:
        """The sparsity that the schedule asks for now."""
        assert isinstance(self.sparsity, Schedule)
        return self.sparsity(self.progress)

    @property
    def shape(self) -> Pattern:
        """The pattern as an object."""
        assert isinstance(self.pattern, Pattern)
        return self.pattern

    @property
    def _shaped(self) -> bool:
        return self.pattern != AnyPattern()

    @property
    @override
    def times(self) -> UpdateTimes:
        # An update costs more than a step, and what has just been grown needs steps to grow in.
        return UpdateTimes(every=self.update_every, start=self.start, stop=self.stop, least=10)

    @staticmethod
    def ranked(pool: MaskedWeight | MaskPool, scores: Callable[[MaskedWeight], Tensor]) -> Scores:
        """The scores of one layer, or of all as flat tensors that are ranked together."""
        return pool.flat(scores) if isinstance(pool, MaskPool) else scores(pool)

    @override
    def refuses(self, candidate: Candidate, *, is_last: bool) -> str:
        return self.shape.refuses(candidate, is_last=is_last)

    @final
    @override
    def update_masks(self, group: MaskGroup) -> None:
        self.before_update(group)
        if self.allocation == "global":
            self.prune_together(group, group.num_active - budget_of(group, self.sparsity_now))
        budgets = self.budgets(group)
        if self._shaped:
            budgets = feasible_budgets(group, budgets, self.shape, self.allowed)
        group.each(self._renew, self.kept(group, budgets), budgets)
        check_met(group)
        self.after_update(group)

    def _renew(self, weight: MaskedWeight, keep: int, budget: int) -> None:
        if not self.regrows:  # what grows then needs a place among those that were pruned before
            keep = max(keep, budget - (weight.numel - weight.num_active))
        mask, weight.budget = self.pruned_to(weight, keep), budget
        if self.grows and (budget > keep or self._shaped):
            free = self.free(weight, mask)
            weight.budget = self.shape.feasible(weight, budget, mask | free) if self._shaped else budget
            mask = self.grown_to(weight, mask, weight.budget - keep, free)
        weight.mask.copy_(mask)

    def before_update(self, group: MaskGroup) -> None:
        """An update is about to choose the masks of ``group``."""

    def after_update(self, group: MaskGroup) -> None:
        """The masks of ``group`` are chosen."""

    @final
    def prune_together(self, group: MaskGroup, n: int) -> None:
        """Prune ``n`` weights of all layers together, as :meth:`dropped` says."""
        if n > 0:
            group.mask &= ~self.dropped(group, self._prunable(group), n)
            left = group.num_active - n
            group.recount()
            if group.num_active != left:
                raise ValueError(
                    f"{type(self).__name__} should have left {left} weights active, but left {group.num_active}."
                    " Scores of NaN cannot be ranked. If some scores are NaN, training has diverged: lower the learning"
                    " rate, or clip gradients."
                )

    def _budgets_together(self, group: MaskGroup) -> list[int]:
        """What is active and, where the schedule falls, the largest of all scores of growth."""
        active = [weight.num_active for weight in group]
        n = budget_of(group, self.sparsity_now) - sum(active)
        if not self.grows or n <= 0:
            return active
        if n == group.numel - sum(active):
            return [weight.numel for weight in group]
        grown = group.smallest(group.flat(self.grow_scores), n, ~group.mask, key=lambda part: part.abs().neg_())
        return [sum(pair) for pair in zip(active, group.counts(group.split(grown)), strict=True)]

    def _prunable(self, group: MaskGroup) -> Tensor:
        """The active weights but for the ``min_active`` largest of each layer."""
        if self.min_active == 0:
            return group.mask
        kept = group.each(
            lambda weight: weight.largest(weight.value, min(self.min_active, weight.num_active), key=torch.abs)
        )
        return group.mask & ~group.flatten(kept)

    def allowed(self, weight: MaskedWeight) -> Tensor:
        """Where the pattern of a layer may have weights after this update."""
        return torch.ones_like(weight.mask) if self.grows else weight.mask

    def pruned_to(self, weight: MaskedWeight, keep: int) -> Tensor:
        """The mask of a layer that is pruned to ``keep`` weights."""
        if self._shaped:
            feasible = self.shape.feasible(weight, keep, weight.mask)
            scores = self.pattern_scores(weight, feasible)
            return self.shape.largest(weight, scores, feasible, weight.mask, key=torch.abs)
        n = weight.num_active - keep
        return weight.mask & ~self.dropped(weight, weight.mask, n) if n > 0 else weight.mask

    def free(self, weight: MaskedWeight, kept: Tensor) -> Tensor:
        """Where a layer that was pruned to ``kept`` may grow."""
        return ~kept if self.regrows else ~kept & ~weight.mask

    def grown_to(self, weight: MaskedWeight, kept: Tensor, n: int, free: Tensor) -> Tensor:
        """The mask of a layer that was pruned to ``kept`` and grows ``n`` of the ``free``, to ``weight.budget``."""
        scores = self.grow_scores(weight)
        if self._shaped:
            first = scores.abs().masked_fill(kept, torch.inf)
            return self.shape.largest(weight, first, weight.budget, kept | free)
        return kept | weight.largest(scores, n, free, key=torch.abs)

    @property
    @override
    def warms_moments(self) -> bool:
        return self.grows

    @property
    def regrows(self) -> bool:
        """Whether a weight that the update has just pruned may be grown by it."""
        return True

    @final
    @override
    def initialize_masks(self, group: MaskGroup) -> None:
        assert isinstance(self.sparsity, Schedule)
        for percent in range(101) if self.grows else (100,):  # refuse at the start what could not be done later
            check_budget(group, self.sparsity(percent / 100), self.min_active, self.shape)
        first = self.sparsity(0.0)
        if self.allocation == "uniform" and not self._shaped:
            last = layer_budgets(group, self.sparsity(1.0), "uniform", self.min_active, grow=True)
            told = told_of_starved(group, last, at_random=False)
            if first > 0.0 and not self.inherited:
                drawn = layer_budgets(group, first, "uniform", self.min_active)
                told = told_of_starved(group, drawn, at_random=True) or told
            if told:
                self.warn_once(told)
        # What never grows begins with what it inherits; its first update prunes the rest.
        if first > 0.0 and (self.grows or not self.inherited):
            self._draw(group, first)
        inherit_(group, self.inherited, self.seed)
        if self._shaped:
            group.each(self._shape)
        self.clock_starts(group)

    def _shape(self, weight: MaskedWeight) -> None:
        """Of masks without the pattern the largest weights that fit it stay."""
        weight.budget = self.shape.feasible(weight, weight.count(weight.mask), weight.mask)
        mask = self.shape.largest(weight, weight.value, weight.budget, weight.mask, key=torch.abs)
        if not self.grows and (woken := weight.count(mask & ~weight.mask)):
            raise MisconfigurationException(
                f"{type(self).__name__} starts from a mask of {weight.name} that does not satisfy the pattern"
                f" {self.shape}: it would train {woken:,} of the zeros again. Use pattern='any', or a method that grows"
                " weights."
            )
        weight.mask.copy_(mask)

    def _draw(self, group: MaskGroup, sparsity: float) -> None:
        """Random masks of a sparsity."""
        allocation = "erk" if self.allocation == "global" else self.allocation
        budgets = layer_budgets(group, sparsity, allocation, self.min_active)
        if self._shaped:
            budgets = feasible_budgets(group, budgets, self.shape, lambda weight: torch.ones_like(weight.mask))

        def draw(weight: MaskedWeight, budget: int) -> None:
            weight.budget = budget
            scores = random_scores(weight, self.seed, step=0)
            weight.mask.copy_(self.shape.largest(weight, scores, budget, torch.ones_like(weight.mask)))

        group.each(draw, budgets)

    @override
    def load_method_state(self, state: Mapping[str, Any]) -> None:
        super().load_method_state(state)
        check_budgets(self.groups, self.state_key)

    @final
    @override
    def target_sparsity(self, name: str | None = None) -> float:
        if name is not None:
            return self.registry[name].target_sparsity
        if self._shaped and self.weights:
            total = sum(weight.unshared_numel for weight in self.weights)
            return 1.0 - sum(weight.budget for weight in self.weights) / total
        return self.sparsity_now

    @override
    def training_ended(self) -> None:
        assert isinstance(self.sparsity, Schedule)
        last = self.sparsity(1.0)
        exact = self.grows and not self._shaped
        for group in self.groups:
            budget = budget_of(group, last)
            if group.num_active > budget or (exact and group.num_active != budget):
                advice = "Train to the last update, resume from a checkpoint to do so, or give an earlier stop."
                if group.not_finite_for:
                    advice = (
                        f"Gradients were inf or NaN at the last {group.not_finite_for} updates, and masks do not"
                        " change then: lower the learning rate, or clip gradients."
                    )
            elif group.num_active < budget and not self._shaped:
                advice = (
                    "It began with more zeros, and this method grows none of them; use one that does, such as RigL."
                )
            else:
                continue
            rank_zero_warn(
                f"{type(self).__name__}: training ended at step {self.step} with sparsity"
                f" {self.registry.sparsity:.4f} instead of {last:.4f}. {advice}"
            )
            return


def _check_never_falls(schedule: Schedule) -> None:
    values = [schedule(percent / 100) for percent in range(101)]
    for before, after in pairwise(values):
        if after < before:
            raise ValueError(
                f"sparsity falls from {before:g} to {after:g} along {schedule}, but pruned weights stay pruned. Give a"
                " schedule that never falls, or a method that grows weights."
            )
