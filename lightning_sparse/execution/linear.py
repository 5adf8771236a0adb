"""Linear layers with zeros, executed sparsely: alone or several in a row, with what follows them fused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_sparse.execution.formats import pack
from lightning_sparse.execution.inputs import refuse_gradients, refuse_unreadable
from lightning_sparse.execution.kernels import Chain, chain, default_kernels
from lightning_sparse.execution.kernels.steps import LinearStep
from lightning_sparse.execution.standing_in import StandIn

__all__ = ["SparseLinear", "linear_step"]


def linear_step(weight: Tensor, bias: Tensor | None, low: float = -math.inf, high: float = math.inf) -> LinearStep:
    """Pack a linear layer.

    Args:
        weight: (outputs, inputs).
        bias: (outputs,), or none.
        low: Lower bound of the results; 0 for a ReLU.
        high: Upper bound of the results.
    """
    packed = pack(weight)
    added = weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()
    return LinearStep(packed, added.numpy(), low, high)


@final
class SparseLinear(StandIn):
    r"""Linear layers whose zeros cost nothing, one after another: :math:`y = \mathrm{clamp}(W x + b)`, for inference.

    For a batch of one, weights are read row by row. For larger batches, each feature's values are laid side by side, 64
    columns at a time, and stay so from layer to layer.

    Args:
        steps: The layers; the outputs of each are the inputs of the next.
        kernels: One of :func:`~lightning_sparse.execution.kernels.available_kernels`; by default the fastest.
        threads: Number of threads; by default torch's current number.
        flatten: Whether all dimensions of the input but the first are one row.

    Raises:
        ValueError: There is no step, or the kernels are not installed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_sparse.execution import SparseLinear
        >>> layer = nn.Linear(4, 3)
        >>> _ = layer.weight.data.mul_(torch.eye(3, 4))
        >>> sparse = SparseLinear.of(layer)
        >>> x = torch.randn(2, 5, 4)
        >>> torch.allclose(sparse(x), layer(x), atol=1e-6)
        True
    """

    def __init__(
        self,
        steps: Sequence[LinearStep],
        *,
        kernels: str | None = None,
        threads: int | None = None,
        flatten: bool = False,
    ) -> None:
        super().__init__()
        if not steps:
            raise ValueError("SparseLinear was given no layers; give at least one step.")
        if steps[-1].gelu:
            raise ValueError("The last step ends with a GELU, which is only fused between layers; apply it afterwards.")
        self.steps = tuple(steps)
        self.kernels = kernels or default_kernels()
        self.threads = threads or torch.get_num_threads()
        self.flatten = flatten
        self.in_features = self.steps[0].weight.num_columns
        self.out_features = self.steps[-1].weight.num_rows
        self.dtype = torch.from_numpy(self.steps[0].weight.values[:0]).dtype
        self._chain: Chain = chain(self.steps, kernels=self.kernels, threads=self.threads)

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        *,
        kernels: str | None = None,
        threads: int | None = None,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> SparseLinear:
        """Make one of a dense layer, whose weights are copied.

        Args:
            linear: The layer.
            kernels: As for :class:`SparseLinear`.
            threads: As for :class:`SparseLinear`.
            low: Lower bound of the results; 0 for a ReLU.
            high: Upper bound of the results.
        """
        step = linear_step(linear.weight, linear.bias, low, high)
        return cls([step], kernels=kernels, threads=threads)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) of inputs (..., in_features)."""
        if x.requires_grad:
            refuse_gradients(x)
        if x.dtype is not self.dtype or not x.is_cpu:
            self._refuse(x)
        try:
            rows = x.flatten(1) if self.flatten and x.dim() > 2 else x
            if rows.dim() == 2 and rows.shape[1] == self.in_features:  # the quick way, for small networks
                return self._chain(rows)
            if rows.shape[-1:] != (self.in_features,):
                self._refuse(x)
            return self._chain(rows.reshape(-1, self.in_features)).reshape(*rows.shape[:-1], self.out_features)
        except RuntimeError:
            refuse_unreadable(x)
            raise

    @override
    def extra_repr(self) -> str:
        sizes = [self.in_features, *(step.weight.num_rows for step in self.steps)]
        sparsities = ", ".join(f"{step.weight.sparsity:.4g}" for step in self.steps)
        return f"{' -> '.join(map(str, sizes))}, sparsity={sparsities}, kernels={self.kernels}, threads={self.threads}"

    @override
    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__.copy()
        return {name: value for name, value in state.items() if name != "_chain"}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._chain = chain(self.steps, kernels=self.kernels, threads=self.threads)

    def _refuse(self, x: Tensor) -> None:
        raise ValueError(
            f"A sparse layer of {self.in_features} inputs in {self.dtype} on the CPU was given {tuple(x.shape)} in"
            f" {x.dtype} on {x.device}. Give inputs of that size, type and device."
        )
