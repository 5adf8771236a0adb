"""Several processes agree, with each other and with one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from lightning_sparse.testing.case import Case
from lightning_sparse.testing.contract.base import Contract, assert_same_states
from lightning_sparse.testing.spies import Kill
from lightning_sparse.testing.toys import OPTIMIZERS, StepIndexedToy, ToyModel
from lightning_sparse.testing.training import DumpRank, fit, fit_two_processes, make_trainer

if TYPE_CHECKING:
    from pathlib import Path


__all__ = ["ProcessContract"]


class ProcessContract(Contract):
    """Several processes agree, with each other and with one."""

    def test_two_processes_choose_the_masks_of_one_with_twice_the_batch(self, case: Case, tmp_path: Path) -> None:
        """Scores are made of the mean gradient, never of the mean of what was made of gradients."""
        alone = case.make()
        fit(alone, tmp_path, model=StepIndexedToy(batch_size=16), precision="64-true", max_epochs=4)
        dumps = fit_two_processes(
            StepIndexedToy(batch_size=8), tmp_path, [case.make()], precision="64-true", max_epochs=4
        )
        expected = alone.state_dict()["masks"]
        for dump in dumps:
            state = dump["callbacks"][alone.state_key]
            assert state["step"] == 16
            for name, packed in state["masks"].items():
                assert torch.equal(packed["bits"], expected[name]["bits"]), name

    def test_two_that_were_made_alike_have_the_same_settings(self, case: Case, tmp_path: Path) -> None:
        """Processes compare them as training begins: they say nothing of where an object lies in memory."""
        assert case.make().settings() == case.make().settings()

    def test_ranks_end_with_the_same_weights_and_masks(self, case: Case, tmp_path: Path) -> None:
        """Whatever state their own random generators are in."""
        first, second = fit_two_processes(ToyModel(OPTIMIZERS["adamw"]), tmp_path, [case.make()], max_epochs=3)
        for name, value in first["weights"].items():
            assert torch.equal(value, second["weights"][name]), name
        for name, packed in next(iter(first["callbacks"].values()))["masks"].items():
            assert torch.equal(packed["bits"], next(iter(second["callbacks"].values()))["masks"][name]["bits"]), name

    def test_resuming_on_two_processes_equals_the_uninterrupted_run(self, case: Case, tmp_path: Path) -> None:
        """Killed and resumed equals never killed, on two processes."""
        whole = fit_two_processes(StepIndexedToy(batch_size=4), tmp_path, [case.make()], max_epochs=2)[0]
        path = tmp_path / "killed.ckpt"
        with pytest.raises(Exception, match=r"KilledError"):
            fit_two_processes(StepIndexedToy(batch_size=4), tmp_path, [case.make(), Kill(5, path)], max_epochs=2)
        model = StepIndexedToy(batch_size=4, seed=99)
        resumed = case.make()

        trainer = make_trainer(tmp_path, strategy="ddp_fork", devices=2, callbacks=[resumed, DumpRank(tmp_path)])
        trainer.fit(model, ckpt_path=path)
        dump = torch.load(tmp_path / "rank0.pt", weights_only=True)
        for name, value in whole["weights"].items():
            assert torch.equal(value, dump["weights"][name]), name
        assert_same_states(whole["callbacks"], dump["callbacks"])
