"""ResNets for 32 x 32 images: that of the original paper, and those with which sparse training is compared.

They are chains of ``conv1``, ``bn1``, ``relu``, the stages ``layer1`` and on, each a chain of blocks, and ``fc``;
weights have torchvision's names. Every activation is a module of its own, so that each can be replaced: where
torchvision's blocks call one ``relu`` at every place, these have ``relu1``, ``relu2`` and ``relu3``.

References:
    He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, https://arxiv.org/abs/1512.03385
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import final

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet as torchvision
from typing_extensions import override

__all__ = ["BasicBlock", "Bottleneck", "ResNet20", "ResNet34", "ResNet50", "ZeroPaddedShortcut"]

Shortcut = Callable[[int, int, int], nn.Module]
"""Makes a shortcut from the channels that come in, the channels that go out, and the stride."""


@final
class BasicBlock(torchvision.BasicBlock):
    """torchvision's block of two 3 x 3 convolutions, with one module for each of its two activations.

    Args:
        in_channels: Channels that come in.
        channels: Channels of both convolutions, and those that go out.
        stride: Of the first convolution.
        downsample: The shortcut where input and output differ in shape; none where they do not.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo.resnet import BasicBlock
        >>> BasicBlock(8, 8)(torch.zeros(5, 8, 4, 4)).shape
        torch.Size([5, 8, 4, 4])
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__(in_channels, channels, stride, downsample)
        del self.relu
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of residual and shortcut, rectified: shape (N, channels, height / stride, width / stride)."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return self.relu2(residual + (x if self.downsample is None else self.downsample(x)))


@final
class Bottleneck(torchvision.Bottleneck):
    """torchvision's block of three convolutions, 1 x 1, 3 x 3 and 1 x 1, with one module for each activation.

    The stride is that of the 3 x 3 convolution, as in torchvision and in the code of EAST and of FGGP; He et al. have
    it in the first.

    Args:
        in_channels: Channels that come in.
        channels: Channels of the first two convolutions; four times as many go out.
        stride: Of the second convolution.
        downsample: The shortcut where input and output differ in shape; none where they do not.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo.resnet import Bottleneck
        >>> Bottleneck(32, 8)(torch.zeros(5, 32, 4, 4)).shape
        torch.Size([5, 32, 4, 4])
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__(in_channels, channels, stride, downsample)
        del self.relu
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.relu3 = nn.ReLU()

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of residual and shortcut, rectified: (N, 4 * channels, height / stride, width / stride)."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.relu2(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return self.relu3(residual + (x if self.downsample is None else self.downsample(x)))


@final
class ZeroPaddedShortcut(nn.Module):
    """The shortcut without parameters, option A of He et al.: every ``stride``-th pixel, and channels of zeros.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out, at least as many; what is added comes last.
        stride: Distance of the pixels that are kept.

    Raises:
        ValueError: If fewer channels go out than come in.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo.resnet import ZeroPaddedShortcut
        >>> ZeroPaddedShortcut(1, 2, stride=2)(torch.arange(16.0).reshape(1, 1, 4, 4)).tolist()
        [[[[0.0, 2.0], [8.0, 10.0]], [[0.0, 0.0], [0.0, 0.0]]]]
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"out_channels is {out_channels} and in_channels {in_channels}; zeros can add channels, not remove any."
                " Give at least as many out_channels, or a convolution as the shortcut."
            )
        self.stride = stride
        self.added = out_channels - in_channels

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Return shape (N, out_channels, height / stride, width / stride)."""
        return F.pad(inputs[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))


@final
class ResNet20(nn.Sequential):
    """ResNet-20 for CIFAR (He et al. 2016, section 4.2): three stages of three blocks, with shortcuts of zeros.

    With the defaults it has 269,722 parameters, 268,336 of them weights. Weights of convolutions begin normal with
    variance 2 / fan_in (He et al. 2015).

    Args:
        num_classes: Logits that come out.
        width: Channels of the first stage, 16 in the paper; the next stages have 2 and 4 times as many.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo import ResNet20
        >>> ResNet20()(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])

    References:
        He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, https://arxiv.org/abs/1512.03385
    """

    def __init__(self, num_classes: int = 10, width: int = 16) -> None:
        super().__init__(_layers(BasicBlock, (3, 3, 3), width, num_classes, ZeroPaddedShortcut, bias=True))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


@final
class ResNet34(nn.Sequential):
    """ResNet-34 for CIFAR, as in the code of EAST.

    A 3 x 3 convolution comes first, no max pooling after it, and the classifier has no bias. With the defaults it has
    21,282,112 parameters, 21,265,088 of them weights. Weights begin as torch draws them. torchvision's checkpoints fit,
    but for ``conv1.weight`` and ``fc``.

    Args:
        num_classes: Logits that come out.
        width: Channels of the first stage, 64 in the papers; the next stages have 2, 4 and 8 times as many.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo import ResNet34
        >>> ResNet34(width=8)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])

    References:
        Li et al., "Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning", TMLR 2025,
        https://arxiv.org/abs/2411.13545
    """

    def __init__(self, num_classes: int = 10, width: int = 64) -> None:
        super().__init__(_layers(BasicBlock, (3, 4, 6, 3), width, num_classes, _projection, bias=False))


@final
class ResNet50(nn.Sequential):
    """ResNet-50 for CIFAR, as in the code of EAST and of FGGP: like :class:`ResNet34`, with bottlenecks.

    With the defaults it has 23,520,832 parameters, 23,467,712 of them weights. Weights begin as torch draws them.
    torchvision's checkpoints fit, but for ``conv1.weight`` and ``fc``.

    Args:
        num_classes: Logits that come out.
        width: Channels inside the bottlenecks of the first stage, 64 in the papers; the next stages have 2, 4 and 8
            times as many.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo import ResNet50
        >>> ResNet50(width=8)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])

    References:
        Li et al., "Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning", TMLR 2025,
        https://arxiv.org/abs/2411.13545
    """

    def __init__(self, num_classes: int = 10, width: int = 64) -> None:
        super().__init__(_layers(Bottleneck, (3, 4, 6, 3), width, num_classes, _projection, bias=False))


def _layers(
    block: type[BasicBlock | Bottleneck],
    depths: Sequence[int],
    width: int,
    num_classes: int,
    shortcut: Shortcut,
    *,
    bias: bool,
) -> OrderedDict[str, nn.Module]:
    """All layers of a ResNet; stages after the first halve height and width and double the channels."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False), bn1=nn.BatchNorm2d(width), relu=nn.ReLU()
    )
    in_channels = width
    for index, depth in enumerate(depths):
        channels = width * 2**index
        layers[f"layer{index + 1}"] = _stage(block, in_channels, channels, depth, 2 if index else 1, shortcut)
        in_channels = channels * block.expansion
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(in_channels, num_classes, bias=bias)
    return layers


def _stage(
    block: type[BasicBlock | Bottleneck], in_channels: int, channels: int, depth: int, stride: int, shortcut: Shortcut
) -> nn.Sequential:
    """Blocks in a chain. The first one may change the shape."""
    out_channels = channels * block.expansion
    same = stride == 1 and in_channels == out_channels
    first = block(in_channels, channels, stride, None if same else shortcut(in_channels, out_channels, stride))
    return nn.Sequential(first, *(block(out_channels, channels) for _ in range(depth - 1)))


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The shortcut by a 1 x 1 convolution, option B of He et al."""
    return nn.Sequential(torchvision.conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
