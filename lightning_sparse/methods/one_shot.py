"""Pruning at once, without a Trainer: for your own training loop, or a module that is already trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sparse.functional.masks import count_true
from lightning_sparse.masks.budgets import budget_of, check_budget, feasible_budgets, layer_budgets
from lightning_sparse.masks.layout import is_sharded
from lightning_sparse.masks.patterns import AnyPattern, ConstantFanIn, Pattern, as_pattern
from lightning_sparse.masks.plan import Candidate, judge_parameters, select_weights
from lightning_sparse.masks.pool import MaskPool
from lightning_sparse.masks.registry import MaskRegistry
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.masks.wrappers import unwrapped
from lightning_sparse.methods.checks import check_choice, check_sparsity
from lightning_sparse.methods.scored import Allocation
from lightning_sparse.methods.wanda import wanda_scores

__all__ = ["prune"]

Scores = Mapping[str, Tensor] | Callable[[str, Tensor], Tensor]


@torch.no_grad()
def prune(
    module: nn.Module,
    sparsity: float,
    *,
    allocation: Allocation | None = None,
    pattern: Pattern | str | None = None,
    scores: Scores | Literal["wanda"] | None = None,
    batches: Iterable[Any] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    r"""Prune a module once, in place, to an exact sparsity.

    Of :math:`N` weights, the :math:`\lfloor (1 - s) N \rfloor` with the largest scores stay active. By default, the
    score is the magnitude. With ``scores="wanda"``, for a trained module, it is

    .. math:: S_{ij} = |W_{ij}| \cdot \lVert X_j \rVert_2

    where :math:`X_j` are the weight's inputs in ``batches``. Each output of a layer then keeps the same number of
    inputs, rounded down, and all layers have the same sparsity. Wanda does not train.

    Weights that earlier masks of the module prune are pruned first, whatever their scores. The next method that trains
    the module starts from these masks. In your own training loop, call :func:`~lightning_sparse.masks.apply_masks`
    after each optimizer step.

    Args:
        module: Any module; frozen weights are pruned too. Wrappers such as DDP are ignored.
        sparsity: Fraction of zeros, in [0, 1), of the masked weights together.
        allocation: ``"global"``, the default, ranks all weights together; ``"uniform"``, the default of Wanda, ``"er"``
            and ``"erk"`` give each layer its share.
        pattern: ``"any"``, the default; N:M as ``"2:4"``; or an object such as
            :class:`~lightning_sparse.masks.patterns.Filters`, or
            :class:`~lightning_sparse.masks.patterns.ConstantFanIn`, the default of Wanda. All but ``"any"`` need an
            allocation by layer.
        scores: Scores to rank instead of the weights, by magnitude: a mapping from names to tensors with the weights'
            shapes, a function from name and weight to such a tensor, or ``"wanda"``.
        batches: For Wanda, the module's inputs, about a hundred samples in all: tensors; mappings, as keyword
            arguments; or ``(inputs, targets)`` of a loader, whose inputs are used.
        include: Patterns of the weights to mask; see :func:`~lightning_sparse.masks.select_weights`.
        exclude: Patterns of the weights that stay dense.

    Returns:
        The masks, ``bool`` tensors of the weights' shapes by parameter name, ``True`` = active.

    Raises:
        ValueError: An argument is out of its range, scores do not fit or are NaN, or the module is in training.
            In these cases nothing has changed.
        MisconfigurationException: No weight can be masked, or the sparsity leaves none.

    Example:
        >>> from lightning_sparse import prune
        >>> module = nn.Linear(4, 2, bias=False)
        >>> module.weight = nn.Parameter(torch.tensor([[1.0, -8.0, 2.0, 3.0], [7.0, 4.0, -5.0, 6.0]]))
        >>> prune(module, 0.75)["weight"]
        tensor([[False,  True, False, False],
                [ True, False, False, False]])

        With Wanda, each output keeps its most important inputs. Here the third input is always 0:

        >>> module.weight = nn.Parameter(torch.tensor([[1.0, -8.0, 9.0, 3.0], [7.0, 4.0, -9.0, 6.0]]))
        >>> prune(module, 0.5, scores="wanda", batches=[torch.tensor([[1.0, 1.0, 0.0, 1.0]])])["weight"]
        tensor([[False,  True, False,  True],
                [ True, False, False,  True]])

    References:
        Sun, Liu, Bair & Kolter, `A Simple and Effective Pruning Approach for Large Language Models
        <https://arxiv.org/abs/2306.11695>`_, ICLR 2024 (Wanda).
    """
    module = unwrapped(module)
    if MaskRegistry.find(module):
        raise ValueError(
            f"{type(module).__name__} is in training, and its method holds its masks. Call prune before fit."
        )
    if any(map(is_sharded, module.parameters())):
        raise ValueError(
            f"{type(module).__name__} is sharded, and prune works on whole weights. Call it before fully_shard or"
            " parallelize_module, or train with GMP, which prunes sharded weights."
        )
    number = check_sparsity("sparsity", sparsity)
    by_wanda = _asks_for_wanda(scores, batches)
    allocation = allocation or ("uniform" if by_wanda else "global")
    if pattern is None:
        pattern = ConstantFanIn() if by_wanda and allocation != "global" else "any"
    check_choice("allocation", allocation, Allocation)
    shape = as_pattern(pattern)
    if allocation == "global" and shape != AnyPattern():
        raise ValueError(
            f"pattern is {shape} and allocation 'global', but a pattern is chosen layer by layer. Give"
            " allocation='uniform' or 'erk'."
        )
    pool = MaskPool(_candidates(module, shape, include, exclude))
    check_budget(pool, number, min_active=0, pattern=shape)
    if isinstance(scores, str):
        scores = wanda_scores(module, batches or (), [weight.candidate for weight in pool])
    left = MaskRegistry.left_in(module)
    ranked = [_scores_of(weight, scores, left) for weight in pool]
    if allocation == "global":
        flat = [weight.flatten(its) for weight, its in zip(pool, ranked, strict=True)]
        n = pool.numel - budget_of(pool, number)
        pool.mask &= ~pool.smallest(flat, n, pool.mask, key=torch.abs)
    else:
        budgets = layer_budgets(pool, number, allocation, min_active=0)
        budgets = feasible_budgets(pool, budgets, shape, lambda weight: weight.mask)
        for weight, its, budget in zip(pool, ranked, budgets, strict=True):
            weight.mask.copy_(shape.largest(weight, its, budget, weight.mask, key=torch.abs))
    pool.recount()
    pool.apply_()
    masks = {weight.name: weight.mask.clone(memory_format=torch.contiguous_format) for weight in pool}
    MaskRegistry.leave(module, left | masks, given=True)
    return masks


def _asks_for_wanda(scores: Scores | str | None, batches: Iterable[Any] | None) -> bool:
    if isinstance(scores, str) and scores != "wanda":
        raise ValueError(f"scores is {scores!r}; give 'wanda', a mapping of names to tensors, or a function.")
    if isinstance(scores, str) != (batches is not None):
        raise ValueError(
            "scores='wanda' needs the layers' inputs: give batches= too, about a hundred training samples."
            if isinstance(scores, str)
            else "batches are used only with scores='wanda'; give both, or leave batches out."
        )
    return isinstance(scores, str)


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


def _scores_of(weight: MaskedWeight, scores: Scores | None, left: Mapping[str, Tensor]) -> Tensor:
    if scores is None:
        its = weight.value
    elif isinstance(scores, Mapping):
        if weight.name not in scores:
            raise ValueError(
                f"scores has none for {weight.name}; it has scores for {', '.join(scores) or 'no weight'}. Give scores"
                " for every masked weight, or leave others out with exclude=."
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
    its = its.to(weight.value.device)
    return its.masked_fill(~left[weight.name], 0.0) if weight.name in left else its
