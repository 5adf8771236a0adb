"""A parameter of a module that might be masked."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_sparse.masks.layers import Wiring
from lightning_sparse.masks.places import Part

__all__ = ["Candidate"]


@dataclass(frozen=True)
class Candidate:
    """A parameter of the module, and whether it is masked.

    Attributes:
        name: Name in the plain module, without the prefixes of wrappers.
        parameter: The parameter itself.
        owner: The module that holds it.
        local_name: Its name there.
        reason: Why it is left dense; empty where it is masked.
        wiring: How its entries feed outputs.
        part: Which part of its layer's weight it is, if that weight is computed from several parameters.
        traits: The selectors that it answers to, such as ``"@depthwise"``.
        keeps_zeros: Whether its layer computes with the zeros that are stored; None if that is not known.
        uses: How many layers use it; more than one under :class:`~lightning_sparse.modules.WeightSharing`.
    """

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    local_name: str
    reason: str = ""
    wiring: Wiring = field(default_factory=Wiring)
    part: Part = "whole"
    traits: frozenset[str] = frozenset()
    keeps_zeros: bool | None = True
    uses: int = 1

    @property
    def module_type(self) -> str:
        """Name of the class of the module that holds it."""
        return _kinds(self.owner)[0].__name__

    @property
    def type_names(self) -> list[str]:
        """Names of that class and of the classes that it comes from, below ``nn.Module``."""
        return [kind.__name__ for kind in _kinds(self.owner)]

    @property
    def numel(self) -> int:
        """Number of entries; 0 if it has no shape yet."""
        return 0 if nn.parameter.is_lazy(self.parameter) else self.parameter.numel()

    @property
    def is_matrix(self) -> bool:
        """Whether it has entries, in two or more dimensions."""
        return self.numel > 0 and self.parameter.dim() > 1

    @property
    def groups(self) -> int:
        """Groups of a convolution."""
        return self.wiring.groups

    @property
    def input_first(self) -> bool:
        """Whether dimension 0 of :attr:`layer_shape` counts inputs, as in a transposed convolution."""
        return self.wiring.input_first

    @property
    def copies(self) -> int:
        """Layers of one shape that lie in the parameter, as the experts of a mixture."""
        return self.wiring.copies

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of the parameter, or of one of its :attr:`copies`."""
        shape = tuple(self.parameter.shape)
        return shape[1:] if self.wiring.is_stack else (shape[0] // self.copies, *shape[1:])

    @property
    def leading(self) -> int:
        """How many of its first dimensions count outputs, two in a stack and else one, if it stores outputs first."""
        return 2 if self.wiring.is_stack else 1

    @property
    def fan_in(self) -> int:
        """Weights of each output neuron or filter."""
        outputs = self.layer_shape[1] * self.groups if self.input_first else self.layer_shape[0]
        return self.numel // max(1, self.copies * outputs)

    def rows(self, tensor: Tensor) -> Tensor:
        """``tensor``, shaped like the weight, as one row of inputs for each output neuron or filter, of each copy.

        Args:
            tensor: Of the weight's shape; or of the part of it that a process holds, where outputs come first.

        Returns:
            Shape ``(copies · outputs, fan-in)``.
        """
        if not self.input_first:
            return tensor.flatten(0, self.leading - 1).flatten(1)  # not reshape, which an empty part leaves open
        blocks, inputs, outputs = self._blocks()
        return tensor.reshape(blocks, inputs, outputs, -1).transpose(1, 2).reshape(blocks * outputs, -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`."""
        shape = self.parameter.shape
        if not self.input_first:
            return rows.reshape(shape)
        blocks, inputs, outputs = self._blocks()
        return rows.reshape(blocks, outputs, inputs, -1).transpose(1, 2).reshape(shape)

    def columns(self, tensor: Tensor) -> Tensor:
        """``tensor``, shaped like the weight, as one row for each input neuron or channel, of each copy.

        Returns:
            Shape ``(copies · inputs, outputs · kernel)``.
        """
        rows = self.rows(tensor)
        blocks = self.copies * self.groups
        inputs = self.layer_shape[0] // self.groups if self.input_first else self.layer_shape[1]
        of_block = rows.reshape(blocks, len(rows) // blocks, inputs, -1)
        return of_block.transpose(1, 2).reshape(blocks * inputs, -1)

    def _blocks(self) -> tuple[int, int, int]:
        """Groups of all copies, and the inputs and outputs of one."""
        return self.copies * self.groups, self.layer_shape[0] // self.groups, self.layer_shape[1]


def _kinds(owner: nn.Module) -> list[type[nn.Module]]:
    """The class of a module and those that it comes from, below ``nn.Module``; without what FSDP2 makes of it."""
    kinds = [kind for kind in type(owner).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]
    kinds = kinds[1:] if len(kinds) > 1 and isinstance(owner, FSDPModule) else kinds
    return kinds or [nn.Module]  # as torch.export makes them
