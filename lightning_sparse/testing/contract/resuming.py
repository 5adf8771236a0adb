"""Killed and resumed is the same as never killed, and going on is going on."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateFinder

from lightning_sparse.testing.case import Case
from lightning_sparse.testing.contract.base import Contract, FirstLook, assert_same_masks, assert_same_states
from lightning_sparse.testing.spies import Kill, KilledError, ZeroWatch, masks_of
from lightning_sparse.testing.toys import OPTIMIZERS, StepIndexedToy, ToyModel
from lightning_sparse.testing.training import fit, make_trainer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path


__all__ = ["ResumeContract"]


class ResumeContract(Contract):
    """Killed and resumed is the same as never killed, and going on is going on."""

    @pytest.mark.parametrize("step", [1, 2, 5, 8, 11, 15])
    def test_resuming_at_any_step_equals_the_uninterrupted_run(self, case: Case, step: int, tmp_path: Path) -> None:
        """Bit for bit: weights, masks, counters, and all that the method remembers."""
        optimizer = OPTIMIZERS["adamw"]
        whole = case.make()
        expected = fit(whole, tmp_path, model=StepIndexedToy(optimizer=optimizer))
        path = tmp_path / "killed.ckpt"
        with pytest.raises(KilledError):
            fit(case.make(), tmp_path, Kill(step, path), model=StepIndexedToy(optimizer=optimizer))
        resumed = case.make()
        torch.manual_seed(12345)  # the global generator must not matter
        model = StepIndexedToy(optimizer=optimizer, seed=99)
        trainer = make_trainer(tmp_path, callbacks=[resumed])
        trainer.fit(model, ckpt_path=path)
        assert resumed.step == whole.step == 16
        assert_same_masks(masks_of(resumed), masks_of(whole))
        for name, value in expected.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
        assert_same_states(whole.state_dict(), resumed.state_dict())

    def test_going_on_with_the_same_module_keeps_its_masks(self, case: Case, tmp_path: Path) -> None:
        """A second ``fit`` begins with the masks of the first."""
        method = case.make()
        model = fit(method, tmp_path)
        masks, step = masks_of(method), method.step
        look = FirstLook(method)
        make_trainer(tmp_path, callbacks=[method, look], max_epochs=1).fit(model)
        assert_same_masks(look.masks, masks)
        assert method.step == step + 8

    def test_one_instance_trains_two_modules_alike(self, case: Case, tmp_path: Path) -> None:
        """Nothing of the first module is left in the callback."""
        method = case.make()
        first = fit(method, tmp_path)
        masks = masks_of(method)
        second = fit(method, tmp_path)
        assert_same_masks(masks_of(method), masks)
        for name, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[name]), name

    def test_the_learning_rate_finder_leaves_no_mark(self, case: Case, tmp_path: Path) -> None:
        """The steps that it takes on trial are taken back."""

        class Tunable(ToyModel):
            lr = 0.1

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=self.lr)

        method = case.make()
        watch = ZeroWatch(method)
        fit(method, tmp_path, watch, LearningRateFinder(num_training_steps=8), model=Tunable(), logger=False)
        assert method.step == 16
        assert watch.leaks == []
        assert method.registry.sparsity > 0.0

    def test_finetuning_callbacks_train_and_resume(self, case: Case, tmp_path: Path) -> None:
        """Parameter groups that come later are resumed too."""

        def once() -> Any:
            return case.make(), Thawing()

        class Thawing(BaseFinetuning):
            goes_on = False

            def freeze_before_training(self, pl_module: Any) -> None:
                self.freeze(pl_module.network[0])

            def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
                if epoch == 1:
                    self.unfreeze_and_add_param_group(pl_module.network[0], optimizer, lr=0.01)

            def load_state_dict(self, state_dict: Any) -> None:
                super().load_state_dict(state_dict)
                self.goes_on = True

            def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
                super().on_fit_start(trainer, pl_module)
                if self.goes_on:  # Lightning leaves frozen what had thawed, if training goes on within an epoch
                    self.make_trainable(pl_module.network[0])

        def trainable(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1)

        path = tmp_path / "killed.ckpt"
        method, finetuning = once()
        with _told_of_a_layer_that_thaws(case):
            fit(method, tmp_path, finetuning, model=StepIndexedToy(optimizer=trainable))
        with pytest.raises(KilledError):
            fit(once()[0], tmp_path, once()[1], Kill(12, path), model=StepIndexedToy(optimizer=trainable))
        resumed, finetuning = once()
        trainer = make_trainer(tmp_path, callbacks=[resumed, finetuning])
        trainer.fit(StepIndexedToy(optimizer=trainable, seed=99), ckpt_path=path)
        assert masks_of(resumed)
        assert_same_masks(masks_of(resumed), {name: masks_of(method)[name] for name in masks_of(resumed)})

    def test_a_layer_unfrozen_while_training_is_masked_or_warned_of(self, case: Case, tmp_path: Path) -> None:
        """A layer that was frozen when masks were made gets the mask it has once it can be trained, or a warning."""

        class Thaw(L.Callback):
            def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                pl_module.get_parameter("network.0.weight").requires_grad_(trainer.current_epoch == 1)

        model = ToyModel()
        model.get_parameter("network.0.weight").requires_grad_(False)
        method = case.make()
        with _told_of_a_layer_that_thaws(case):
            fit(method, tmp_path, Thaw(), model=model)
        assert ("network.0.weight" in method.registry) == case.masks_what_thaws

    def test_going_on_after_validating_a_checkpoint_takes_its_masks(self, case: Case, tmp_path: Path) -> None:
        """Weights that ``validate`` loads bring their masks."""
        method = case.make()
        path = tmp_path / "early.ckpt"

        class Save(L.Callback):
            def on_train_batch_end(
                self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                if trainer.global_step == 6:
                    trainer.save_checkpoint(path)
                    saved.update(masks_of(method))

        saved: dict[str, torch.Tensor] = {}
        model = fit(method, tmp_path, Save())
        make_trainer(tmp_path, callbacks=[method]).validate(model, ckpt_path=path, verbose=False)
        look = FirstLook(method)
        make_trainer(tmp_path, callbacks=[method, look], max_epochs=2).fit(model)
        assert_same_masks(look.masks, saved)


def _told_of_a_layer_that_thaws(case: Case) -> AbstractContextManager[Any]:
    if case.masks_what_thaws:
        return nullcontext()
    return pytest.warns(UserWarning, match=r"frozen when masks were made, so left dense: network\.0\.weight")
