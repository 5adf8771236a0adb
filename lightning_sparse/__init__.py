"""lightning_sparse: sparse training for PyTorch Lightning, one callback per method."""

from __future__ import annotations

from lightning_sparse import functional, schedules
from lightning_sparse._version import __version__
from lightning_sparse.masks import MaskedWeight, MaskRegistry
from lightning_sparse.methods import DST, FGGP, GMP, SET, RigL, SparseMethod
from lightning_sparse.monitor import SparsityMonitor

__all__ = [
    "DST",
    "FGGP",
    "GMP",
    "SET",
    "MaskRegistry",
    "MaskedWeight",
    "RigL",
    "SparseMethod",
    "SparsityMonitor",
    "__version__",
    "functional",
    "schedules",
]
