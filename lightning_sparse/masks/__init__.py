"""The masks of one module: which weights, who owns them, and how they stay true."""

from lightning_sparse.masks.registry import MaskedWeight, MaskGroup, MaskRegistry
from lightning_sparse.masks.selection import Candidate, Plan, select_weights

__all__ = ["Candidate", "MaskGroup", "MaskRegistry", "MaskedWeight", "Plan", "select_weights"]
