"""Tiny models, quiet trainers and two-process fits shared by the tests: those of :mod:`lightning_sparse.testing`."""

from __future__ import annotations

from lightning_sparse.testing import (
    ConvToy,
    DumpRank,
    RankDump,
    SeedPerRank,
    ToyModel,
    fit_two_processes,
    make_trainer,
)

__all__ = ["ConvToy", "DumpRank", "RankDump", "SeedPerRank", "ToyModel", "fit_two_processes", "make_trainer"]
