"""The networks of the evidence, each in any width, and the data sets that they are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_sparse.zoo.resnet import BasicBlock, ZeroPaddedShortcut

__all__ = ["NETWORKS", "Network", "equal_width", "num_weights"]

_SMALLEST = 8  # the fewest units of a layer: fewer than the classes, but not a bottleneck of one


def _units(full: int, width: float) -> int:
    return min(full, max(_SMALLEST, round(full * width)))


def lenet300(width: float = 1.0) -> nn.Module:
    """LeNet-300-100: 266,200 weights. Narrow ones may have fewer than eight units in the first layer, which is wide."""
    first, second = max(1, round(300 * width)), _units(100, width)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 10)
    )


def cnn(width: float = 1.0, *, normalized: bool = False) -> nn.Module:
    """Three 3 x 3 convolutions of stride 2 and two linear layers: 155,536 weights. BatchNorm in between, or none."""
    channels = [max(1, round(full * width)) for full in (16, 32, 64)]
    hidden, layers, inputs = _units(128, width), list[nn.Module](), 1
    for outputs in channels:
        layers.append(nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1))
        layers += [nn.BatchNorm2d(outputs)] * normalized
        layers.append(nn.ReLU())
        inputs = outputs
    layers += [nn.Flatten(), nn.Linear(16 * inputs, hidden)]
    layers += [nn.BatchNorm1d(hidden)] * normalized
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(hidden, 10))


def cnn_bn(width: float = 1.0) -> nn.Module:
    """:func:`cnn` with BatchNorm."""
    return cnn(width, normalized=True)


def resnet8(width: float = 1.0) -> nn.Module:
    """ResNet-8 for CIFAR-10: one block in each of three stages, zero-padded shortcuts; 74,800 weights."""
    one, two, three = (max(1, round(full * width)) for full in (16, 32, 64))
    return nn.Sequential(
        nn.Conv2d(3, one, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(one),
        nn.ReLU(),
        BasicBlock(one, one),
        BasicBlock(one, two, 2, ZeroPaddedShortcut(one, two, 2)),
        BasicBlock(two, three, 2, ZeroPaddedShortcut(two, three, 2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(three, 10),
    )


@dataclass(frozen=True)
class Network:
    """A network and how long it is trained.

    Attributes:
        title: Its name in tables.
        make: Makes it, in a width that is a fraction of the full one.
        data: The data set.
        epochs: Epochs of a training run.
        batch_size: Images in a batch.
        lr: Learning rate at the beginning; it falls to 0 along a cosine.
        weight_decay: Weight decay of the optimizer, SGD with momentum 0.9.
        shape: Shape of one image.
        precision: The Trainer's precision.
    """

    title: str
    make: Callable[..., nn.Module]
    data: Literal["mnist", "cifar10"]
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    shape: tuple[int, int, int]
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


NETWORKS = {
    "lenet300": Network("LeNet-300-100, MNIST", lenet300, "mnist", 4, 200, 0.05, 0.0, (1, 28, 28)),
    "cnn-bn": Network("CNN with BatchNorm, MNIST", cnn_bn, "mnist", 4, 200, 0.05, 0.0, (1, 28, 28)),
    "cnn": Network("CNN without BatchNorm, MNIST", cnn, "mnist", 4, 200, 0.05, 0.0, (1, 28, 28)),
    # Here bfloat16 halves the time of a step.
    "resnet8": Network("ResNet-8, CIFAR-10", resnet8, "cifar10", 4, 128, 0.1, 1e-4, (3, 32, 32), "bf16-mixed"),
}


def num_weights(network: nn.Module) -> int:
    """The number of weights of a network: entries of parameters with two dimensions or more."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.dim() > 1)


def equal_width(make: Callable[..., nn.Module], sparsity: float) -> float:
    """The largest width, in thousandths, at which a dense network has no more weights than a sparse one.

    Args:
        make: Makes the network in a width.
        sparsity: Sparsity of the sparse network, which has the full width.
    """
    allowed = (1.0 - sparsity) * num_weights(make(1.0))
    low, high = 0, 1000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if num_weights(make(middle / 1000)) <= allowed else (low, middle)
    return low / 1000
