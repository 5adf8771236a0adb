"""The layers of a module that could be executed sparsely, and the time of each, dense and sparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_sparse.execution.attention import SparseSelfAttention, why_dense_attention
from lightning_sparse.execution.conv import SparseConv2d, SparsePlanes, why_dense
from lightning_sparse.execution.kernels import KernelsUnavailableError
from lightning_sparse.execution.linear import SparseLinear
from lightning_sparse.execution.report import LayerChoice
from lightning_sparse.execution.semi_structured import semi_structured_linear, why_not_semi_structured
from lightning_sparse.execution.timing import compare
from lightning_sparse.execution.tracing import has_hooks

__all__ = [
    "SEMI_STRUCTURED",
    "InputSpec",
    "input_specs",
    "layers_with_zeros",
    "reason_to_stay_dense",
    "sparse_layer",
    "time_layer",
    "unread_layers",
]

SEMI_STRUCTURED = "semi_structured"
"""The kernels of a GPU for 2:4."""

LEAST_GAIN = 1.1
"""A layer is swapped if it was so many times faster."""

SECONDS = 0.015
"""Timing of a layer takes about so long, in each of its forms."""


@final
@dataclass(frozen=True)
class InputSpec:
    """What a layer was given on the example: shape, type, whether channels lay last in memory, and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False
    device: str = "cpu"

    @classmethod
    def of(cls, x: Tensor) -> InputSpec:
        """Describe a tensor."""
        last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return cls(tuple(x.shape), x.dtype, last, str(x.device))

    def random(self) -> Tensor:
        """Return noise of this description; zeros, where it is of integers."""
        if not self.dtype.is_floating_point:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        x = torch.randn(self.shape, dtype=self.dtype, device=self.device)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


def input_specs(module: nn.Module, call: Any) -> dict[str, InputSpec]:
    """Return what each submodule is given in a call, if its first argument is a tensor.

    Args:
        module: What is called.
        call: Calls it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> input_specs(network, lambda: network(torch.zeros(2, 4)))["1"].shape
        (2, 3)
    """
    specs: dict[str, InputSpec] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                specs.setdefault(name, InputSpec.of(inputs[0]))

        return hook

    handles = [child.register_forward_pre_hook(note(name)) for name, child in module.named_modules()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return specs


def layers_with_zeros(module: nn.Module) -> Iterator[tuple[str, nn.Module, float]]:
    """Yield linear layers and convolutions, and what else has zeros in matrices: name, layer, fraction of zeros."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            continue  # the last matrix of attention, which counts with it
        weights = _weights_of(layer)
        share = _share_of_zeros(weights)
        if weights and (share or isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))):
            yield name, layer, share


def unread_layers(module: nn.Module) -> list[str]:
    """Return the names of layers whose zeros are not counted, since their weights are no plain tensors.

    Example:
        >>> unread_layers(nn.Sequential(nn.Linear(4, 3)))
        []
    """
    return [name for name, layer in module.named_modules() if not _is_plain(getattr(layer, "weight", None))]


def _is_plain(weight: Any) -> bool:
    """Whether a weight is a plain dense tensor, or there is none."""
    if not isinstance(weight, Tensor):
        return not callable(weight)  # quantised layers of torch.ao have a method of that name
    return type(weight) in (Tensor, nn.Parameter) and weight.layout is torch.strided


def _weights_of(layer: nn.Module) -> list[Any]:
    """The matrices of a layer, the one that names its size first; none of a network's own, as positions and tokens."""
    weight = getattr(layer, "weight", None)  # which a parametrized layer computes
    if isinstance(weight, Tensor):
        return [weight] if weight.dim() > 1 else []
    if not type(layer).__module__.startswith("torch.nn."):
        return []
    held = [w for w in layer.parameters(recurse=False) if not nn.parameter.is_lazy(w) and w.dim() > 1]
    return [*held, layer.out_proj.weight] if isinstance(layer, nn.MultiheadAttention) else held


def _share_of_zeros(weights: Sequence[Tensor]) -> float:
    """The fraction of zeros of plain dense tensors; none of those of other kinds, as quantisation makes them."""
    plain = [w for w in weights if _is_plain(w) and w.device.type != "meta"]
    active = sum(int(torch.count_nonzero(w.float() if _is_float8(w) else w)) for w in plain)
    return 1 - active / total if (total := sum(w.numel() for w in plain)) else 0.0


def _is_float8(weight: Tensor) -> bool:
    """Whether a tensor has eight-bit floats, whose zeros torch cannot count."""
    return weight.dtype.is_floating_point and weight.dtype.itemsize == 1


def reason_to_stay_dense(layer: nn.Module, kernels: str) -> str | None:
    """Return why a layer cannot be executed sparsely; ``None`` if it can.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> reason_to_stay_dense(nn.Linear(4, 3, dtype=torch.bfloat16), "llvm")
        'its weight is torch.bfloat16; sparse kernels compute in float32 and float64'
    """
    weight = _weights_of(layer)[0]
    if hasattr(layer, "parametrizations"):
        return "its weight is parametrized; remove the parametrization first"
    if has_hooks(layer):
        return "it has hooks, and a sparse layer would not call them"
    if kernels == SEMI_STRUCTURED:
        return why_not_semi_structured(layer)
    if type(layer) not in (nn.Linear, nn.Conv2d, nn.MultiheadAttention):
        return f"{type(layer).__name__} has no sparse form"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"its weight is {weight.dtype}; sparse kernels compute in float32 and float64"
    bias: Any = getattr(layer, "bias", None)
    if bias is not None and bias.dtype != weight.dtype:
        return "its bias and its weight have different types"
    if isinstance(layer, nn.MultiheadAttention):
        return why_dense_attention(layer)
    return why_dense(layer, kernels) if isinstance(layer, nn.Conv2d) else None


def sparse_layer(layer: nn.Module, kernels: str, threads: int) -> nn.Module:
    """Return the sparse form of one layer, which knows what that knows."""
    if isinstance(layer, nn.Conv2d):
        return SparseConv2d(layer, kernels=kernels, threads=threads).stand_for(layer)
    if isinstance(layer, nn.MultiheadAttention):
        return SparseSelfAttention(layer, kernels=kernels, threads=threads).stand_for(layer)
    assert isinstance(layer, nn.Linear)
    if kernels == SEMI_STRUCTURED:
        return semi_structured_linear(layer)
    return SparseLinear.of(layer, kernels=kernels, threads=threads).stand_for(layer)


def time_layer(
    name: str, layer: nn.Module, sparsity: float, spec: InputSpec | None, *, kernels: str, threads: int, inside: bool
) -> LayerChoice:
    """Time a layer both ways and choose.

    Args:
        name: Of the layer.
        layer: Dense.
        sparsity: Fraction of its weights that are zero.
        spec: What it is given on the example; ``None`` if it is not called.
        kernels: What executes it sparsely.
        threads: How many threads compute.
        inside: Whether the network is a graph, in which its neighbours may be sparse too and images stay laid out.
    """
    shape = tuple(_weights_of(layer)[0].shape)
    reason = reason_to_stay_dense(layer, kernels) or (None if spec else "the example input does not reach it")
    if reason or spec is None:
        return LayerChoice(name, shape, sparsity, sparse=False, reason=reason or "")
    try:
        sparse = sparse_layer(layer, kernels, threads)
        x = spec.random()
        inputs, more = ((x, x, x), {"need_weights": False}) if _is_attention(layer) else ((x,), {})
        sparse(*inputs, **more)
    except (KernelsUnavailableError, ValueError, RuntimeError) as error:  # torch without MKL has no sparse product
        return LayerChoice(name, shape, sparsity, sparse=False, reason=str(error))
    call = _inner_call(sparse, x) if inside else None
    calls = {"dense": lambda: layer(*inputs, **more), "sparse": call or (lambda: sparse(*inputs, **more))}
    seconds = compare(calls, budget=SECONDS, device=spec.device)
    chosen = seconds["dense"] >= LEAST_GAIN * seconds["sparse"]
    return LayerChoice(
        name,
        shape,
        sparsity,
        chosen,
        seconds["dense"],
        seconds["sparse"],
        "" if chosen else f"sparse is not {LEAST_GAIN} times as fast",
    )


def _is_attention(layer: nn.Module) -> bool:
    return isinstance(layer, nn.MultiheadAttention)


def _inner_call(sparse: nn.Module, x: Tensor) -> Any:
    """What a convolution computes, without laying images out before and after."""
    if not isinstance(sparse, SparseConv2d) or not isinstance(sparse.inner, SparsePlanes) or x.dim() != 4:
        return None
    planes = sparse.inner
    images = x.contiguous()
    planes(images)
    compute = getattr(planes.network, "compute_again", None)
    return None if compute is None else lambda: compute(images)
