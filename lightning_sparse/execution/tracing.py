"""Networks as graphs: traced by torch.fx, with BatchNorms folded, and without what does nothing in inference."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from typing_extensions import override

from lightning_sparse.execution.shrinking.tracing import Shapes, shape_of

__all__ = [
    "UntraceableError",
    "bounds_of",
    "has_hooks",
    "is_addition",
    "is_constant",
    "is_gelu",
    "layers_read",
    "module_of",
    "shape_of",
    "trace",
]


class UntraceableError(Exception):
    """torch.fx cannot follow a module, or the graph would not compute what the module computes."""


def trace(module: nn.Module, example: tuple[Any, ...]) -> fx.GraphModule:
    """Return a module as a graph, with BatchNorms folded into the layers before them.

    Args:
        module: In evaluation mode. The graph shares its submodules, and folding changes them.
        example: Positional arguments of a call.

    Raises:
        UntraceableError: torch.fx cannot follow the module, or the graph fails on the example.
    """
    if _Tracer().is_leaf_module(module, ""):
        raise UntraceableError(f"{type(module).__name__} is one layer.")
    for name, part in module.named_modules():
        if has_hooks(part) and (part is module or not _Tracer().is_leaf_module(part, name)):
            raise UntraceableError(f"{name or 'the module'} has hooks, which a graph would not call.")
    try:
        graph_module = fx.GraphModule(module, _Tracer().trace(module, concrete_args=_constants(module, example)))
        with torch.inference_mode(mode=False), torch.no_grad():  # in inference mode, tensors count no writes
            _Watched(graph_module).run(*example)
    except UntraceableError:
        raise
    except Exception as error:  # torch.fx raises whatever a module raises when it gets a Proxy
        raise UntraceableError(f"torch.fx cannot follow {type(module).__name__}: {error}") from error
    _remove_what_does_nothing(graph_module)
    _fold_batch_norms(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


class _Tracer(fx.Tracer):
    """torch.fx's tracer, which follows containers and keeps layers whole. It also keeps layers that we replaced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a module is one node of the graph."""
        ours = type(m).__module__.startswith("lightning_sparse.execution.")
        return ours or super().is_leaf_module(m, module_qualified_name)


def _constants(module: nn.Module, example: tuple[Any, ...]) -> dict[str, Any] | None:
    """Return the constants of the graph: arguments that the example leaves at their defaults, and flags."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise UntraceableError(f"{type(module).__name__}.forward takes any arguments.")
    given = {p.name: value for p, value in zip(parameters, example, strict=False) if is_constant(value)}
    return given | {parameter.name: parameter.default for parameter in parameters[len(example) :]} or None


def is_constant(value: Any) -> bool:
    """Say whether an argument is a constant of a graph: a value that a module checks before it computes.

    Example:
        >>> [is_constant(value) for value in (None, True, "sum", 3)]
        [True, True, True, False]
    """
    return value is None or isinstance(value, (bool, str))


def has_hooks(module: nn.Module) -> bool:
    """Say whether a call of a module also calls hooks.

    Example:
        >>> layer = nn.ReLU()
        >>> handle = layer.register_forward_hook(lambda *_: None)
        >>> has_hooks(layer), has_hooks(nn.ReLU())
        (True, False)
    """
    return any(getattr(module, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def module_of(node: fx.Node) -> nn.Module | None:
    """Return the layer that a node calls, if any. A layer with hooks is not returned: nothing may replace it."""
    module = _called(node)
    return None if module is None or has_hooks(module) else module


def layers_read(graph: fx.Graph) -> set[str]:
    """Return the names of layers whose weights are also read outside their calls. These layers must not change.

    Example:
        >>> layers_read(fx.symbolic_trace(nn.Linear(3, 2)).graph)
        {''}
    """
    return {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}


def _called(node: fx.Node) -> nn.Module | None:
    if node.op != "call_module" or not isinstance(node.target, str):
        return None
    owner = node.graph.owning_module
    return None if owner is None else owner.get_submodule(node.target)


RELUS: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
ADDITIONS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}


def bounds_of(node: fx.Node) -> tuple[float, float] | None:
    """Return the bounds to which a node clamps its only input; None if it does anything else.

    Example:
        >>> from torch import nn
        >>> graph = trace(nn.Sequential(nn.ReLU6()).eval(), (torch.zeros(1),)).graph
        >>> [bounds_of(node) for node in graph.nodes]
        [None, (0.0, 6.0), None]
    """
    if node.target in RELUS and len(node.all_input_nodes) == 1:
        return 0.0, float("inf")
    module = module_of(node)
    if isinstance(module, nn.ReLU):
        return 0.0, float("inf")
    if isinstance(module, nn.Hardtanh):  # nn.ReLU6 is one
        return float(module.min_val), float(module.max_val)
    return None


def is_gelu(node: fx.Node) -> bool:
    """Say whether a node is the exact GELU, which uses the error function."""
    module = module_of(node)
    if isinstance(module, nn.GELU):
        return module.approximate == "none"
    plain = node.target is F.gelu and len(node.args) == 1
    return plain and str(node.kwargs.get("approximate", "none")) == "none"


def is_addition(node: fx.Node) -> bool:
    """Say whether a node adds two tensors of the same shape."""
    if node.target not in ADDITIONS or len(node.args) != 2 or node.kwargs:
        return False
    first, second = (shape_of(argument) for argument in node.args)
    if first is None or second is None:
        return False
    return bool(first == second)


@final
class _Watched(Shapes):
    """Runs a graph, and refuses one in which a value is changed in place and also read elsewhere.

    A graph without what nobody reads, and with fused layers, would read it before the change or without. Whatever
    changes a value, and through whichever view, is found by autograd's counters and by the memory of values.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        # Weak references keep no memory, and no other value gets the same while they are there.
        self._memory: dict[StorageWeakRef, list[fx.Node]] = {}
        self._own = {_memory_of(x) for x in (*graph_module.parameters(), *graph_module.buffers())}

    @override
    def run_node(self, n: fx.Node) -> Any:
        """Run one operation, and look whether it has written what it was given."""
        given = [x for node in n.all_input_nodes for x in _tensors_in(self.env[node]) if not x.is_inference()]
        before = [x._version for x in given]
        result = super().run_node(n)
        for x, version in zip(given, before, strict=True):
            if x._version != version and self._is_read_elsewhere(x, n):
                raise UntraceableError(f"{n.name} changes a value in place that other layers read too.")
        for x in _tensors_in(result):
            self._memory.setdefault(_memory_of(x), []).append(n)
        return result

    def _is_read_elsewhere(self, x: Tensor, writer: fx.Node) -> bool:
        memory = _memory_of(x)
        holders = {writer, *self._memory.get(memory, ())}
        return memory in self._own or any(user not in holders for holder in holders - {writer} for user in holder.users)


def _memory_of(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The plain tensors in a value, however nested."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item)


def _remove_what_does_nothing(graph_module: fx.GraphModule) -> None:
    nothing = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
    for node in list(graph_module.graph.nodes):
        dropout = node.target is F.dropout and node.kwargs.get("training") is False
        if isinstance(module_of(node), nothing) or dropout:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def _fold_batch_norms(graph_module: fx.GraphModule) -> None:
    """Fold each BatchNorm whose input is a layer that is called once and that nothing else reads."""
    calls: dict[str, int] = {}
    read = layers_read(graph_module.graph)
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in list(graph_module.graph.nodes):
        norm = module_of(node)
        if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) or not norm.track_running_stats:
            continue
        before = node.args[0]
        if len(before.users) > 1 or calls.get(before.target, 0) != 1 or before.target in read:
            continue
        fuse = _fusion(module_of(before), norm, shape_of(before))
        if fuse is not None:
            graph_module.set_submodule(before.target, fuse())
            node.replace_all_uses_with(before)
            graph_module.graph.erase_node(node)


def _fusion(layer: nn.Module | None, norm: Any, shape: tuple[int, ...] | None) -> Callable[[], nn.Module] | None:
    if type(layer) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d):
        return lambda: fuse_conv_bn_eval(layer, norm)
    if type(layer) is nn.Linear and isinstance(norm, nn.BatchNorm1d) and shape is not None and len(shape) == 2:
        return lambda: fuse_linear_bn_eval(layer, _affine(norm))
    return None


def _affine(norm: Any) -> Any:
    """Give a BatchNorm without a scale a scale of one: torch needs one to fold it into a linear layer."""
    if norm.weight is None:
        norm.weight = nn.Parameter(torch.ones_like(norm.running_var), requires_grad=False)
        norm.bias = nn.Parameter(torch.zeros_like(norm.running_var), requires_grad=False)
    return norm
