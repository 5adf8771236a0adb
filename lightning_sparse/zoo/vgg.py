"""VGG networks for 32 x 32 images, as the code of the papers on sparse training has them.

References:
    Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
    https://arxiv.org/abs/1409.1556
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import final

from torch import nn

__all__ = ["VGG16", "VGG19"]


@final
class VGG16(nn.Sequential):
    """VGG-16 for CIFAR with batch normalisation and two linear layers, as in the code of DST.

    13 convolutions without biases, whose norms begin with a scale of 0.5, and a classifier with a hidden layer of 512
    units. With the defaults it has 14,987,722 parameters, 14,977,728 of them weights. Weights begin as torch draws
    them, like those of the authors' masked network; their dense one begins as He et al. 2015 propose.

    Args:
        num_classes: Logits that come out.
        width: Channels of the first stage, 64 in the papers; the next stages have 2, 4, 8 and 8 times as many.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo import VGG16
        >>> VGG16(width=8)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])

    References:
        Liu et al., "Dynamic Sparse Training", ICLR 2020, https://arxiv.org/abs/2005.06870
    """

    def __init__(self, num_classes: int = 10, width: int = 64) -> None:
        features = _features((2, 2, 3, 3, 3), width, bias=False)
        for module in features:
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.5)
        classifier = nn.Sequential(
            nn.Linear(8 * width, 8 * width),
            nn.BatchNorm1d(8 * width),
            nn.ReLU(),
            nn.Linear(8 * width, num_classes),
        )
        super().__init__(_network(features, classifier))


@final
class VGG19(nn.Sequential):
    """VGG-19 for CIFAR with batch normalisation and one linear layer, as in the code of FGGP.

    16 convolutions with biases. With the defaults it has 20,040,522 parameters, 20,024,000 of them weights. Weights of
    convolutions begin normal with variance 2 / fan_in (He et al. 2015), the classifier's with a standard deviation of
    0.01, biases at zero.

    Args:
        num_classes: Logits that come out.
        width: Channels of the first stage, 64 in the papers; the next stages have 2, 4, 8 and 8 times as many.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo import VGG19
        >>> VGG19(width=8)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])

    References:
        Zhu, Bezek & Goksel, "Fixed-Rate Gradient-First Gradual Pruning", SCIA 2025, https://arxiv.org/abs/2411.05500
    """

    def __init__(self, num_classes: int = 10, width: int = 64) -> None:
        features = _features((2, 2, 4, 4, 4), width, bias=True)
        for module in features:
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        classifier = nn.Linear(8 * width, num_classes)
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
        super().__init__(_network(features, classifier))


def _features(depths: Sequence[int], width: int, *, bias: bool) -> nn.Sequential:
    """Five stages of 3 x 3 convolutions with max pooling between them, from 32 x 32 to 2 x 2 pixels."""
    layers: list[nn.Module] = []
    in_channels = 3
    for depth, factor in zip(depths, (1, 2, 4, 8, 8), strict=True):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for _ in range(depth):
            channels = factor * width
            convolution = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=bias)
            layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
            in_channels = channels
    return nn.Sequential(*layers)


def _network(features: nn.Module, classifier: nn.Module) -> OrderedDict[str, nn.Module]:
    return OrderedDict(features=features, pool=nn.AvgPool2d(2), flatten=nn.Flatten(), classifier=classifier)
