"""Randomness that every rank, device and resumed run draws alike."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lightning_sparse.masks.registry import MaskedWeight

__all__ = ["random_scores"]


def random_scores(weight: MaskedWeight, seed: int, step: int) -> Tensor:
    """A random score in [0, 1) for each weight, from a generator of its own.

    It is seeded by ``(seed, step, name)`` and runs on the CPU, so that the scores depend on nothing else: not on the
    global generator, not on the rank, not on the order of layers.

    Returns:
        float32, the weight's shape, on its device.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{weight.name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    scores = torch.rand(weight.shape, generator=generator)
    device = weight.parameter.device
    # From pinned memory, so that the CPU goes on to the next layer.
    return scores.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else scores.to(device)
