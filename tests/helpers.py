"""Tiny models, quiet trainers and two-process fits shared by the tests: those of :mod:`lightning_sparse.testing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from lightning_sparse.masks import MaskGroup, MaskRegistry
from lightning_sparse.methods import SparseMethod
from lightning_sparse.methods.run import Beginning, LivePlan, Run
from lightning_sparse.testing import (
    ConvToy,
    DumpRank,
    RankDump,
    SeedPerRank,
    ToyModel,
    fit_two_processes,
    make_trainer,
)

__all__ = [
    "ConvToy",
    "DumpRank",
    "RankDump",
    "SeedPerRank",
    "ToyModel",
    "fit_two_processes",
    "make_trainer",
    "within_training",
]

Method = TypeVar("Method", bound=SparseMethod)


def within_training(method: Method, groups: Sequence[MaskGroup], *, step: int = 100, total_steps: int = 100) -> Method:
    """The method as it stands after ``step`` steps of a training of these weights, without a Trainer."""
    registry = MaskRegistry()
    registry._weights = {weight.name: weight for group in groups for weight in group}
    method.step = step
    method.last_run = Run(
        trainer=lambda: None,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        module=lambda: None,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        registry=registry,
        groups=list(groups),
        plan=LivePlan([], []),
        beginning=Beginning(),
        origin=0,
        began_at=0,
        total_steps=total_steps,
    )
    method.last_run.timetable = method.timetable(total_steps)
    method.prepare()
    return method
