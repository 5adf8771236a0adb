"""Layers that stand in the place of dense ones, and may be asked what those know."""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import Self, override

__all__ = ["StandIn", "share_memory"]


class StandIn(nn.Module):
    """A layer in the place of another: what it has not itself, as ``weight`` or ``stride``, is read of the other.

    Networks read such things of their layers, to convert inputs to the type of the weights for one.

    Example:
        >>> StandIn().stand_for(nn.Linear(3, 2)).weight.shape
        torch.Size([2, 3])
    """

    def stand_for(self, layer: nn.Module) -> Self:
        """Say in whose place it is. Returns itself."""
        self.__dict__["_stands_for"] = layer  # not by nn.Module's way, which would make it a submodule
        return self

    @override
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            other = self.__dict__.get("_stands_for")
            if other is None or name.startswith("__"):
                raise
            return getattr(other, name)


def share_memory(copy: nn.Module, module: nn.Module) -> None:
    """Let the parameters of a copy be those of the module that it is a copy of, in the same memory, without gradients.

    Example:
        >>> import copy
        >>> layer = nn.Linear(3, 2)
        >>> own = copy.deepcopy(layer)
        >>> share_memory(own, layer)
        >>> own.weight.data_ptr() == layer.weight.data_ptr(), own.weight.requires_grad
        (True, False)
    """
    for own, other in zip(copy.modules(), module.modules(), strict=True):
        for name, parameter in other.named_parameters(recurse=False):
            own.register_parameter(name, nn.Parameter(parameter.detach(), requires_grad=False))
