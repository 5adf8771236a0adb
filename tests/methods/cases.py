"""The smallest configuration of each method; the contract suite runs over all of them.

A method of the package without a case stops the collection.
"""

from __future__ import annotations

from typing import Any

from lightning_sparse.methods import (
    ACDC,
    DSR,
    DST,
    EAST,
    FGGP,
    GMP,
    MEST,
    SET,
    SNFS,
    SNIP,
    SRSTE,
    STR,
    Feather,
    FixedMask,
    GraNet,
    GraSP,
    RigL,
    SRigL,
    SynFlow,
    TopKAST,
)
from lightning_sparse.methods.catalog import all_methods
from lightning_sparse.modules import DyReLUPhasing
from lightning_sparse.schedules import Cosine, Polynomial
from lightning_sparse.testing import Case, ConvToy, ToyModel, random_masks

__all__ = ["CASES", "Case", "random_masks"]

_OFTEN = {"update_every": 2, "start": 1, "stop": 11}
_CYCLES = {"update_every": 2, "cycle_update_every": 1}
_THRESHOLDS: dict[str, Any] = {
    "refuses": {"muon": "Muon does not take them"},
    "sparsity_under": {"adafactor": 0.01},  # its step is relative to the values, and thresholds begin at 0
}
_SMALLER: dict[str, Any] = {"initial": -2.7, "decay": 0.01}  # as the classifier's weights are
_SCALARS: dict[str, Any] = {"refuses": {"muon": "Muon does not take them"}}

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
            "sparsity": 0.8,
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
    Case("granet", GraNet, {"sparsity": 0.8, "update_every": 2, "stop": 11}),
    Case(
        "granet-layer", GraNet, {"sparsity": Polynomial(0.5, 0.8), "allocation": "erk", "update_every": 2, "stop": 11}
    ),
    Case("acdc", ACDC, {"sparsity": 0.8, "min_active": 4, "update_every": 2, "start": 1, "last_dense": 7, "stop": 11}),
    Case("mest", MEST, {"sparsity": 0.8, "update_every": 2, "stop": 11}),
    Case("mest-soft", MEST, {"sparsity": 0.8, "soft": True, "update_every": 2, "stop": 11}),
    Case("snfs", SNFS, {"sparsity": 0.8, "update_every": 2, "stop": 11}),
    Case("dsr", DSR, {"sparsity": 0.8, "threshold": 0.05, "update_every": 2, "stop": 11}),
    Case("srigl", SRigL, {"sparsity": 0.75, "update_every": 2, "stop": 11}, sparsity=0.7),
    Case("snip", SNIP, {"sparsity": 0.8}, moves=False, gradual=False),
    Case("snip-batches", SNIP, {"sparsity": 0.8, "batches": 3, "allocation": "erk"}, moves=False, gradual=False),
    Case("grasp", GraSP, {"sparsity": 0.8}, moves=False, gradual=False),
    Case("synflow", SynFlow, {"sparsity": 0.8, "iterations": 10}, moves=False, gradual=False),
    Case("dst-alpha", DST, {"alpha": 0.03}, sparsity=0.3, **_THRESHOLDS),
    Case("dst-sparsity", DST, {"sparsity": 0.8}, sparsity=0.3, **_THRESHOLDS),
    Case("srste", SRSTE, {"pattern": "1:4", "decay": 0.05}, conv_arguments={"pattern": "1:2"}, sparsity=0.5),
    Case("str", STR, {"initial": -2.0, "decay": 0.05}, sparsity=0.3, conv_arguments=_SMALLER, **_SCALARS),
    Case("topkast", TopKAST, {"sparsity": 0.8, "backward_sparsity": 0.5, "decay": 0.01}),
    Case("topkast-erk", TopKAST, {"sparsity": 0.8, "allocation": "erk", "update_every": 3}),
    Case("feather", Feather, {"sparsity": 0.8, "theta": 0.5, "start": 1, "stop": 7}),
    Case(
        "fixedmask",
        FixedMask,
        {"masks": random_masks(ToyModel())},
        conv_arguments={"masks": random_masks(ConvToy())},
        moves=False,
    ),
]

_without_case = {kind.__name__ for kind in all_methods()} - {case.method.__name__ for case in CASES}
if _without_case:
    raise LookupError(f"{', '.join(sorted(_without_case))}: no case in tests/methods/cases.py.")
