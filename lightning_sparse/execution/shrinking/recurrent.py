"""Recurrent layers as shrinking sees them: LSTM, GRU and plain RNN, of one direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from lightning_sparse.execution.shrinking.layers import Layer, as_reals
from lightning_sparse.execution.shrinking.units import Features, Ids, Reader, Reals, UnitTable

__all__ = ["RecurrentLayer", "RecurrentStack"]

Flags = NDArray[np.bool_]

# Where the weights of the candidate are among those of the gates: without it, the state stays zero.
_CANDIDATE: dict[type[nn.RNNBase], int] = {nn.LSTM: 2, nn.GRU: 2, nn.RNN: 0}


@final
class RecurrentLayer(Layer):
    """The layers of one ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``: the state of each unit is read by the next step too.

    A unit whose candidate reads nothing and has no bias keeps the state 0 with which it begins; that is a constant. One
    with a bias changes over time without an input, and is none.

    Args:
        name: The module's name.
        module: It, without projections and of one direction.
        table: All units.
        inputs: What is known of the input; ``None`` if nothing is.
    """

    def __init__(self, name: str, module: nn.RNNBase, table: UnitTable, inputs: Features | None) -> None:
        super().__init__(name, module)
        self.rnn = module
        if inputs is None:
            inputs = Features.varying(2, table.new(module.input_size, fixed=True))
        self.states: list[Features] = []
        for index in range(module.num_layers):
            units = table.new(module.hidden_size)
            rows = np.tile(units, self._num_gates)
            weight, recurrent = (self._matrix(part, index) for part in ("weight_ih", "weight_hh"))
            constant = np.where(self._stays_zero(index, inputs), 0.0, np.nan)
            self.readers.append(Reader(rows, inputs.units, weight != 0, inputs.constant))
            self.readers.append(Reader(rows, units, recurrent != 0, constant))
            inputs = Features(2, units, constant)
            self.states.append(inputs)

    @property
    @override
    def units(self) -> Ids:
        return np.concatenate([state.units for state in self.states])

    @override
    def shrink(self, needed: Flags) -> nn.Module:
        kept = [(needed[reader.rows], needed[reader.columns]) for reader in self.readers]
        if all(rows.all() and columns.all() for rows, columns in kept):
            return self.module
        layers = [self._shrunk(index, needed) for index in range(self.rnn.num_layers)]
        return layers[0] if len(layers) == 1 else RecurrentStack(layers)

    def _shrunk(self, index: int, needed: Flags) -> nn.RNNBase:
        outer, inner = self.readers[2 * index : 2 * index + 2]
        rows, columns, units = needed[outer.rows], needed[outer.columns], needed[inner.columns]
        weight, recurrent = (self._matrix(part, index)[rows] for part in ("weight_ih", "weight_hh"))
        shift = weight @ np.where(columns, 0.0, np.nan_to_num(outer.constant))
        values = {"weight_ih_l0": weight[:, columns], "weight_hh_l0": recurrent[:, units]}
        if self.rnn.bias or shift.any():
            values["bias_ih_l0"] = self._matrix("bias_ih", index)[rows] + shift
            values["bias_hh_l0"] = self._matrix("bias_hh", index)[rows]
        like = getattr(self.rnn, f"weight_ih_l{index}")
        options: dict[str, Any] = {"nonlinearity": self.rnn.nonlinearity} if isinstance(self.rnn, nn.RNN) else {}
        kind: Any = type(self.rnn)  # whose mode its base asks for as well
        layer = kind(
            int(columns.sum()),
            int(units.sum()),
            bias="bias_ih_l0" in values,
            batch_first=self.rnn.batch_first,
            device=like.device,
            dtype=like.dtype,
            **options,
        )
        with torch.no_grad():
            for name, value in values.items():
                getattr(layer, name).copy_(torch.from_numpy(value))
        return layer.requires_grad_(like.requires_grad).train(self.rnn.training)

    @property
    def _num_gates(self) -> int:
        return len(self.rnn.weight_ih_l0) // self.rnn.hidden_size  # type: ignore[arg-type]

    def _matrix(self, part: str, index: int) -> Reals:
        """Weights or biases of a layer; zeros for biases that there are not."""
        values = getattr(self.rnn, f"{part}_l{index}", None)
        return np.zeros(self._num_gates * self.rnn.hidden_size) if values is None else as_reals(values)

    def _stays_zero(self, index: int, inputs: Features) -> Flags:
        """Which units begin at zero and never leave it."""
        size = self.rnn.hidden_size
        candidate = slice(_CANDIDATE[type(self.rnn)] * size, (_CANDIDATE[type(self.rnn)] + 1) * size)
        weight = self._matrix("weight_ih", index)[candidate]
        recurrent = self._matrix("weight_hh", index)[candidate] != 0
        outer = self._matrix("bias_ih", index)[candidate] + weight @ np.nan_to_num(inputs.constant)
        inner = self._matrix("bias_hh", index)[candidate]
        is_off = ((outer == 0) & (inner == 0)) if isinstance(self.rnn, nn.GRU) else outer + inner == 0
        zero = is_off & ~((weight != 0) & np.isnan(inputs.constant)).any(axis=1)
        while (stays := zero & ~recurrent[:, ~zero].any(axis=1)).sum() < zero.sum():  # some read one that leaves it
            zero = stays
        return zero


@final
class RecurrentStack(nn.Module):
    """Recurrent layers of different sizes, one after the other.

    Args:
        layers: Modules of one layer each.

    Example:
        >>> outputs, states = RecurrentStack([nn.LSTM(3, 5), nn.LSTM(5, 2)])(torch.ones(7, 4, 3))
        >>> outputs.shape, len(states)
        (torch.Size([7, 4, 2]), 2)
    """

    def __init__(self, layers: Sequence[nn.RNNBase]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @override
    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Any]]:
        """Return the outputs of the last layer, and the last states of each, whose sizes differ."""
        states: list[Any] = []
        for layer in self.layers:
            inputs, state = layer(inputs)
            states.append(state)
        return inputs, states
