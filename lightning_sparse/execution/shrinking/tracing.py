"""A module as a graph of its operations, by torch.fx, with the shapes that an example gives."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from typing_extensions import override

from lightning_sparse.execution.examples import arguments_of

__all__ = ["NotTraceableError", "Shapes", "shape_of", "trace"]


class NotTraceableError(ValueError):
    """A module's operations depend on more than torch.fx can follow; the message goes on after "cannot be traced: "."""


def trace(module: nn.Module, example: Any) -> fx.Graph:
    """The operations of a forward pass, each with the shape of what it gave for an example.

    Args:
        module: A module in evaluation mode; the graph refers to its submodules by name.
        example: One tensor, a tuple or list of arguments, or a mapping of them by name.

    Raises:
        NotTraceableError: It depends on values, or does what torch.fx cannot record.
        TypeError: The example does not fit the arguments of ``forward``.

    Example:
        >>> graph = trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval(), torch.ones(5, 3))
        >>> [(node.op, node.target, shape_of(node)) for node in graph.nodes][1:3]
        [('call_module', '0', (5, 2)), ('call_module', '1', (5, 2))]
    """
    args, kwargs = arguments_of(example)
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"The example does not fit {type(module).__name__}.forward{signature}: {error}. Give one tensor, a tuple of"
            " arguments, or a dictionary of them by name."
        ) from error
    if any(parameter.kind in _ANY_NUMBER for parameter in signature.parameters.values()):
        raise NotTraceableError("its forward takes any number of arguments")
    left_out = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in bound.arguments and parameter.default is not inspect.Parameter.empty
    }
    try:
        with torch.no_grad():
            graph = fx.Tracer().trace(module, left_out)
            values = left_out | bound.arguments
            Shapes(fx.GraphModule(module, graph)).run(*(values[name] for name in signature.parameters))
    except Exception as error:  # whatever code the module has meets proxies, which are no tensors
        raise NotTraceableError((str(error).strip().splitlines() or [type(error).__name__])[0]) from error
    return graph


def shape_of(node: Any) -> tuple[int, ...] | None:
    """The shape of what a node gave for the example; ``None`` if that was no tensor."""
    return node.meta.get(_SHAPE) if isinstance(node, fx.Node) else None


_ANY_NUMBER = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
_SHAPE = "lightning_sparse_shape"


class Shapes(fx.Interpreter):
    """Runs a graph and notes the shapes, for :func:`shape_of`."""

    @override
    def run_node(self, n: fx.Node) -> Any:
        """Run one operation, and note the shape of what it gives."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta[_SHAPE] = tuple(result.shape)
        return result
