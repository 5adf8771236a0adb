"""Small networks with zeros, and dense float64 references of what they compute."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

M = TypeVar("M", bound=nn.Module)


def sparsify(module: M, sparsity: float = 0.9, seed: int = 0) -> M:
    """Zero weights at random, give BatchNorms statistics of their own, and return the module for inference."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.weight.data.mul_(torch.rand(layer.weight.shape, generator=generator) >= sparsity)
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in ((layer.running_mean, -1, 1), (layer.running_var, 0.5, 2)):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return module.eval()


def in_float64(module: nn.Module, x: Tensor) -> Tensor:
    """Return what the module computes, in float64."""
    with torch.no_grad():
        return copy.deepcopy(module).double()(x.double())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare relative to the largest entry, as rounding goes."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape
    if expected.numel():
        scale = expected.abs().max().clamp_min(1e-6)
        assert float((actual - expected).abs().max() / scale) < tolerance


class Block(nn.Module):
    """A residual block with BatchNorm, as in ResNets."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


def residual_network(channels: int = 8) -> nn.Module:
    """A stem with pooling, two residual blocks, a mean, a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 7, 2, 3, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        Block(channels, channels, 1),
        Block(channels, 2 * channels, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 5),
    )


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with ReLUs between them, on flattened inputs."""
    layers: list[Any] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Untraceable(nn.Module):
    """Decides by its input, which no graph can follow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if bool(x.sum() < torch.inf) else x
