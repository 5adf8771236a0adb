"""How weights with zeros are stored for execution: rows of what is not zero, and SELL for single vectors.

``pack`` makes of a weight the arrays of compressed sparse rows. Kernels of whole batches read them as they are, with
offsets in place of columns; ``sell`` orders them in slices for the kernel of single vectors; ``transposed`` turns them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["PackedWeight", "Sell", "balanced_blocks", "pack"]

Floats = NDArray[Any]
Integers = NDArray[Any]


@final
@dataclass(frozen=True, eq=False)
class Sell:
    """Slices of as many rows as a vector has lanes. A slice's rows are side by side; rows are sorted by length.

    Args:
        slices: int64, where each slice begins, in columns, and where the last ends: (slices + 1,).
        columns: uint16 or int32, the inputs: (columns, lanes). Padding multiplies input 0 by 0.
        values: The weights: (columns, lanes).
        order: int32, the row at each place: (slices * lanes,); -1 where there is none.
    """

    slices: Integers
    columns: Integers
    values: Floats
    order: Integers

    def arranged(self, bias: Floats) -> Floats:
        """Return the biases in the order of the slices, 0 where there is no row."""
        return np.where(self.order >= 0, bias[self.order], 0).astype(bias.dtype)


@final
@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Compressed sparse rows of a weight whose first dimension counts outputs.

    Args:
        shape: Of the dense weight.
        rows: int64, where each row begins in what follows, and where the last ends: (outputs + 1,).
        columns: int32, the place of each weight in its flattened row: (non-zeros,).
        values: The weights that are not zero: (non-zeros,).

    Example:
        >>> import torch
        >>> packed = pack(torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 0.0], [7.0, 0.0, 9.0]]))
        >>> packed.rows.tolist(), packed.columns.tolist(), packed.values.tolist()
        ([0, 1, 1, 3], [1, 0, 2], [5.0, 7.0, 9.0])
    """

    shape: tuple[int, ...]
    rows: Integers
    columns: Integers
    values: Floats

    @property
    def num_rows(self) -> int:
        """Outputs of the layer."""
        return self.shape[0]

    @property
    def num_columns(self) -> int:
        """Weights of a dense row."""
        return int(np.prod(self.shape[1:]))

    @property
    def num_active(self) -> int:
        """Weights that are not zero."""
        return len(self.values)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros; 0 for an empty weight."""
        total = self.num_rows * self.num_columns
        return 1 - self.num_active / total if total else 0.0

    def dense(self) -> Tensor:
        """Return the weight as it was.

        Example:
            >>> import torch
            >>> weight = torch.tensor([[0.0, 5.0], [0.0, 0.0]])
            >>> torch.equal(pack(weight).dense(), weight)
            True
        """
        weight = np.zeros((self.num_rows, self.num_columns), self.values.dtype)
        weight[np.repeat(np.arange(self.num_rows), np.diff(self.rows)), self.columns] = self.values
        return torch.from_numpy(weight).reshape(self.shape)

    def transposed(self) -> PackedWeight:
        """Return the rows of the transposed matrix (inputs, outputs), each in order.

        Example:
            >>> import torch
            >>> weight = torch.tensor([[0.0, 5.0], [6.0, 0.0], [0.0, 7.0]])
            >>> torch.equal(pack(weight).transposed().dense(), weight.t())
            True
        """
        order = np.argsort(self.columns, kind="stable")
        counts = np.bincount(self.columns, minlength=self.num_columns)
        outputs = np.repeat(np.arange(self.num_rows, dtype=np.int32), np.diff(self.rows))
        return PackedWeight((self.num_columns, self.num_rows), _starts(counts), outputs[order], self.values[order])

    def sell(self, lanes: int) -> Sell:
        """Return the weight in slices of ``lanes`` rows.

        Example:
            >>> import torch
            >>> sell = pack(torch.tensor([[0.0, 5.0, 0.0], [1.0, 2.0, 3.0]])).sell(lanes=2)
            >>> sell.order.tolist(), sell.columns.tolist(), sell.values.tolist()
            ([1, 0], [[0, 1], [1, 0], [2, 0]], [[1.0, 5.0], [2.0, 0.0], [3.0, 0.0]])
        """
        counts = np.diff(self.rows)
        num_slices = -(-self.num_rows // lanes)
        order = np.full(num_slices * lanes, -1, np.int32)
        order[: self.num_rows] = np.argsort(-counts, kind="stable")
        longest = counts[order[::lanes]] if num_slices else counts[:0]
        slices = _starts(longest)
        small = self.num_columns <= np.iinfo(np.uint16).max + 1
        columns = np.zeros((slices[-1], lanes), np.uint16 if small else np.int32)
        values = np.zeros((slices[-1], lanes), self.values.dtype)
        # The k-th weight of the row at place p lies in column slices[p // lanes] + k, lane p % lanes.
        place = np.empty(self.num_rows, np.int64)
        place[order[: self.num_rows]] = np.arange(self.num_rows)
        place = np.repeat(place, counts)
        within = np.arange(self.num_active) - np.repeat(self.rows[:-1], counts)
        at = slices[place // lanes] + within, place % lanes
        columns[at], values[at] = self.columns, self.values
        return Sell(slices, columns, values, order)


def pack(weight: Tensor) -> PackedWeight:
    """Store what is not zero of a weight, row by row.

    Args:
        weight: (outputs, ...), dense, real, on the CPU.

    Returns:
        Its compressed rows, in arrays of their own. NaN is not zero.

    Raises:
        ValueError: The weight has no dimension of outputs, is sparse already, or is not on the CPU.

    Example:
        >>> import torch
        >>> pack(torch.tensor([[0.0, 5.0], [0.0, 0.0]])).sparsity
        0.75
    """
    if weight.dim() < 1 or weight.layout is not torch.strided or weight.device.type != "cpu":
        raise ValueError(
            f"pack was given a weight of shape {tuple(weight.shape)}, layout {weight.layout}, on {weight.device}; it"
            " takes dense tensors of at least one dimension on the CPU. Give weight.to_dense().cpu()."
        )
    rows = weight.detach().reshape(len(weight), -1) if len(weight) else weight.detach().new_empty(0, 1)
    outputs, columns = rows.nonzero(as_tuple=True)
    counts = torch.bincount(outputs, minlength=len(rows)).numpy()
    return PackedWeight(
        shape=tuple(weight.shape),
        rows=_starts(counts),
        columns=columns.to(torch.int32).numpy(),
        values=rows[outputs, columns].numpy(),
    )


def balanced_blocks(rows: Integers, num_blocks: int) -> Integers:
    """Divide rows into blocks of about equal cost, to which a row adds four weights and those it has.

    Args:
        rows: int64, where each row begins, and where the last ends: (rows + 1,).
        num_blocks: How many blocks, at least 1.

    Returns:
        int64, the first row of each block, and the number of rows: (num_blocks + 1,).

    Example:
        >>> import numpy as np
        >>> balanced_blocks(np.array([0, 6, 7, 8, 9, 10, 11, 12]), num_blocks=2).tolist()
        [0, 3, 7]
    """
    cost = rows + 4 * np.arange(len(rows))
    bounds = np.searchsorted(cost, cost[-1] * np.arange(1, num_blocks) / num_blocks)
    return np.concatenate([[0], bounds, [len(rows) - 1]]).astype(np.int64)


def _starts(counts: Integers) -> Integers:
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts
