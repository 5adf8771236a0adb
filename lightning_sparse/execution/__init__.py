"""Zeros that pay: smaller files, smaller networks, faster ones. For any torch module with zeros; needs no Lightning."""

from __future__ import annotations

from lightning_sparse.execution.files import SparseFileError, load_sparse, save_sparse

__all__ = ["SparseFileError", "load_sparse", "save_sparse"]
