"""Rules for what moves features, or looks at shapes."""

from __future__ import annotations

import operator
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn

from lightning_sparse.execution.shrinking.layer_rules import Rule
from lightning_sparse.execution.shrinking.network import Network
from lightning_sparse.execution.shrinking.reshaping import ShapeOf, indexed, permuted, reshaped
from lightning_sparse.execution.shrinking.tracing import shape_of
from lightning_sparse.execution.shrinking.units import Features

__all__ = ["FUNCTION_RULES", "METHOD_RULES", "MODULE_RULES"]


def _reshape(network: Network, node: fx.Node) -> Any:
    before, after = shape_of(node.args[0]), shape_of(node)
    inputs = network.features(node.args[0])
    if inputs is None or before is None or after is None:
        return NotImplemented
    result = reshaped(inputs, before, after)
    if result is None:
        return NotImplemented
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    is_view = node.target in ("view", "reshape", torch.reshape)
    if is_view and (node.kwargs or not all(isinstance(size, (int, fx.Node)) for size in cast("Any", sizes))):
        return NotImplemented
    size: Any = cast("Any", sizes)[result.axis] if is_view and len(cast("Any", sizes)) > result.axis else -1
    # A number in the code stays what it is when features go.
    return NotImplemented if isinstance(size, int) and size != -1 else result


def _permute(network: Network, node: fx.Node) -> Any:
    shape, inputs = shape_of(node.args[0]), network.features(node.args[0])
    if inputs is None or shape is None or node.kwargs:
        return NotImplemented
    rest: Any = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    if not all(isinstance(axis, int) for axis in rest):
        return NotImplemented
    order = list(range(len(shape)))
    if node.target in ("transpose", torch.transpose):
        one, other = (axis % len(shape) for axis in rest)
        order[one], order[other] = order[other], order[one]
    else:
        order = list(rest)
    return permuted(inputs, order)


def _squeeze(network: Network, node: fx.Node) -> Any:
    """An axis of size one less or more."""
    before, after = shape_of(node.args[0]), shape_of(node)
    inputs = network.features(node.args[0])
    if inputs is None or before is None or after is None or len(node.args) != 2 or not isinstance(node.args[1], int):
        return NotImplemented
    if node.target in ("unsqueeze", torch.unsqueeze):
        axis = node.args[1] % len(after)
        return Features(inputs.axis + (axis <= inputs.axis), inputs.units, inputs.constant)
    axis = node.args[1] % len(before)
    if axis == inputs.axis:
        return NotImplemented
    return Features(inputs.axis - (axis < inputs.axis and before != after), inputs.units, inputs.constant)


def _concatenate(network: Network, node: fx.Node) -> Any:
    parts: Any = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    shape = shape_of(node)
    known = [network.features(part) for part in parts] if isinstance(parts, (list, tuple)) else [None]
    if shape is None or not isinstance(axis, int) or any(part is None for part in known):
        return NotImplemented
    features = cast("list[Features]", known)
    first = features[0]
    if any(part.axis != first.axis for part in features):
        return NotImplemented
    if axis % len(shape) == first.axis:
        joined = [np.concatenate([getattr(part, name) for part in features]) for name in ("units", "constant")]
        return Features(first.axis, *joined)
    for part in features[1:]:
        network.table.join(first.units, part.units)
    same = np.all([part.constant == first.constant for part in features], axis=0)
    return first.with_constant(np.where(same, first.constant, np.nan))


def _getitem(network: Network, node: fx.Node) -> Any:
    if not node.users:  # as of states that nobody looks at
        return None
    source, index = node.args
    known = network.known.get(source) if isinstance(source, fx.Node) else None
    if isinstance(known, tuple) and isinstance(index, int):
        return known[index]
    if isinstance(known, ShapeOf):
        shape = shape_of(cast("fx.Node", source).args[0])
        if shape is None or not isinstance(index, (int, slice)):
            return NotImplemented
        axes = range(len(shape))[index] if _is_plain(index) else range(len(shape))
        return known if known.features.axis in (axes if isinstance(axes, range) else (axes,)) else None
    shape = shape_of(source)
    if not isinstance(known, Features) or shape is None:
        return NotImplemented
    result = indexed(known, len(shape), index)
    return NotImplemented if result is None else result


def _is_plain(index: int | slice) -> bool:
    """Whether no part of an index is computed."""
    return isinstance(index, int) or not any(
        isinstance(part, fx.Node) for part in (index.start, index.stop, index.step)
    )


def _getattr(network: Network, node: fx.Node) -> Any:
    """The shape of a tensor, or what else it has that does not depend on its features."""
    if node.args[1] in ("ndim", "dtype", "device"):
        return None
    inputs = network.features(node.args[0])
    if node.args[1] != "shape":
        return NotImplemented
    return None if inputs is None else ShapeOf(inputs)


def _size(network: Network, node: fx.Node) -> Any:
    inputs, shape = network.features(node.args[0]), shape_of(node.args[0])
    if inputs is None or shape is None:
        return NotImplemented
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(axis, int) and axis % len(shape) != inputs.axis:
        return None
    return ShapeOf(inputs)


def _nothing(network: Network, node: fx.Node) -> None:
    """What depends on no feature."""
    del network, node


MODULE_RULES: dict[Any, Rule] = {nn.Flatten: _reshape}
METHOD_RULES: dict[Any, Rule] = {
    **dict.fromkeys(("view", "reshape", "flatten"), _reshape),
    **dict.fromkeys(("permute", "transpose"), _permute),
    **dict.fromkeys(("squeeze", "unsqueeze"), _squeeze),
    "size": _size,
    "dim": _nothing,
}
FUNCTION_RULES: dict[Any, Rule] = {
    **dict.fromkeys((torch.flatten, torch.reshape), _reshape),
    **dict.fromkeys((torch.permute, torch.transpose), _permute),
    **dict.fromkeys((torch.squeeze, torch.unsqueeze), _squeeze),
    **dict.fromkeys((torch.cat, torch.concat), _concatenate),
    operator.getitem: _getitem,
    getattr: _getattr,
}
