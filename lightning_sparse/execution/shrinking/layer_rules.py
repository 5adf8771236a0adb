"""Rules for modules with weights: which units they make, read, or go with.

A rule gets the network and a node of its graph, and returns what is then known of the node's result, or
``NotImplemented`` where it does not know the case; then all units that the node is given stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx, nn

from lightning_sparse.execution.shrinking import operations
from lightning_sparse.execution.shrinking.layers import MatrixLayer, PerFeatureLayer, as_reals, has_border
from lightning_sparse.execution.shrinking.network import Network
from lightning_sparse.execution.shrinking.recurrent import RecurrentLayer
from lightning_sparse.execution.shrinking.tracing import shape_of
from lightning_sparse.execution.shrinking.units import Features

__all__ = ["LAYER_RULES", "Rule"]

Rule = Callable[[Network, fx.Node], Any]


def _linear(network: Network, node: fx.Node) -> Any:
    shape = shape_of(node)
    if shape is None or len(node.args) != 1:
        return NotImplemented
    inputs = network.features(node.args[0], axis=-1)
    layer = MatrixLayer(str(node.target), network.module_of(node), network.table, inputs, len(shape) - 1)
    network.layers.append(layer)
    return layer.output


def _convolution(network: Network, node: fx.Node) -> Any:
    module, shape = network.module_of(node), shape_of(node)
    if shape is None or len(node.args) != 1 or len(shape) != len(module.kernel_size) + 2:
        return NotImplemented
    inputs = network.features(node.args[0], axis=1)
    if module.groups == 1:
        layer = MatrixLayer(str(node.target), module, network.table, inputs, 1)
        network.layers.append(layer)
        return layer.output
    is_depthwise = type(module) in operations.CONVOLUTIONS and module.groups == module.in_channels
    if not is_depthwise or module.out_channels != module.in_channels or inputs is None:
        return NotImplemented
    sizes = ("in_channels", "out_channels", "groups")
    network.layers.append(PerFeatureLayer(str(node.target), module, inputs.units, {"weight": 0, "bias": 0}, sizes))
    weight = as_reals(module.weight).reshape(module.in_channels, -1)
    bias = 0.0 if module.bias is None else as_reals(module.bias)
    constant = np.where(has_border(module) & (inputs.constant != 0), np.nan, inputs.constant)
    constant = np.where((weight == 0).all(axis=1), 0.0, constant)
    return inputs.with_constant(constant * weight.sum(axis=1) + bias)


def _batch_norm(network: Network, node: fx.Node) -> Any:
    module, inputs = network.module_of(node), network.features(node.args[0], axis=1)
    if inputs is None:
        return None
    parameters = {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}
    network.layers.append(PerFeatureLayer(str(node.target), module, inputs.units, parameters, ("num_features",)))
    size = len(inputs.units)
    weight, bias = (
        default if tensor is None else as_reals(tensor)
        for tensor, default in ((module.weight, np.ones(size)), (module.bias, np.zeros(size)))
    )
    if module.running_mean is None:  # by the statistics of a batch: what is constant there depends on the others
        return inputs.with_constant(np.where(weight == 0, bias, np.nan))
    scale = weight / np.sqrt(as_reals(module.running_var) + module.eps)
    constant = (inputs.constant - as_reals(module.running_mean)) * scale + bias
    return inputs.with_constant(np.where(weight == 0, bias, constant))


def _prelu(network: Network, node: fx.Node) -> Any:
    module = network.module_of(node)
    inputs = network.features(node.args[0], axis=None if module.num_parameters == 1 else 1)
    if inputs is None:
        return None
    if module.num_parameters > 1:
        network.layers.append(
            PerFeatureLayer(str(node.target), module, inputs.units, {"weight": 0}, ("num_parameters",))
        )
    slope = as_reals(module.weight)
    return inputs.mapped(lambda values: np.where(values < 0, slope * values, values))


def _embedding(network: Network, node: fx.Node) -> Any:
    module, shape = network.module_of(node), shape_of(node)
    if shape is None or module.max_norm is not None:
        return NotImplemented
    units = network.table.new(module.embedding_dim)
    network.layers.append(PerFeatureLayer(str(node.target), module, units, {"weight": 1}, ("embedding_dim",)))
    weight = as_reals(module.weight)
    return Features(len(shape) - 1, units, np.where((weight == weight[:1]).all(axis=0), weight[0], np.nan))


def _recurrent(network: Network, node: fx.Node) -> Any:
    module = network.module_of(node)
    shape = shape_of(node.args[0]) if len(node.args) == 1 and not node.kwargs else None
    if shape is None or len(shape) != 3 or module.bidirectional or module.proj_size:
        return NotImplemented
    layer = RecurrentLayer(str(node.target), module, network.table, network.features(node.args[0], axis=-1))
    network.layers.append(layer)
    states: Any = layer.states if len(layer.states) > 1 else layer.states[0]
    if len(layer.states) == 1 and isinstance(module, nn.LSTM):
        states = (states, states)
    return (layer.states[-1], states)


LAYER_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    **dict.fromkeys(operations.CONVOLUTIONS | operations.TRANSPOSED, _convolution),
    **dict.fromkeys(operations.NORMS, _batch_norm),
    **dict.fromkeys(operations.RECURRENT, _recurrent),
}
