"""The smallest configuration of each method; the contract suite runs over all of them.

A method of the package without a case stops the collection.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_sparse import methods
from lightning_sparse.methods import DST, FGGP, GMP, SET, RigL, SparseMethod
from lightning_sparse.methods.gradual_pruning import GradualPruning
from lightning_sparse.methods.hard_mask import HardMaskMethod
from lightning_sparse.schedules import Cosine, Polynomial

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CASES", "GRADUAL", "HARD", "Case"]


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
        return self.method(**(dict(self.arguments) | overrides))


_OFTEN = {"update_every": 2, "start": 1, "stop": 11}

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
    Case("dst-alpha", DST, {"alpha": 0.03}, sparsity=0.3),
    Case("dst-sparsity", DST, {"sparsity": 0.8}, sparsity=0.3),
]
HARD = [case for case in CASES if issubclass(case.method, HardMaskMethod)]
GRADUAL = [case for case in CASES if issubclass(case.method, GradualPruning)]

_public = {getattr(methods, name) for name in methods.__all__}
_concrete = {kind for kind in _public if inspect.isclass(kind) and not inspect.isabstract(kind)}
_without_case = {kind.__name__ for kind in _concrete if issubclass(kind, SparseMethod)} - {
    case.method.__name__ for case in CASES
}
if _without_case:
    raise LookupError(f"{', '.join(sorted(_without_case))}: no case in tests/methods/cases.py.")
