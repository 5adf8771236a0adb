"""Where the entries of a weight are: all of them in this process, or a part of them.

This is the only file that knows how a weight may be spread over processes. Everything else asks a :class:`Layout`: for
the entries that are here, for their places in the whole, and for sums over all processes that hold some.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

__all__ = ["Layout", "Whole"]


class Layout(ABC):
    """How a weight of a stated shape lies in the processes of a training.

    Args:
        shape: Shape of the whole weight.
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    @abstractmethod
    def local(self, tensor: Tensor) -> Tensor:
        """The entries that this process holds of a tensor that lies like the weight, sharing their memory."""

    @abstractmethod
    def take(self, whole: Tensor) -> Tensor:
        """The entries of this process out of a tensor that is whole here."""

    @abstractmethod
    def whole(self, local: Tensor) -> Tensor:
        """The inverse of :meth:`take`. A collective: every process must call it."""

    @abstractmethod
    def sum(self, counts: Tensor) -> Tensor:
        """Counts of this process' own entries, added up over all processes. A collective."""

    @abstractmethod
    def places(self, device: torch.device) -> Tensor:
        """The place of each local entry in the flattened whole: ``int64``, of the local shape."""


@final
class Whole(Layout):
    """Every process holds every entry: a single device, or data-parallel training.

    Example:
        >>> layout = Whole(torch.Size([2, 2]))
        >>> layout.places(torch.device("cpu"))
        tensor([[0, 1],
                [2, 3]])
    """

    def local(self, tensor: Tensor) -> Tensor:  # noqa: D102
        return tensor

    def take(self, whole: Tensor) -> Tensor:  # noqa: D102
        return whole

    def whole(self, local: Tensor) -> Tensor:  # noqa: D102
        return local

    def sum(self, counts: Tensor) -> Tensor:  # noqa: D102
        return counts

    def places(self, device: torch.device) -> Tensor:  # noqa: D102
        return torch.arange(self.shape.numel(), device=device).view(self.shape)
