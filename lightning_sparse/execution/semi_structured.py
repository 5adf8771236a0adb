"""2:4 sparsity, which NVIDIA GPUs execute: of every four neighbouring inputs of a linear layer, at most two are active.

In random masks with 95 % zeros, nearly every group of four satisfies 2:4, but hardly any whole matrix does. Projecting
it prunes a few weights in a thousand. On a GPU, :func:`~lightning_sparse.execution.accelerate` stores layers that
satisfy 2:4 with ``torch.sparse.to_sparse_semi_structured``, and keeps them if the whole network is faster. Shapes and
types are tested on a CPU; nothing here was measured on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_sparse.execution.copying import copied, frozen_copy

__all__ = [
    "LayerProjection",
    "Projection",
    "groups_beyond_2_4",
    "project_to_2_4",
    "satisfies_2_4",
    "semi_structured_linear",
    "why_not_semi_structured",
]

# What torch.sparse accepts with either of its backends, cuSPARSELt and CUTLASS: multiples of rows and columns.
MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64)}


def groups_beyond_2_4(weight: Tensor) -> int:
    """Count the groups of four neighbouring inputs that have more than two weights.

    Args:
        weight: Shape (outputs, inputs), where the number of inputs is a multiple of 4.

    Raises:
        ValueError: The weight has another shape.

    Example:
        >>> import torch
        >>> groups_beyond_2_4(torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 4.0, 5.0]]))
        1
    """
    return int((_groups(weight).count_nonzero(-1) > 2).sum())


def satisfies_2_4(weight: Tensor) -> bool:
    """Whether in every group of four neighbouring inputs at most two weights are not zero.

    Args:
        weight: Any shape; only (outputs, multiple of 4) can satisfy 2:4.

    Example:
        >>> import torch
        >>> satisfies_2_4(torch.tensor([[1.0, 2.0, 0.0, 0.0]])), satisfies_2_4(torch.ones(2, 3))
        (True, False)
    """
    fits = weight.dim() == 2 and weight.shape[1] % 4 == 0
    return fits and groups_beyond_2_4(weight) == 0


@final
@dataclass(frozen=True)
class LayerProjection:
    """How many weights of one layer 2:4 has pruned.

    Args:
        name: Name of the layer.
        active: Number of weights that were not zero.
        removed: Number of these that are zero now.
    """

    name: str
    active: int
    removed: int


@final
@dataclass(frozen=True)
class Projection:
    """A module that satisfies 2:4, and how many weights that cost.

    Args:
        module: A copy that satisfies 2:4.
        layers: The projected linear layers.
        left: Names of linear layers whose number of inputs is not a multiple of 4.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(8, 2)
        >>> project_to_2_4(layer).share
        0.5
    """

    module: nn.Module
    layers: Sequence[LayerProjection]
    left: Sequence[str]

    @property
    def share(self) -> float:
        """Fraction of the active weights that were removed; 0 if there were none."""
        active = sum(layer.active for layer in self.layers)
        return sum(layer.removed for layer in self.layers) / active if active else 0.0


def project_to_2_4(module: nn.Module) -> Projection:
    """Remove, in each group of four neighbouring inputs of linear layers, all but the two largest weights.

    Args:
        module: Any torch module. It is not changed.

    Returns:
        A copy that satisfies 2:4, and how many weights that cost.

    Raises:
        ValueError: The module has no linear layer, or cannot be copied.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.Linear(4, 1)
        >>> layer.weight.data = torch.tensor([[1.0, -4.0, 3.0, 0.0]])
        >>> projection = project_to_2_4(layer)
        >>> projection.module.weight.tolist(), projection.layers[0].removed
        ([[0.0, -4.0, 3.0, 0.0]], 1)
    """
    own = copied(module)
    linears = [(name, layer) for name, layer in own.named_modules() if isinstance(layer, nn.Linear)]
    if not linears:
        raise ValueError(
            f"{type(module).__name__} has no linear layer; give a module with nn.Linear, the layers that 2:4 is for."
        )
    layers: list[LayerProjection] = []
    left: list[str] = []
    done: dict[int, int] = {}
    for name, layer in linears:
        weight = layer.weight
        if weight.shape[1] % 4:
            left.append(name)
        elif id(weight) not in done:  # tied weights are one
            done[id(weight)] = 1
            active = int(weight.count_nonzero())
            _project_(weight.data)
            layers.append(LayerProjection(name, active, active - int(weight.count_nonzero())))
    return Projection(own, layers, left)


def why_not_semi_structured(layer: nn.Module) -> str | None:
    """Return why a GPU cannot execute a layer as 2:4; ``None`` if it can.

    Example:
        >>> from torch import nn
        >>> why_not_semi_structured(nn.Linear(64, 32))
        'its weight is torch.float32; 2:4 is executed in float16 and bfloat16'
    """
    weight: Any = getattr(layer, "weight", None)
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__} has no 2:4 form"
    if weight.dtype not in MULTIPLES:
        return f"its weight is {weight.dtype}; 2:4 is executed in float16 and bfloat16"
    rows, columns = MULTIPLES[weight.dtype]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"its shape is not a multiple of {rows} × {columns}"
    if beyond := groups_beyond_2_4(weight):
        return f"{beyond} groups of four have more than two weights; see project_to_2_4"
    return None


def semi_structured_linear(layer: nn.Linear) -> nn.Linear:
    """Return a copy of a linear layer on a GPU, stored as 2:4.

    Raises:
        ValueError: The layer does not satisfy 2:4, or is not on an NVIDIA GPU.
    """
    reason = why_not_semi_structured(layer)
    reason = reason or (None if layer.weight.is_cuda else f"it is on {layer.weight.device}, and 2:4 is for GPUs")
    if reason:
        raise ValueError(f"{layer} cannot be stored as 2:4: {reason}. Leave it dense.")
    own = frozen_copy(layer)
    assert isinstance(own, nn.Linear)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype")  # torch says so of the whole interface
        compressed = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
    own.weight = nn.Parameter(compressed, requires_grad=False)
    return own


def _groups(weight: Tensor) -> Tensor:
    if weight.dim() != 2 or weight.shape[1] % 4:
        raise ValueError(
            f"The weight has shape {tuple(weight.shape)}; 2:4 is for (outputs, inputs) with inputs a multiple of 4."
        )
    return weight.detach().reshape(weight.shape[0], -1, 4)


def _project_(weight: Tensor) -> None:
    groups = _groups(weight)
    smallest = groups.abs().float().argsort(dim=-1, stable=True)[..., :2]
    beyond = (groups.count_nonzero(-1) > 2)[..., None]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, smallest, True)
    weight.copy_(groups.masked_fill(mask & beyond, 0).reshape(weight.shape))
