"""Which units of a traced network are needed.

An operation that is not known keeps all units that it is given, and of what it gives nothing is known. So what is
unknown costs savings, and never exactness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from lightning_sparse.execution.shrinking import feature_rules, moving_rules, operations
from lightning_sparse.execution.shrinking.attention import attention_rule, shrink_blocks
from lightning_sparse.execution.shrinking.layer_rules import LAYER_RULES, Rule
from lightning_sparse.execution.shrinking.layers import Layer
from lightning_sparse.execution.shrinking.network import Network
from lightning_sparse.execution.shrinking.units import solve

__all__ = ["needed_units"]

_MODULES: dict[Any, Rule] = {
    **LAYER_RULES,
    **feature_rules.MODULE_RULES,
    **moving_rules.MODULE_RULES,
    nn.MultiheadAttention: attention_rule,
}
_METHODS: dict[Any, Rule] = {**feature_rules.METHOD_RULES, **moving_rules.METHOD_RULES}
_FUNCTIONS: dict[Any, Rule] = {**feature_rules.FUNCTION_RULES, **moving_rules.FUNCTION_RULES}


def needed_units(module: nn.Module, graph: fx.Graph) -> tuple[Sequence[Layer], NDArray[np.bool_]]:
    """The layers of a network, and by label which of their units are needed.

    Args:
        module: The network, in evaluation mode.
        graph: Its operations, with shapes; see :func:`~lightning_sparse.execution.shrinking.tracing.trace`.
    """
    network = Network(module, graph)
    for node in graph.nodes:
        _visit(network, node)
    readers = [reader for layer in network.layers for reader in layer.readers]
    return network.layers, solve(network.table, readers)


def _visit(network: Network, node: fx.Node) -> None:
    known: Any = None
    if node.op not in ("placeholder", "get_attr"):
        rule = _rule_of(network, node)
        known = NotImplemented if rule is None else rule(network, node)
        if known is NotImplemented:
            network.fix([network.known.get(argument) for argument in node.all_input_nodes])
            known = None
            if node.op == "call_module":
                shrink_blocks(network, node)
    network.known[node] = known
    if _writes(network, node) and node.args and isinstance(node.args[0], fx.Node):
        network.known[node.args[0]] = known  # who reads it later finds what was written


def _rule_of(network: Network, node: fx.Node) -> Rule | None:
    if node.op == "call_module":
        module = network.module_of(node)
        return None if network.is_used_elsewhere(str(node.target), module) else _MODULES.get(type(module))
    return {"call_method": _METHODS, "call_function": _FUNCTIONS}.get(node.op, {}).get(node.target)


def _writes(network: Network, node: fx.Node) -> bool:
    """Whether an operation writes its first argument."""
    if node.op == "call_module":
        return bool(getattr(network.module_of(node), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return node.target in operations.IN_PLACE or bool(node.kwargs.get("inplace"))
