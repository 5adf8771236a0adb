"""Writers whom no hook of Lightning's separates from what reads: they are caught, watched from then on, and told of."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_sparse import GMP, SparseMethod
from lightning_sparse.masks.checkpoint import load_checkpoint, masks_by_method
from tests.helpers import ToyModel, make_trainer
from tests.methods.test_guard import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

every_method = pytest.mark.parametrize("name", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:.* were written between two steps; they are zero again")


class AwakeInForwards(L.Callback):
    """In which forwards of the network pruned weights were not zero: by the step, and whether in training."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method
        self.found: list[tuple[int, bool]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        def look(module: nn.Module, _: Any) -> None:
            sparse = self.method.weights if self.method.last_run and self.method.run.active else []
            if any(weight.value[~weight.mask].count_nonzero() for weight in sparse):
                self.found.append((trainer.global_step, module.training))

        self.handle = pl_module.network.register_forward_pre_hook(look)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.handle.remove()


def fit(
    method: SparseMethod, model: ToyModel, root: Path, *others: L.Callback, **settings: Any
) -> tuple[AwakeInForwards, list[str]]:
    """Train, with other callbacks after the method; where weights were awake, and what the method said."""
    watch = AwakeInForwards(method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(root, callbacks=[method, *others, watch], **settings).fit(model)
    for weight in method.weights:
        assert weight.value[~weight.mask].count_nonzero() == 0
    return watch, [str(w.message) for w in caught if str(w.message).startswith(type(method).__name__)]


@torch.no_grad()
def nudge(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(0.01)


def nudge_past_the_counters(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.detach().numpy()[...] += 0.01


class InTheStep(ToyModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        nudge(self)
        return super().training_step(batch, batch_idx)


class AsABatchOfValidationBegins(ToyModel):
    def on_validation_batch_start(self, *_: Any) -> None:
        nudge(self)


class InTheStepOfValidation(ToyModel):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        nudge(self)
        return super().validation_step(batch, batch_idx)


class BeforeAStepByHand(ToyModel):
    """In manual optimization nothing of the optimizer's comes before the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def on_train_batch_start(self, *_: Any) -> None:
        nudge(self)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class AsABatchBegins(ToyModel):
    def on_train_batch_start(self, *_: Any) -> None:
        nudge(self)


@every_method
@pytest.mark.parametrize(
    "model", [InTheStep, AsABatchOfValidationBegins, InTheStepOfValidation, BeforeAStepByHand, AsABatchBegins]
)
def test_who_writes_before_a_forward_is_caught_by_the_first_and_told_of_once(
    name: str, model: type[ToyModel], tmp_path: Path
) -> None:
    watch, said = fit(METHODS[name](), model(), tmp_path, accumulate_grad_batches=1 + 2 * (model is AsABatchBegins))
    assert len(watch.found) <= 1
    assert len([line for line in said if "were written" in line]) == 1


def test_the_hooks_of_who_is_watched_are_gone_after_training_and_from_copies(tmp_path: Path) -> None:
    class Copies(InTheStep):
        def on_train_epoch_end(self) -> None:
            self.copied = copy.deepcopy(self.network)
            pickle.dumps(self.network)

    model = Copies()
    with pytest.warns(UserWarning, match="were written right before a forward pass"):
        make_trainer(tmp_path, callbacks=[METHODS["fixed"]()]).fit(model)
    assert not any(module._forward_pre_hooks for module in model.network.modules())
    nudge(model.copied)
    model.copied(torch.zeros(1, 12))  # its hook does nothing
    assert all(parameter.count_nonzero() == parameter.numel() for parameter in model.copied.parameters())


def test_a_compiled_network_whose_writer_is_watched_compiles_as_often(tmp_path: Path) -> None:
    compiled: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    class Compiled(InTheStep):
        def on_fit_start(self) -> None:
            self.network = torch.compile(self.network, backend=backend, fullgraph=True)  # type: ignore[assignment]

    with pytest.warns(UserWarning, match="were written right before a forward pass"):
        make_trainer(tmp_path, callbacks=[METHODS["fixed"]()]).fit(Compiled())
    assert len(compiled) == 2  # in training and in validation


@every_method
@pytest.mark.parametrize("write", ["data", "numpy"])
def test_one_write_past_the_counters_is_found_before_the_next_forward(name: str, write: str, tmp_path: Path) -> None:
    class Once(ToyModel):
        def on_train_batch_start(self, *_: Any) -> None:
            if self.global_step == 9:
                for parameter in self.parameters():
                    if write == "data":
                        parameter.data.add_(0.01)
                    else:
                        parameter.detach().numpy()[...] += 0.01

    watch, said = fit(METHODS[name](), Once(), tmp_path)
    assert watch.found == []
    assert len([line for line in said if "written without autograd's notice" in line]) == 1


class Manual(ToyModel):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()  # type: ignore[union-attr]


class StepsAfterItsClosure(ToyModel):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.step()


class StepsAtEverySecondBatch(ToyModel):
    """Lightning's documentation has one such, for gradients that some batches add up."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (ToyModel, {}),
        (ToyModel, {"accumulate_grad_batches": 3}),
        (Manual, {}),
        (StepsAfterItsClosure, {}),
        (StepsAtEverySecondBatch, {}),
    ],
    ids=["automatic", "accumulated", "manual", "after its closure", "at every second batch"],
)
@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_write_between_two_batches_is_found_before_the_next_forward(
    at: int, model: type[ToyModel], settings: dict[str, Any], tmp_path: Path
) -> None:
    class Once(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.fit_loop.total_batch_idx == at:
                nudge_past_the_counters(pl_module)

    watch, said = fit(METHODS["fixed"](), model(), tmp_path, Once(), **settings)
    assert watch.found == []
    assert any("written without autograd's notice" in line for line in said)


@every_method
def test_a_write_is_found_where_optimizers_are_set_up_anew(name: str, tmp_path: Path) -> None:
    class Anew(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.strategy.setup_optimizers(trainer)

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch:
                nudge_past_the_counters(pl_module)

    watch, said = fit(METHODS[name](), ToyModel(), tmp_path, Anew())
    assert watch.found == []
    assert any("written without autograd's notice" in line for line in said)


@every_method
def test_who_computes_as_a_batch_begins_finds_zeros(name: str, tmp_path: Path) -> None:
    class Computes(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.network(batch[0])

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            nudge_past_the_counters(pl_module)

    watch, said = fit(METHODS[name](), ToyModel(), tmp_path, Computes())
    assert watch.found == []
    assert any("written without autograd's notice" in line for line in said)


# Checkpoints that others change.


def others_of(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"] = {name: value + 0.01 for name, value in checkpoint["state_dict"].items()}


class Rewrites(L.Callback):
    """Puts other weights into the file, as averages of one's own do."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        others_of(checkpoint)


class Writes(L.Callback):
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        nudge(pl_module)


class RewritesItself(ToyModel):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        others_of(checkpoint)


def saved(order: Sequence[L.Callback], model: ToyModel, root: Path) -> list[int]:
    """Train, and count the pruned weights that are not zero in each checkpoint."""
    keeps = ModelCheckpoint(root, save_top_k=-1)
    make_trainer(root, callbacks=[*order, keeps], enable_checkpointing=True).fit(model)
    return [awake_in(path) for path in sorted(root.glob("*.ckpt"))]


def awake_in(path: Path) -> int:
    checkpoint = load_checkpoint(path)
    masks = {name: mask for its in masks_by_method(checkpoint, path).values() for name, mask in its.items()}
    assert masks
    return sum(int(checkpoint["state_dict"][name][~mask].count_nonzero()) for name, mask in masks.items())


@every_method
@pytest.mark.parametrize("writer", [Rewrites, Writes])
def test_what_an_earlier_callback_puts_into_a_checkpoint_is_sparse(name: str, writer: Any, tmp_path: Path) -> None:
    assert saved([writer(), METHODS[name]()], ToyModel(), tmp_path) == [0, 0]


@every_method
@pytest.mark.parametrize(("writer", "model"), [(Rewrites, ToyModel), (Writes, ToyModel), (None, RewritesItself)])
def test_what_comes_into_a_checkpoint_after_us_is_told(name: str, writer: Any, model: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="written while or after a checkpoint was saved, so the file may hold values"):
        saved([METHODS[name](), *([writer()] if writer else [])], model(), tmp_path)


def test_a_training_that_saves_and_writes_nothing_else_is_silent(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="GMP")
        assert saved([GMP(0.8, update_every=2, stop=11)], ToyModel(), tmp_path) == [0, 0]


# Masks of weights that are others now.


def test_masks_are_not_saved_beside_weights_that_were_written_since(tmp_path: Path) -> None:
    method, model = METHODS["gmp"](), ToyModel()
    trainer = make_trainer(tmp_path, callbacks=[method])
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "sparse.ckpt")
    assert awake_in(tmp_path / "sparse.ckpt") == 0
    model.load_state_dict(ToyModel(seed=3).state_dict())
    with pytest.warns(UserWarning, match="written after training, so the masks no longer fit the module"):
        trainer.save_checkpoint(tmp_path / "dense.ckpt")
    assert masks_by_method(load_checkpoint(tmp_path / "dense.ckpt"), "it") == {}


def test_masks_after_a_test_of_the_best_are_those_of_the_best(tmp_path: Path) -> None:
    class Worse(ToyModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("worse", float(self.current_epoch))

        def test_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

        def test_dataloader(self) -> Any:
            return self.val_dataloader()

    method, model = GMP(0.9, update_every=2, start=1, stop=11), Worse()
    best = ModelCheckpoint(tmp_path, monitor="worse")
    trainer = make_trainer(tmp_path, callbacks=[method, best], enable_checkpointing=True)
    with pytest.warns(UserWarning, match="best checkpoint"):
        trainer.fit(model)
    at_the_end = method.registry.sparsity
    trainer.test(model, ckpt_path="best")
    trainer.save_checkpoint(tmp_path / "best-again.ckpt")
    assert awake_in(tmp_path / "best-again.ckpt") == 0
    masks = masks_by_method(load_checkpoint(tmp_path / "best-again.ckpt"), "it")[method.state_key]
    assert {name: torch.equal(mask, model.get_parameter(name) != 0) for name, mask in masks.items()} == dict.fromkeys(
        masks, True
    )
    assert method.registry.sparsity < at_the_end
