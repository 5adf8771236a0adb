"""Convolutions with zeros, executed sparsely: all by offsets on padded planes; 1 x 1 also by torch's sparse product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_sparse.execution.formats import pack
from lightning_sparse.execution.inputs import refuse_gradients, refuse_unreadable
from lightning_sparse.execution.kernels import Planes, default_kernels, planes
from lightning_sparse.execution.kernels.steps import ConvStep, PlaneStep
from lightning_sparse.execution.linear import SparseLinear, linear_step
from lightning_sparse.execution.standing_in import StandIn

__all__ = ["SparseConv2d", "SparsePlanes", "conv_step", "why_dense"]


def why_dense(conv: nn.Conv2d, kernels: str) -> str | None:
    """Return why a convolution cannot be executed sparsely; ``None`` if it can.

    Example:
        >>> from torch import nn
        >>> why_dense(nn.Conv2d(3, 8, 3, stride=3), "llvm")
        'its stride is not 1 or 2, so only torch computes it'
    """
    if kernels != "llvm":
        pointwise = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1
        pointwise = pointwise and conv.padding in ((0, 0), "same", "valid")
        return None if pointwise else "without llvmlite, only 1 x 1 convolutions without stride and groups are sparse"
    if conv.stride not in ((1, 1), (2, 2)):
        return "its stride is not 1 or 2, so only torch computes it"
    if conv.padding_mode != "zeros":
        return f"its padding is {conv.padding_mode}, which only torch computes"
    if isinstance(conv.padding, str) and any(reach % 2 for reach in _reach(conv)) and conv.padding == "same":
        return "it has 'same' padding of an even window, which only torch computes"
    return None


def conv_step(
    conv: nn.Conv2d,
    x: str,
    y: str,
    *,
    residual: str | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> ConvStep:
    """Pack a convolution that :func:`why_dense` has no objection to.

    Args:
        conv: The layer.
        x: Name of its input.
        y: Name of its output.
        residual: Name of what is added to its output.
        low: Lower bound of the results; 0 for a ReLU.
        high: Upper bound of the results.
    """
    if isinstance(conv.padding, str):
        padding = (0, 0) if conv.padding == "valid" else (_reach(conv)[0] // 2, _reach(conv)[1] // 2)
    else:
        padding = conv.padding[0], conv.padding[1]
    bias = conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias.detach().clone()
    return ConvStep(
        weight=pack(conv.weight),
        bias=bias.detach().numpy(),
        x=x,
        y=y,
        residual=residual,
        stride=conv.stride[0],
        padding=padding,
        dilation=(conv.dilation[0], conv.dilation[1]),
        groups=conv.groups,
        low=low,
        high=high,
    )


def _reach(conv: nn.Conv2d) -> list[int]:
    return [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)]


@final
class SparsePlanes(nn.Module):
    """A part of a network, convolutions and what is between them, on padded planes from its inputs to its outputs.

    Args:
        steps: What is computed, in an order in which it can be.
        inputs: Names of the tensors that are given.
        outputs: Names of the tensors that are returned.
        dtype: ``torch.float32`` or ``torch.float64``.
        threads: How many threads compute.
    """

    def __init__(
        self,
        steps: Sequence[PlaneStep],
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        dtype: torch.dtype,
        threads: int,
    ) -> None:
        super().__init__()
        self.steps = tuple(steps)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.dtype = dtype
        self.threads = threads
        self.network = self._made()

    def _made(self) -> Planes:
        return planes(self.steps, self.inputs, self.outputs, dtype=self.dtype, threads=self.threads)

    @override
    def forward(self, *images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs, one alone as it is, for images (N, C, H, W)."""
        for x in images:
            refuse_gradients(x)
            if x.dim() != 4 or x.dtype != self.dtype or x.device.type != "cpu":
                raise ValueError(
                    f"Sparse convolutions in {self.dtype} on the CPU were given {tuple(x.shape)} in {x.dtype} on"
                    f" {x.device}. Give images (N, C, H, W) of that type and device."
                )
        try:
            results = self.network(*(x.contiguous() for x in images))
        except RuntimeError:
            for x in images:
                refuse_unreadable(x)
            raise
        return results[0] if len(results) == 1 else tuple(results)

    @override
    def extra_repr(self) -> str:
        convolutions = sum(isinstance(step, ConvStep) for step in self.steps)
        return f"steps={len(self.steps)}, convolutions={convolutions}, threads={self.threads}"

    @override
    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__.copy()
        return {name: value for name, value in state.items() if name != "network"}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.network = self._made()


@final
class SparseConv2d(StandIn):
    """A convolution whose zeros cost nothing, for inference on a CPU: images in torch's layout in and out.

    Args:
        conv: The dense layer, whose weights are copied.
        kernels: ``llvm``, or ``torch_csr`` for 1 x 1 convolutions; by default the fastest that is installed.
        threads: Number of threads; by default torch's current number.

    Raises:
        ValueError: The layer cannot be executed sparsely, or the kernels are not installed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_sparse.execution import SparseConv2d
        >>> layer = nn.Conv2d(3, 8, 1)
        >>> _ = layer.weight.data.mul_(torch.rand(8, 3, 1, 1) > 0.5)
        >>> x = torch.randn(2, 3, 4, 4)
        >>> torch.allclose(SparseConv2d(layer)(x), layer(x), atol=1e-6)
        True
    """

    def __init__(self, conv: nn.Conv2d, *, kernels: str | None = None, threads: int | None = None) -> None:
        super().__init__()
        kernels = kernels or default_kernels()
        threads = threads or torch.get_num_threads()
        if reason := why_dense(conv, kernels):
            raise ValueError(f"{conv} cannot be executed sparsely: {reason}. Leave it dense.")
        self.in_channels = conv.in_channels
        self.inner: nn.Module
        if kernels == "llvm":
            step = conv_step(conv, "x", "y")
            self.inner = SparsePlanes([step], ["x"], ["y"], dtype=conv.weight.dtype, threads=threads)
        else:
            step = linear_step(conv.weight.flatten(1), conv.bias)
            self.inner = SparseLinear([step], kernels=kernels, threads=threads)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H, W) of images (N, in_channels, H, W), or both without N."""
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"A convolution of {self.in_channels} channels was given {tuple(x.shape)}. Give images (N, C, H, W) or"
                " (C, H, W) with as many channels."
            )
        images = x if x.dim() == 4 else x[None]
        if isinstance(self.inner, SparsePlanes):
            y = self.inner(images)
        else:
            # Channels are features, pixels are rows: for one image both ways are views.
            y = self.inner(images.permute(0, 2, 3, 1).reshape(-1, self.in_channels))
            y = y.reshape(len(images), *images.shape[2:], self.inner.out_features).permute(0, 3, 1, 2)
        return y if x.dim() == 4 else y[0]
