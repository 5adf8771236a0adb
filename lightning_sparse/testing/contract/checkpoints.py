"""Checkpoints are the dense module's; one that lacks something is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_sparse.testing.case import Case
from lightning_sparse.testing.contract.base import Contract, assert_same_masks, cut
from lightning_sparse.testing.spies import Kill, KilledError, masks_of
from lightning_sparse.testing.toys import ToyModel
from lightning_sparse.testing.training import fit, make_trainer

if TYPE_CHECKING:
    from pathlib import Path


__all__ = ["CheckpointContract"]


def _reshape(state: dict[str, Any]) -> None:
    mask = next(iter(state["masks"].values()))
    mask["shape"] = [*mask["shape"][::-1]]


def _forget_one(state: dict[str, Any]) -> None:
    state["masks"].pop(next(reversed(state["masks"])))


def _forget_clock(state: dict[str, Any]) -> None:
    del state["step"]


class CheckpointContract(Contract):
    """Checkpoints are the dense module's; one that lacks something is refused."""

    def test_the_checkpoint_is_that_of_the_dense_module(self, case: Case, tmp_path: Path) -> None:
        """``state_dict`` has the dense keys, and ``load_from_checkpoint`` needs nothing else."""
        method = case.make()
        model = fit(method, tmp_path, ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert checkpoint["state_dict"].keys() == ToyModel().state_dict().keys()
        loaded = ToyModel.load_from_checkpoint(tmp_path / "last.ckpt")
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name

    def test_a_checkpoint_without_masks_is_refused(self, case: Case, tmp_path: Path) -> None:
        """Training never goes on dense in silence."""
        path = tmp_path / "dense.ckpt"
        trainer = make_trainer(tmp_path)
        trainer.fit(ToyModel())
        trainer.save_checkpoint(path)
        with pytest.raises(MisconfigurationException, match=r"holds no (masks|Dynamic ReLUs) .* load_from_checkpoint"):
            make_trainer(tmp_path, callbacks=[case.make()], max_epochs=3).fit(ToyModel(), ckpt_path=path)

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (cut, "cannot be read.*cut short"),
            (_reshape, "has shape"),
            (_forget_one, "holds no mask of"),
            (_forget_clock, "cut short: it lacks step"),
        ],
    )
    def test_a_damaged_checkpoint_is_refused(self, case: Case, damage: Any, sentence: str, tmp_path: Path) -> None:
        """With a sentence that says what is wrong."""
        path = tmp_path / "damaged.ckpt"
        with pytest.raises(KilledError):
            fit(case.make(), tmp_path, Kill(9, path))
        checkpoint = torch.load(path, weights_only=True)
        damage(next(iter(checkpoint["callbacks"].values())))
        torch.save(checkpoint, path)
        with pytest.raises(MisconfigurationException, match=sentence):
            make_trainer(tmp_path, callbacks=[case.make()]).fit(ToyModel(), ckpt_path=path)

    def test_a_refused_resume_takes_nothing_from_a_trained_module(self, case: Case, tmp_path: Path) -> None:
        """Masks and clock stay as they were."""
        path = tmp_path / "damaged.ckpt"
        with pytest.raises(KilledError):
            fit(case.make(), tmp_path, Kill(9, path))
        checkpoint = torch.load(path, weights_only=True)
        cut(next(iter(checkpoint["callbacks"].values())))
        torch.save(checkpoint, path)
        method = case.make()
        model = fit(method, tmp_path)
        masks = masks_of(method)
        with pytest.raises(MisconfigurationException):
            make_trainer(tmp_path, callbacks=[method], max_epochs=3).fit(model, ckpt_path=path)
        assert_same_masks(masks_of(method), masks)
        assert method.step == 16

    def test_a_sparse_checkpoint_validates_in_a_trainer_with_the_callback(self, case: Case, tmp_path: Path) -> None:
        """Validation needs no masks."""
        path = tmp_path / "killed.ckpt"
        with pytest.raises(KilledError):
            fit(case.make(), tmp_path, Kill(9, path))
        method = case.make()
        make_trainer(tmp_path, callbacks=[method]).validate(ToyModel(), ckpt_path=path, verbose=False)
        assert not method.registry

    def test_checkpoints_and_early_stopping_can_monitor_sparsity(self, case: Case, tmp_path: Path) -> None:
        """``sparsity`` is logged in time for them."""
        method = case.make()
        checkpoint = ModelCheckpoint(tmp_path, monitor="sparsity", mode="max")
        stopping = EarlyStopping("sparsity", stopping_threshold=case.sparsity, mode="max")
        fit(method, tmp_path, checkpoint, stopping, enable_checkpointing=True, min_epochs=2)
        assert checkpoint.best_model_score is not None
        assert float(checkpoint.best_model_score) == pytest.approx(method.registry.sparsity)
        assert stopping.stopped_epoch == 1

    def test_metrics_are_those_of_the_weights_that_are_saved(self, case: Case, tmp_path: Path) -> None:
        """Masks do not change between validation and checkpoint."""
        checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{val_loss:.9f}")
        fit(case.make(), tmp_path, checkpoint, enable_checkpointing=True)
        for path in tmp_path.glob("*.ckpt"):
            recorded = float(path.stem.split("=")[1].split("-")[0])
            model = ToyModel.load_from_checkpoint(path)
            (metrics,) = make_trainer(tmp_path).validate(model, verbose=False)
            assert metrics["val_loss"] == pytest.approx(recorded, abs=1e-7)
