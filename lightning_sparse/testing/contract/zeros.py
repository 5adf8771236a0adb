"""A pruned weight is exactly zero, everywhere; what changes starts at zero, with cleared moments."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

from lightning_sparse.functional import num_active, unpack
from lightning_sparse.masks.moments import is_second_moment
from lightning_sparse.testing.case import Case
from lightning_sparse.testing.contract.base import Contract, hard_only
from lightning_sparse.testing.spies import MaskWatch, ZeroWatch
from lightning_sparse.testing.toys import OPTIMIZERS, ConvToy, ToyModel, TwoOptimizers
from lightning_sparse.testing.training import fit, make_trainer

if TYPE_CHECKING:
    from pathlib import Path


__all__ = ["ZeroContract"]


class ZeroContract(Contract):
    """A pruned weight is exactly zero, everywhere; what changes starts at zero, with cleared moments."""

    @pytest.mark.filterwarnings("ignore:.* no active weight left")  # some optimizers shrink a whole layer of the toy
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_pruned_weights_are_zero_in_every_forward_and_checkpoint(
        self, case: Case, optimizer: str, tmp_path: Path
    ) -> None:
        """With momentum, weight decay and clipping, under each optimizer; or the optimizer is refused."""
        method = case.make()
        watch = ZeroWatch(method)
        refusal = case.refusal(optimizer)
        if refusal is not None:
            with pytest.raises(MisconfigurationException, match=refusal):
                fit(method, tmp_path, model=ToyModel(OPTIMIZERS[optimizer]))
            return
        fit(
            method,
            tmp_path,
            watch,
            ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1),
            model=ToyModel(OPTIMIZERS[optimizer]),
            enable_checkpointing=True,
            gradient_clip_val=0.5,
        )
        assert watch.looks > 0
        assert watch.leaks == []
        assert method.registry.sparsity >= case.sparsity_under.get(optimizer, case.sparsity)

    def test_pruned_weights_are_zero_in_convolutions_in_channels_last(self, case: Case, tmp_path: Path) -> None:
        """The memory format of a weight does not matter."""
        method = case.make(**case.conv_arguments)
        watch = ZeroWatch(method)
        fit(method, tmp_path, watch, model=ConvToy().to(memory_format=torch.channels_last))
        assert watch.leaks == []
        assert method.registry.sparsity >= case.sparsity

    @pytest.mark.parametrize("method_is_first", [True, False])
    @pytest.mark.parametrize("average", [WeightAveraging, partial(EMAWeightAveraging, decay=0.8)])
    def test_averaged_weights_are_sparse_too(
        self, case: Case, average: Any, method_is_first: bool, tmp_path: Path
    ) -> None:
        """Averages that a callback keeps are masked, on either side of the method."""
        method = case.make()
        averaging = average()
        callbacks = [method, averaging] if method_is_first else [averaging, method]
        checkpoint = ModelCheckpoint(tmp_path, save_last=True)
        model = ToyModel()
        make_trainer(tmp_path, callbacks=[*callbacks, checkpoint], enable_checkpointing=True).fit(model)
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        for weight in method.weights:
            assert weight.parameter[~weight.mask].count_nonzero() == 0
            assert saved[weight.name][~weight.mask].count_nonzero() == 0
            assert weight.parameter[weight.mask].count_nonzero() > 0

    def test_averaged_checkpoints_within_an_epoch_hold_no_pruned_weight(self, case: Case, tmp_path: Path) -> None:
        """A checkpoint of averaged weights is masked whenever it is written."""
        method = case.make()
        averaging = EMAWeightAveraging(decay=0.8)
        watch = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
        make_trainer(tmp_path, callbacks=[method, averaging, watch], enable_checkpointing=True).fit(ToyModel())
        paths = sorted(tmp_path.glob("*.ckpt"))
        assert len(paths) >= 5
        for path in paths:
            checkpoint = torch.load(path, weights_only=True)
            (masks,) = (state["masks"] for state in checkpoint["callbacks"].values() if "masks" in state)
            for name, packed in masks.items():
                mask = unpack(packed["bits"], tuple(packed["shape"]))
                assert checkpoint["state_dict"][name][~mask].count_nonzero() == 0, f"{path.name}: {name}"

    def test_stochastic_weight_averaging_ends_sparse(self, case: Case, tmp_path: Path) -> None:
        """The average of dense and sparse weights is sparse in the end."""
        method = case.make()
        fit(method, tmp_path, StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), max_epochs=3)
        for weight in method.weights:
            assert weight.parameter[~weight.mask].count_nonzero() == 0

    def test_two_optimizers_stepped_by_hand(self, case: Case, tmp_path: Path) -> None:
        """Manual optimization: each optimizer has its share of the weights and of the budget."""
        method = case.make()
        watch = ZeroWatch(method)
        fit(method, tmp_path, watch, model=TwoOptimizers())
        assert method.step == 16
        assert len(method.groups) == 2
        assert watch.leaks == []
        if case.is_gradual:
            for group in method.groups:
                assert group.num_active == num_active(method.target_sparsity(), group.numel)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_other_precisions_keep_budgets_and_zeros(self, case: Case, precision: Any, tmp_path: Path) -> None:
        """In bfloat16 and float64 too."""
        method = case.make()
        watch = ZeroWatch(method)
        fit(method, tmp_path, watch, precision=precision)
        assert watch.leaks == []
        assert method.registry.sparsity >= case.sparsity

    @hard_only
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_weights_just_pruned_or_grown_are_zero_and_forgotten(
        self, case: Case, optimizer: str, tmp_path: Path
    ) -> None:
        """Moments of whatever has changed are zero, but for the second ones of grown weights; others are left alone."""
        method = case.make()
        watch = MaskWatch(method)
        fit(method, tmp_path, watch, model=ToyModel(OPTIMIZERS[optimizer]))
        some_changed = 0
        for before, after in zip(watch.history, watch.history[1:], strict=False):
            for name, mask in after["masks"].items():
                changed = mask ^ before["masks"][name]
                some_changed += int(changed.sum())
                assert after["weights"][name][changed].count_nonzero() == 0
                assert after["grads"][name][~mask].count_nonzero() == 0
                assert len(after["moments"][name]) > 0
                for key, moment in after["moments"][name].items():
                    forgotten = changed & ~mask if is_second_moment(key) else changed
                    assert moment[forgotten].count_nonzero() == 0
                    assert moment[mask & ~changed].count_nonzero() > 0
        assert some_changed > 0
