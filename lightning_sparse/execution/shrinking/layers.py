"""Layers as shrinking sees them: which units their weights read and make, and how they go on without some of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from lightning_sparse.execution.shrinking.units import Features, Ids, Reader, Reals, UnitTable

__all__ = ["Layer", "LiveInputs", "MatrixLayer", "PerFeatureLayer"]

Flags = NDArray[np.bool_]

_FEW = 0.25
"""The share of live inputs up to which they are picked."""
_LEAST_SPARED = 65_536
"""Weights that picking inputs must spare: with fewer, and one input at a time, it was slower than to keep all."""


class Layer(ABC):
    """One module and its units.

    Args:
        name: The module's name in the network.
        module: It; changed by ``shrink`` alone.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.readers: list[Reader] = []

    @property
    @abstractmethod
    def units(self) -> Ids:
        """Labels of the units that it makes; empty if it makes none."""

    @abstractmethod
    def shrink(self, needed: Flags) -> nn.Module:
        """Leave out what is not needed, in the module itself or in another that takes its place."""


@final
class MatrixLayer(Layer):
    """A linear layer or a convolution: each unit reads those before it.

    Args:
        name: The module's name.
        module: ``nn.Linear``, a convolution or a transposed one, of one group.
        table: All units.
        inputs: What is known of the input; ``None`` if nothing is.
        axis: The axis of the output's features.
    """

    def __init__(self, name: str, module: nn.Module, table: UnitTable, inputs: Features | None, axis: int) -> None:
        super().__init__(name, module)
        self._is_transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        weight = self._weight()
        rows, columns = weight.shape[:2]
        if inputs is None:
            inputs = Features.varying(axis, table.new(columns, fixed=True))
        self._rows = table.new(rows)
        self._reader = Reader(self._rows, inputs.units, (weight != 0).any(axis=2), inputs.constant, has_border(module))
        self.readers = [self._reader]
        self.output = Features(axis, self._rows, self._constants(weight))

    @property
    @override
    def units(self) -> Ids:
        return self._rows

    @override
    def shrink(self, needed: Flags) -> nn.Module:
        rows, columns = needed[self._reader.rows], needed[self._reader.columns]
        live = columns & self._reader.columns_read(needed)
        chooses = isinstance(self.module, nn.Linear) and _are_few(int(live.sum()), int(columns.sum()), int(rows.sum()))
        if rows.all() and columns.all() and not chooses:
            return self.module
        weight = self._weight()[rows]
        shift = np.zeros(len(weight))
        stand_in = self._reader.stand_in(needed)
        constant = np.where(columns, 0.0, np.nan_to_num(self._reader.constant))
        if stand_in is None:
            shift = weight.sum(axis=2) @ constant
        else:
            weight[:, stand_in] += np.einsum("rcp,c->rp", weight, constant / self._reader.constant[stand_in])
        if chooses:
            self._set(weight[:, live], rows, shift)
            return LiveInputs(self.module, np.flatnonzero(live[columns]).tolist())
        self._set(weight[:, columns], rows, shift)
        return self.module

    def _weight(self) -> Reals:
        """All weights, of shape (rows, columns, positions of the kernel)."""
        weight = cast("Tensor", self.module.weight).detach()
        weight = weight.transpose(0, 1) if self._is_transposed else weight
        return as_reals(weight).reshape(*weight.shape[:2], -1)

    def _constants(self, weight: Reals) -> Reals:
        """What comes out of the rows that read constants alone."""
        reader = self._reader
        is_known = np.isfinite(reader.constant) & (~np.array(reader.has_border) | (reader.constant == 0))
        varies = (reader.reads & ~is_known).any(axis=1)
        value = weight.sum(axis=2) @ np.where(is_known, reader.constant, 0.0)
        bias: Any = self.module.bias
        return np.where(varies, np.nan, value if bias is None else value + as_reals(bias))

    def _set(self, weight: Reals, rows: Flags, shift: Reals) -> None:
        module = cast("Any", self.module)
        shape = (*weight.shape[:2], *module.weight.shape[2:])
        tensor = torch.from_numpy(weight.reshape(shape))
        set_parameter(module, "weight", tensor.transpose(0, 1) if self._is_transposed else tensor)
        if module.bias is not None:
            set_parameter(module, "bias", torch.from_numpy(as_reals(module.bias)[rows] + shift))
        elif shift.any():
            module.bias = nn.Parameter(torch.empty(0).to(module.weight))
            set_parameter(module, "bias", torch.from_numpy(shift))
        inputs, outputs = weight.shape[1], weight.shape[0]
        if isinstance(module, nn.Linear):
            module.in_features, module.out_features = inputs, outputs
        else:
            module.in_channels, module.out_channels = inputs, outputs


@final
class PerFeatureLayer(Layer):
    """What has numbers for each feature, as a normalisation or a depthwise convolution: it goes with its features.

    Args:
        name: The module's name.
        module: It.
        units: Labels of its features.
        parameters: Axis of the features in each parameter and buffer that has one.
        sizes: Attributes that hold the number of features.
    """

    def __init__(
        self, name: str, module: nn.Module, units: Ids, parameters: Mapping[str, int], sizes: Sequence[str]
    ) -> None:
        super().__init__(name, module)
        self._units = units
        self._parameters = parameters
        self._sizes = sizes

    @property
    @override
    def units(self) -> Ids:
        return self._units[:0]

    @override
    def shrink(self, needed: Flags) -> nn.Module:
        kept = needed[self._units]
        if kept.all():
            return self.module
        index = torch.from_numpy(np.flatnonzero(kept))
        for name, axis in self._parameters.items():
            tensor = getattr(self.module, name)
            if tensor is not None:
                set_parameter(self.module, name, tensor.detach().index_select(axis, index.to(tensor.device)))
        for name in self._sizes:
            setattr(self.module, name, len(index))
        return self.module


@final
class LiveInputs(nn.Module):
    """A layer that reads some of its inputs alone.

    Args:
        layer: It, for as many inputs as are read.
        live: Positions of those on the last axis.

    Example:
        >>> LiveInputs(nn.Linear(2, 1), [0, 3])(torch.ones(5, 4)).shape
        torch.Size([5, 1])
    """

    live: Tensor

    def __init__(self, layer: nn.Module, live: Sequence[int]) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("live", torch.tensor(live, device=cast("Tensor", layer.weight).device))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the layer makes of the inputs that it reads."""
        return self.layer(inputs.index_select(-1, self.live))


def _are_few(live: int, inputs: int, outputs: int) -> bool:
    """Whether so few inputs matter that to pick them pays."""
    return 0 < live <= _FEW * inputs and (inputs - live) * outputs >= _LEAST_SPARED


def as_reals(tensor: Tensor) -> Reals:
    """Numbers in double precision, in memory of their own."""
    return tensor.detach().cpu().double().numpy().copy()


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace the values of a parameter or a buffer by others of another shape, in its dtype and where it is."""
    old = getattr(module, name)
    new = value.to(old).contiguous().clone()
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)


def has_border(module: nn.Module) -> bool:
    """Whether a convolution sees zeros around its input, or reads less of it at some outputs than at others."""
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return True
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or module.padding_mode != "zeros":
        return False
    if isinstance(module.padding, str):
        return module.padding == "same" and any(size > 1 for size in module.kernel_size)
    return any(module.padding)
