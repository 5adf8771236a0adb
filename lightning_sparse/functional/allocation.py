r"""Allocation of a network's budget of active weights to its layers, in exact integers.

Layer :math:`l` has :math:`n_l` weights and a score :math:`r_l`. Its budget is
:math:`b_l = \min(n_l, \epsilon\, r_l n_l)` with the one :math:`\epsilon` for which :math:`\sum_l b_l = b`: a layer that
would exceed 100 % is dense and :math:`\epsilon` is solved again for the others. The fractions are rounded by largest
remainder, so the sum is exact.

Erdős–Rényi:        Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity
                    inspired by network science", Nature Communications 2018.
Erdős–Rényi–Kernel: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, §3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

__all__ = [
    "erdos_renyi",
    "erdos_renyi_kernel",
    "largest_feasible_sparsity",
    "num_active",
    "proportional",
    "share",
    "uniform",
]

Shape = Sequence[int]


def num_active(sparsity: float, numel: int) -> int:
    r"""The budget of ``numel`` weights at a sparsity: :math:`\lfloor (1 - s)\, n \rfloor`.

    The sparsity is used as the decimal that you write: ``num_active(0.9, 10)`` is 1, although ``(1 - 0.9) * 10`` is
    0.9999… in floating point.

    Args:
        sparsity: Fraction of zeros, from 0 up to 1.
        numel: Number of weights.

    Example:
        >>> num_active(0.9, 10), num_active(0.9999, 21_265_088)
        (1, 2126)
    """
    return math.floor((1 - Fraction(str(float(sparsity)))) * numel)


def share(rate: float, numel: int, *, up: bool = False) -> int:
    r"""A fraction of ``numel`` weights: :math:`\lfloor r\, n \rfloor`, with the rate as the decimal that you write.

    Args:
        rate: Fraction in [0, 1].
        numel: Number of weights.
        up: Whether to round up: :math:`\lceil r\, n \rceil`.

    Example:
        >>> share(0.29, 100), int(0.29 * 100)
        (29, 28)
        >>> share(0.005, 12), share(0.005, 12, up=True)
        (0, 1)
    """
    exact = Fraction(str(float(rate))) * numel
    return math.ceil(exact) if up else math.floor(exact)


def largest_feasible_sparsity(least: int, numel: int) -> str:
    """The largest sparsity that keeps ``least`` of ``numel`` weights, rounded down to a short decimal.

    Example:
        >>> largest_feasible_sparsity(1, 3)
        '0.666666'
    """
    digits = max(6, len(str(numel)) + 1)
    return f"0.{(numel - least) * 10**digits // numel:0{digits}d}"


def uniform(
    shapes: Sequence[Shape],
    total: int,
    *,
    capacities: Sequence[int] | None = None,
    min_active: int = 0,
    copies: Sequence[int] | None = None,
) -> list[int]:
    """The same sparsity in every layer.

    Args:
        shapes: Shape of each layer's weight.
        total: Active weights of all layers together.
        capacities: The largest budget of each layer; by default its number of weights.
        min_active: The smallest budget of each layer; a smaller layer keeps all its weights.
        copies: How many layers of the same shape each weight holds, such as a stack of experts; they share one budget.

    Returns:
        One budget for each layer; they sum to ``total``.

    Raises:
        ValueError: ``total`` is below the sum of the minima or above the sum of the capacities.

    Example:
        >>> uniform([(10, 20), (10, 10)], total=30)
        [20, 10]
    """
    return _share([1.0] * len(shapes), shapes, total, capacities, min_active, copies)


def erdos_renyi(
    shapes: Sequence[Shape],
    total: int,
    *,
    capacities: Sequence[int] | None = None,
    min_active: int = 0,
    copies: Sequence[int] | None = None,
) -> list[int]:
    r"""Erdős–Rényi: :math:`r_l = (n_{in} + n_{out}) / (n_{in}\, n_{out})`. See :func:`uniform` for the arguments.

    Example:
        >>> erdos_renyi([(10, 20), (10, 10)], total=50)
        [30, 20]
    """
    scores = [(shape[0] + _fan(shape)) / (shape[0] * _fan(shape)) for shape in shapes]
    return _share(scores, shapes, total, capacities, min_active, copies)


def erdos_renyi_kernel(
    shapes: Sequence[Shape],
    total: int,
    *,
    capacities: Sequence[int] | None = None,
    min_active: int = 0,
    copies: Sequence[int] | None = None,
) -> list[int]:
    r"""Erdős–Rényi–Kernel (ERK): :math:`r_l = \sum_d \mathrm{shape}_d / \prod_d \mathrm{shape}_d`.

    See :func:`uniform` for the arguments.

    Example:
        >>> erdos_renyi_kernel([(4, 3, 3, 3), (8, 4, 3, 3)], total=62)  # 13 to 18
        [26, 36]
    """
    scores = [sum(shape) / math.prod(shape) for shape in shapes]
    return _share(scores, shapes, total, capacities, min_active, copies)


def proportional(
    weights: Sequence[float], total: int, capacities: Sequence[int], minima: Sequence[int] | None = None
) -> list[int]:
    """Shares of ``total`` in proportion to ``weights``; what exceeds a capacity goes to the others in proportion.

    Args:
        weights: One for each layer, at least 0; if all are 0, they count as equal.
        total: The integer to divide.
        capacities: The largest share of each layer.
        minima: The smallest share of each layer; 0 by default.

    Returns:
        An integer for each; they sum to ``total``.

    Raises:
        ValueError: ``total`` is above the sum of the capacities, or below that of the minima.

    Example:
        >>> proportional([3.0, 1.0], total=8, capacities=[9, 9]), proportional([3.0, 1.0], total=8, capacities=[5, 9])
        ([6, 2], [5, 3])
    """
    low = [0] * len(weights) if minima is None else minima
    if not sum(low) <= total <= sum(capacities):
        raise ValueError(
            f"{total} cannot be shared out; give a total of {sum(low)} to {sum(capacities)}, for which there is room."
        )
    # A layer with the weight 0 gets what nobody else has room for.
    least = max(weights, default=0.0) * 1e-12 or 1.0
    slopes = [max(weight, least) for weight in weights]
    return _round(_fill(slopes, low, capacities, total), capacities, total)


def _fan(shape: Shape) -> int:
    return shape[1] if len(shape) > 1 else 1


def _share(
    scores: Sequence[float],
    shapes: Sequence[Shape],
    total: int,
    capacities: Sequence[int] | None,
    min_active: int,
    copies: Sequence[int] | None,
) -> list[int]:
    numbers = [1] * len(shapes) if copies is None else copies
    sizes = [number * math.prod(shape) for number, shape in zip(numbers, shapes, strict=True)]
    high = sizes if capacities is None else list(capacities)
    low = [min(min_active, capacity) for capacity in high]
    if total < sum(low):
        raise ValueError(
            f"A budget of {total} active weights cannot be shared: the layers must hold at least {sum(low)} of"
            f" {sum(sizes)}. The largest feasible sparsity is {largest_feasible_sparsity(sum(low), sum(sizes))}; ask"
            f" for less, or lower min_active ({min_active})."
        )
    if total > sum(high):
        raise ValueError(
            f"A budget of {total} active weights cannot be shared: the layers can hold at most {sum(high)} of"
            f" {sum(sizes)}. Ask for a higher sparsity, or raise the capacities."
        )
    slopes = [score * size for score, size in zip(scores, sizes, strict=True)]
    return _round(_fill(slopes, low, high, total), high, total)


def _fill(slopes: Sequence[float], low: Sequence[int], high: Sequence[int], total: int) -> list[float]:
    """Budgets ``clip(ε · slope, low, high)`` with the ε at which they sum to ``total``.

    The sum is piecewise linear and increasing in ε; its kinks are where a layer leaves ``low`` or reaches ``high``.
    """

    def budgets(epsilon: float) -> list[float]:
        return [min(max(epsilon * s, lo), hi) for s, lo, hi in zip(slopes, low, high, strict=True)]

    kinks = sorted({bound / slope for slope, lo, hi in zip(slopes, low, high, strict=True) for bound in (lo, hi)})
    above = next((kink for kink in kinks if sum(budgets(kink)) >= total), kinks[-1])
    below = max((kink for kink in kinks if kink < above), default=0.0)
    start, end = sum(budgets(below)), sum(budgets(above))
    share = (total - start) / (end - start) if end > start else 0.0
    return budgets(below + share * (above - below))


def _round(budgets: Sequence[float], high: Sequence[int], total: int) -> list[int]:
    """Largest remainder: round down, then give one each to the largest fractions; equal ones in the order of layers."""
    rounded = [math.floor(budget + 1e-9) for budget in budgets]
    open_layers = [layer for layer, capacity in enumerate(high) if rounded[layer] < capacity]
    by_remainder = sorted(open_layers, key=lambda layer: rounded[layer] - budgets[layer])
    for layer in by_remainder[: total - sum(rounded)]:
        rounded[layer] += 1
    return rounded
