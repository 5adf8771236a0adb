"""The operations that shrinking knows, by what they do to features. Tables, and nothing else."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = [
    "AVERAGE_POOLS",
    "BINARY",
    "CONVOLUTIONS",
    "EACH_FEATURE_MODULES",
    "FUNCTIONS",
    "FUNCTIONS_OF_POOLS",
    "IN_PLACE",
    "METHODS",
    "MODULES_OF_POOLS",
    "NORMS",
    "RECURRENT",
    "TRANSPOSED",
]

Modules = frozenset[type[nn.Module]]

EACH_FEATURE_MODULES: Modules = frozenset(
    {
        *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
        *(nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.Sigmoid),
        *(nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign),
    }
)
"""Modules without parameters that work on each number alone; those of dropout do nothing in evaluation mode."""

FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(F.dropout, F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish),
        *(F.hardsigmoid, F.hardtanh, F.logsigmoid, F.softplus, F.softsign, F.tanhshrink, F.sigmoid, F.tanh),
        *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.abs, torch.neg, torch.square, torch.exp),
        *(torch.sqrt, torch.clamp, torch.pow, operator.neg, operator.pow),
    }
)
"""Functions that do the same, if no other argument is computed."""

METHODS = frozenset(
    {
        *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "abs", "neg", "square", "exp", "sqrt", "clamp"),
        *("clamp_", "clamp_min", "clamp_max", "pow", "contiguous", "clone", "detach"),
    }
)
"""Methods of tensors that do the same."""

BINARY: dict[Any, Callable[[Any, Any], Any]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), operator.add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), operator.sub),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), operator.mul),
    operator.floordiv: operator.floordiv,
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), operator.truediv),
}
"""Functions and methods of two tensors, or of a tensor and a number, and what they do to numbers."""

IN_PLACE: frozenset[Any] = frozenset({operator.iadd, operator.isub, operator.imul, operator.itruediv, torch.relu_})
"""Functions that write their first argument; methods that do end in an underscore."""

NORMS: Modules = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})
CONVOLUTIONS: Modules = frozenset({nn.Conv1d, nn.Conv2d, nn.Conv3d})
TRANSPOSED: Modules = frozenset({nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d})
RECURRENT: Modules = frozenset({nn.LSTM, nn.GRU, nn.RNN})

MODULES_OF_POOLS: dict[Any, int] = {
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d), 1),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), 2),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d), 3),
}
"""Modules that put maxima or means of neighbours in their place, and over how many dimensions."""

FUNCTIONS_OF_POOLS: dict[Any, int] = {
    **dict.fromkeys((F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d), 1),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d), 2),
    **dict.fromkeys((F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d), 3),
}
"""Functions that do the same."""

AVERAGE_POOLS: frozenset[Any] = frozenset(
    {nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}
)
"""Those whose zeros at the border may count."""
