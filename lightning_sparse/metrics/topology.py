"""Metrics over masks: sparsity, change, exploration, dead neurons.

Each is the :class:`torchmetrics.Metric` of the function in :mod:`lightning_sparse.functional.topology` with its name.
Their states are counts and their values ratios of sums, so they are right where every process holds the same masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_sparse.functional.topology import count_active, count_changed, count_dead

__all__ = ["DeadNeurons", "ExplorationRate", "MaskChange", "Sparsity"]


class _Share(Metric):
    """Some of all: two counts, and their ratio."""

    is_differentiable: bool | None = False
    higher_is_better: bool | None = None
    full_state_update: bool | None = False
    part: Tensor
    whole: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("part", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("whole", default=torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, counts: tuple[int, int]) -> None:
        self.part += counts[0]
        self.whole += counts[1]

    @override
    def compute(self) -> Tensor:
        return self.part / self.whole


class Sparsity(_Share):
    """The fraction of zeros, in [0, 1]; see :func:`~lightning_sparse.functional.topology.sparsity`.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = Sparsity()
        >>> metric([torch.tensor([True, False]), torch.tensor([[False, False]])])
        tensor(0.7500)
    """

    @override
    def update(self, masks: Sequence[Tensor]) -> None:
        """Count the zeros of ``masks``, ``bool`` and of any shapes."""
        active, total = count_active(masks)
        self._add((total - active, total))


class MaskChange(_Share):
    """The share of mask entries that differ, in [0, 1]; see :func:`~lightning_sparse.functional.topology.mask_change`.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = MaskChange()
        >>> metric([torch.tensor([True, True, False, False])], [torch.tensor([True, False, True, False])])
        tensor(0.5000)
    """

    @override
    def update(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Count the differences between masks at two times, ``bool`` and of equal shapes."""
        self._add(count_changed(old, new))


class ExplorationRate(_Share):
    r"""The share :math:`R_s` ever active; see :func:`~lightning_sparse.functional.topology.exploration_rate`.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = ExplorationRate()
        >>> before, after = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
        >>> metric([before | after])
        tensor(0.7500)

    References:
        Liu et al., `Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse Training
        <https://arxiv.org/abs/2102.02887>`_, ICML 2021.
    """

    @override
    def update(self, ever_active: Sequence[Tensor]) -> None:
        """Count the weights that have ever been active, ``bool`` and of any shapes."""
        self._add(count_active(ever_active))


class DeadNeurons(_Share):
    """Neurons and filters with no input left; see :func:`~lightning_sparse.functional.topology.dead_neurons`.

    Args:
        normalize: Whether the value is their share, in [0, 1], or their number.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> rows = [torch.tensor([[True, False], [False, False]]), torch.tensor([[True], [True]])]
        >>> DeadNeurons()(rows), DeadNeurons(normalize=False)(rows)
        (tensor(0.2500), tensor(1))
    """

    # Numbers are added from update to update, but not from process to process: forward must not merge as these do.
    full_state_update: bool | None = True
    number: Tensor

    def __init__(self, *, normalize: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.normalize = normalize
        # Every process holds the same masks: the number is that of one of them, not the sum.
        self.add_state("number", default=torch.tensor(0), dist_reduce_fx="max")

    @override
    def update(self, rows: Sequence[Tensor]) -> None:
        """Count the empty rows of masks, each ``bool`` and of shape ``(outputs, fan-in)``."""
        counts = count_dead(rows)
        self._add(counts)
        self.number += counts[0]

    @override
    def compute(self) -> Tensor:
        return super().compute() if self.normalize else self.number
