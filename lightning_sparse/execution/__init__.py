"""Zeros that pay: modules with zeros, executed faster on a CPU; any torch module, whoever trained it."""

from __future__ import annotations

from lightning_sparse.execution.accelerate import accelerate
from lightning_sparse.execution.accelerated import AcceleratedModule, StaleWeightsError
from lightning_sparse.execution.conv import SparseConv2d
from lightning_sparse.execution.linear import SparseLinear
from lightning_sparse.execution.report import AccelerationReport, LayerChoice
from lightning_sparse.execution.semi_structured import Projection, project_to_2_4, satisfies_2_4

__all__ = [
    "AcceleratedModule",
    "AccelerationReport",
    "LayerChoice",
    "Projection",
    "SparseConv2d",
    "SparseLinear",
    "StaleWeightsError",
    "accelerate",
    "project_to_2_4",
    "satisfies_2_4",
]
