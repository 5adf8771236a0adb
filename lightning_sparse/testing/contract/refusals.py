"""What cannot work is refused, with a sentence that says what to do instead."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_sparse.masks import MaskRegistry
from lightning_sparse.testing.case import Case
from lightning_sparse.testing.contract.base import Contract, gradual_only
from lightning_sparse.testing.toys import ToyModel, TwoOptimizers
from lightning_sparse.testing.training import fit, make_trainer

if TYPE_CHECKING:
    from pathlib import Path


__all__ = ["RefusalContract"]


class FSDPStrategy(SingleDeviceStrategy):
    """Bears the name of a strategy that shards weights."""


class _Endless(torch.utils.data.IterableDataset[Any]):
    """Data without a length."""

    def __iter__(self) -> Any:
        return iter(ToyModel().train_data)


class RefusalContract(Contract):
    """What cannot work is refused, with a sentence that says what to do instead."""

    def test_a_strategy_that_shards_weights_is_refused(self, case: Case, tmp_path: Path) -> None:
        """FSDP, for example."""
        with pytest.raises(MisconfigurationException, match=r"does not support FSDPStrategy.*strategy='ddp'"):
            fit(case.make(), tmp_path, strategy=FSDPStrategy(torch.device("cpu"), accelerator=None))

    def test_lbfgs_is_refused(self, case: Case, tmp_path: Path) -> None:
        """It evaluates the loss many times a step."""
        with pytest.raises(MisconfigurationException, match=r"LBFGS.*Use SGD"):
            fit(case.make(), tmp_path, model=ToyModel(torch.optim.LBFGS))

    def test_an_optimizer_that_lacks_a_masked_parameter_is_refused(self, case: Case, tmp_path: Path) -> None:
        """Nobody would step the weight."""

        def all_but_the_first(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(list(parameters)[1:], lr=0.1)

        with pytest.raises(MisconfigurationException, match=r"No optimizer steps network\.0\.weight.*exclude="):
            fit(case.make(), tmp_path, model=ToyModel(all_but_the_first))

    def test_an_optimizer_stepped_behind_lightnings_back_is_refused(self, case: Case, tmp_path: Path) -> None:
        """Its steps would not be seen."""

        class Raw(TwoOptimizers):
            def optimizers(self, use_pl_optimizer: bool = True) -> Any:
                return super().optimizers(use_pl_optimizer=False)

        with pytest.raises(MisconfigurationException, match=r"stepped without Lightning.*self\.optimizers\(\)"):
            fit(case.make(), tmp_path, model=Raw())

    def test_one_optimizer_of_two_stepped_behind_lightnings_back_is_refused(self, case: Case, tmp_path: Path) -> None:
        """One is enough."""

        class HalfRaw(TwoOptimizers):
            def optimizers(self, use_pl_optimizer: bool = True) -> Any:
                first, second = cast("Any", super().optimizers())
                return [first, second.optimizer]

        with pytest.raises(MisconfigurationException, match=r"AdamW stepped without Lightning"):
            fit(case.make(), tmp_path, model=HalfRaw())

    @pytest.mark.filterwarnings("ignore:.* training ended at [sb]")  # at its first step
    def test_an_optimizer_that_moves_weights_without_a_step_is_named(self, case: Case, tmp_path: Path) -> None:
        """A warning, since it cannot be known before."""

        class Sharpness(torch.optim.SGD):
            def second_step(self) -> None:
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.data.sub_(parameter.grad, alpha=0.01)

        class Model(ToyModel):
            def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
                optimizer = cast("Any", self.optimizers())
                optimizer.zero_grad()
                self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.optimizer.second_step()

        model = Model(partial(Sharpness, lr=0.1))
        model.automatic_optimization = False
        with pytest.warns(UserWarning, match="has not stepped through Lightning"):
            fit(case.make(), tmp_path, model=model)

    def test_two_methods_may_not_claim_one_weight(self, case: Case, tmp_path: Path) -> None:
        """The error names the weight."""
        with pytest.raises(MisconfigurationException, match=r"network\.0\.weight.*already masks.*exclude="):
            fit(case.make(include=["network.0.*"]), tmp_path, case.make())

    def test_two_methods_divide_a_network(self, case: Case, tmp_path: Path) -> None:
        """By ``include`` and ``exclude``, in one registry."""
        first, second = case.make(include=["network.0.*"]), case.make(exclude=["network.0.*"])
        fit(first, tmp_path, second)
        assert first.registry is second.registry
        assert list(first.registry) == ["network.0.weight", "network.2.weight", "network.4.weight"]
        assert [weight.name for weight in second.weights] == ["network.2.weight", "network.4.weight"]

    def test_patterns_that_match_nothing_are_refused(self, case: Case, tmp_path: Path) -> None:
        """The error names what there is."""
        with pytest.raises(MisconfigurationException, match=r"include='netwrk\.0\.\*' matches no .*network\.0"):
            fit(case.make(include=["netwrk.0.*"]), tmp_path)

    def test_a_module_with_nothing_to_mask_is_refused(self, case: Case, tmp_path: Path) -> None:
        """It would train dense."""
        with pytest.raises(MisconfigurationException, match="has no weight to mask"):
            fit(case.make(exclude=["Linear"]), tmp_path)

    @gradual_only
    def test_fractions_of_an_endless_training_are_refused(self, case: Case, tmp_path: Path) -> None:
        """A fraction of infinity is no time."""
        with pytest.raises(ValueError, match=r"fractions of training.*max_epochs"):
            fit(case.make(stop=0.8), tmp_path, max_epochs=-1)

    @gradual_only
    def test_fractions_of_a_training_without_a_length_are_refused(self, case: Case, tmp_path: Path) -> None:
        """Nor is one of an unknown length."""
        loader = torch.utils.data.DataLoader(_Endless(), batch_size=8)
        trainer = make_trainer(tmp_path, callbacks=[case.make(stop=0.8)])
        with pytest.raises(ValueError, match="data loader without length"):
            trainer.fit(ToyModel(), loader, ToyModel().val_dataloader())

    @pytest.mark.parametrize("ends_by_exception", [False, True])
    def test_nothing_is_left_behind_but_a_sparse_module(
        self, case: Case, ends_by_exception: bool, tmp_path: Path
    ) -> None:
        """No hook, no buffer, no parametrization, however training ends."""
        method, model, seen = case.make(), ToyModel(), []

        class Remember(L.Callback):
            def on_train_batch_end(
                self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                seen.append(trainer.optimizers[0])
                if ends_by_exception and trainer.global_step == 14:
                    raise ZeroDivisionError

        if ends_by_exception:
            with pytest.raises(ZeroDivisionError):
                fit(method, tmp_path, Remember(), model=model)
        else:
            fit(method, tmp_path, Remember(), model=model)
        assert not seen[-1]._optimizer_step_post_hooks
        assert MaskRegistry.of(model) is not method.registry
        assert not any(isinstance(module, nn.utils.parametrize.ParametrizationList) for module in model.modules())
        assert not list(model.buffers())
        zeros = sum(int((weight.parameter == 0).sum()) for weight in method.weights)
        assert zeros >= method.registry.numel - method.registry.num_active
