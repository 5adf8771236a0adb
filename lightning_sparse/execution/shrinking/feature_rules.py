"""Rules for what works on each feature alone, or on features of two tensors, place by place."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_sparse.execution.shrinking import operations
from lightning_sparse.execution.shrinking.layer_rules import Rule
from lightning_sparse.execution.shrinking.network import Network
from lightning_sparse.execution.shrinking.tracing import shape_of
from lightning_sparse.execution.shrinking.units import Features, Reals

__all__ = ["FUNCTION_RULES", "METHOD_RULES", "MODULE_RULES"]


def _each_feature_module(network: Network, node: fx.Node) -> Any:
    module = network.module_of(node)
    return _each_feature(network, node, lambda values: module(values))


def _each_feature_function(network: Network, node: fx.Node) -> Any:
    function = cast("Callable[..., Any]", node.target)
    if _has_nodes(node) or (node.target is F.dropout and node.kwargs.get("training", True)):
        return NotImplemented
    return _each_feature(network, node, lambda values: function(values, *node.args[1:], **node.kwargs))


def _each_feature_method(network: Network, node: fx.Node) -> Any:
    if _has_nodes(node):
        return NotImplemented
    name = str(node.target)
    return _each_feature(network, node, lambda values: getattr(values, name)(*node.args[1:], **node.kwargs))


def _each_feature(network: Network, node: fx.Node, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    inputs = network.features(node.args[0]) if node.args else None
    return None if inputs is None else inputs.mapped(lambda values: function(torch.from_numpy(values)).numpy())


def _has_nodes(node: fx.Node) -> bool:
    """Whether more than the first argument is computed, from the same value perhaps."""
    computed: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), computed.append)
    return computed != list(node.args[:1])


def _binary(network: Network, node: fx.Node) -> Any:
    function = operations.BINARY[node.target]
    if shape_of(node) is None:  # something computed from sizes
        return tuple(network.known.get(argument) for argument in node.all_input_nodes)
    if len(node.args) != 2 or node.kwargs:
        return NotImplemented
    first, second = (network.features(item) if isinstance(item, fx.Node) else item for item in node.args)
    if isinstance(first, Features) and isinstance(second, (int, float)):
        return first.mapped(lambda values: function(values, second))
    if isinstance(second, Features) and isinstance(first, (int, float)):
        return second.mapped(lambda values: function(first, values))
    if not isinstance(first, Features) or not isinstance(second, Features):
        return NotImplemented
    return _together(network, node, first, second)


def _together(network: Network, node: fx.Node, first: Features, second: Features) -> Any:
    """Features of two tensors, place by place."""
    function = operations.BINARY[node.target]
    shapes = [shape_of(node), *(shape_of(item) for item in node.args)]
    if any(shape is None for shape in shapes) or len(first.units) != len(second.units):
        return NotImplemented
    ndim, of_first, of_second = (len(cast("tuple[int, ...]", shape)) for shape in shapes)
    if first.axis - of_first != second.axis - of_second:
        return NotImplemented
    network.table.join(first.units, second.units)
    with np.errstate(all="ignore"):
        constant = cast("Reals", function(first.constant, second.constant))
    if function is operator.mul:
        constant = np.where((first.constant == 0) | (second.constant == 0), 0.0, constant)
    return Features(first.axis - of_first + ndim, first.units, first.constant).with_constant(constant)


def _pool(network: Network, node: fx.Node) -> Any:
    """Maxima and means of neighbours, which are the constant where all of them are."""
    is_module = node.op == "call_module"
    kind: Any = type(network.module_of(node)) if is_module else node.target
    ndim = (operations.MODULES_OF_POOLS if is_module else operations.FUNCTIONS_OF_POOLS)[kind] + 2
    if [len(shape_of(part) or ()) for part in (node, node.args[0])] != [ndim, ndim]:
        return NotImplemented
    inputs = network.features(node.args[0], axis=1)
    if inputs is None or kind not in operations.AVERAGE_POOLS or _is_mean(network, node):
        return inputs
    return inputs.with_constant(np.where(inputs.constant == 0, 0.0, np.nan))


def _interpolate(network: Network, node: fx.Node) -> Any:
    """Means of neighbours with weights that sum to one."""
    for argument in node.all_input_nodes:
        if argument is not node.args[0]:
            network.fix(network.known.get(argument))
    return network.features(node.args[0], axis=1)


def _is_mean(network: Network, node: fx.Node) -> bool:
    """Whether an average pool divides by the number of values that there are, zeros at the border not counted."""
    if node.op == "call_module":
        module = network.module_of(node)
        padding, counts = module.padding, module.count_include_pad
        other = getattr(module, "divisor_override", None)
    else:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
        padding, counts, other = (
            given.get("padding", 0),
            given.get("count_include_pad", True),
            given.get("divisor_override"),
        )
    has_border = any(padding) if isinstance(padding, (tuple, list)) else padding != 0
    return other is None and not (has_border and counts)


def _mean(network: Network, node: fx.Node) -> Any:
    """A mean over other axes than that of the features."""
    shape, names = shape_of(node.args[0]), ("dim", "keepdim")
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    dims, keep = given.get("dim"), given.get("keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims
    if shape is None or not isinstance(dims, (list, tuple)) or not {*given} <= {*names}:
        return NotImplemented
    inputs = network.features(node.args[0])
    if inputs is None:
        return None
    taken = {dim % len(shape) for dim in dims if isinstance(dim, int)}
    if inputs.axis in taken:
        return NotImplemented
    before = 0 if keep else sum(dim < inputs.axis for dim in taken)
    return Features(inputs.axis - before, inputs.units, inputs.constant)


MODULE_RULES: dict[Any, Rule] = {
    **dict.fromkeys(operations.EACH_FEATURE_MODULES, _each_feature_module),
    **dict.fromkeys(operations.MODULES_OF_POOLS, _pool),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), _interpolate),
}
METHOD_RULES: dict[Any, Rule] = {
    **dict.fromkeys(operations.METHODS, _each_feature_method),
    **{name: _binary for name in operations.BINARY if isinstance(name, str)},
    "mean": _mean,
}
FUNCTION_RULES: dict[Any, Rule] = {
    **dict.fromkeys(operations.FUNCTIONS, _each_feature_function),
    **{function: _binary for function in operations.BINARY if not isinstance(function, str)},
    **dict.fromkeys(operations.FUNCTIONS_OF_POOLS, _pool),
    F.interpolate: _interpolate,
    torch.mean: _mean,
}
