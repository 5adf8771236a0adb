"""Zeros that pay: smaller files, smaller networks, faster ones. For any torch module with zeros, whoever trained it."""

from __future__ import annotations

from lightning_sparse.execution.accelerate import accelerate
from lightning_sparse.execution.accelerated import AcceleratedModule, StaleWeightsError
from lightning_sparse.execution.conv import SparseConv2d
from lightning_sparse.execution.files import SparseFileError, load_sparse, save_sparse
from lightning_sparse.execution.linear import SparseLinear
from lightning_sparse.execution.report import AccelerationReport, LayerChoice
from lightning_sparse.execution.semi_structured import Projection, project_to_2_4, satisfies_2_4
from lightning_sparse.execution.shrink import dead_units, shrink

__all__ = [
    "AcceleratedModule",
    "AccelerationReport",
    "LayerChoice",
    "Projection",
    "SparseConv2d",
    "SparseFileError",
    "SparseLinear",
    "StaleWeightsError",
    "accelerate",
    "dead_units",
    "load_sparse",
    "project_to_2_4",
    "satisfies_2_4",
    "save_sparse",
    "shrink",
]
