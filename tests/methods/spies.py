"""Callbacks and models that watch a method at work: those of :mod:`lightning_sparse.testing`."""

from __future__ import annotations

from lightning_sparse.testing import (
    Kill,
    KilledError,
    MaskWatch,
    NonFiniteGradients,
    StepIndexedToy,
    TwoOptimizers,
    ZeroWatch,
    masks_of,
)

__all__ = [
    "Kill",
    "KilledError",
    "MaskWatch",
    "NonFiniteGradients",
    "StepIndexedToy",
    "TwoOptimizers",
    "ZeroWatch",
    "masks_of",
]
