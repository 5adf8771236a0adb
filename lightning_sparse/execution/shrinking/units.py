"""Neurons, filters and recurrent units, by labels that travel through a network, and which of them are needed.

Every place on the axis of features of a tensor has the label of a unit. Layers make new ones; what works on a feature
alone hands them on; a sum joins those of its terms, since they can only go together; flattening repeats them. What is
constant, for every input, position and time, is known beside it. A unit is needed if some needed unit reads it, with a
weight that is not zero, where it is not constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Features", "Ids", "Reader", "Reals", "UnitTable", "solve"]

Ids = NDArray[np.int64]
Reals = NDArray[np.float64]
Flags = NDArray[np.bool_]


@final
class UnitTable:
    """All units of a network.

    Example:
        >>> table = UnitTable()
        >>> first, second = table.new(2), table.new(2, fixed=True)
        >>> table.join(first[:1], second[1:])
        >>> table.roots(first) == table.roots(second)[::-1]
        array([ True, False])
        >>> table.fixed().tolist()
        [True, False, True, False]
    """

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._fixed: set[int] = set()

    def __len__(self) -> int:
        return len(self._parents)

    def new(self, count: int, *, fixed: bool = False) -> Ids:
        """Labels of new units; those that are fixed stay whether they are needed or not."""
        start = len(self._parents)
        ids = range(start, start + count)
        self._parents.extend(ids)
        if fixed:
            self._fixed.update(ids)
        return np.arange(start, start + count, dtype=np.int64)

    def join(self, first: Ids, second: Ids) -> None:
        """Let units of two lists, place by place, stay or go together."""
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            one, other = self._root(one), self._root(other)
            self._parents[max(one, other)] = min(one, other)

    def fix(self, ids: Ids) -> None:
        """Keep units whatever happens."""
        self._fixed.update(ids.tolist())

    def roots(self, ids: Ids) -> Ids:
        """One label for all that were joined."""
        return np.array([self._root(unit) for unit in ids.tolist()], dtype=np.int64)

    def fixed(self) -> Flags:
        """Whether units are fixed, by root."""
        flags = np.zeros(len(self), dtype=bool)
        flags[[self._root(unit) for unit in self._fixed]] = True
        return flags

    def _root(self, unit: int) -> int:
        parents = self._parents
        while parents[unit] != unit:
            parents[unit] = parents[parents[unit]]
            unit = parents[unit]
        return unit


@final
@dataclass(frozen=True, eq=False)
class Features:
    """What is known of a tensor along its axis of features.

    Args:
        axis: The axis, counted from the front.
        units: Labels, of the axis' size.
        constant: The value of each feature where it is the same for every input and at every position, else NaN.
    """

    axis: int
    units: Ids
    constant: Reals

    @classmethod
    def varying(cls, axis: int, units: Ids) -> Features:
        """Features that vary: none of them is constant."""
        return cls(axis, units, np.full(len(units), np.nan))

    def mapped(self, function: Callable[[Reals], Any]) -> Features:
        """The same after a function of each feature alone."""
        with np.errstate(all="ignore"):
            values = np.asarray(function(self.constant.copy()), dtype=np.float64)
        return self.with_constant(np.where(np.isnan(self.constant), np.nan, values))

    def with_constant(self, constant: Reals) -> Features:
        """The same units with other constants; what is infinite is none."""
        return Features(self.axis, self.units, np.where(np.isfinite(constant), constant, np.nan))


@final
@dataclass(eq=False)
class Reader:
    """A matrix of weights: which units read which.

    Args:
        rows: Labels of the units that read, of shape (m,).
        columns: Labels of the units that are read, of shape (n,).
        reads: Where a weight is not zero, of shape (m, n).
        constant: What is read where it is constant, else NaN, of shape (n,).
        has_border: Zeros surround what is read, so a constant is none at the border; a constant column must then stay,
            and stands for all others.
    """

    rows: Ids
    columns: Ids
    reads: Flags
    constant: Reals
    has_border: bool = False

    def columns_read(self, needed: Flags) -> Flags:
        """Columns that some needed row reads."""
        return np.any(self.reads[needed[self.rows]], axis=0)

    def stand_in(self, needed: Flags) -> int | None:
        """The column among those that stay that can stand for constant ones which go: the largest."""
        constant = np.where(needed[self.columns], np.nan_to_num(np.abs(self.constant)), 0.0)
        return int(constant.argmax()) if self.has_border and constant.any() else None


def solve(table: UnitTable, readers: Sequence[Reader]) -> Flags:
    """Which units are needed, by label.

    Labels in the readers become those of their roots.

    Args:
        table: All units.
        readers: Every matrix of weights, in the order of the network.

    Returns:
        For each unit whether it stays. Something of every matrix does.

    Example:
        >>> table = UnitTable()
        >>> inputs, hidden, outputs = table.new(1, fixed=True), table.new(3), table.new(1, fixed=True)
        >>> up, down = np.array([[True], [False], [True]]), np.array([[True, True, False]])
        >>> first = Reader(hidden, inputs, up, np.array([np.nan]))
        >>> second = Reader(outputs, hidden, down, np.array([np.nan, 0.5, np.nan]))  # the second has no input
        >>> solve(table, [first, second])[hidden].tolist()
        [True, False, False]
    """
    everything = np.arange(len(table), dtype=np.int64)
    roots = table.roots(everything)
    for reader in readers:
        reader.rows, reader.columns = roots[reader.rows], roots[reader.columns]
    needed = table.fixed()
    _spread(needed, readers)
    while any(_keep_least(needed, reader) for reader in readers):
        _spread(needed, readers)
    return needed[roots]


def _spread(needed: Flags, readers: Sequence[Reader]) -> None:
    """Mark what is read, until nothing new is."""
    before = -1
    while before != (before := int(needed.sum())):
        for reader in reversed(readers):
            varies = reader.columns_read(needed) & np.isnan(reader.constant)
            needed[reader.columns[varies]] = True


def _keep_least(needed: Flags, reader: Reader) -> bool:
    """Mark one unit more where a matrix would be empty, or a border needs a constant; whether that was so."""
    if not needed[reader.rows].any():
        needed[reader.rows[reader.reads.sum(axis=1).argmin()]] = True
        return True
    read = reader.columns_read(needed)
    bordered = read & (np.nan_to_num(reader.constant) != 0) & ~needed[reader.columns]
    if reader.has_border and bordered.any() and reader.stand_in(needed) is None:
        needed[reader.columns[np.where(bordered, np.abs(np.nan_to_num(reader.constant)), 0.0).argmax()]] = True
        return True
    if not needed[reader.columns].any():
        needed[reader.columns[np.isnan(reader.constant).argmin()]] = True  # a constant one reads the least itself
        return True
    return False
