"""The recorded runs: what is trained, by which methods, and how; through the public API alone."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from numpy.random import RandomState

from lightning_sparse import (
    DST,
    EAST,
    FGGP,
    GMP,
    SET,
    DyReLUPhasing,
    FixedMask,
    RigL,
    SparseMethod,
    WeightSharing,
    apply_masks,
)
from lightning_sparse.schedules import Cosine, Cyclic, Exponential, Linear, Polynomial, Schedule
from tests.recorded.modules import MLP, ConvNet, Recurrent, ResidualNet, Toy, TwoOptimizers, adamw

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["RUNS", "Run", "make"]


def make(method: type[SparseMethod], **arguments: Any) -> SparseMethod:
    """Make a method; the one place that knows of arguments with a new name."""
    parameters = inspect.signature(method).parameters
    if "drop_fraction" in arguments and "drop_fraction" not in parameters:
        arguments["exchange"] = arguments.pop("drop_fraction")
    return method(**arguments)


@dataclass(frozen=True)
class Run:
    """One training that is recorded.

    Args:
        name: Unique among :data:`RUNS`.
        methods: Makes the methods; the first is the one whose steps are counted.
        module: Makes the module.
        trainer: Arguments of the Trainer besides those that all runs share.
        processes: 1, or 2 for DDP.
        resumed_at: Step of a checkpoint from which new methods and a new module go on; only they are recorded.
        uses_random: Whether masks depend on random scores: such runs are recorded anew where those are drawn otherwise.
        grows_under_adam: Whether weights grow with cleared moments under an optimizer that has second moments.
    """

    name: str
    methods: Callable[[], list[SparseMethod]]
    module: Callable[[], Toy] = MLP
    trainer: Mapping[str, Any] = field(default_factory=dict[str, Any])
    processes: int = 1
    resumed_at: int | None = None
    uses_random: bool = False
    grows_under_adam: bool = False


@dataclass(frozen=True)
class Ramp(Schedule):
    """From dense to ``final`` in the first half, and constant in the second: nothing begins at random."""

    final: float

    def __call__(self, progress: float) -> float:
        return min(self.final, 2.0 * self.final * progress)


def _given(module: Toy, active: float) -> dict[str, torch.Tensor]:
    """Masks with a share of each layer that is ``active``, at places that are the same with every version of torch."""
    draws = RandomState(2)
    weights = {name: value for name, value in module.named_parameters() if value.dim() > 1}
    return {name: torch.from_numpy(draws.random_sample(tuple(value.shape)) < active) for name, value in weights.items()}


def _sparse(kind: Callable[[], Toy], active: float = 0.6) -> Callable[[], Toy]:
    """A module that a sparse training has left, so that a method begins with its masks."""

    def module() -> Toy:
        made = kind()
        apply_masks(made, _given(made, active))
        return made

    return module


def _run(
    name: str, method: type[SparseMethod], arguments: Mapping[str, Any], module: Callable[[], Toy] = MLP, **more: Any
) -> Run:
    """A run of one method; callbacks among its arguments are copied, for they are used up in training."""
    return Run(name, lambda: [make(method, **copy.deepcopy(dict(arguments)))], module, **more)


_GRADUAL: dict[str, Any] = {"sparsity": 0.8, "update_every": 3, "start": 2, "stop": 19}
_EXPLORE: dict[str, Any] = {"sparsity": 0.7, "update_every": 3, "stop": 20}
_FROM_DENSE: dict[str, Any] = {"sparsity": Ramp(0.7), "update_every": 2, "stop": 21}
_EAST: dict[str, Any] = {"sparsity": 0.7, "update_every": 3, "cycle_update_every": 2, "stop": 22}
_CYCLES_ALONE: dict[str, Any] = {**_EAST, "phasing": False, "sharing": False}
_PARTS: dict[str, Any] = {"phasing": DyReLUPhasing(4, 14), "sharing": WeightSharing()}
_RANDOM: dict[str, Any] = {"uses_random": True}


def _adamw(kind: Callable[..., Toy]) -> Callable[[], Toy]:
    return lambda: kind(adamw)


def _bad_batches(kind: Callable[..., Toy]) -> Callable[[], Toy]:
    return lambda: kind(bad_batches=range(7, 10))


_GMP = [
    _run("gmp-uniform", GMP, _GRADUAL),
    _run("gmp-global-adamw", GMP, {**_GRADUAL, "allocation": "global"}, _adamw(MLP)),
    _run("gmp-global-min-active", GMP, {**_GRADUAL, "sparsity": 0.9, "allocation": "global", "min_active": 12}),
    _run("gmp-erk-min-active-conv", GMP, {**_GRADUAL, "allocation": "erk", "min_active": 16}, ConvNet),
    _run("gmp-er-lstm", GMP, {**_GRADUAL, "allocation": "er"}, Recurrent),
    _run("gmp-excluded", GMP, {**_GRADUAL, "sparsity": Exponential(0.0, 0.9), "exclude": ["*.5.weight"]}),
    _run("gmp-fractions", GMP, {"sparsity": 0.75, "start": 0.1, "stop": 0.9, "update_every": 0.5}),
    _run("gmp-two-optimizers", GMP, {**_GRADUAL, "allocation": "global"}, TwoOptimizers),
    _run("gmp-begins-at-random", GMP, {**_GRADUAL, "sparsity": Linear(0.3, 0.8)}, **_RANDOM),
    _run("gmp-goes-on", GMP, _GRADUAL, _sparse(MLP)),
    _run("gmp-accumulated", GMP, _GRADUAL, trainer={"accumulate_grad_batches": 2, "max_epochs": 4}),
    _run("gmp-resumed", GMP, _GRADUAL, resumed_at=9),
]

_FGGP = [
    _run("fggp-global", FGGP, _GRADUAL),
    _run("fggp-magnitude-first", FGGP, {**_GRADUAL, "first": "magnitude"}),
    _run("fggp-uniform", FGGP, {**_GRADUAL, "allocation": "uniform"}),
    _run("fggp-survivors", FGGP, {**_GRADUAL, "pool": Cosine(0.5, 0.005), "pool_of": "survivors"}),
    _run("fggp-gradient-alone", FGGP, {**_GRADUAL, "pool": 0.0}),
    _run("fggp-clipped-lstm", FGGP, _GRADUAL, Recurrent, trainer={"gradient_clip_val": 0.5}),
    _run("fggp-min-active-conv-adamw", FGGP, {**_GRADUAL, "min_active": 20}, _adamw(ConvNet)),
    _run("fggp-begins-at-random", FGGP, {**_GRADUAL, "sparsity": Polynomial(0.5, 0.9)}, **_RANDOM),
    _run("fggp-bad-gradients", FGGP, _GRADUAL, _bad_batches(MLP)),
    _run("fggp-resumed", FGGP, _GRADUAL, _adamw(MLP), resumed_at=6),
    _run("fggp-two-processes", FGGP, _GRADUAL, processes=2, trainer={"accumulate_grad_batches": 2, "max_epochs": 4}),
    _run("fggp-two-processes-resumed", FGGP, _GRADUAL, ConvNet, processes=2, resumed_at=9),
]

_SET = [
    _run("set-erk", SET, _EXPLORE, **_RANDOM),
    _run("set-uniform-lstm", SET, {**_EXPLORE, "allocation": "uniform", "regrow": False}, Recurrent, **_RANDOM),
    _run("set-resumed", SET, {**_EXPLORE, "allocation": "uniform"}, ConvNet, resumed_at=9, **_RANDOM),
    _run("set-two-processes", SET, _EXPLORE, processes=2, **_RANDOM),
]

_RIGL = [
    _run("rigl-erk", RigL, _EXPLORE, **_RANDOM),
    _run("rigl-cyclic", RigL, {**_EXPLORE, "sparsity": Cyclic(0.7, cycles=2, multiplier=2.0)}, ConvNet, **_RANDOM),
    _run("rigl-goes-on", RigL, {**_EXPLORE, "allocation": "uniform"}, _sparse(MLP)),
    _run(
        "rigl-itop-goes-on",
        RigL,
        {
            **_EXPLORE,
            "allocation": "uniform",
            "drop_fraction": Cosine(0.5, 0.005),
            "regrow": False,
            "update_replaces_step": False,
        },
        _sparse(ConvNet),
    ),
    _run("rigl-from-dense", RigL, {**_FROM_DENSE, "update_replaces_step": False}),
    _run("rigl-from-dense-min-active-conv", RigL, {**_FROM_DENSE, "min_active": 40}, ConvNet),
    _run("rigl-from-dense-lstm-adamw", RigL, _FROM_DENSE, _adamw(Recurrent), grows_under_adam=True),
    _run("rigl-from-dense-resumed", RigL, _FROM_DENSE, resumed_at=15),
    _run("rigl-from-dense-two-processes", RigL, _FROM_DENSE, processes=2),
]

_EAST_RUNS = [
    _run("east-all", EAST, {**_EAST, **_PARTS}, ResidualNet, **_RANDOM),
    _run("east-all-resumed", EAST, {**_EAST, **_PARTS}, ResidualNet, resumed_at=9, **_RANDOM),
    _run("east-all-two-processes", EAST, {**_EAST, **_PARTS}, ResidualNet, processes=2, **_RANDOM),
    _run("east-goes-on", EAST, {**_CYCLES_ALONE, "allocation": "uniform"}, _sparse(MLP)),
    _run(
        "east-phasing-goes-on",
        EAST,
        {**_CYCLES_ALONE, **_PARTS, "sharing": False, "allocation": "uniform"},
        _sparse(ResidualNet),
    ),
    _run("east-no-cycles-goes-on", EAST, {**_CYCLES_ALONE, "cycles": 0, "allocation": "er"}, _sparse(ConvNet)),
]

_DST = [
    _run("dst-alpha", DST, {"alpha": 0.03}),
    _run("dst-alpha-lstm-adamw", DST, {"alpha": 0.01}, _adamw(Recurrent)),
    _run("dst-sparsity-conv", DST, {"sparsity": 0.7}, ConvNet),
    _run("dst-resets", DST, {"alpha": 0.05, "reset_sparsity": 0.5}),
    _run("dst-bad-gradients", DST, {"alpha": 0.03}, _bad_batches(MLP)),
    _run(
        "dst-accumulated-clipped",
        DST,
        {"alpha": 0.03},
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ),
    _run("dst-sparsity-resumed", DST, {"sparsity": 0.7}, _adamw(MLP), resumed_at=9),
    _run("dst-two-processes", DST, {"alpha": 0.03}, ConvNet, processes=2),
]

_FIXED = [
    _run("fixed-given", FixedMask, {"masks": _given(MLP(), 0.3)}),
    _run("fixed-zeros-conv-adamw", FixedMask, {}, _sparse(_adamw(ConvNet), 0.3)),
    _run("fixed-lstm-resumed", FixedMask, {"masks": _given(Recurrent(), 0.3)}, Recurrent, resumed_at=9),
    _run("fixed-two-processes", FixedMask, {"masks": _given(MLP(), 0.3)}, _adamw(MLP), processes=2),
]

_TOGETHER = [
    Run(
        "dst-and-fggp",
        lambda: [make(DST, alpha=0.03, include=["network.0.*"]), make(FGGP, **_GRADUAL, exclude=["network.0.*"])],
    ),
    Run(
        "rigl-and-fixed",
        lambda: [
            make(RigL, **_FROM_DENSE, include=["network.0.*"]),
            make(FixedMask, masks=_given(MLP(), 0.5), include=["network.2.*", "network.5.*"]),
        ],
    ),
]

RUNS: Mapping[str, Run] = {
    run.name: run for run in (*_GMP, *_FGGP, *_SET, *_RIGL, *_EAST_RUNS, *_DST, *_FIXED, *_TOGETHER)
}
"""All recorded runs, by name."""
