"""One method after another: masks that are there when a method begins, and what it makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.moments import clear_moments
from lightning_sparse.masks.randomness import random_scores
from lightning_sparse.masks.weight import MaskedWeight

__all__ = ["forget_pruned", "inherit_", "looks_pruned", "waking_zeros"]

# A layer in which this share of the weights is zero was pruned, unless someone has initialized it so.
_PRUNED = 0.1


@torch.no_grad()
def inherit_(group: MaskGroup, inherited: Mapping[str, Tensor], seed: int) -> None:
    r"""Bring the masks with which a method would begin as near to the inherited ones as its budgets allow.

    In a layer that would begin with :math:`n` active weights and inherits :math:`a` stay active, of the inherited, the
    :math:`\min(n, a)` with the largest magnitude. Where :math:`n > a`, as many of the method's own are added, drawn at
    random. A layer that would begin dense begins with what it inherits.

    Args:
        group: Its masks are those with which the method would begin alone.
        inherited: ``bool`` masks by name, of what this process holds; a weight that is not among them keeps its own.
        seed: Of the draw.
    """
    group.each(partial(_inherit, inherited=inherited, seed=seed))


def _inherit(weight: MaskedWeight, inherited: Mapping[str, Tensor], seed: int) -> None:
    if weight.name in inherited:
        its_own, before = weight.mask.clone(), inherited[weight.name].to(weight.mask.device)
        is_dense = weight.count(its_own) == weight.numel
        weight.mask.copy_(before if is_dense else _nearest(weight, its_own, before, seed))
        weight.budget = weight.count(weight.mask)


def _nearest(weight: MaskedWeight, its_own: Tensor, before: Tensor, seed: int) -> Tensor:
    budget, available = weight.count(its_own), weight.count(before)
    if budget <= available:
        return weight.largest(weight.value, budget, among=before, key=torch.abs)
    new = weight.largest(random_scores(weight, seed, step=0), budget - available, among=its_own & ~before)
    return before | new


def forget_pruned(group: MaskGroup, inherited: Mapping[str, Tensor]) -> None:
    """Clear the moments that a resumed optimizer has of weights that are pruned now, or were until now."""
    for weight in group:
        before = inherited.get(weight.name)
        stays = weight.mask if before is None else weight.mask & before.to(weight.mask.device)
        clear_moments(group.optimizer, weight.parameter, ~stays)


def waking_zeros(groups: Sequence[MaskGroup], inherited: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights that seem to come from a sparse training, and whose zeros would be trained again."""
    return [
        weight.name
        for group in groups
        for weight, wakes in zip(group, group.each(_would_wake), strict=True)
        if weight.name not in inherited and wakes
    ]


def _would_wake(weight: MaskedWeight) -> bool:
    zeros = weight.value == 0
    # a layer that begins at zero was not pruned
    return weight.count(zeros) < weight.numel and looks_pruned(weight.count(zeros & weight.mask), weight.numel)


def looks_pruned(zeros: int, numel: int) -> bool:
    """Whether so many of a layer's weights are zero that it seems to come from a sparse training.

    Example:
        >>> looks_pruned(zeros=1, numel=3)
        True
    """
    return zeros > _PRUNED * numel
