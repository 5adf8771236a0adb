"""The masks of one module: which weights, who owns them, and how they stay true."""

from lightning_sparse.masks.apply import apply_masks
from lightning_sparse.masks.checkpoint import CheckpointError
from lightning_sparse.masks.files import load_masks, read_masks, save_masks
from lightning_sparse.masks.plan import Candidate, Plan, select_weights
from lightning_sparse.masks.registry import MaskedWeight, MaskGroup, MaskRegistry

__all__ = [
    "Candidate",
    "CheckpointError",
    "MaskGroup",
    "MaskRegistry",
    "MaskedWeight",
    "Plan",
    "apply_masks",
    "load_masks",
    "read_masks",
    "save_masks",
    "select_weights",
]
