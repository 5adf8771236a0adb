"""A traced network while it is looked at: what is known of each operation's result, and the layers found so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast, final

from torch import fx, nn

from lightning_sparse.execution.shrinking.layers import Layer
from lightning_sparse.execution.shrinking.reshaping import ShapeOf
from lightning_sparse.execution.shrinking.tracing import shape_of
from lightning_sparse.execution.shrinking.units import Features, UnitTable

__all__ = ["Network"]


@final
class Network:
    """What rules find out about a network, and what they ask.

    Args:
        module: The network, in evaluation mode.
        graph: Its operations, with shapes; see :func:`~lightning_sparse.execution.shrinking.tracing.trace`.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.table = UnitTable()
        self.layers: list[Layer] = []
        self.known: dict[fx.Node, Any] = {}
        self.blocks: set[str] = set()
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._shared = _shared_modules(module, graph)

    def module_of(self, node: fx.Node) -> Any:
        """The module that a node calls."""
        return self._modules[str(node.target)]

    def is_used_elsewhere(self, name: str, module: nn.Module) -> bool:
        """Whether others call a module or see its weights too, or hooks or another forward change what it does."""
        hooks = (module._forward_hooks, module._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]
        has_state = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
        return any(hooks) or "forward" in vars(module) or (has_state and name in self._shared)

    def features(self, node: Any, axis: int | None = None) -> Features | None:
        """What is known of the features of a tensor, if they are on an axis, counted from the front or the back.

        Where they are on another one, they are fixed.
        """
        known = self.known.get(node) if isinstance(node, fx.Node) else None
        shape = shape_of(node)
        if isinstance(known, Features) and (axis is None or (shape and axis % len(shape) == known.axis)):
            return known
        self.fix(known)
        return None

    def fix(self, known: Any) -> None:
        """Keep all units that something depends on, in a way that is not known."""
        for features in _flat(known):
            self.table.fix(features.units)


def _flat(known: Any) -> Iterator[Features]:
    if isinstance(known, (tuple, list)):
        for part in cast("list[Any]", known):
            yield from _flat(part)
    elif isinstance(known, ShapeOf):
        yield known.features
    elif isinstance(known, Features):
        yield known


def _shared_modules(module: nn.Module, graph: fx.Graph) -> set[str]:
    """Names of modules that are called more than once, or whose parameters something else uses too."""
    names: dict[int, str] = {}
    calls: Counter[str] = Counter()
    for name, part in module.named_modules(remove_duplicate=False):
        names.setdefault(id(part), name)
    owners: dict[int, set[str]] = {}
    for name, part in module.named_modules():
        for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            owners.setdefault(tensor.data_ptr() or id(tensor), set()).add(name)
    seen_outside: set[str] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            calls[names[id(module.get_submodule(str(node.target)))]] += 1
        elif node.op == "get_attr":
            seen_outside.add(str(node.target).rpartition(".")[0])
    shared = {name for of_one in owners.values() if len(of_one) > 1 for name in of_one}
    shared |= {name for name, count in calls.items() if count > 1} | seen_outside
    return {name for name, part in module.named_modules(remove_duplicate=False) if names[id(part)] in shared}
