"""The places of the nonzero entries of a flat tensor in few bytes: as gaps between them, or as one bit for each place.

There is one gap for each position, and one for the end: the number of places that are skipped before it. The largest
number of the gap's type, 255 or 65535, means that this many places are skipped and the gap continues. So the gaps
determine the length of the tensor, and a small file cannot claim a large tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["bitmask_of", "gaps_nbytes", "gaps_of", "iterate_bitmask", "iterate_gaps"]

_Gaps = NDArray[np.uint8] | NDArray[np.uint16]

_AT_ONCE = 1 << 17
"""Positions that are decoded at once: their scratch of eight bytes each stays in the cache."""


def gaps_of(positions: Tensor, numel: int, width: int) -> Tensor:
    """Positions as gaps.

    Args:
        positions: Increasing positions in [0, numel), of shape (n,).
        numel: Length of the flat tensor.
        width: Bytes of a gap, 1 or 2.

    Returns:
        ``uint8`` or ``uint16`` of shape (m,), m > n.

    Example:
        >>> gaps_of(torch.tensor([0, 3, 4]), numel=6, width=1)
        tensor([0, 2, 0, 1], dtype=torch.uint8)
        >>> gaps_of(torch.tensor([300]), numel=301, width=1)
        tensor([255,  45,   0], dtype=torch.uint8)
    """
    skipped = _skipped(positions, numel)
    top = _top(width)
    bridges = skipped // top
    gaps = np.full(len(skipped) + int(bridges.sum()), top, dtype=np.uint8 if width == 1 else np.uint16)
    gaps[np.cumsum(bridges + 1) - 1] = skipped - bridges * top
    return torch.from_numpy(gaps)


def gaps_nbytes(positions: Tensor, numel: int, width: int) -> int:
    """Bytes that :func:`gaps_of` takes, without making the gaps.

    Example:
        >>> gaps_nbytes(torch.tensor([300]), numel=301, width=1), gaps_nbytes(torch.tensor([300]), numel=301, width=2)
        (3, 4)
    """
    skipped = _skipped(positions, numel)
    return width * (len(skipped) + int((skipped // _top(width)).sum()))


def iterate_gaps(gaps: Tensor, numel: int, count: int | None = None) -> Iterator[Tensor]:
    """Positions from gaps, some at a time; all is checked before the first.

    Args:
        gaps: ``uint8`` or ``uint16`` of shape (m,).
        numel: Length of the flat tensor.
        count: How many positions there should be, where that is known.

    Yields:
        Increasing positions, ``int64``. The memory is used again for the next.

    Raises:
        ValueError: The gaps lead elsewhere than to the end, or to more or fewer positions.

    Example:
        >>> [part.tolist() for part in iterate_gaps(torch.tensor([0, 2, 0, 1], dtype=torch.uint8), numel=6, count=3)]
        [[0, 3, 4]]
    """
    array: _Gaps = gaps.numpy()
    top = _top(array.itemsize)
    bridges = int(np.count_nonzero(array == top))
    found = len(array) - bridges - 1
    length = int(array.sum(dtype=np.int64)) + found
    if not len(array) or array[-1] == top or length != numel:
        raise ValueError(f"its gaps lead to place {max(length, 0):,}, and it has {numel:,} places")
    _check_count(found, count)
    return _positions_of_gaps(array[:-1], top if bridges else None)


def bitmask_of(positions: Tensor, numel: int) -> Tensor:
    """Positions as bits: bit ``i % 8``, counted from the lowest, of byte ``i // 8`` is position ``i``.

    Example:
        >>> bitmask_of(torch.tensor([0, 3, 8]), numel=9)
        tensor([9, 1], dtype=torch.uint8)
    """
    places = np.zeros(numel, dtype=bool)
    places[positions.numpy()] = True
    return torch.from_numpy(np.packbits(places, bitorder="little"))


def iterate_bitmask(bits: Tensor, numel: int, count: int | None = None) -> Iterator[Tensor]:
    """Positions from bits, some at a time; see :func:`iterate_gaps`.

    Raises:
        ValueError: There are more or fewer bytes or bits than there should be.

    Example:
        >>> bits = torch.tensor([9, 1], dtype=torch.uint8)
        >>> [part.tolist() for part in iterate_bitmask(bits, numel=9, count=3)]
        [[0, 3, 8]]
    """
    array: NDArray[np.uint8] = bits.numpy()
    if len(array) != -(-numel // 8):
        raise ValueError(f"its bitmask has {len(array):,} bytes, and {numel:,} places need {-(-numel // 8):,}")
    found = sum(int(_BITS_OF_BYTE[part].sum()) for part in _parts(array))
    if numel % 8 and array[-1] >> numel % 8:
        raise ValueError(f"its bitmask goes on after its {numel:,} places")
    _check_count(found, count)
    return _positions_of_bits(array)


_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.int64)


def _check_count(found: int, count: int | None) -> None:
    if count is not None and found != count:
        raise ValueError(f"it has {found:,} positions and {count:,} values")


def _top(width: int) -> int:
    return (1 << 8 * width) - 1


def _skipped(positions: Tensor, numel: int) -> NDArray[np.int64]:
    """Places skipped before each position, and before the end."""
    return np.diff(positions.numpy(), prepend=-1, append=numel) - 1


def _parts(array: Any) -> Iterator[Any]:
    return (array[start : start + _AT_ONCE] for start in range(0, len(array), _AT_ONCE))


def _positions_of_gaps(gaps: _Gaps, bridge: int | None) -> Iterator[Tensor]:
    scratch = np.empty(min(len(gaps), _AT_ONCE), dtype=np.int64)
    last = -1
    for part in _parts(gaps):
        steps = scratch[: len(part)]
        np.add(part, 1, out=steps, dtype=np.int64)
        is_bridge = None if bridge is None else part == bridge
        if is_bridge is not None:
            steps -= is_bridge  # a bridge stands for no place of its own
        steps[0] += last
        positions = np.cumsum(steps, out=steps)
        last = int(positions[-1])
        yield torch.from_numpy(positions if is_bridge is None else positions[~is_bridge])


def _positions_of_bits(bits: NDArray[np.uint8]) -> Iterator[Tensor]:
    start = 0
    for part in _parts(bits):
        positions = np.flatnonzero(np.unpackbits(part, bitorder="little"))
        positions += start
        start += 8 * len(part)
        yield torch.from_numpy(positions)
