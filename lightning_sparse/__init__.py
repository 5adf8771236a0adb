"""lightning_sparse: sparse training for PyTorch Lightning, one callback per method."""

from __future__ import annotations

from lightning_sparse import functional, schedules
from lightning_sparse._version import __version__
from lightning_sparse.execution import accelerate, load_sparse, save_sparse, shrink
from lightning_sparse.masks import MaskedWeight, MaskRegistry, apply_masks, load_masks, save_masks
from lightning_sparse.methods import (
    ACDC,
    DSR,
    DST,
    EAST,
    FGGP,
    GMP,
    MEST,
    SET,
    SNFS,
    SNIP,
    SRSTE,
    STR,
    Feather,
    FixedMask,
    GraNet,
    GraSP,
    RigL,
    SparseMethod,
    SRigL,
    SynFlow,
    TopKAST,
)
from lightning_sparse.methods.one_shot import prune
from lightning_sparse.modules import DyReLUPhasing, WeightSharing, share_weights, unshare_weights
from lightning_sparse.monitor import SparsityMonitor
from lightning_sparse.reporting import report

__all__ = [
    "ACDC",
    "DSR",
    "DST",
    "EAST",
    "FGGP",
    "GMP",
    "MEST",
    "SET",
    "SNFS",
    "SNIP",
    "SRSTE",
    "STR",
    "DyReLUPhasing",
    "Feather",
    "FixedMask",
    "GraNet",
    "GraSP",
    "MaskRegistry",
    "MaskedWeight",
    "RigL",
    "SRigL",
    "SparseMethod",
    "SparsityMonitor",
    "SynFlow",
    "TopKAST",
    "WeightSharing",
    "__version__",
    "accelerate",
    "apply_masks",
    "functional",
    "load_masks",
    "load_sparse",
    "prune",
    "report",
    "save_masks",
    "save_sparse",
    "schedules",
    "share_weights",
    "shrink",
    "unshare_weights",
]
