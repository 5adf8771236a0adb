"""Wide residual networks: ResNets for 32 x 32 images that are shallow and have many channels.

References:
    Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, https://arxiv.org/abs/1605.07146
"""

from __future__ import annotations

from collections import OrderedDict
from typing import final

from torch import Tensor, nn
from typing_extensions import override

__all__ = ["PreActivationBlock", "WideResNet"]


@final
class PreActivationBlock(nn.Module):
    """Two 3 x 3 convolutions, each after its norm and activation; each activation is a module of its own.

    Where the number of channels changes, the shortcut is a 1 x 1 convolution of the input after its first activation.

    Args:
        in_channels: Channels that come in.
        channels: Channels that go out.
        stride: Of the first convolution.

    Raises:
        ValueError: If there is a stride but as many channels go out as come in.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo.wide_resnet import PreActivationBlock
        >>> PreActivationBlock(4, 8, stride=2)(torch.zeros(5, 4, 6, 6)).shape
        torch.Size([5, 8, 3, 3])
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        if stride != 1 and in_channels == channels:
            raise ValueError(
                f"stride is {stride}, but {channels} channels come in and go out; the shortcut of such a block is the"
                " input itself. Give stride 1, or another number of channels."
            )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.shortcut = (
            None
            if in_channels == channels
            else nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False)
        )

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum of residual and shortcut: shape (N, channels, height / stride, width / stride)."""
        activated = self.relu1(self.bn1(inputs))
        residual = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return residual + (inputs if self.shortcut is None else self.shortcut(activated))


@final
class WideResNet(nn.Sequential):
    """WRN-``depth``-``widen_factor`` for CIFAR, without dropout, as in the code of DST.

    A convolution to 16 channels, three stages of (depth - 4) / 6 blocks each, with 16, 32 and 64 times ``widen_factor``
    channels, and a linear layer. WRN-16-8 has 10,961,370 parameters, WRN-28-8 23,354,842. Weights begin as torch draws
    them, like those of the authors' masked network; Zagoruyko and Komodakis begin as He et al. 2015 propose.

    Args:
        depth: Convolutions in the chain and the linear layer: 10, 16, 22, 28, 34, 40 and so on.
        widen_factor: How many times as wide as He et al.'s networks.
        num_classes: Logits that come out.

    Raises:
        ValueError: If the depth is not 4 more than a multiple of 6.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo import WideResNet
        >>> WideResNet(depth=16, widen_factor=1)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])

    References:
        Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, https://arxiv.org/abs/1605.07146
    """

    def __init__(self, depth: int = 28, widen_factor: int = 8, num_classes: int = 10) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(
                f"depth is {depth}; give 10, 16, 22, 28, 34, 40 or another multiple of 6 plus 4: three stages of blocks"
                " of two convolutions, and four layers around them."
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False))
        in_channels = 16
        for index in range(3):
            channels = 16 * widen_factor * 2**index
            first = PreActivationBlock(in_channels, channels, stride=2 if index else 1)
            others = (PreActivationBlock(channels, channels) for _ in range((depth - 4) // 6 - 1))
            layers[f"layer{index + 1}"] = nn.Sequential(first, *others)
            in_channels = channels
        layers["bn1"] = nn.BatchNorm2d(in_channels)
        layers["relu"] = nn.ReLU()
        layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(in_channels, num_classes)
        super().__init__(layers)
