"""Networks of the sparse-training literature, as small as their papers describe them.

References:
    LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", Proc. IEEE 1998
    Caffe's variant of LeNet-5: https://github.com/BVLC/caffe/blob/master/examples/mnist/lenet_train_test.prototxt
"""

from __future__ import annotations

from collections import OrderedDict
from typing import final

from torch import Tensor, nn
from typing_extensions import override

__all__ = ["LeNet5Caffe", "LeNet300100", "RowLSTM"]


@final
class LeNet300100(nn.Sequential):
    """LeNet-300-100: a multilayer perceptron with 300 and 100 hidden units and ReLU.

    With the defaults it has 266,610 parameters, 266,200 of them weights. It flattens its input, so it takes images.

    Args:
        in_features: Values in one input, over all its dimensions: 784 for MNIST, 64 for 8 x 8 digits.
        num_classes: Logits that come out.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo import LeNet300100
        >>> network = LeNet300100(in_features=64)
        >>> network(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, in_features: int = 784, num_classes: int = 10) -> None:
        super().__init__(
            OrderedDict(
                flatten=nn.Flatten(),
                fc1=nn.Linear(in_features, 300),
                relu1=nn.ReLU(),
                fc2=nn.Linear(300, 100),
                relu2=nn.ReLU(),
                fc3=nn.Linear(100, num_classes),
            )
        )


@final
class LeNet5Caffe(nn.Sequential):
    """LeNet-5 in Caffe's variant, for 1 x 28 x 28 images: two 5 x 5 convolutions without padding, two linear layers.

    With the defaults it has 431,080 parameters, 430,500 of them weights. Caffe's own file has a ReLU after the 500
    units alone. The code of the papers whose tables name this network (SNIP, SNFS, DST) has one after each
    convolution too, and so has this class.

    Args:
        num_classes: Logits that come out.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo import LeNet5Caffe
        >>> LeNet5Caffe()(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(1, 20, kernel_size=5),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(20, 50, kernel_size=5),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(50 * 4 * 4, 500),
                relu3=nn.ReLU(),
                fc2=nn.Linear(500, num_classes),
            )
        )


@final
class RowLSTM(nn.Module):
    """Two LSTM layers that read an image row by row, and a linear layer on the last hidden state: sequential MNIST.

    DST's LSTM-a has 128 hidden units, its LSTM-b 256. In the authors' code each gate has one bias, in torch's LSTM two;
    theirs also hands the last state of a batch on to the next batch of other images, and this one begins at zero.
    DST's figures count the gates' weights alone; the classifier is dense, which is ``exclude=["*classifier.*"]``.

    Args:
        hidden_size: Units of each layer.
        in_features: Values in a row: 28 for MNIST.
        num_classes: Logits that come out.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo import RowLSTM
        >>> RowLSTM(hidden_size=128)(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])

    References:
        Liu et al., "Dynamic Sparse Training", ICLR 2020, https://arxiv.org/abs/2005.06870
    """

    def __init__(self, hidden_size: int = 128, in_features: int = 28, num_classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(in_features, hidden_size, num_layers=2, batch_first=True)
        self.classifier = nn.Linear(hidden_size, num_classes)
        nn.init.uniform_(self.classifier.weight, -0.1, 0.1)
        nn.init.zeros_(self.classifier.bias)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images of shape (N, 1, rows, in_features)."""
        states, _ = self.lstm(images.squeeze(1))
        return self.classifier(states[:, -1])
