"""Zeros that pay: modules with zeros, executed faster on a CPU; any torch module, whoever trained it."""

from __future__ import annotations

from lightning_sparse.execution.conv import SparseConv2d
from lightning_sparse.execution.linear import SparseLinear

__all__ = ["SparseConv2d", "SparseLinear"]
