"""The kernels that need only torch: compressed sparse rows times feature-major activations.

``F.linear(x, csr)`` is several times slower: the product is fast only if each feature's values for the whole batch lie
side by side. So the input is transposed once, unless it comes from another such layer. The result is a transposed view,
whose strides pass the layout on to the next layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sparse.execution.formats import PackedWeight
from lightning_sparse.execution.kernels.steps import LinearStep

__all__ = ["CSRChain", "csr_tensor"]


def csr_tensor(weight: PackedWeight) -> Tensor:
    """Return a weight as torch's compressed sparse rows (outputs, inputs), with 32-bit indices.

    Example:
        >>> import torch
        >>> from lightning_sparse.execution.formats import pack
        >>> csr_tensor(pack(torch.tensor([[0.0, 5.0], [0.0, 0.0]]))) @ torch.ones(2, 1)
        tensor([[5.],
                [0.]])
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(
            torch.from_numpy(weight.rows.astype(np.int32)),
            torch.from_numpy(weight.columns),
            torch.from_numpy(weight.values),
            size=(weight.num_rows, weight.num_columns),
            check_invariants=False,
        )


@final
class CSRChain:
    """A chain of linear layers, computed by torch alone.

    Args:
        steps: The layers, at least one; the outputs of each are the inputs of the next.
    """

    def __init__(self, steps: Sequence[LinearStep]) -> None:
        self._layers = [(csr_tensor(step.weight), torch.from_numpy(step.bias)[:, None], step) for step in steps]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the last layer's outputs (rows, outputs) for rows (rows, inputs), as a transposed view."""
        features = x.t()
        for weight, bias, step in self._layers:
            features = torch.addmm(bias, weight, features.contiguous())
            if step.low > -np.inf or step.high < np.inf:
                features.clamp_(step.low, step.high)
            if step.gelu:
                features = F.gelu(features)
        return features.t()
