"""Shared parts of selections over the entries of several processes, on CPUs and other devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["BITS", "BUCKETS", "SINGLE", "Held", "Sum", "counter_type", "shifts", "width_of"]

Sum: TypeAlias = Callable[[Tensor], Tensor]
"""Adds a tensor of integers of this process to those of all others: a collective."""

BITS = 8
"""Bits of a digit. Each round finds one digit."""
BUCKETS = 1 << BITS
SINGLE = 4
"""Bytes of a float in single precision."""


@dataclass(frozen=True, eq=False)
class Held:
    """What this process holds of one tensor.

    Attributes:
        scores: Floating point, flat.
        places: From places in ``scores``, ``int64``, to places in the whole of all tensors that are ranked together.
        owned: Whether they are counted here; where several processes hold the same entries, one counts them.
    """

    scores: Tensor
    places: Callable[[Tensor], Tensor]
    owned: bool = True


def width_of(parts: Sequence[Held]) -> int:
    """Bits of the keys; the same in every process, for each has something of every part, if nothing but its type."""
    return 8 * max([SINGLE, *(part.scores.element_size() for part in parts)])


def counter_type(numel: int) -> torch.dtype:
    """The integers in which so many entries are counted."""
    return torch.int32 if numel < 1 << 31 else torch.int64


def shifts(width: int) -> range:
    """Where the digits of integers of ``width`` bits begin, the highest first."""
    return range((max(1, width) - 1) // BITS * BITS, -1, -BITS)
