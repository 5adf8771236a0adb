"""Whoever picks the best checkpoint by a loss is told when it is a denser one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sparse import FGGP, GMP, RigL, SparseMethod
from tests.helpers import ToyModel, make_trainer

if TYPE_CHECKING:
    from pathlib import Path


class Graded(ToyModel):
    """Its validation loss is what it was told, epoch by epoch."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses = losses

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("graded", self.losses[self.current_epoch])


def fit(method: SparseMethod, losses: list[float], root: Path, *others: L.Callback, **settings: Any) -> L.Trainer:
    best = ModelCheckpoint(root, monitor="graded", **settings)
    trainer = make_trainer(root, max_epochs=4, callbacks=[method, *others, best], enable_checkpointing=True)
    trainer.fit(Graded(losses))
    return trainer


@pytest.mark.parametrize("on_train_epoch_end", [False, True])
def test_a_best_checkpoint_from_before_the_end_of_pruning_is_named(on_train_epoch_end: bool, tmp_path: Path) -> None:
    method = GMP(0.9, update_every=1, stop=0.7)
    sentence = r"the best checkpoint by graded, epoch=1.*\.ckpt, has sparsity 0\.\d+, and training ended at 0\.90"
    with pytest.warns(UserWarning, match=sentence):
        fit(method, [0.5, 0.1, 0.7, 0.9], tmp_path, save_on_train_epoch_end=on_train_epoch_end)


@pytest.mark.filterwarnings("error:.*the best checkpoint")
@pytest.mark.parametrize(
    ("method", "losses"),
    [(GMP(0.9, update_every=1, stop=0.7), [0.9, 0.8, 0.7, 0.1]), (RigL(0.9, update_every=2), [0.1, 0.8, 0.7, 0.9])],
    ids=["the last is the best", "the sparsity was there from the start"],
)
def test_a_best_checkpoint_as_sparse_as_the_end_is_not(
    method: SparseMethod, losses: list[float], tmp_path: Path
) -> None:
    fit(method, losses, tmp_path)


def test_a_checkpoint_that_cannot_be_read_safely_is_passed_over(tmp_path: Path) -> None:
    class WithCode(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            best = trainer.checkpoint_callback
            assert isinstance(best, ModelCheckpoint)
            if best.best_model_path:
                torch.save({"callbacks": object}, best.best_model_path)

    fit(FGGP(0.9, update_every=1, stop=0.7), [0.5, 0.1, 0.7, 0.9], tmp_path, WithCode())
