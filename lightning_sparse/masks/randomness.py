"""Randomness that every process, device and resumed run draws alike."""

from __future__ import annotations

import hashlib

from torch import Tensor

from lightning_sparse.functional.randomness import uniform_by_place, uniform_in_order
from lightning_sparse.masks.weight import MaskedWeight

__all__ = ["random_scores"]


def random_scores(weight: MaskedWeight, seed: int, step: int) -> Tensor:
    """A random score in [0, 1) for each entry of a weight that this process holds.

    It is a function of the seed, the step, the weight's name, and the entry's place in the whole weight: not of the
    global generator, the rank, the order of layers, or how the weight is divided.

    Returns:
        float32, the shape of ``weight.value``, on its device.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{weight.name}".encode(), digest_size=8).digest()
    key, device = int.from_bytes(digest, "little"), weight.mask.device
    if weight.layout.is_whole:
        return uniform_in_order(key, weight.numel, device).view(weight.shape)
    return uniform_by_place(key, weight.layout.places(device))
