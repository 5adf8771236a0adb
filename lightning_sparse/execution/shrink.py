"""Smaller dense networks: units that no output depends on are removed, and constants are folded into biases."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_sparse.execution.copying import copied
from lightning_sparse.execution.examples import arguments_of, unfit
from lightning_sparse.execution.shrinking.analysis import needed_units
from lightning_sparse.execution.shrinking.layers import Layer
from lightning_sparse.execution.shrinking.tracing import NotTraceableError, trace

__all__ = ["LayerUnits", "Shrinkage", "dead_units", "shrink"]

_Module = TypeVar("_Module", bound=nn.Module)


@final
@dataclass(frozen=True)
class LayerUnits:
    """The neurons, filters or recurrent units of one layer.

    Args:
        name: The layer.
        units: How many it has.
        dead: How many of them can be removed.
    """

    name: str
    units: int
    dead: int


@final
@dataclass(frozen=True)
class Shrinkage:
    """What :func:`shrink` would remove.

    Args:
        layers: Layers with units, in the order in which they run.
        parameters: Number of parameters of the module.
        parameters_left: Number of parameters that :func:`shrink` keeps.
        obstacle: Why the module cannot be traced, so that nothing can be removed; empty if it can be traced.
    """

    layers: tuple[LayerUnits, ...]
    parameters: int
    parameters_left: int
    obstacle: str = ""

    @property
    def units(self) -> int:
        """Units of all layers."""
        return sum(layer.units for layer in self.layers)

    @property
    def dead(self) -> int:
        """Units that can be removed."""
        return sum(layer.dead for layer in self.layers)


def shrink(module: _Module, example: Any) -> _Module:
    r"""A copy of a module without dead neurons, filters and recurrent units, with the same outputs.

    A unit is dead if no output depends on it through nonzero weights, or if it is constant. A unit without active
    inputs has the constant output :math:`c = f(b)`: its bias after normalisation and activation. A unit that reads it
    with a weight :math:`w` then gets the bias :math:`b' = b + w c`. If a padded convolution reads constant inputs, the
    padding zeros differ from the constant, so one of these inputs stays and represents all. Channels that a residual
    sum adds can only be removed together.

    The module is traced by torch.fx. Units are removed only where each feature is known to be computed separately. All
    features stay around layer and group normalisation, attention, views with explicit sizes, modules with hooks or with
    shared or parametrised parameters, and layers that are called more than once. The network's inputs all stay; a large
    linear layer that uses at most a quarter of its inputs selects these.

    Args:
        module: Any module; it is not changed.
        example: Its input: one tensor, a tuple or list of arguments, or a mapping of arguments by name.

    Returns:
        The copy, in evaluation mode. Other batch and image sizes than the example's work as before. If the module
        cannot be traced, the copy is unchanged, and a warning says why.

    Raises:
        TypeError: ``module`` is not a module, or the example does not fit its ``forward``.
        ValueError: The module cannot be copied, or fails on the example.

    Example:
        >>> from lightning_sparse import shrink
        >>> module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = module[0].weight.data[1].zero_()  # without inputs: constant
        >>> _ = module[2].weight.data[:, 2].zero_()  # read by nothing
        >>> small = shrink(module, torch.ones(1, 4))
        >>> small[0], small[2]
        (Linear(in_features=4, out_features=1, bias=True), Linear(in_features=1, out_features=2, bias=True))
        >>> inputs = torch.randn(5, 4)
        >>> torch.testing.assert_close(small(inputs), module(inputs))
    """
    plan = _plan(module, example)
    if plan.obstacle:
        _tell(module, f"cannot be traced: {plan.obstacle}")
        return plan.module
    before = _run(plan.module, example)
    _remove(plan)
    if not _gives(plan.module, example, before):
        _tell(
            module, "gives other outputs when it is shrunk, so some of its code depends on sizes or on random numbers"
        )
        return copied(module).eval()
    return plan.module


def dead_units(module: nn.Module, example: Any) -> Shrinkage:
    """Say what :func:`shrink` would remove.

    Args:
        module: Any module; it is not changed.
        example: Its input; see :func:`shrink`.

    Returns:
        The number of units and of dead units in each layer, and the number of parameters before and after.

    Raises:
        TypeError: ``module`` is not a module, or the example does not fit its ``forward``.
        ValueError: The module cannot be copied, or fails on the example.

    Example:
        >>> module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = module[2].weight.data[:, 2].zero_()
        >>> dead_units(module, torch.ones(1, 4))
        Shrinkage(layers=(LayerUnits(name='0', units=3, dead=1), LayerUnits(name='2', units=2, dead=0)),
                  parameters=23, parameters_left=16, obstacle='')
    """
    plan = _plan(module, example)
    layers = tuple(
        LayerUnits(layer.name, len(layer.units), int((~plan.needed[layer.units]).sum()))
        for layer in plan.layers
        if len(layer.units)
    )
    before = _num_parameters(plan.module)
    _remove(plan)
    return Shrinkage(layers, before, _num_parameters(plan.module), plan.obstacle)


class _Plan(NamedTuple):
    """A copy that nobody else has, and what to remove of it."""

    module: Any
    layers: Sequence[Layer]
    needed: NDArray[np.bool_]
    obstacle: str = ""


def _plan(module: nn.Module, example: Any) -> _Plan:
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"shrink takes a module and an example of its input, as in shrink(model, torch.zeros(1, 3, 32, 32)); the"
            f" module is a {type(module).__name__}."
        )
    own = copied(module).eval()
    try:
        return _Plan(own, *needed_units(own, trace(own, example)))
    except NotTraceableError as error:
        _refuse_unfit(own, example)
        return _Plan(own, (), np.zeros(0, dtype=bool), str(error))


def _refuse_unfit(module: nn.Module, example: Any) -> None:
    """Raise where it is the example that is to blame, and not the module."""
    try:
        _run(module, example)
    except Exception as error:  # whatever the user's module raises when its input does not fit
        raise unfit(module, example, error) from error


def _remove(plan: _Plan) -> None:
    places = [(name, part) for name, part in plan.module.named_modules(remove_duplicate=False) if name]
    for layer in plan.layers:
        replacement = layer.shrink(plan.needed)
        if replacement is not layer.module:
            for name in [name for name, part in places if part is layer.module]:
                parent, _, own = name.rpartition(".")
                setattr(plan.module.get_submodule(parent), own, replacement)


def _run(module: nn.Module, example: Any) -> list[Tensor]:
    args, kwargs = arguments_of(example)
    with torch.no_grad():
        return _tensors(module(*args, **kwargs))


def _gives(module: nn.Module, example: Any, expected: Sequence[Tensor]) -> bool:
    try:
        return _are_close(_run(module, example), expected)
    except Exception:  # code that reads the sizes of its layers may do anything
        return False


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in cast("Any", parts) for tensor in _tensors(part)]


def _are_close(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether outputs are equal but for rounding: half of the digits of their type, of the largest value."""
    if len(some) != len(others):
        return False
    for one, other in zip(some, others, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if other.is_floating_point() and other.numel():
            scale = other.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
            tolerance = torch.finfo(other.dtype).eps ** 0.5
            if not torch.allclose(one, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
                return False
    return True


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _tell(module: nn.Module, found: str) -> None:
    warnings.warn(f"{type(module).__name__} {found}. shrink returns a copy of it, unchanged.", stacklevel=3)
