"""Metrics of sparse training: :class:`torchmetrics.Metric` classes over functional twins, and the monitor's memory."""

from lightning_sparse.metrics.flops import ForwardFLOPs, InferenceFLOPs, TrainingFLOPs
from lightning_sparse.metrics.history import MaskHistory
from lightning_sparse.metrics.timeline import SparsityTimeline
from lightning_sparse.metrics.topology import DeadNeurons, ExplorationRate, MaskChange, Sparsity

__all__ = [
    "DeadNeurons",
    "ExplorationRate",
    "ForwardFLOPs",
    "InferenceFLOPs",
    "MaskChange",
    "MaskHistory",
    "Sparsity",
    "SparsityTimeline",
    "TrainingFLOPs",
]
