"""Metrics of sparse training: :class:`torchmetrics.Metric` classes over functional twins."""

from lightning_sparse.metrics.flops import ForwardFLOPs, InferenceFLOPs, TrainingFLOPs
from lightning_sparse.metrics.topology import DeadNeurons, ExplorationRate, MaskChange, Sparsity

__all__ = [
    "DeadNeurons",
    "ExplorationRate",
    "ForwardFLOPs",
    "InferenceFLOPs",
    "MaskChange",
    "Sparsity",
    "TrainingFLOPs",
]
