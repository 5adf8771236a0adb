"""How sparse is it: a module, or any Lightning checkpoint or state dict, whatever trained it; and how alike two are."""

from __future__ import annotations

from lightning_sparse.masks.checkpoint import CheckpointError
from lightning_sparse.reporting.gains import Gains, LayerGain
from lightning_sparse.reporting.layers import LayerSparsity, SparsityReport, sparsity_table, width_of
from lightning_sparse.reporting.overlap import MaskOverlap, compare_masks, overlap_table
from lightning_sparse.reporting.sources import checkpoint_sparsity, read_state, report

__all__ = [
    "CheckpointError",
    "Gains",
    "LayerGain",
    "LayerSparsity",
    "MaskOverlap",
    "SparsityReport",
    "checkpoint_sparsity",
    "compare_masks",
    "overlap_table",
    "read_state",
    "report",
    "sparsity_table",
    "width_of",
]
