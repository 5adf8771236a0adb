"""Bad gradients change no mask, skipped steps are no steps, accumulated gradients are a mean."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_sparse.testing.case import Case
from lightning_sparse.testing.contract.base import Contract, assert_same_masks, moving_only
from lightning_sparse.testing.spies import MaskWatch, ZeroWatch, masks_of
from lightning_sparse.testing.toys import NonFiniteGradients, ToyModel
from lightning_sparse.testing.training import fit

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_sparse.methods import SparseMethod

__all__ = ["StepContract"]


class _MasksAfterEachBatch(L.Callback):
    """Copies the masks at the end of every batch."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method
        self.masks: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look."""
        self.masks.append(masks_of(self.method))


class _Overflow(ToyModel):
    """Losses that overflow at the given batches, as they do under a GradScaler in float16."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The toy's loss; infinite at the first three batches of each epoch."""
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx < 3 else loss


class StepContract(Contract):
    """Bad gradients change no mask, skipped steps are no steps, accumulated gradients are a mean."""

    @moving_only
    def test_gradients_that_are_not_finite_change_no_mask(self, case: Case, tmp_path: Path) -> None:
        """The update waits until they are finite."""
        method = case.make()
        after = _MasksAfterEachBatch(method)
        fit(method, tmp_path, after, model=NonFiniteGradients(range(3, 8)))
        for batch in range(3, 8):
            assert_same_masks(after.masks[batch], after.masks[2])
        assert any(not torch.equal(mask, after.masks[2][name]) for name, mask in after.masks[8].items())
        assert method.registry.sparsity >= case.sparsity

    @moving_only
    def test_a_hundred_steps_of_nan_end_the_training_with_a_sentence(self, case: Case, tmp_path: Path) -> None:
        """It does not wait forever."""
        model = NonFiniteGradients(range(4, 1000))
        with pytest.raises(RuntimeError, match=r"network\.0\.weight.* inf or NaN at 100 steps in a row"):
            fit(case.make(), tmp_path, model=model, max_epochs=20)

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_step_that_the_grad_scaler_skips_is_no_step(self, case: Case, fused: bool, tmp_path: Path) -> None:
        """The clock stands still, and an update that was due comes at the next step."""
        # torch's fused SGD goes on from momentum that a skipped first step has left uninitialised.
        adamw = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0, fused=True)
        optimizer = adamw if fused else partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        method = case.make()
        watch, zeros = MaskWatch(method), ZeroWatch(method)
        precision = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
        fit(method, tmp_path, watch, zeros, model=_Overflow(optimizer), plugins=[precision], max_epochs=3)
        assert method.step == 24 - 9
        assert zeros.leaks == []
        if case.is_gradual:  # the first update may find nothing to prune
            times = method.run.timetable
            assert times is not None
            due = [step for step in range(method.step) if times.latest(step) == step]
            assert [seen["step"] for seen in watch.history if seen["updates"]][-5:] == due[-5:]

    def test_accumulated_batches_choose_the_masks_of_one_large_batch(self, case: Case, tmp_path: Path) -> None:
        """Scores see the gradient that the optimizer sees."""
        large, accumulated = case.make(), case.make()
        fit(large, tmp_path, model=ToyModel(batch_size=16), precision="64-true", max_epochs=4)
        fit(
            accumulated,
            tmp_path,
            model=ToyModel(batch_size=8),
            precision="64-true",
            max_epochs=4,
            accumulate_grad_batches=2,
        )
        assert accumulated.step == 16
        assert_same_masks(masks_of(accumulated), masks_of(large))
