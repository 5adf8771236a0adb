"""Where the axis of features goes when a tensor is flattened, transposed or indexed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from torch import fx

from lightning_sparse.execution.shrinking.units import Features

__all__ = ["ShapeOf", "indexed", "permuted", "reshaped"]

Shape = tuple[int, ...]


@final
@dataclass(frozen=True, eq=False)
class ShapeOf:
    """The sizes of a tensor, or what was computed from them, as far as they change with its features.

    Args:
        features: What is known of the tensor.
    """

    features: Features


def reshaped(features: Features, before: Shape, after: Shape) -> Features | None:
    """Features after a reshape, flattening included.

    Args:
        features: Those before.
        before: Shape of the tensor.
        after: Shape that it gets.

    Returns:
        What is known after it; ``None`` where the axis is split or mixed with what it was not.

    Example:
        >>> units = np.array([7, 8])
        >>> flat = reshaped(Features.varying(1, units), (5, 2, 3, 1), (5, 6))
        >>> flat.axis, flat.units.tolist()
        (1, [7, 7, 7, 8, 8, 8])
        >>> reshaped(Features.varying(1, units), (5, 2), (10,)) is None
        True
    """
    merged = _merged(features.axis, before, after)
    if merged is None:
        return None
    first, last, axis = merged
    if 0 < first <= features.axis and math.prod(before[first : features.axis]) != 1:
        return None  # what comes before in the same axis would be repeated over all units
    if first == 0 and features.axis > 0 and math.prod(before[: features.axis]) != 1:
        return None
    repeats = math.prod(before[features.axis + 1 : last + 1])
    return Features(axis, np.repeat(features.units, repeats), np.repeat(features.constant, repeats))


def permuted(features: Features, order: Sequence[int]) -> Features:
    """Features after ``permute(*order)``.

    Example:
        >>> permuted(Features.varying(1, np.array([7, 8])), (0, 2, 3, 1)).axis
        3
    """
    axes = [axis % len(order) for axis in order]
    return Features(axes.index(features.axis), features.units, features.constant)


def indexed(features: Features, ndim: int, index: Any) -> Features | None:
    """Features after an index of integers, slices, ``None`` and ``...`` that leaves their axis whole.

    Example:
        >>> indexed(Features.varying(2, np.array([7, 8])), 3, (slice(None), -1)).axis
        1
        >>> indexed(Features.varying(1, np.array([7, 8])), 2, (slice(None), 0)) is None
        True
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is None or part is ... or isinstance(part, (int, slice, fx.Node)) for part in parts):
        return None
    if any(isinstance(part, fx.Node) or type(part) is bool for part in parts):
        return None
    taken = sum(part is not None and part is not ... for part in parts)
    if ... in parts:
        place = parts.index(...)
        parts[place : place + 1] = [slice(None)] * (ndim - taken)
    axis, after = 0, 0
    for part in parts:
        if axis == features.axis and part is not None:
            whole = part == slice(None)
            return Features(after, features.units, features.constant) if whole else None
        axis += part is not None
        after += not isinstance(part, int)
    return Features(after + features.axis - axis, features.units, features.constant)


def _merged(axis: int, before: Shape, after: Shape) -> tuple[int, int, int] | None:
    """First and last axis before, and the axis after that they become, of the group that holds ``axis``."""
    start = 0
    for place, size in enumerate(after):
        stop, product = start, 1
        while stop < len(before) and (
            product < size or (stop <= axis < len(before) and product * before[stop] == size)
        ):
            product *= before[stop]
            stop += 1
        if product != size:
            return None
        if start <= axis < stop:
            return start, stop - 1, place
        start = stop
    return None
