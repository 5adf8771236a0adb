"""Attention and torch's transformer blocks as shrinking sees them.

Attention mixes the features of queries, and sums products of all of a head, so that what it makes stays as it is. What
goes are features of keys and values that none of its weights read, where they come from elsewhere than the queries, and
the inner neurons of a block's two linear layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from typing_extensions import override

from lightning_sparse.execution.shrinking import operations
from lightning_sparse.execution.shrinking.layers import Layer, MatrixLayer, as_reals, set_parameter
from lightning_sparse.execution.shrinking.network import Network
from lightning_sparse.execution.shrinking.units import Features, Ids, Reader, UnitTable

__all__ = ["AttentionLayer", "attention_rule", "shrink_blocks"]

_BLOCKS = {nn.TransformerEncoderLayer, nn.TransformerDecoderLayer}


@final
class AttentionLayer(Layer):
    """What attention reads of keys and values.

    Args:
        name: The module's name.
        module: It.
        table: All units.
        key: What is known of the keys; ``None`` if nothing is.
        value: Likewise of the values.
    """

    def __init__(
        self, name: str, module: nn.MultiheadAttention, table: UnitTable, key: Features | None, value: Features | None
    ) -> None:
        super().__init__(name, module)
        self.attention = module
        _, *projections = _projections(module)
        for projection, inputs in zip(projections, (key, value), strict=True):
            weight = as_reals(projection)
            known = inputs or Features.varying(2, table.new(weight.shape[1], fixed=True))
            rows = table.new(len(weight), fixed=True)
            self.readers.append(Reader(rows, known.units, weight != 0, known.constant))

    @property
    @override
    def units(self) -> Ids:
        return np.zeros(0, dtype=np.int64)

    @override
    def shrink(self, needed: NDArray[np.bool_]) -> nn.Module:
        kept = [needed[reader.columns] for reader in self.readers]
        if all(columns.all() for columns in kept):
            return self.module
        module: Any = self.attention
        query, *projections = (projection.detach() for projection in _projections(module))
        shifts = [np.zeros(module.embed_dim)]
        module.register_parameter("q_proj_weight", nn.Parameter(query.clone()))
        for name, projection, reader, columns in zip("kv", projections, self.readers, kept, strict=True):
            weight = as_reals(projection)
            shifts.append(weight @ np.where(columns, 0.0, np.nan_to_num(reader.constant)))
            left = torch.from_numpy(weight[:, columns]).to(projection)
            module.register_parameter(f"{name}_proj_weight", nn.Parameter(left))
            setattr(module, f"{name}dim", int(columns.sum()))
        module.register_parameter("in_proj_weight", None)
        module._qkv_same_embed_dim = False
        self._add_to_bias(np.concatenate(shifts), query)
        return module

    def _add_to_bias(self, shift: NDArray[np.float64], like: Tensor) -> None:
        module: Any = self.attention
        if module.in_proj_bias is not None:
            set_parameter(module, "in_proj_bias", torch.from_numpy(as_reals(module.in_proj_bias) + shift))
        elif shift.any():
            module.in_proj_bias = nn.Parameter(torch.from_numpy(shift).to(like))


def attention_rule(network: Network, node: fx.Node) -> Any:
    """The rule for ``nn.MultiheadAttention``: all but keys and values stays."""
    module: nn.MultiheadAttention = network.module_of(node)
    given = dict(zip(("query", "key", "value"), node.args, strict=False)) | node.kwargs
    for name, argument in given.items():
        if name not in ("key", "value") and isinstance(argument, fx.Node):
            network.fix(network.known.get(argument))
    key, value = (network.features(given.get(name), axis=-1) for name in ("key", "value"))
    if key is not None or value is not None:
        network.layers.append(AttentionLayer(str(node.target), module, network.table, key, value))


def shrink_blocks(network: Network, node: fx.Node) -> None:
    """Take the inner neurons of torch's transformer blocks within a module into account; nothing else reads them."""
    module: nn.Module = network.module_of(node)
    for name, block in module.named_modules(prefix=str(node.target)):
        if type(block) in _BLOCKS and name not in network.blocks:
            network.blocks.add(name)
            network.layers.extend(_feedforward(network, name, block))


def _feedforward(network: Network, name: str, block: Any) -> Iterator[Layer]:
    parts = {own: getattr(block, own) for own in ("linear1", "linear2")}
    activation = block.activation
    is_known = activation in operations.FUNCTIONS or type(activation) in operations.EACH_FEATURE_MODULES
    if not is_known or any(type(part) is not nn.Linear for part in parts.values()):
        return
    if any(network.is_used_elsewhere(f"{name}.{own}", part) for own, part in parts.items()):
        return
    up = MatrixLayer(f"{name}.linear1", parts["linear1"], network.table, None, 2)
    inner = up.output.mapped(lambda values: activation(torch.from_numpy(values)).numpy())
    down = MatrixLayer(f"{name}.linear2", parts["linear2"], network.table, inner, 2)
    network.fix(down.output)
    yield from (up, down)


def _projections(module: nn.MultiheadAttention) -> list[Tensor]:
    """The weights that queries, keys and values meet first."""
    if module.in_proj_weight is not None:  # pyright: ignore[reportUnnecessaryComparison]  # where sizes differ it is
        return list(module.in_proj_weight.chunk(3))
    return [getattr(module, f"{name}_proj_weight") for name in "qkv"]
