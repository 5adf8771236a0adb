"""The smallest configuration of each method; the contract suite runs over all of them.

A method of the package without a case stops the collection.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_sparse import methods
from lightning_sparse.masks import select_weights
from lightning_sparse.methods import DST, EAST, FGGP, GMP, SET, FixedMask, RigL, SparseMethod
from lightning_sparse.methods.gradual_pruning import GradualPruning
from lightning_sparse.methods.hard_mask import HardMaskMethod
from lightning_sparse.modules import DyReLUPhasing
from lightning_sparse.schedules import Cosine, Polynomial
from tests.helpers import ToyModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

__all__ = ["CASES", "GRADUAL", "HARD", "MOVING", "Case", "random_masks"]


@dataclass(frozen=True)
class Case:
    """A method with arguments that suit a training of sixteen steps on a network of 344 weights."""

    name: str
    method: type[SparseMethod]
    arguments: Mapping[str, Any]
    sparsity: float = 0.75
    """Sparsity that those sixteen steps reach at least."""

    def make(self, **overrides: Any) -> SparseMethod:
        """A new callback."""
        return self.method(**copy.deepcopy(dict(self.arguments) | overrides))

    @property
    def changes_modules(self) -> bool:
        """Whether it computes something else for a while."""
        return isinstance(self.arguments.get("phasing"), DyReLUPhasing)


def random_masks(module: nn.Module, sparsity: float = 0.8) -> dict[str, Tensor]:
    """Masks of about that sparsity for all weights of ``module``, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    weights = select_weights(module).masked
    return {weight.name: torch.rand(weight.parameter.shape, generator=generator) >= sparsity for weight in weights}


_OFTEN = {"update_every": 2, "start": 1, "stop": 11}
_CYCLES = {"update_every": 2, "cycle_update_every": 1}

CASES = [
    Case("gmp-uniform", GMP, {"sparsity": 0.8, **_OFTEN}),
    Case("gmp-erk", GMP, {"sparsity": 0.8, "allocation": "erk", "min_active": 2, **_OFTEN}),
    Case("fggp-global", FGGP, {"sparsity": 0.8, **_OFTEN}),
    Case("fggp-layer", FGGP, {"sparsity": 0.8, "allocation": "uniform", "first": "magnitude", **_OFTEN}),
    Case(
        "fggp-half",
        FGGP,
        {"sparsity": Polynomial(0.5, 0.9), "pool": Cosine(0.5, 0.005), "pool_of": "survivors", **_OFTEN},
    ),
    Case("set", SET, {"sparsity": 0.8, "update_every": 2, "stop": 11}),
    Case("rigl", RigL, {"sparsity": 0.8, "update_every": 2, "stop": 11}),
    Case(
        "rigl-itop",
        RigL,
        {
            "sparsity": 0.9,
            "allocation": "uniform",
            "drop_fraction": Cosine(0.5, 0.005),
            "update_every": 2,
            "stop": 1.0,
            "regrow": False,
            "update_replaces_step": False,
        },
    ),
    Case("east", EAST, {"sparsity": 0.8, **_CYCLES, "sharing": False, "phasing": DyReLUPhasing(2, 5)}),
    Case("east-masks", EAST, {"sparsity": 0.8, **_CYCLES, "sharing": False, "phasing": False}),
    Case("dst-alpha", DST, {"alpha": 0.03}, sparsity=0.3),
    Case("dst-sparsity", DST, {"sparsity": 0.8}, sparsity=0.3),
    Case("fixedmask", FixedMask, {"masks": random_masks(ToyModel())}),
]
MOVING = [case for case in CASES if case.method is not FixedMask]
"""Those whose masks change while they train."""
HARD = [case for case in MOVING if issubclass(case.method, HardMaskMethod)]
GRADUAL = [case for case in CASES if issubclass(case.method, GradualPruning)]

_public = {getattr(methods, name) for name in methods.__all__}
_concrete = {kind for kind in _public if inspect.isclass(kind) and not inspect.isabstract(kind)}
_without_case = {kind.__name__ for kind in _concrete if issubclass(kind, SparseMethod)} - {
    case.method.__name__ for case in CASES
}
if _without_case:
    raise LookupError(f"{', '.join(sorted(_without_case))}: no case in tests/methods/cases.py.")
