r"""Random numbers by place: what an entry draws depends on a key and on its place, and on nothing else.

The generator is SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), of
which any output can be computed without those before it. Each process draws for the entries that it holds, and all
processes together draw what one would.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["uniform_by_place"]

_STEP = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_BITS = 24  # those of a float32's significand
_CHUNK = 1 << 16  # entries computed at a time on a CPU, so that they stay in the cache


def uniform_by_place(key: int, places: Tensor) -> Tensor:
    """A number in [0, 1) for each place, uniform and the same on every device.

    Args:
        key: Any integer; its lowest 64 bits choose the sequence.
        places: ``int64``, any shape.

    Returns:
        float32, the shape of ``places``, on their device; multiples of 2⁻²⁴.

    Example:
        >>> torch.equal(uniform_by_place(7, torch.arange(4))[2:], uniform_by_place(7, torch.arange(2, 4)))
        True
    """
    if not places.is_cpu or places.numel() <= _CHUNK:
        return _uniform(key, places)
    drawn = torch.empty(places.numel(), dtype=torch.float32)
    for out, part in zip(drawn.split(_CHUNK), places.reshape(-1).split(_CHUNK), strict=True):
        out.copy_(_uniform(key, part))
    return drawn.view(places.shape)


def _uniform(key: int, places: Tensor) -> Tensor:
    # int64 wraps around like the unsigned integers of the definition; only its right shifts differ.
    bits = (places + 1).mul_(_signed(_STEP)).add_(_signed(key))
    for shift, factor in _MIX:
        bits ^= _shifted(bits, shift)
        bits *= _signed(factor)
    bits ^= _shifted(bits, _LAST_SHIFT)
    return _shifted(bits, 64 - _BITS).to(torch.float32).mul_(2.0**-_BITS)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A logical shift to the right: zeros come in from the left."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    """The signed integer with the lowest 64 bits of ``number``."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number
