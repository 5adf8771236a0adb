"""lightning_sparse: sparse training for PyTorch Lightning, one callback per method."""

from __future__ import annotations

from lightning_sparse import functional, schedules
from lightning_sparse._version import __version__
from lightning_sparse.execution import load_sparse, save_sparse, shrink
from lightning_sparse.masks import MaskedWeight, MaskRegistry, apply_masks, load_masks, save_masks
from lightning_sparse.methods import DST, EAST, FGGP, GMP, SET, FixedMask, RigL, SparseMethod
from lightning_sparse.modules import DyReLUPhasing, WeightSharing, share_weights, unshare_weights
from lightning_sparse.monitor import SparsityMonitor
from lightning_sparse.reporting import report

__all__ = [
    "DST",
    "EAST",
    "FGGP",
    "GMP",
    "SET",
    "DyReLUPhasing",
    "FixedMask",
    "MaskRegistry",
    "MaskedWeight",
    "RigL",
    "SparseMethod",
    "SparsityMonitor",
    "WeightSharing",
    "__version__",
    "apply_masks",
    "functional",
    "load_masks",
    "load_sparse",
    "report",
    "save_masks",
    "save_sparse",
    "schedules",
    "share_weights",
    "shrink",
    "unshare_weights",
]
