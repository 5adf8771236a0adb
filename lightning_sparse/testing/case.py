"""A method's case for the contract suite: how to construct it, and in what it differs from other methods."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lightning_sparse.masks import select_weights
from lightning_sparse.trainer import is_a

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_sparse.methods import SparseMethod

__all__ = ["Case", "random_masks"]


@dataclass(frozen=True)
class Case:
    """A method with arguments that suit a training of sixteen steps on a network of 344 weights.

    Sixteen steps are few. Give durations in steps, update at every second step, and let the last update be at step 11
    at the latest, so that the suite also tests the steps after it. A gradual-pruning method must take all arguments of
    its family, because the suite changes some of them.

    Args:
        name: The case's name in the names of tests, unique in its class.
        method: The class of the method.
        arguments: The arguments of the method.
        sparsity: The least sparsity after these sixteen steps, in [0, 1].
        conv_arguments: Arguments that must differ for :class:`~lightning_sparse.testing.ConvToy`.
        moves: Whether masks change during training.
        gradual: Whether pruned weights stay pruned; None means that the method's ``grows`` says so.
        refuses: For each optimizer of :data:`~lightning_sparse.testing.OPTIMIZERS` that the method refuses, by name, a
            pattern that matches its error.
        sparsity_under: For optimizers that reach a lower sparsity than ``sparsity``, by name: that sparsity.

    Example:
        >>> from lightning_sparse import GMP
        >>> from lightning_sparse.testing import Case
        >>> case = Case("gmp", GMP, {"sparsity": 0.8, "update_every": 2, "start": 1, "stop": 11})
        >>> case.make(min_active=2).min_active
        2
    """

    name: str
    method: type[SparseMethod]
    arguments: Mapping[str, Any]
    sparsity: float = 0.75
    conv_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    moves: bool = True
    gradual: bool | None = None
    refuses: Mapping[str, str] = field(default_factory=dict[str, str])
    sparsity_under: Mapping[str, float] = field(default_factory=dict[str, float])

    def make(self, **overrides: Any) -> SparseMethod:
        """A new callback."""
        return self.method(**copy.deepcopy(dict(self.arguments) | overrides))

    def refusal(self, optimizer: str) -> str | None:
        """A pattern of the error with which the optimizer of that name is refused; ``None`` where it is not."""
        if optimizer == "muon" and self.changes_modules:  # what is put into the network has vectors
            return "No optimizer steps the parameters"
        return self.refuses.get(optimizer)

    @property
    def changes_modules(self) -> bool:
        """Whether it computes something else for a while."""
        return any(is_a(part, "DyReLUPhasing") for part in self.make().companions())

    @property
    def is_gradual(self) -> bool:
        """Whether it prunes along a schedule to exact budgets, and what is pruned stays pruned."""
        return self.gradual if self.gradual is not None else not getattr(self.method, "grows", True)

    @property
    def is_hard(self) -> bool:
        """Whether it moves masks, and what it prunes is lost."""
        return self.moves and self.method.clears_gradients

    @property
    def masks_what_thaws(self) -> bool:
        """Whether it has masks for weights that are frozen when training begins."""
        return self.make().masks_what_thaws


def random_masks(module: nn.Module, sparsity: float = 0.8) -> dict[str, Tensor]:
    """Masks of about that sparsity for all weights of ``module``, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    weights = select_weights(module).masked
    return {weight.name: torch.rand(weight.parameter.shape, generator=generator) >= sparsity for weight in weights}
