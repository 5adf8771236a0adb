"""Budgets are exact integers, and a layer that collapses is seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_sparse.functional import num_active
from lightning_sparse.testing.case import Case
from lightning_sparse.testing.contract.base import Contract, gradual_only
from lightning_sparse.testing.spies import Kill, KilledError, MaskWatch
from lightning_sparse.testing.toys import StepIndexedToy, ToyModel, TwoOptimizers
from lightning_sparse.testing.training import fit, make_trainer

if TYPE_CHECKING:
    from pathlib import Path


__all__ = ["BudgetContract"]


class BudgetContract(Contract):
    """Budgets are exact integers, and a layer that collapses is seen."""

    @gradual_only
    def test_after_every_update_the_active_count_is_the_schedules(self, case: Case, tmp_path: Path) -> None:
        """After an update ⌊(1 − s) · N⌋ weights are active, s being what the schedule asks for."""
        method = case.make()
        watch = MaskWatch(method)
        fit(method, tmp_path, watch)
        assert len(watch.history) >= 5
        for seen in watch.history:
            total = sum(mask.numel() for mask in seen["masks"].values())
            active = sum(int(mask.sum()) for mask in seen["masks"].values())
            assert active == num_active(seen["target"], total)

    def test_each_layer_holds_what_its_budget_says(self, case: Case, tmp_path: Path) -> None:
        """Masks, counts and budgets of each layer agree."""
        method = case.make()
        fit(method, tmp_path)
        for weight in method.weights:
            assert int(weight.mask.sum()) == weight.num_active == weight.budget
            assert method.target_sparsity(weight.name) == pytest.approx(weight.sparsity)

    @gradual_only
    def test_a_budget_that_cannot_be_met_states_the_largest_feasible_sparsity(self, case: Case, tmp_path: Path) -> None:
        """The error names a sparsity that could be reached, and no weight has changed."""
        model = ToyModel()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(MisconfigurationException, match=r"largest feasible sparsity is 0\.\d+"):
            fit(case.make(sparsity=0.999, min_active=5), tmp_path, model=model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    @gradual_only
    def test_training_with_no_sparsity_is_training_without_the_callback(self, case: Case, tmp_path: Path) -> None:
        """At sparsity 0 every weight is, to the last bit, what plain training makes of it."""
        model = fit(case.make(sparsity=0.0), tmp_path)
        plain = ToyModel()
        make_trainer(tmp_path).fit(plain)
        for (name, value), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
            assert torch.equal(value, expected), name

    @gradual_only
    def test_two_optimizers_and_max_steps_reach_the_final_sparsity(self, case: Case, tmp_path: Path) -> None:
        """The clock counts batches, however many optimizers step in one."""
        method = case.make(update_every=1, start=0, stop=0.8)
        fit(method, tmp_path, model=TwoOptimizers(), max_steps=20, max_epochs=-1)
        assert method.step == 10
        for group in method.groups:
            assert group.num_active == num_active(method.target_sparsity(), group.numel)

    @gradual_only
    def test_resuming_for_a_shorter_training_still_reaches_the_final_sparsity(self, case: Case, tmp_path: Path) -> None:
        """A resumed training may have another length than was planned."""
        path = tmp_path / "killed.ckpt"
        longer = {"update_every": 1, "start": 0, "stop": 0.8}
        with pytest.raises(KilledError):
            fit(case.make(**longer), tmp_path, Kill(20, path), model=StepIndexedToy(), max_epochs=4)
        resumed = case.make(**longer)
        with pytest.warns(UserWarning, match=r"resumed with 24 steps of training \(was 32\)"):
            make_trainer(tmp_path, callbacks=[resumed], max_epochs=3).fit(StepIndexedToy(), ckpt_path=path)
        assert resumed.registry.num_active == num_active(resumed.target_sparsity(), resumed.registry.numel)

    @gradual_only
    def test_training_that_ends_early_says_what_sparsity_was_due(self, case: Case, tmp_path: Path) -> None:
        """A training that is too short for its updates warns."""
        with pytest.warns(UserWarning, match=r"the last updates will not happen|training ended at step"):
            fit(case.make(), tmp_path, max_epochs=1)

    @gradual_only
    def test_a_layer_without_active_weights_is_named(self, case: Case, tmp_path: Path) -> None:
        """Layer collapse warns."""
        model = ToyModel()
        with torch.no_grad():
            model.get_parameter("network.4.weight").mul_(1e-6)
        with pytest.warns(UserWarning, match=r"network\.\d\.weight has no active weight left"):
            fit(case.make(sparsity=0.99, allocation="global", min_active=0), tmp_path, model=model)

    @gradual_only
    def test_min_active_forbids_the_collapse(self, case: Case, tmp_path: Path) -> None:
        """Every layer keeps ``min_active`` weights, whatever the ranking says."""
        model = ToyModel()
        with torch.no_grad():
            model.get_parameter("network.4.weight").mul_(1e-6)
        method = case.make(sparsity=0.97, allocation="global", min_active=2)
        fit(method, tmp_path, model=model)
        assert all(weight.num_active >= 2 for weight in method.weights)
