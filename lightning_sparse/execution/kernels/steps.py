"""The steps that kernels compute: layers of a network, with what is fused to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np

from lightning_sparse.execution.formats import PackedWeight

__all__ = ["ConvStep", "LinearStep", "MeanStep", "PlaneStep", "PoolStep"]


@final
@dataclass(frozen=True, eq=False)
class LinearStep:
    """A linear layer: ``clamp(weight @ x + bias)``.

    Args:
        weight: (outputs, inputs).
        bias: (outputs,), in the weight's type.
        low: Lower bound of the results; 0 for a ReLU.
        high: Upper bound of the results; 6 for a ReLU6.
        gelu: Whether the exact GELU follows, before the next layer; only in float32.
    """

    weight: PackedWeight
    bias: Any
    low: float = -np.inf
    high: float = np.inf
    gelu: bool = False


@final
@dataclass(frozen=True, eq=False)
class ConvStep:
    """A convolution: ``clamp(conv(x) + bias + residual)``.

    Args:
        weight: (outputs, inputs / groups, kernel height, kernel width).
        bias: (outputs,), in the weight's type.
        x: Name of the input.
        y: Name of the output.
        residual: Name of a tensor of the output's shape that is added before the clamp.
        stride: 1 or 2, in both directions.
        padding: Rows and columns of zeros on each side.
        dilation: Distance between the kernel's rows, and between its columns.
        groups: As in ``nn.Conv2d``.
        low: Lower bound of the results.
        high: Upper bound of the results.
    """

    weight: PackedWeight
    bias: Any
    x: str
    y: str
    residual: str | None = None
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    low: float = -np.inf
    high: float = np.inf

    @property
    def reach(self) -> tuple[int, int]:
        """Rows and columns between the kernel's first and last."""
        height, width = self.weight.shape[2:]
        return (height - 1) * self.dilation[0], (width - 1) * self.dilation[1]


@final
@dataclass(frozen=True)
class PoolStep:
    """Max pooling of inputs that are never negative, or without padding.

    Args:
        x: Name of the input.
        y: Name of the output.
        kernel: Height and width of the window.
        stride: 1 or 2, in both directions.
        padding: Rows and columns on each side.
    """

    x: str
    y: str
    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]

    @property
    def reach(self) -> tuple[int, int]:
        """Rows and columns between the window's first and last."""
        return self.kernel[0] - 1, self.kernel[1] - 1


@final
@dataclass(frozen=True)
class MeanStep:
    """The mean of each channel of each image, of shape (images, channels, 1, 1)."""

    x: str
    y: str


PlaneStep = ConvStep | PoolStep | MeanStep
