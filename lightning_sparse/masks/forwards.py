r"""Find out by a trial whether a layer computes with the zeros that it stores.

A convolution that standardises its weights, :math:`W' = (W - \mu) / \sigma`, does not compute with the zeros of
:math:`W`. One that pads its inputs itself, or scales its weights, does. To see what a custom ``forward`` does, the
trial calls it once on a copy whose weight is half zeros, and looks at the weights that reach the product.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

__all__ = ["keeps_zeros"]

_CONVOLUTIONS = {f"conv{transposed}{dims}d" for transposed in ("", "_transpose") for dims in (1, 2, 3)}
_PRODUCTS = _CONVOLUTIONS | {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "einsum"}


@torch.no_grad()
def keeps_zeros(layer: nn.Module, name: str) -> bool | None:
    """Whether ``layer`` computes with zeros wherever its weight ``name`` is zero.

    The layer itself is not called and does not change. The trial runs on the CPU, and draws no number from the global
    generator.

    Args:
        layer: A linear layer or a convolution, with a ``forward`` that takes one tensor.
        name: The name of its weight among its parameters.

    Returns:
        None if the trial shows nothing: ``forward`` needs more than one tensor, or its products use no tensor of the
        weight's shape.

    Example:
        >>> class Standardised(nn.Linear):
        ...     def forward(self, inputs):
        ...         return nn.functional.linear(inputs, self.weight - self.weight.mean(1, keepdim=True))
        >>> keeps_zeros(nn.Linear(4, 3), "weight"), keeps_zeros(Standardised(4, 3), "weight")
        (True, False)
    """
    if "forward" in vars(layer) or dict(layer.named_parameters(recurse=False)).get(name) is None:
        return None  # forward is bound to the layer, not to a copy; or the weight is computed from other tensors
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    shape = layer.get_parameter(name).shape
    weight = draw(shape).clamp_(min=0.0)
    zeros = weight == 0
    try:
        trial, inputs = _copy_of(layer, name, weight), draw(_input_shape(layer, shape))
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), _NoCollectives(), _Factors() as factors:
            trial.forward(inputs)
    except Exception:  # custom code can raise anything
        return None
    found = [_is_zero_at(zeros, factor) for factor in factors.found if factor.shape in (zeros.shape, zeros.mT.shape)]
    return any(found) if found else None


class _Factors(TorchFunctionMode):
    """Records the tensors that are passed to products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    @override
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _PRODUCTS:
            self.found += [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return func(*args, **(kwargs or {}))


class _NoCollectives(TorchDispatchMode):
    """Ends a trial that would wait for other processes: they may not take part in it."""

    @override
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError(f"{func} in a trial")
        return func(*args, **(kwargs or {}))


def _copy_of(layer: nn.Module, name: str, weight: Tensor) -> Any:
    """A copy of a layer on the CPU, with another weight.

    Parameters, buffers and submodules are copied. All other attributes are shared, because a layer may refer to its
    whole network. What ``forward`` assigns stays in the copy.
    """
    trial: Any = copy.copy(layer)
    trial._parameters = {
        key: parameter if parameter is None else nn.Parameter(weight if key == name else _on_cpu(parameter))
        for key, parameter in layer._parameters.items()  # pyright: ignore[reportPrivateUsage]
    }
    trial._buffers = {
        key: buffer if buffer is None else _on_cpu(buffer)
        for key, buffer in layer._buffers.items()  # pyright: ignore[reportPrivateUsage]
    }
    trial._modules = {key: copy.deepcopy(child) for key, child in layer.named_children()}
    return trial


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` on the CPU, in float32 if it is floating point; ones if it has no values yet."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    if tensor.is_meta:
        return torch.ones(tensor.shape, dtype=dtype, device="cpu")
    return tensor.detach().to("cpu", dtype, copy=True)


def _input_shape(layer: Any, weight: torch.Size) -> tuple[int, ...]:
    """The shape of a small batch. Its size is no size of the weight, so that inputs are not mistaken for weights."""
    batch = next(size for size in (2, 3, 5) if size not in weight[:2])
    if not hasattr(layer, "kernel_size"):
        inputs = next(getattr(layer, key) for key in ("in_features", "in_channels") if hasattr(layer, key))
        return batch, int(inputs)
    reach = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)]
    return batch, int(layer.in_channels), *(max(2, size) for size in reach)


def _is_zero_at(zeros: Tensor, factor: Tensor) -> bool:
    """Whether ``factor`` or its transpose is zero wherever ``zeros`` is True."""
    return any(
        each.shape == zeros.shape and not bool((each[zeros] != 0).any())
        for each in ((factor, factor.mT) if factor.dim() > 1 else (factor,))
    )
