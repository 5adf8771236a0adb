r"""Random numbers by index: an entry's number depends only on a key and on the entry's index.

The generator is SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). Any of
its outputs can be computed without the earlier ones. Each process draws for the entries that it holds, and together
they draw the same numbers as one process.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["uniform_by_place"]

_STEP = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_BITS = 24  # those of a float32's significand
_CHUNK = 1 << 15  # entries computed at a time on a CPU, so that they stay in the cache
_ALL = (1 << 64) - 1


def uniform_by_place(key: int, places: Tensor) -> Tensor:
    """A uniform number in [0, 1) for each place, the same on every device.

    Args:
        key: Any integer; its lowest 64 bits choose the sequence.
        places: ``int64``, any shape.

    Returns:
        float32, the shape of ``places``, on their device; multiples of 2⁻²⁴.

    Example:
        >>> torch.equal(uniform_by_place(7, torch.arange(4))[2:], uniform_by_place(7, torch.arange(2, 4)))
        True
    """
    if not places.is_cpu:
        return _uniform(key, places)
    drawn = torch.empty(places.numel(), dtype=torch.float32)
    _draw(key, places.reshape(-1).numpy().view(np.uint64), drawn.numpy())
    return drawn.view(places.shape)


def _uniform(key: int, places: Tensor) -> Tensor:
    # int64 wraps around like the unsigned integers of the definition; only its right shifts differ.
    bits = (places + 1).mul_(_signed(_STEP)).add_(_signed(key))
    for shift, factor in _MIX:
        bits ^= _shifted(bits, shift)
        bits *= _signed(factor)
    bits ^= _shifted(bits, _LAST_SHIFT)
    return _shifted(bits, 64 - _BITS).to(torch.float32).mul_(2.0**-_BITS)


def _draw(key: int, places: NDArray[np.uint64], drawn: NDArray[np.float32]) -> None:
    """:func:`_uniform` on a CPU: numpy has unsigned integers, so that it takes two thirds of the time."""
    offset = np.uint64((key + _STEP) & _ALL)  # (place + 1) · step + key = place · step + offset
    shifted = np.empty(min(_CHUNK, len(places)), dtype=np.uint64)
    for start in range(0, len(places), _CHUNK):
        bits = places[start : start + _CHUNK] * np.uint64(_STEP)
        its = shifted[: len(bits)]
        bits += offset
        for shift, factor in _MIX:
            np.right_shift(bits, np.uint64(shift), out=its)
            bits ^= its
            bits *= np.uint64(factor)
        np.right_shift(bits, np.uint64(_LAST_SHIFT), out=its)
        bits ^= its
        bits >>= np.uint64(64 - _BITS)
        drawn[start : start + _CHUNK] = bits.view(np.int64)  # exact: of 24 bits
    drawn *= np.float32(2.0**-_BITS)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A logical shift to the right: zeros come in from the left."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    """The signed integer with the lowest 64 bits of ``number``."""
    number &= _ALL
    return number - (1 << 64) if number >> 63 else number
