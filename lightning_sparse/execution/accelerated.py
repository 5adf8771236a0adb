"""The module that ``accelerate`` returns, and how it is rebuilt from the original module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, final

import torch
from torch import Tensor, fx, nn
from typing_extensions import override

from lightning_sparse.execution.attention import with_sparse_encoders
from lightning_sparse.execution.calls import as_traced
from lightning_sparse.execution.conv import SparseConv2d, SparsePlanes
from lightning_sparse.execution.copying import frozen_copy, with_linear_layers
from lightning_sparse.execution.dead_units import shrunk
from lightning_sparse.execution.fuse import fuse
from lightning_sparse.execution.inputs import refuse_gradients
from lightning_sparse.execution.layers import InputSpec, sparse_layer
from lightning_sparse.execution.linear import SparseLinear
from lightning_sparse.execution.report import AccelerationReport
from lightning_sparse.execution.standing_in import StandIn, share_memory
from lightning_sparse.execution.tracing import UntraceableError, module_of, trace

__all__ = ["AcceleratedModule", "Recipe", "StaleWeightsError"]


class StaleWeightsError(RuntimeError):
    """The weights of the original module have changed since it was accelerated."""


@final
@dataclass(frozen=True)
class Recipe:
    """How a module is made fast: all choices, but none of its weights.

    Args:
        layers: Names of the layers that are executed sparsely.
        traced: Whether the network is one graph, in which layers are fused; layers are replaced one by one if not.
        kernels: What executes them.
        threads: How many threads compute.
        arguments: What the module is called with, by position.
        inputs: What parts of the network are given, for those that are traced alone.
        shrink: Whether dead units are removed first.
    """

    layers: frozenset[str]
    traced: bool
    kernels: str
    threads: int
    arguments: tuple[InputSpec | Any, ...]
    inputs: Mapping[str, InputSpec]
    shrink: bool = False

    def example(self) -> tuple[Any, ...]:
        """Return arguments of a call, of noise."""
        return tuple(spec.random() if isinstance(spec, InputSpec) else spec for spec in self.arguments)

    def make(self, module: nn.Module) -> nn.Module:
        """Return what executes a module; the module stays as it is."""
        own = frozen_copy(module)
        if not (self.traced or self.shrink):
            for name in self.layers:
                share_memory(own.get_submodule(name), module.get_submodule(name))
        own = with_linear_layers(own)
        if self.shrink:
            own = shrunk(own, self.example())
        if self.traced:
            graph = trace(own, self.example())
            fused = fuse(graph, self.layers.__contains__, kernels=self.kernels, threads=self.threads)
            # What a graph calls as one, such as an encoder of torch, has layers of its own.
            self._replace_layers(fused)
            return _without_a_graph(fused)
        return sparse_layer(own, self.kernels, self.threads) if "" in self.layers else self._replace_layers(own)

    def _replace_layers(self, root: nn.Module) -> nn.Module:
        """Replace layers one by one, and chains of them as graphs."""
        done: set[str] = set()
        for name, child in list(root.named_modules()):
            inside = {layer for layer in self.layers if not name or layer.startswith(f"{name}.")}
            if inside and isinstance(child, nn.TransformerEncoderLayer):
                child.activation_relu_or_gelu = 0  # it calls its layers then, and does not read their weights itself
            if any(name.startswith(f"{part}.") for part in done):
                continue
            if name and name in self.layers and not isinstance(child, StandIn):
                root.set_submodule(name, sparse_layer(child, self.kernels, self.threads))
            elif name and inside and isinstance(child, nn.Sequential) and name in self.inputs:
                try:
                    root.set_submodule(name, self._fused(name, child))
                    done.add(name)
                except UntraceableError:
                    continue
        return with_sparse_encoders(root)

    def _fused(self, name: str, chain: nn.Module) -> nn.Module:
        graph = trace(chain, (self.inputs[name].random(),))
        return fuse(graph, lambda layer: f"{name}.{layer}" in self.layers, kernels=self.kernels, threads=self.threads)


def _without_a_graph(graph_module: fx.GraphModule) -> nn.Module:
    """Return the one layer that a graph consists of, or the graph."""
    calls = [node for node in graph_module.graph.nodes if node.op not in ("placeholder", "output")]
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    layer = module_of(calls[0]) if len(calls) == 1 else None
    if not isinstance(layer, (SparseLinear, SparsePlanes)) or calls[0].args != tuple(inputs):
        return graph_module
    return layer if calls[0] in calls[0].graph.output_node().args else graph_module


@final
class AcceleratedModule(nn.Module):
    """A module for inference with the same outputs as another module, executed in the fastest measured way.

    It holds the original module and copies of its weights. ``state_dict`` is that of the original; copying and pickling
    keep both. If the original's weights are written or its weights or layers replaced later, a call raises
    :class:`StaleWeightsError` until ``refresh`` is called. Writes past autograd are not noticed: those through
    ``.data``, as in ``weight.data.mul_(2)``, through NumPy arrays, and by other processes. Nor are hooks and settings
    of layers. Call ``refresh`` after them, or write under ``torch.no_grad()``.

    Args:
        module: The original module. It is not changed.
        recipe: How it is made fast; ``None`` if the module itself is called.
        report: The choices, and the gain of each.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_sparse.execution import accelerate
        >>> network = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
        >>> _ = network[0].weight.data.mul_(torch.rand(256, 256) > 0.95)
        >>> fast = accelerate(network, torch.randn(1, 256), threads=1)
        >>> x = torch.randn(7, 256)
        >>> torch.allclose(fast(x), network(x), atol=1e-5)
        True
    """

    def __init__(
        self, module: nn.Module, recipe: Recipe | None, report: AccelerationReport, executed: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.report = report
        self.recipe = recipe
        self._source = (module,)  # in a tuple, so that it is no submodule
        self._execute(executed if executed is not None else self._made())
        self.training = False
        self._watch()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``forward``, or the module itself where nothing was faster: of small layers a call is half the time."""
        if self._forward_hooks or self._forward_pre_hooks:
            return super().__call__(*args, **kwargs)
        return self._direct(*args, **kwargs)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module would.

        Raises:
            StaleWeightsError: The module's weights have changed since it was accelerated.
            ValueError: An input requires a gradient, or has a type or size that a sparse layer does not take; or the
                module was traced as one graph, and the arguments differ from those of the example.
        """
        self._refuse_changes()
        if self._arity is not None and (kwargs or len(args) != self._arity or type(args[0]) is not Tensor):
            assert self.recipe is not None
            args, kwargs = tuple(as_traced(self._source[0], self.recipe.arguments, args, kwargs)), {}
        if self._looks_for_gradients and torch.is_grad_enabled():
            for x in args:
                if isinstance(x, Tensor):
                    refuse_gradients(x)
        return self._call(*args, **kwargs)

    def refresh(self) -> AcceleratedModule:
        """Use the module's current weights; the choice for each layer stays. Returns itself.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from lightning_sparse.execution import accelerate
            >>> network = nn.Linear(256, 256).eval()
            >>> _ = network.weight.data.mul_(torch.rand(256, 256) > 0.95)
            >>> fast = accelerate(network, torch.randn(1, 256), threads=1)
            >>> with torch.no_grad():
            ...     _ = network.weight.mul_(2)
            >>> x = torch.randn(3, 256)
            >>> torch.allclose(fast.refresh()(x), network(x), atol=1e-5)
            True
        """
        self._execute(self._made())
        self._watch()
        return self

    @property
    def executed(self) -> nn.Module:
        """The module that is called, which is a graph or a copy with sparse layers, or the original module itself."""
        return self._executed[0]

    @override
    def train(self, mode: bool = True) -> AcceleratedModule:
        """Stay in evaluation mode.

        Raises:
            ValueError: Training is asked for.
        """
        if mode:
            raise ValueError("An accelerated module is for inference. Train the original module, then call refresh().")
        return self

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the state of the original module: dense, with its keys."""
        return self._source[0].state_dict(*args, **kwargs)

    @override
    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: load the weights into the original module instead, then call ``refresh``.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "An accelerated module has no weights of its own to load. Load them into the original module, then call"
            " refresh()."
        )

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AcceleratedModule:
        probe = next((tensor for _, _, tensor, _, _ in self._watched), torch.empty(0))
        moved = fn(probe[:0] if probe.dim() else probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise ValueError(
                f"An accelerated module stays on {probe.device} in {probe.dtype}. Move or convert the original module,"
                " and accelerate that."
            )
        return self

    @override
    def __getstate__(self) -> dict[str, Any]:
        self._refuse_changes()
        left_out = ("_watched", "_parts", "_call", "_direct")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._execute(self._executed[0])
        self._watch()

    @override
    def extra_repr(self) -> str:
        gain = f"{self.report.gain:.2f} times as fast on the example"
        return f"{gain}, executed as:\n{self.executed}"

    def _execute(self, module: nn.Module) -> None:
        self._executed = (module,)
        # What accelerate made has no hooks that a call would have to run, and small networks take microseconds.
        ours = isinstance(module, (SparseLinear, SparsePlanes, fx.GraphModule))
        # nn.Module's own call has two frames. The outer one checks whether the module was compiled: it is left out.
        plain = type(module).__call__ is nn.Module.__call__ and module._compiled_call_impl is None
        self._call: Callable[..., Any] = module.forward if ours else module._call_impl if plain else module.__call__
        self._direct: Callable[..., Any] = self._call if self.recipe is None else self.forward
        # A graph has one way, that of the example, and a sparse layer takes one tensor: other calls are looked at.
        one_way = self.recipe is not None and (self.recipe.traced or isinstance(module, (SparseLinear, SparseConv2d)))
        self._arity = self._plain_arity() if one_way else None
        self._looks_for_gradients = self.recipe is not None and not isinstance(
            module, SparseLinear
        )  # which does itself

    def _plain_arity(self) -> int:
        """How many tensors a call has that need not be looked at; none, if one of the arguments is a constant."""
        assert self.recipe is not None
        arguments = self.recipe.arguments
        return len(arguments) if all(isinstance(x, InputSpec) for x in arguments) else -1

    def _made(self) -> nn.Module:
        return self._source[0] if self.recipe is None else self.recipe.make(self._source[0])

    def _watch(self) -> None:
        """Remember every parameter and buffer as it is: which tensor, how often written, where its memory is.

        And the layers in each layer.
        """
        self._watched: list[tuple[Any, str, Any, int, int]] = []
        self._parts: list[tuple[dict[str, nn.Module | None], tuple[nn.Module | None, ...]]] = []
        if self.recipe is None:
            return
        for module in self._source[0].modules():
            if module._modules:
                self._parts.append((module._modules, tuple(module._modules.values())))
            for held in (module._parameters, module._buffers):  # the only way to notice that one was replaced
                for name, tensor in held.items():
                    if tensor is not None and not tensor.is_inference() and type(tensor) in (Tensor, nn.Parameter):
                        self._watched.append((held, name, tensor, tensor._version, tensor.data_ptr()))

    def _refuse_stale(self, held: Any, name: str) -> NoReturn:
        for path, module in self._source[0].named_modules():
            if path and (held is module._parameters or held is module._buffers):
                name = f"{path}.{name}"
                break
        raise StaleWeightsError(
            f"{name!r} of the original module has changed since it was accelerated. Call refresh() to take over its"
            " weights, or accelerate it again if its zeros have changed."
        )

    def _refuse_changes(self) -> None:
        """Look whether the original's tensors and layers are as they were; part of every call."""
        for held, name, tensor, version, address in self._watched:
            if held.get(name) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                self._refuse_stale(held, name)
        for parts, then in self._parts:
            if tuple(parts.values()) != then:
                self._refuse_other_parts(parts, then)

    def _refuse_other_parts(self, parts: Mapping[str, Any], then: tuple[Any, ...]) -> NoReturn:
        other = next((name for name, part in parts.items() if part not in then), None)
        path = next((path for path, module in self._source[0].named_modules() if module._modules is parts), "")
        what = f"in {path!r}" if path else "of the original module"
        what = (
            f"A layer {what}" if other is None else f"{'.'.join(filter(None, (path, other)))!r} of the original module"
        )
        raise StaleWeightsError(
            f"{what} has been replaced, added or removed since it was accelerated. Accelerate it again, or call"
            " refresh() if the layers are like those before."
        )
