"""What the contract suite is told of a method: how it is made, and the little in which it differs from others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lightning_sparse.masks import select_weights
from lightning_sparse.methods.at_initialization import AtInitialization
from lightning_sparse.methods.hard_mask import HardMaskMethod
from lightning_sparse.methods.scored import ScoredMethod
from lightning_sparse.modules import DyReLUPhasing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_sparse.methods import SparseMethod

__all__ = ["Case", "random_masks"]


@dataclass(frozen=True)
class Case:
    """A method with arguments that suit a training of sixteen steps on a network of 344 weights.

    Sixteen steps are few: give durations in steps, an update at every second step, and the last one by step 11, so that
    what comes after it is seen too. A method of gradual pruning takes all arguments of its family, which the suite sets
    to other values here and there.

    Args:
        name: The case's part in the names of tests, unique in its class.
        method: The class of the method.
        arguments: What it is made with.
        sparsity: Sparsity that those sixteen steps reach at least, in [0, 1].
        conv_arguments: Arguments that have to differ for :class:`~lightning_sparse.testing.ConvToy`.
        moves: Whether masks change while the method trains.
        refuses: For each optimizer of :data:`~lightning_sparse.testing.OPTIMIZERS` that the method refuses, by name, a
            pattern that its error matches.
        sparsity_under: For optimizers with which less is reached than ``sparsity``, by name, what is.

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
        return isinstance(self.arguments.get("phasing"), DyReLUPhasing)

    @property
    def is_gradual(self) -> bool:
        """Whether it is a method of gradual pruning."""
        at_once = issubclass(self.method, AtInitialization)
        return issubclass(self.method, ScoredMethod) and not self.method.grows and not at_once

    @property
    def is_hard(self) -> bool:
        """Whether it moves masks, and what it prunes is lost."""
        return self.moves and issubclass(self.method, HardMaskMethod)

    @property
    def masks_what_thaws(self) -> bool:
        """Whether it has masks for weights that are frozen when training begins."""
        return self.make().masks_what_thaws


def random_masks(module: nn.Module, sparsity: float = 0.8) -> dict[str, Tensor]:
    """Masks of about that sparsity for all weights of ``module``, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    weights = select_weights(module).masked
    return {weight.name: torch.rand(weight.parameter.shape, generator=generator) >= sparsity for weight in weights}
