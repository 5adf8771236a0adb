r"""Random numbers by index: an entry's number depends only on a key and on the entry's index.

The generator is SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). Any of
its outputs can be computed without the earlier ones. Each process draws for the entries that it holds, and together
they draw the same numbers as one process. The last step of SplitMix64, ``bits ^= bits >> 31``, is left out: it changes
none of the 24 highest bits, and only those are used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["uniform_by_place", "uniform_in_order"]

_STEP = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_BITS = 24  # those of a float32's significand
_CHUNK = 1 << 15  # entries computed at a time on a CPU, so that they stay in the cache
_ALL = (1 << 64) - 1

_Fill = Callable[[int, NDArray[np.uint64]], None]


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
    flat = places.reshape(-1).numpy().view(np.uint64)
    offset = np.uint64((key + _STEP) & _ALL)  # (place + 1) · step + key = place · step + offset

    def fill(start: int, bits: NDArray[np.uint64]) -> None:
        np.multiply(flat[start : start + len(bits)], np.uint64(_STEP), out=bits)
        bits += offset

    return _drawn(len(flat), fill).view(places.shape)


def uniform_in_order(key: int, number: int, device: torch.device) -> Tensor:
    """What :func:`uniform_by_place` draws for the places 0 to ``number - 1``; on a CPU in a third of the time.

    Args:
        key: Any integer; its lowest 64 bits choose the sequence.
        number: How many places.
        device: Where.

    Returns:
        float32, shape ``(number,)``, on ``device``.

    Example:
        >>> torch.equal(uniform_in_order(7, 4, torch.device("cpu")), uniform_by_place(7, torch.arange(4)))
        True
    """
    if device.type != "cpu":
        return _uniform(key, torch.arange(number, device=device))
    steps = _steps()

    def fill(start: int, bits: NDArray[np.uint64]) -> None:
        np.add(steps[: len(bits)], np.uint64((key + _STEP * (start + 1)) & _ALL), out=bits)

    return _drawn(number, fill)


@cache
def _steps() -> NDArray[np.uint64]:
    """Place · step of the places of a chunk."""
    return np.arange(_CHUNK, dtype=np.uint64) * np.uint64(_STEP)


def _uniform(key: int, places: Tensor) -> Tensor:
    # int64 wraps around like the unsigned integers of the definition; only its right shifts differ.
    bits = (places + 1).mul_(_signed(_STEP)).add_(_signed(key))
    for shift, factor in _MIX:
        bits ^= _shifted(bits, shift)
        bits *= _signed(factor)
    return _shifted(bits, 64 - _BITS).to(torch.float32).mul_(2.0**-_BITS)


def _drawn(number: int, fill: _Fill) -> Tensor:
    """:func:`_uniform` on a CPU, where numpy's unsigned integers take two thirds of the time.

    Args:
        number: Of the entries.
        fill: Writes (place + 1) · step + key for the places of the entries from its first argument on.
    """
    result = torch.empty(number, dtype=torch.float32)
    drawn = result.numpy()
    every = np.empty((2, min(_CHUNK, number)), dtype=np.uint64)
    for start in range(0, number, _CHUNK):
        bits, shifted = every[:, : number - start]
        fill(start, bits)
        for shift, factor in _MIX:
            np.right_shift(bits, np.uint64(shift), out=shifted)
            bits ^= shifted
            bits *= np.uint64(factor)
        bits >>= np.uint64(64 - _BITS)
        drawn[start : start + _CHUNK] = bits.view(np.int64)  # exact: of 24 bits
        drawn[start : start + _CHUNK] *= np.float32(2.0**-_BITS)
    return result


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A logical shift to the right: zeros come in from the left."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    """The signed integer with the lowest 64 bits of ``number``."""
    number &= _ALL
    return number - (1 << 64) if number >> 63 else number
