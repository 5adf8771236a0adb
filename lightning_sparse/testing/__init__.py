"""The contract suite for your own method: a case says how to construct it, and the suite tests every guarantee.

It needs pytest: ``pip install 'lightning-sparse[testing]'``.
"""

from __future__ import annotations

try:
    import pytest
except ImportError as error:
    raise ImportError(
        "lightning_sparse.testing runs under pytest, which is not installed."
        " Run: pip install 'lightning-sparse[testing]'"
    ) from error

# Before they are imported: their assertions then show both sides, as those of a test file do.
pytest.register_assert_rewrite("lightning_sparse.testing.contract")

from lightning_sparse.testing.case import Case, random_masks  # noqa: E402
from lightning_sparse.testing.contract import MethodContract  # noqa: E402
from lightning_sparse.testing.spies import Kill, KilledError, MaskWatch, ZeroWatch, masks_of  # noqa: E402
from lightning_sparse.testing.toys import (  # noqa: E402
    OPTIMIZERS,
    ConvToy,
    NonFiniteGradients,
    StepIndexedToy,
    ToyClassifier,
    ToyModel,
    TwoOptimizers,
)
from lightning_sparse.testing.training import DumpRank, RankDump, SeedPerRank, fit, fit_two_processes, make_trainer  # noqa: E402

__all__ = [
    "OPTIMIZERS",
    "Case",
    "ConvToy",
    "DumpRank",
    "Kill",
    "KilledError",
    "MaskWatch",
    "MethodContract",
    "NonFiniteGradients",
    "RankDump",
    "SeedPerRank",
    "StepIndexedToy",
    "ToyClassifier",
    "ToyModel",
    "TwoOptimizers",
    "ZeroWatch",
    "fit",
    "fit_two_processes",
    "make_trainer",
    "masks_of",
    "random_masks",
]
