"""Pruning at once, without a Trainer: for a training loop of one's own, or a module that is trained already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_sparse.functional.masks import count_true
from lightning_sparse.masks.budgets import budget_of, check_budget, layer_budgets
from lightning_sparse.masks.layout import is_sharded
from lightning_sparse.masks.patterns import AnyPattern, Pattern, as_pattern
from lightning_sparse.masks.plan import Candidate, judge_parameters, select_weights
from lightning_sparse.masks.pool import MaskPool
from lightning_sparse.masks.registry import MaskRegistry
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.checks import check_choice
from lightning_sparse.methods.scored import Allocation
from lightning_sparse.schedules import as_number, as_schedule, check_fraction

__all__ = ["prune"]

Scores = Mapping[str, Tensor] | Callable[[str, Tensor], Tensor]


@torch.no_grad()
def prune(
    module: nn.Module,
    sparsity: float,
    *,
    allocation: Allocation = "global",
    pattern: Pattern | str = "any",
    scores: Scores | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    r"""Prune a module once, in place, to an exact sparsity.

    Of :math:`N` weights :math:`\lfloor (1 - s) N \rfloor` stay, those with the largest scores.

    The next training of the module by a method goes on from these masks. In a loop of one's own, call
    :func:`~lightning_sparse.apply_masks` after each optimizer step.

    Args:
        module: Any module; frozen weights are pruned too.
        sparsity: Fraction of zeros, in [0, 1), of the masked weights together.
        allocation: ``"global"`` ranks all weights together; ``"uniform"``, ``"er"`` and ``"erk"`` give each layer its
            share.
        pattern: ``"any"``, N of M as ``"2:4"``, or an object such as
            :class:`~lightning_sparse.masks.patterns.Filters`; one other than ``"any"`` goes with an allocation by
            layer.
        scores: What is ranked instead of the weights, by magnitude: a mapping of names to tensors of the weights'
            shapes, or a function of name and weight that gives one.
        include: Patterns of what is masked; see :func:`~lightning_sparse.masks.select_weights`.
        exclude: Patterns of what stays dense.

    Returns:
        The masks, ``bool`` tensors of the weights' shapes by parameter name, ``True`` = active.

    Raises:
        ValueError: An argument is out of its range, scores do not fit or are NaN, or the module is in training.
            Nothing has changed then.
        MisconfigurationException: No weight can be masked, or the sparsity leaves none.

    Example:
        >>> from lightning_sparse import prune
        >>> module = nn.Linear(4, 2, bias=False)
        >>> module.weight = nn.Parameter(torch.tensor([[1.0, -8.0, 2.0, 3.0], [7.0, 4.0, -5.0, 6.0]]))
        >>> prune(module, 0.75)["weight"]
        tensor([[False,  True, False, False],
                [ True, False, False, False]])
    """
    module = getattr(module, "_orig_mod", module)
    if MaskRegistry.find(module):
        raise ValueError(
            f"{type(module).__name__} is in training, where its masks are those of its method. Call prune before fit."
        )
    if any(map(is_sharded, module.parameters())):
        raise ValueError(
            f"{type(module).__name__} is sharded, and prune works on whole weights. Call it before fully_shard or"
            " parallelize_module, or train with GMP, which prunes sharded weights."
        )
    check_fraction("sparsity", as_schedule(sparsity), below_one=True)
    check_choice("allocation", allocation, Allocation)
    shape, number = as_pattern(pattern), float(as_number(sparsity))
    if allocation == "global" and shape != AnyPattern():
        raise ValueError(
            f"pattern is {shape} and allocation 'global', but a pattern is chosen layer by layer. Give"
            " allocation='uniform' or 'erk'."
        )
    pool = MaskPool(_candidates(module, shape, include, exclude))
    check_budget(pool, number, min_active=0)
    ranked = [_scores_of(weight, scores) for weight in pool]
    if allocation == "global":
        flat = [weight.flatten(its) for weight, its in zip(pool, ranked, strict=True)]
        n = pool.numel - budget_of(pool, number)
        pool.mask &= ~pool.smallest(flat, n, pool.mask, key=torch.abs)
    else:
        budgets = layer_budgets(pool, number, allocation, min_active=0)
        for weight, its, budget in zip(pool, ranked, budgets, strict=True):
            k = shape.feasible(weight, budget, weight.mask)
            weight.mask.copy_(shape.largest(weight, its, k, weight.mask, key=torch.abs))
    pool.recount()
    pool.apply_()
    masks = {weight.name: weight.mask.clone(memory_format=torch.contiguous_format) for weight in pool}
    MaskRegistry.leave(module, MaskRegistry.left_in(module) | masks, given=True)
    return masks


def _candidates(
    module: nn.Module, shape: Pattern, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[Candidate]:
    select_weights(module, include=include, exclude=exclude, frozen=True)
    weights = judge_parameters(module, include=include, exclude=exclude).weights
    fitting = [candidate for candidate in weights if not shape.refuses(candidate, is_last=candidate is weights[-1])]
    if not fitting:
        reasons = "; ".join(
            f"{candidate.name}: {shape.refuses(candidate, is_last=candidate is weights[-1])}" for candidate in weights
        )
        raise ValueError(f"No weight can have the pattern {shape}: {reasons}. Give another pattern.")
    return fitting


def _scores_of(weight: MaskedWeight, scores: Scores | None) -> Tensor:
    if scores is None:
        its = weight.value
    elif isinstance(scores, Mapping):
        if weight.name not in scores:
            raise ValueError(
                f"scores has none of {weight.name}; it has some of {', '.join(scores) or 'nothing'}. Give scores for"
                " every masked weight, or leave others out with exclude=."
            )
        its = scores[weight.name]
    else:
        its = scores(weight.name, weight.value)
    if not isinstance(its, Tensor) or its.shape != weight.shape:
        found = tuple(its.shape) if isinstance(its, Tensor) else type(its).__name__
        raise ValueError(f"The scores of {weight.name} are {found}; give a tensor of shape {tuple(weight.shape)}.")
    unranked = count_true(its.isnan())
    if unranked:
        raise ValueError(f"{unranked} scores of {weight.name} are NaN, which cannot be ranked. Give finite scores.")
    return its.to(weight.value.device)
