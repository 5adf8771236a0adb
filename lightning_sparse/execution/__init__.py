"""Zeros that pay: smaller files, smaller networks, faster ones. For any torch module with zeros; needs no Lightning."""

from __future__ import annotations

from lightning_sparse.execution.files import SparseFileError, load_sparse, save_sparse
from lightning_sparse.execution.shrink import dead_units, shrink

__all__ = ["SparseFileError", "dead_units", "load_sparse", "save_sparse", "shrink"]
