"""Quiet trainings of a few steps, in one process or in two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import lightning as L
import torch
from torch import Tensor

from lightning_sparse.testing.toys import ToyModel
from lightning_sparse.trainer import callbacks_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lightning_sparse.methods import SparseMethod

__all__ = ["DumpRank", "RankDump", "SeedPerRank", "fit", "fit_two_processes", "make_trainer"]


def make_trainer(root: Path, **overrides: Any) -> L.Trainer:
    """A silent CPU trainer of two epochs that writes only below ``root``; ``overrides`` are Trainer arguments."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "default_root_dir": root,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**(settings | overrides))


def fit(method: SparseMethod, root: Path, *others: L.Callback, model: Any = None, **overrides: Any) -> Any:
    """Train a toy for sixteen steps with ``method`` first among the callbacks."""
    model = ToyModel() if model is None else model
    make_trainer(root, callbacks=[method, *others], **overrides).fit(model)
    return model


class RankDump(TypedDict):
    """What one process leaves behind at the end of training."""

    weights: dict[str, Tensor]
    callbacks: dict[str, dict[str, Any]]


class DumpRank(L.Callback):
    """Saves a :class:`RankDump` to ``root/rank{r}.pt`` at the end of training; a forked child returns nothing else."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the module's weights and the state of every callback that has one, by its ``state_key``."""
        states = {callback.state_key: callback.state_dict() for callback in callbacks_of(trainer)}
        dump: RankDump = {
            "weights": pl_module.state_dict(),
            "callbacks": {key: state for key, state in states.items() if state},
        }
        torch.save(dump, self.root / f"rank{trainer.global_rank}.pt")


class SeedPerRank(L.Callback):
    """Gives every rank another random state, so that equal masks cannot come from equal global generators."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Seed torch's global generator by the rank."""
        torch.manual_seed(1000 + trainer.global_rank)


def fit_two_processes(
    model: L.LightningModule, root: Path, callbacks: Sequence[L.Callback] = (), **overrides: Any
) -> tuple[RankDump, RankDump]:
    """Fit in two forked processes (DDP over gloo) and return what each rank dumped; errors of a rank are raised here.

    Callbacks live on in the children alone: read ``dump["callbacks"][callback.state_key]``, not their attributes.
    """
    make_trainer(
        root, strategy="ddp_fork", devices=2, callbacks=[SeedPerRank(), *callbacks, DumpRank(root)], **overrides
    ).fit(model)
    first, second = (torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second
