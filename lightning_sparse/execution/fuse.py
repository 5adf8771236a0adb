"""Replaces layers of a graph, and what follows them, by sparse ones. Each new part keeps its own layout inside.

Neighbouring convolutions, activations, additions and poolings become one :class:`SparsePlanes`. Linear layers with
their activations become one :class:`SparseLinear`. torch computes what cannot or should not be sparse.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_sparse.execution.attention import SparseSelfAttention, is_plain_self_attention, why_dense_attention
from lightning_sparse.execution.conv import SparsePlanes, conv_step
from lightning_sparse.execution.formats import pack
from lightning_sparse.execution.kernels.steps import ConvStep, LinearStep, MeanStep, PlaneStep, PoolStep
from lightning_sparse.execution.linear import SparseLinear, linear_step
from lightning_sparse.execution.tracing import bounds_of, is_addition, is_gelu, layers_read, module_of, shape_of

__all__ = ["fuse"]

Wanted = Callable[[str], bool]


def fuse(graph_module: fx.GraphModule, wanted: Wanted, *, kernels: str, threads: int) -> fx.GraphModule:
    """Replace layers of a traced graph by sparse ones, in place.

    Args:
        graph_module: As :func:`~lightning_sparse.execution.tracing.trace` returns it.
        wanted: Says whether the layer of a given name should be sparse.
        kernels: One of :func:`~lightning_sparse.execution.kernels.available_kernels`.
        threads: How many threads compute.

    Returns:
        The same graph.
    """
    read = layers_read(graph_module.graph)
    asked, wanted = wanted, lambda name: name not in read and asked(name)
    if kernels == "llvm":
        for part in _parts(graph_module, wanted):
            _replace_part(graph_module, part, threads)
    _replace_attention(graph_module, wanted, kernels, threads)
    for linears in _linear_chains(graph_module, wanted):
        _replace_chain(graph_module, linears, kernels, threads)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


# Convolutions


def _parts(graph_module: fx.GraphModule, wanted: Wanted) -> list[list[fx.Node]]:
    """Runs of neighbouring nodes that can be computed on planes; each begins with a convolution."""
    parts: list[list[fx.Node]] = [[]]
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if parts[-1] and not _on_planes(node, wanted, parts[-1]):
            parts.append([])
        if _on_planes(node, wanted, parts[-1]):
            parts[-1].append(node)
    return [part for part in parts if part]


def _on_planes(node: fx.Node, wanted: Wanted, part: list[fx.Node]) -> bool:
    """Whether a node can be computed on planes, after the nodes of a part."""
    if any(_is_mean(argument) for argument in node.all_input_nodes if argument in part):
        return False  # a mean leaves the planes
    module = module_of(node)
    if isinstance(module, nn.Conv2d):
        return type(module) is nn.Conv2d and len(shape_of(node) or ()) == 4 and wanted(str(node.target))
    if not part or not any(argument in part for argument in node.all_input_nodes) or not _are_images(node):
        return False
    if isinstance(module, nn.BatchNorm2d):
        return module.running_mean is not None
    return bounds_of(node) is not None or is_addition(node) or _is_mean(node) or _pool_of(node, part) is not None


def _are_images(node: fx.Node) -> bool:
    shapes = [shape_of(argument) for argument in node.all_input_nodes]
    return all(shape is not None and len(shape) == 4 for shape in shapes) and shape_of(node) is not None


def _is_mean(node: fx.Node) -> bool:
    """Whether a node averages all pixels of each channel."""
    module = module_of(node)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1), [1, 1])
    if node.target is F.adaptive_avg_pool2d:
        return len(node.args) == 2 and node.args[1] in (1, (1, 1), [1, 1])
    if node.target not in ("mean", torch.mean) or len(node.args) < 2 or set(node.kwargs) - {"keepdim"}:
        return False
    dims = node.args[1]
    return isinstance(dims, Iterable) and sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]


def _pool_of(node: fx.Node, part: list[fx.Node]) -> PoolStep | None:
    """The pooling that a node computes, if planes can: stride 1 or 2, and no negative inputs if there is padding."""
    module = module_of(node)
    if isinstance(module, nn.MaxPool2d):
        settings = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        plain = not module.ceil_mode and not module.return_indices
    elif node.target is F.max_pool2d and len(node.args) >= 2:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
        plain = not given.pop("ceil_mode", False) and not given.pop("return_indices", False)
        settings = {"stride": None, "padding": 0, "dilation": 1} | given
        settings["stride"] = settings["stride"] or settings["kernel_size"]
    else:
        return None
    kernel, stride, padding, dilation = (
        _pair(settings[name]) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    fits = plain and dilation == (1, 1) and stride in ((1, 1), (2, 2))
    if not fits or (padding != (0, 0) and not _never_negative(node.all_input_nodes[0], part)):
        return None
    return PoolStep(node.all_input_nodes[0].name, node.name, kernel, stride[0], padding)


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return first, second


def _never_negative(node: fx.Node, part: list[fx.Node]) -> bool:
    bounds = bounds_of(node)
    if bounds is not None:
        return bounds[0] >= 0
    return node in part and _pool_of(node, part) is not None and _never_negative(node.all_input_nodes[0], part)


def _replace_part(graph_module: fx.GraphModule, part: list[fx.Node], threads: int) -> None:
    """Replace a part of the graph by one module."""
    inside = set(part)
    outputs = [node for node in part if any(user not in inside for user in node.users)]
    inputs = list(dict.fromkeys(x for node in part for x in node.all_input_nodes if x not in inside))
    steps, dtype = _steps_of(part, {node.name for node in outputs})
    module = SparsePlanes(steps, [x.name for x in inputs], [y.name for y in outputs], dtype=dtype, threads=threads)
    name = _new_name(graph_module, "sparse_planes", module)
    graph = graph_module.graph
    with graph.inserting_after(part[-1]):
        call = graph.call_module(name, tuple(inputs))
    after = call
    for number, node in enumerate(outputs):
        value = call
        if len(outputs) > 1:
            with graph.inserting_after(after):
                value = after = graph.call_function(operator.getitem, (call, number))
        shape = shape_of(node)
        if _is_mean(node) and shape is not None and len(shape) == 2:
            with graph.inserting_after(after):
                value = after = graph.call_function(torch.flatten, (value, 1))
        value.meta = dict(node.meta)
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in inside)
    for node in reversed(part):
        graph.erase_node(node)


def _steps_of(part: list[fx.Node], outputs: set[str]) -> tuple[list[PlaneStep], torch.dtype]:
    """The steps of a part. Activations and additions join the convolution before them, if it is open."""
    steps: dict[str, PlaneStep] = {}
    dtype = torch.float32
    for node in part:
        module = module_of(node)
        if isinstance(module, nn.Conv2d):
            dtype = module.weight.dtype
            steps[node.name] = conv_step(module, node.all_input_nodes[0].name, node.name)
        elif (bounds := bounds_of(node)) is not None:
            _clamp(steps, node, bounds, outputs, dtype)
        elif is_addition(node):
            _add(steps, node, outputs, dtype)
        elif isinstance(module, nn.BatchNorm2d):
            steps[node.name] = _scaling(node, *_scale_and_shift(module), dtype=dtype)
        elif _is_mean(node):
            steps[node.name] = MeanStep(node.all_input_nodes[0].name, node.name)
        else:
            pool = _pool_of(node, part)
            assert pool is not None
            steps[node.name] = pool
    return list(steps.values()), dtype


def _open_convolution(steps: dict[str, PlaneStep], node: Any, outputs: set[str]) -> ConvStep | None:
    """The convolution that computes a node, if more can join it: nothing else reads it, and it does not clamp."""
    step = steps.get(node.name)
    alone = isinstance(step, ConvStep) and len(node.users) == 1 and node.name not in outputs
    return step if alone and isinstance(step, ConvStep) and step.low == -math.inf and step.high == math.inf else None


def _clamp(
    steps: dict[str, PlaneStep], node: fx.Node, bounds: tuple[float, float], outputs: set[str], dtype: torch.dtype
) -> None:
    before = _open_convolution(steps, node.all_input_nodes[0], outputs)
    if before is None:
        channels = (shape_of(node) or (0, 0))[1]
        step = _scaling(node, torch.ones(channels), torch.zeros(channels), dtype=dtype)
    else:
        del steps[before.y]
        step = before
    steps[node.name] = replace(step, y=node.name, low=bounds[0], high=bounds[1])


def _add(steps: dict[str, PlaneStep], node: fx.Node, outputs: set[str], dtype: torch.dtype) -> None:
    first, second = node.args
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    for summand, other in ((first, second), (second, first)):
        before = _open_convolution(steps, summand, outputs)
        if before is not None and before.residual is None and summand is not other:
            # Nothing else reads it, so it can wait until the sum, when the other summand is ready.
            del steps[before.y]
            steps[node.name] = replace(before, y=node.name, residual=other.name)
            return
    channels = (shape_of(node) or (0, 0))[1]
    scaled = _scaling(node, torch.ones(channels), torch.zeros(channels), dtype=dtype)
    steps[node.name] = replace(scaled, x=first.name, residual=second.name)


def _scaling(node: fx.Node, scale: torch.Tensor, shift: torch.Tensor, *, dtype: torch.dtype) -> ConvStep:
    """A scale and a shift of each channel, as a 1 x 1 convolution of each channel with itself."""
    # A scale of zero is not stored as a weight; its shift remains.
    return ConvStep(
        weight=pack(scale.to(dtype)[:, None, None, None]),
        bias=shift.to(dtype).numpy(),
        x=node.all_input_nodes[0].name,
        y=node.name,
        groups=len(scale),
    )


def _scale_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


# Attention


def _replace_attention(graph_module: fx.GraphModule, wanted: Wanted, kernels: str, threads: int) -> None:
    """Replace dense self-attention by sparse, where no call passes masks or asks for attention weights."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if type(module_of(node)) is nn.MultiheadAttention and wanted(str(node.target)):
            calls.setdefault(str(node.target), []).append(node)
    for name, nodes in calls.items():
        attention = graph_module.get_submodule(name)
        assert isinstance(attention, nn.MultiheadAttention)
        plain = all(is_plain_self_attention(node.args, node.kwargs) for node in nodes)
        if plain and why_dense_attention(attention) is None:
            graph_module.set_submodule(name, SparseSelfAttention(attention, kernels=kernels, threads=threads))


# Linear layers


def _linear_chains(graph_module: fx.GraphModule, wanted: Wanted) -> list[list[fx.Node]]:
    """Runs of linear layers and their activations in which only the next node reads each value."""
    chains: list[list[fx.Node]] = []
    seen: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node in seen or not _is_wanted_linear(node, wanted):
            continue
        found = [node]
        while len(found[-1].users) == 1:
            follower = next(iter(found[-1].users))
            if not _joins(follower, found[-1]) and not _is_wanted_linear(follower, wanted):
                break
            found.append(follower)
        if is_gelu(found[-1]):
            found.pop()  # a GELU is fused only between two layers
        seen.update(found)
        chains.append(found)
    return chains


def _joins(node: fx.Node, before: fx.Node) -> bool:
    """Whether an activation can join the layer before it."""
    layer = module_of(before)
    if not isinstance(layer, nn.Linear):
        return False
    return bounds_of(node) is not None or (is_gelu(node) and layer.weight.dtype == torch.float32)


def _is_wanted_linear(node: fx.Node, wanted: Wanted) -> bool:
    return type(module_of(node)) is nn.Linear and len(node.all_input_nodes) == 1 and wanted(str(node.target))


def _replace_chain(graph_module: fx.GraphModule, nodes: list[fx.Node], kernels: str, threads: int) -> None:
    """Replace linear layers and their activations by one module."""
    steps: list[LinearStep] = []
    for node in nodes:
        module = module_of(node)
        if isinstance(module, nn.Linear):
            steps.append(linear_step(module.weight, module.bias))
        elif (bounds := bounds_of(node)) is not None:
            steps[-1] = replace(steps[-1], low=bounds[0], high=bounds[1])
        else:
            steps[-1] = replace(steps[-1], gelu=True)
    source = nodes[0].all_input_nodes[0]
    flatten = _is_flatten(source) and len(source.users) == 1
    module = SparseLinear(steps, kernels=kernels, threads=threads, flatten=flatten)
    name = _new_name(graph_module, "sparse_linear", module)
    graph = graph_module.graph
    with graph.inserting_after(nodes[-1]):
        call = graph.call_module(name, (source.all_input_nodes[0] if flatten else source,))
    call.meta = dict(nodes[-1].meta)
    nodes[-1].replace_all_uses_with(call)
    for node in reversed([source, *nodes] if flatten else nodes):
        graph.erase_node(node)


def _is_flatten(node: fx.Node) -> bool:
    """Whether a node flattens all dimensions but the first."""
    module = module_of(node)
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    called = node.target in (torch.flatten, "flatten") and not node.kwargs
    return called and node.args[1:] in ((1,), (1, -1))


def _new_name(graph_module: fx.GraphModule, prefix: str, module: nn.Module) -> str:
    taken = {name for name, _ in graph_module.named_children()}
    name = next(f"{prefix}_{number}" for number in range(len(taken) + 1) if f"{prefix}_{number}" not in taken)
    graph_module.add_submodule(name, module)
    return name
