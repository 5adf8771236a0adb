"""What always holds, over every method: the eleven lines of the contract, in order."""

from __future__ import annotations

import pickle
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_sparse import DST, GMP, FixedMask, MaskRegistry, RigL
from lightning_sparse.functional import num_active, unpack
from lightning_sparse.methods.gradual_pruning import GradualPruning
from tests.helpers import ConvToy, ToyModel, fit_two_processes, make_trainer
from tests.methods.cases import CASES, GRADUAL, HARD, MOVING, Case, random_masks
from tests.methods.spies import (
    Kill,
    KilledError,
    MaskWatch,
    NonFiniteGradients,
    StepIndexedToy,
    TwoOptimizers,
    ZeroWatch,
    masks_of,
)

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_sparse.methods import SparseMethod

pytestmark = [
    # The toy of the resume tests draws its batches by the global step.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    # Sixteen steps from dense to sparse are steered roughly.
    pytest.mark.filterwarnings("ignore:DST. .* has collapsed to sparsity"),
    # Nor does that always arrive.
    pytest.mark.filterwarnings("ignore:DST. training ended at sparsity"),
]

every_method = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_moving_method = pytest.mark.parametrize("case", MOVING, ids=lambda case: case.name)
every_hard_method = pytest.mark.parametrize("case", HARD, ids=lambda case: case.name)
every_gradual_method = pytest.mark.parametrize("case", GRADUAL, ids=lambda case: case.name)

OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "adafactor": partial(torch.optim.Adafactor, lr=0.05),
}
if hasattr(torch.optim, "Muon"):

    def muon(parameters: Any) -> torch.optim.Optimizer:
        """Muon takes matrices alone."""
        return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.05, momentum=0.9)

    OPTIMIZERS["muon"] = muon


def fit(method: SparseMethod, root: Path, *others: L.Callback, model: Any = None, **overrides: Any) -> Any:
    """Train a toy for sixteen steps with ``method`` first among the callbacks."""
    model = ToyModel() if model is None else model
    make_trainer(root, callbacks=[method, *others], **overrides).fit(model)
    return model


def assert_same_masks(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, mask in first.items():
        assert torch.equal(mask, second[name]), name


# 1. Budgets are exact integers.


@every_gradual_method
def test_after_every_update_the_active_count_is_the_schedules(case: Case, tmp_path: Path) -> None:
    method = case.make()
    watch = MaskWatch(method)
    fit(method, tmp_path, watch)
    assert len(watch.history) >= 5
    for seen in watch.history:
        total = sum(mask.numel() for mask in seen["masks"].values())
        active = sum(int(mask.sum()) for mask in seen["masks"].values())
        assert active == num_active(seen["target"], total)


@every_method
def test_each_layer_holds_what_its_budget_says(case: Case, tmp_path: Path) -> None:
    method = case.make()
    fit(method, tmp_path)
    for weight in method.weights:
        assert int(weight.mask.sum()) == weight.num_active == weight.budget
        assert method.target_sparsity(weight.name) == pytest.approx(weight.sparsity)


@every_gradual_method
def test_a_budget_that_cannot_be_met_states_the_largest_feasible_sparsity(case: Case, tmp_path: Path) -> None:
    model = ToyModel()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=r"largest feasible sparsity is 0\.\d+"):
        fit(case.make(sparsity=0.999, min_active=5), tmp_path, model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# 2. A pruned weight is exactly zero, everywhere.


@every_method
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruned_weights_are_zero_in_every_forward_and_checkpoint(case: Case, optimizer: str, tmp_path: Path) -> None:
    method = case.make()
    watch = ZeroWatch(method)
    refusal = "Muon does not take them" if case.method is DST else "No optimizer steps the parameters"
    if optimizer == "muon" and (case.method is DST or case.changes_modules):
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
    # Adafactor's step is relative to the values, and thresholds begin at 0.
    assert method.registry.sparsity >= (0.01 if (optimizer, case.method) == ("adafactor", DST) else case.sparsity)


@every_method
def test_pruned_weights_are_zero_in_convolutions_in_channels_last(case: Case, tmp_path: Path) -> None:
    method = case.make(**({"masks": random_masks(ConvToy())} if case.method is FixedMask else {}))
    watch = ZeroWatch(method)
    fit(method, tmp_path, watch, model=ConvToy().to(memory_format=torch.channels_last))
    assert watch.leaks == []
    assert method.registry.sparsity >= case.sparsity


@every_method
@pytest.mark.parametrize("method_is_first", [True, False])
@pytest.mark.parametrize("average", [WeightAveraging, partial(EMAWeightAveraging, decay=0.8)])
def test_averaged_weights_are_sparse_too(case: Case, average: Any, method_is_first: bool, tmp_path: Path) -> None:
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


@every_method
def test_stochastic_weight_averaging_ends_sparse(case: Case, tmp_path: Path) -> None:
    method = case.make()
    fit(method, tmp_path, StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), max_epochs=3)
    for weight in method.weights:
        assert weight.parameter[~weight.mask].count_nonzero() == 0


@every_method
def test_two_optimizers_stepped_by_hand(case: Case, tmp_path: Path) -> None:
    method = case.make()
    watch = ZeroWatch(method)
    fit(method, tmp_path, watch, model=TwoOptimizers())
    assert method.step == 16
    assert len(method.groups) == 2
    assert watch.leaks == []
    if case in GRADUAL:
        for group in method.groups:
            assert group.num_active == num_active(method.target_sparsity(), group.numel)


@every_gradual_method
def test_training_with_no_sparsity_is_training_without_the_callback(case: Case, tmp_path: Path) -> None:
    model = fit(case.make(sparsity=0.0), tmp_path)
    plain = ToyModel()
    make_trainer(tmp_path).fit(plain)
    for (name, value), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


# 3. What changes starts at zero, with cleared moments.


@every_hard_method
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_just_pruned_or_grown_are_zero_and_forgotten(case: Case, optimizer: str, tmp_path: Path) -> None:
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
            for moment in after["moments"][name]:
                assert moment[changed].count_nonzero() == 0
                assert moment[mask & ~changed].count_nonzero() > 0
    assert some_changed > 0


# 4. One process with batch 2B and two with batch B.


@every_method
def test_two_processes_choose_the_masks_of_one_with_twice_the_batch(case: Case, tmp_path: Path) -> None:
    alone = case.make()
    fit(alone, tmp_path, model=StepIndexedToy(batch_size=16), precision="64-true", max_epochs=4)
    dumps = fit_two_processes(StepIndexedToy(batch_size=8), tmp_path, [case.make()], precision="64-true", max_epochs=4)
    expected = alone.state_dict()["masks"]
    for dump in dumps:
        state = dump["callbacks"][alone.state_key]
        assert state["step"] == 16
        for name, packed in state["masks"].items():
            assert torch.equal(packed["bits"], expected[name]["bits"]), name


@every_method
def test_ranks_end_with_the_same_weights_and_masks(case: Case, tmp_path: Path) -> None:
    first, second = fit_two_processes(ToyModel(OPTIMIZERS["adamw"]), tmp_path, [case.make()], max_epochs=3)
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    for name, packed in next(iter(first["callbacks"].values()))["masks"].items():
        assert torch.equal(packed["bits"], next(iter(second["callbacks"].values()))["masks"][name]["bits"]), name


class _CorruptOneRank(L.Callback):
    """Turns a mask around on rank 1, as a bug would."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Flip the last layer's mask at step 3, before the first update."""
        if trainer.global_rank == 1 and trainer.global_step == 3:
            weight = self.method.registry["network.4.weight"]
            weight.mask.logical_not_()


def test_ranks_that_disagree_are_an_error_that_names_the_layer(tmp_path: Path) -> None:
    method = CASES[0].make(start=4, stop=7)
    with pytest.raises(Exception, match=r"masks of network\.4\.weight differ between the processes"):
        fit_two_processes(ToyModel(), tmp_path, [method, _CorruptOneRank(method)], max_epochs=2)


# 5. KilledError and resumed is the same as never killed.


@every_method
@pytest.mark.parametrize("step", [1, 2, 5, 8, 11, 15])
def test_resuming_at_any_step_equals_the_uninterrupted_run(case: Case, step: int, tmp_path: Path) -> None:
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
    _assert_equal_states(whole.state_dict(), resumed.state_dict())


def _assert_equal_states(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            _assert_equal_states(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            _assert_equal_states(one, other)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


@every_method
def test_resuming_on_two_processes_equals_the_uninterrupted_run(case: Case, tmp_path: Path) -> None:
    whole = fit_two_processes(StepIndexedToy(batch_size=4), tmp_path, [case.make()], max_epochs=2)[0]
    path = tmp_path / "killed.ckpt"
    with pytest.raises(Exception, match=r"KilledError"):
        fit_two_processes(StepIndexedToy(batch_size=4), tmp_path, [case.make(), Kill(5, path)], max_epochs=2)
    model = StepIndexedToy(batch_size=4, seed=99)
    resumed = case.make()
    from tests.helpers import DumpRank

    trainer = make_trainer(tmp_path, strategy="ddp_fork", devices=2, callbacks=[resumed, DumpRank(tmp_path)])
    trainer.fit(model, ckpt_path=path)
    dump = torch.load(tmp_path / "rank0.pt", weights_only=True)
    for name, value in whole["weights"].items():
        assert torch.equal(value, dump["weights"][name]), name
    _assert_equal_states(whole["callbacks"], dump["callbacks"])


class _FirstLook(L.Callback):
    """Copies the masks before the first step."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method
        self.masks: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look."""
        self.masks = masks_of(self.method)


@every_method
def test_going_on_with_the_same_module_keeps_its_masks(case: Case, tmp_path: Path) -> None:
    method = case.make()
    model = fit(method, tmp_path)
    masks, step = masks_of(method), method.step
    look = _FirstLook(method)
    make_trainer(tmp_path, callbacks=[method, look], max_epochs=1).fit(model)
    assert_same_masks(look.masks, masks)
    assert method.step == step + 8


@every_method
def test_one_instance_trains_two_modules_alike(case: Case, tmp_path: Path) -> None:
    method = case.make()
    first = fit(method, tmp_path)
    masks = masks_of(method)
    second = fit(method, tmp_path)
    assert_same_masks(masks_of(method), masks)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@every_method
def test_the_learning_rate_finder_leaves_no_mark(case: Case, tmp_path: Path) -> None:
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


# 6. Checkpoints are plain.


@every_method
def test_the_checkpoint_is_that_of_the_dense_module(case: Case, tmp_path: Path) -> None:
    method = case.make()
    model = fit(method, tmp_path, ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == ToyModel().state_dict().keys()
    loaded = ToyModel.load_from_checkpoint(tmp_path / "last.ckpt")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@every_method
def test_a_checkpoint_without_masks_is_refused(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "dense.ckpt"
    trainer = make_trainer(tmp_path)
    trainer.fit(ToyModel())
    trainer.save_checkpoint(path)
    with pytest.raises(MisconfigurationException, match=r"holds no (masks|Dynamic ReLUs) .* load_from_checkpoint"):
        make_trainer(tmp_path, callbacks=[case.make()], max_epochs=3).fit(ToyModel(), ckpt_path=path)


def _cut(state: dict[str, Any]) -> None:
    mask = next(iter(state["masks"].values()))
    mask["bits"] = mask["bits"][:-1]


def _reshape(state: dict[str, Any]) -> None:
    mask = next(iter(state["masks"].values()))
    mask["shape"] = [*mask["shape"][::-1]]


def _forget_one(state: dict[str, Any]) -> None:
    state["masks"].pop(next(reversed(state["masks"])))


def _forget_clock(state: dict[str, Any]) -> None:
    del state["step"]


@every_method
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_cut, "cannot be read.*cut short"),
        (_reshape, "has shape"),
        (_forget_one, "holds no mask of"),
        (_forget_clock, "cut short: it lacks step"),
    ],
)
def test_a_damaged_checkpoint_is_refused(case: Case, damage: Any, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.ckpt"
    with pytest.raises(KilledError):
        fit(case.make(), tmp_path, Kill(9, path))
    checkpoint = torch.load(path, weights_only=True)
    damage(next(iter(checkpoint["callbacks"].values())))
    torch.save(checkpoint, path)
    with pytest.raises(MisconfigurationException, match=sentence):
        make_trainer(tmp_path, callbacks=[case.make()]).fit(ToyModel(), ckpt_path=path)


@every_method
def test_a_sparse_checkpoint_validates_in_a_trainer_with_the_callback(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "killed.ckpt"
    with pytest.raises(KilledError):
        fit(case.make(), tmp_path, Kill(9, path))
    method = case.make()
    make_trainer(tmp_path, callbacks=[method]).validate(ToyModel(), ckpt_path=path, verbose=False)
    assert not method.registry


# 7. Gradients that are not finite, skipped steps, accumulation.


class _MasksAfterEachBatch(L.Callback):
    """Copies the masks at the end of every batch."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method
        self.masks: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Look."""
        self.masks.append(masks_of(self.method))


@every_moving_method
def test_gradients_that_are_not_finite_change_no_mask(case: Case, tmp_path: Path) -> None:
    method = case.make()
    after = _MasksAfterEachBatch(method)
    fit(method, tmp_path, after, model=NonFiniteGradients(range(3, 8)))
    for batch in range(3, 8):
        assert_same_masks(after.masks[batch], after.masks[2])
    assert any(not torch.equal(mask, after.masks[2][name]) for name, mask in after.masks[8].items())
    assert method.registry.sparsity >= case.sparsity


@every_moving_method
def test_a_hundred_steps_of_nan_end_the_training_with_a_sentence(case: Case, tmp_path: Path) -> None:
    model = NonFiniteGradients(range(4, 1000))
    with pytest.raises(RuntimeError, match=r"network\.0\.weight.* inf or NaN at 100 steps in a row"):
        fit(case.make(), tmp_path, model=model, max_epochs=20)


class _Overflow(ToyModel):
    """Losses that overflow at the given batches, as they do under a GradScaler in float16."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The toy's loss; infinite at the first three batches of each epoch."""
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx < 3 else loss


@every_method
def test_a_step_that_the_grad_scaler_skips_is_no_step(case: Case, tmp_path: Path) -> None:
    method = case.make()
    watch, zeros = MaskWatch(method), ZeroWatch(method)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    fit(method, tmp_path, watch, zeros, model=_Overflow(), plugins=[precision], max_epochs=3)
    assert method.step == 24 - 9
    assert zeros.leaks == []
    if case in GRADUAL:  # the first, at step 1, may find nothing to prune
        assert [seen["step"] for seen in watch.history if seen["updates"]][-5:] == [3, 5, 7, 9, 11]


@every_method
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_keep_budgets_and_zeros(case: Case, precision: Any, tmp_path: Path) -> None:
    method = case.make()
    watch = ZeroWatch(method)
    fit(method, tmp_path, watch, precision=precision)
    assert watch.leaks == []
    assert method.registry.sparsity >= case.sparsity


@every_method
def test_accumulated_batches_choose_the_masks_of_one_large_batch(case: Case, tmp_path: Path) -> None:
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


# 8. torch.compile.


@pytest.mark.parametrize("case", [case for case in CASES if not case.changes_modules], ids=lambda case: case.name)
def test_a_compiled_module_is_not_compiled_again_when_masks_change(case: Case, tmp_path: Path) -> None:
    torch._dynamo.reset()
    method, model, graphs = case.make(), ToyModel(), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model.network = cast("Any", torch.compile(model.network, backend=backend, fullgraph=True))
    eager = case.make()
    with torch._dynamo.config.patch(error_on_recompile=True):
        fit(method, tmp_path, model=model, limit_val_batches=0)
    expected = fit(eager, tmp_path, limit_val_batches=0)
    assert len(graphs) == 1
    assert_same_masks(masks_of(method), masks_of(eager))
    for value, wanted in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, wanted)


# 9. The same seed, the same masks.


@every_method
def test_masks_do_not_depend_on_the_global_generator(case: Case, tmp_path: Path) -> None:
    first, second = case.make(), case.make()
    torch.manual_seed(1)
    fit(first, tmp_path)
    torch.manual_seed(2)
    fit(second, tmp_path)
    assert_same_masks(masks_of(first), masks_of(second))


@every_method
def test_the_global_generator_does_not_notice_the_callback(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(7)
    make_trainer(tmp_path).fit(ToyModel())
    expected = torch.random.get_rng_state()
    torch.manual_seed(7)
    fit(case.make(), tmp_path)
    assert torch.equal(torch.random.get_rng_state(), expected)


# 10. What cannot work is refused, with the remedy.


class FSDPStrategy(SingleDeviceStrategy):
    """Bears the name of a strategy that shards weights."""


@every_method
def test_a_strategy_that_shards_weights_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"does not support FSDPStrategy.*strategy='ddp'"):
        fit(case.make(), tmp_path, strategy=FSDPStrategy(torch.device("cpu"), accelerator=None))


@every_method
def test_lbfgs_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"LBFGS.*Use SGD"):
        fit(case.make(), tmp_path, model=ToyModel(torch.optim.LBFGS))


@every_method
def test_an_optimizer_that_lacks_a_masked_parameter_is_refused(case: Case, tmp_path: Path) -> None:
    def all_but_the_first(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(parameters)[1:], lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"No optimizer steps network\.0\.weight.*exclude="):
        fit(case.make(), tmp_path, model=ToyModel(all_but_the_first))


@every_method
def test_an_optimizer_stepped_behind_lightnings_back_is_refused(case: Case, tmp_path: Path) -> None:
    class Raw(TwoOptimizers):
        def optimizers(self, use_pl_optimizer: bool = True) -> Any:
            return super().optimizers(use_pl_optimizer=False)

    with pytest.raises(MisconfigurationException, match=r"stepped without Lightning.*self\.optimizers\(\)"):
        fit(case.make(), tmp_path, model=Raw())


@every_method
def test_one_optimizer_of_two_stepped_behind_lightnings_back_is_refused(case: Case, tmp_path: Path) -> None:
    class HalfRaw(TwoOptimizers):
        def optimizers(self, use_pl_optimizer: bool = True) -> Any:
            first, second = cast("Any", super().optimizers())
            return [first, second.optimizer]

    with pytest.raises(MisconfigurationException, match=r"AdamW stepped without Lightning"):
        fit(case.make(), tmp_path, model=HalfRaw())


@every_method
def test_a_method_can_go_to_another_process_before_and_after_training(case: Case, tmp_path: Path) -> None:
    method = case.make()
    assert type(pickle.loads(pickle.dumps(method))) is case.method
    fit(method, tmp_path)
    copy = pickle.loads(pickle.dumps(method))
    assert_same_masks(masks_of(copy), masks_of(method))


@every_method
def test_two_methods_may_not_claim_one_weight(case: Case, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"network\.0\.weight.*already masks.*exclude="):
        fit(case.make(include=["network.0.*"]), tmp_path, case.make())


@every_method
def test_two_methods_divide_a_network(case: Case, tmp_path: Path) -> None:
    first, second = case.make(include=["network.0.*"]), case.make(exclude=["network.0.*"])
    fit(first, tmp_path, second)
    assert first.registry is second.registry
    assert list(first.registry) == ["network.0.weight", "network.2.weight", "network.4.weight"]
    assert [weight.name for weight in second.weights] == ["network.2.weight", "network.4.weight"]


@every_method
def test_patterns_that_match_nothing_are_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"include='netwrk\.0\.\*' matches no .*network\.0"):
        fit(case.make(include=["netwrk.0.*"]), tmp_path)


@every_method
def test_a_module_with_nothing_to_mask_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="has no weight to mask"):
        fit(case.make(exclude=["Linear"]), tmp_path)


@every_gradual_method
def test_fractions_of_an_endless_training_are_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fractions of training.*max_epochs"):
        fit(case.make(stop=0.8), tmp_path, max_epochs=-1)


# 11. Layer collapse is seen, and what is left behind is clean.


@every_gradual_method
def test_a_layer_without_active_weights_is_named(case: Case, tmp_path: Path) -> None:
    model = ToyModel()
    with torch.no_grad():
        model.get_parameter("network.4.weight").mul_(1e-6)
    with pytest.warns(UserWarning, match=r"network\.\d\.weight has no active weight left"):
        fit(case.make(sparsity=0.99, allocation="global", min_active=0), tmp_path, model=model)


@every_gradual_method
def test_min_active_forbids_the_collapse(case: Case, tmp_path: Path) -> None:
    model = ToyModel()
    with torch.no_grad():
        model.get_parameter("network.4.weight").mul_(1e-6)
    method = case.make(sparsity=0.97, allocation="global", min_active=2)
    fit(method, tmp_path, model=model)
    assert all(weight.num_active >= 2 for weight in method.weights)


@every_method
@pytest.mark.parametrize("ends_by_exception", [False, True])
def test_nothing_is_left_behind_but_a_sparse_module(case: Case, ends_by_exception: bool, tmp_path: Path) -> None:
    method, model, seen = case.make(), ToyModel(), []

    class Remember(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
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


@every_method
def test_checkpoints_and_early_stopping_can_monitor_sparsity(case: Case, tmp_path: Path) -> None:
    method = case.make()
    checkpoint = ModelCheckpoint(tmp_path, monitor="sparsity", mode="max")
    stopping = EarlyStopping("sparsity", stopping_threshold=case.sparsity, mode="max")
    fit(method, tmp_path, checkpoint, stopping, enable_checkpointing=True, min_epochs=2)
    assert checkpoint.best_model_score is not None
    assert float(checkpoint.best_model_score) == pytest.approx(method.registry.sparsity)
    assert stopping.stopped_epoch == 1


@every_method
def test_metrics_are_those_of_the_weights_that_are_saved(case: Case, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{val_loss:.9f}")
    fit(case.make(), tmp_path, checkpoint, enable_checkpointing=True)
    for path in tmp_path.glob("*.ckpt"):
        recorded = float(path.stem.split("=")[1].split("-")[0])
        model = ToyModel.load_from_checkpoint(path)
        (metrics,) = make_trainer(tmp_path).validate(model, verbose=False)
        assert metrics["val_loss"] == pytest.approx(recorded, abs=1e-7)


@every_gradual_method
def test_training_that_ends_early_says_what_sparsity_was_due(case: Case, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"the last updates will not happen|training ended at step"):
        fit(case.make(), tmp_path, max_epochs=1)


def test_every_gradual_method_is_covered() -> None:
    assert {case.method for case in CASES} >= set(GradualPruning.__subclasses__())


# What a stranger found, and must not find again.


class _Endless(torch.utils.data.IterableDataset[Any]):
    """Data without a length."""

    def __iter__(self) -> Any:
        return iter(ToyModel().train_data)


@every_gradual_method
def test_fractions_of_a_training_without_a_length_are_refused(case: Case, tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(_Endless(), batch_size=8)
    trainer = make_trainer(tmp_path, callbacks=[case.make(stop=0.8)])
    with pytest.raises(ValueError, match="data loader without length"):
        trainer.fit(ToyModel(), loader, ToyModel().val_dataloader())


@pytest.mark.parametrize("rigl_is_first", [True, False])
def test_a_step_that_one_method_leaves_out_starves_no_other(rigl_is_first: bool, tmp_path: Path) -> None:
    rigl = RigL(0.5, update_every=2, stop=11, include=["network.0.*"])
    gmp = GMP(0.9, update_every=1, stop=11, exclude=["network.0.*"])
    watch = MaskWatch(gmp)
    callbacks = [rigl, gmp] if rigl_is_first else [gmp, rigl]
    make_trainer(tmp_path, callbacks=[*callbacks, watch]).fit(ToyModel())
    assert [seen["step"] for seen in watch.history][:10] == list(range(10))


def test_rigl_leaves_out_no_step_where_nothing_changes(tmp_path: Path) -> None:
    method = RigL(0.5, update_every=4, stop=8)
    model = ToyModel()
    biases = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            biases.append(model.get_parameter("network.0.bias").detach().clone())

    fit(method, tmp_path, Watch(), model=model)
    still = [step for step in range(1, 16) if torch.equal(biases[step], biases[step - 1])]
    assert still == [4]  # at step 8, f(t) = 0


@every_gradual_method
def test_resuming_for_a_shorter_training_still_reaches_the_final_sparsity(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "killed.ckpt"
    longer = {"update_every": 1, "start": 0, "stop": 0.8}
    with pytest.raises(KilledError):
        fit(case.make(**longer), tmp_path, Kill(20, path), model=StepIndexedToy(), max_epochs=4)
    resumed = case.make(**longer)
    make_trainer(tmp_path, callbacks=[resumed], max_epochs=3).fit(StepIndexedToy(), ckpt_path=path)
    assert resumed.registry.num_active == num_active(resumed.target_sparsity(), resumed.registry.numel)


@every_method
def test_a_layer_unfrozen_while_training_stays_dense_by_name(case: Case, tmp_path: Path) -> None:
    class Thaw(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.get_parameter("network.0.weight").requires_grad_(trainer.current_epoch == 1)

    model = ToyModel()
    model.get_parameter("network.0.weight").requires_grad_(False)
    method = case.make()
    with pytest.warns(UserWarning, match=r"network\.0\.weight can be trained now, but was frozen"):
        fit(method, tmp_path, Thaw(), model=model)
    assert "network.0.weight" not in method.registry


@every_method
def test_finetuning_callbacks_train_and_resume(case: Case, tmp_path: Path) -> None:
    def once() -> Any:
        return case.make(), Thawing()

    class Thawing(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.network[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.network[0], optimizer, lr=0.01)

    def trainable(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1)

    path = tmp_path / "killed.ckpt"
    method, finetuning = once()
    with pytest.warns(UserWarning, match="was frozen when masks were made"):
        fit(method, tmp_path, finetuning, model=StepIndexedToy(optimizer=trainable))
    with pytest.raises(KilledError):
        fit(once()[0], tmp_path, once()[1], Kill(12, path), model=StepIndexedToy(optimizer=trainable))
    resumed, finetuning = once()
    trainer = make_trainer(tmp_path, callbacks=[resumed, finetuning])
    trainer.fit(StepIndexedToy(optimizer=trainable, seed=99), ckpt_path=path)
    assert_same_masks(masks_of(resumed), masks_of(method))


@every_method
def test_averaged_checkpoints_within_an_epoch_hold_no_pruned_weight(case: Case, tmp_path: Path) -> None:
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


@every_method
def test_a_refused_resume_takes_nothing_from_a_trained_module(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "damaged.ckpt"
    with pytest.raises(KilledError):
        fit(case.make(), tmp_path, Kill(9, path))
    checkpoint = torch.load(path, weights_only=True)
    _cut(next(iter(checkpoint["callbacks"].values())))
    torch.save(checkpoint, path)
    method = case.make()
    model = fit(method, tmp_path)
    masks = masks_of(method)
    with pytest.raises(MisconfigurationException):
        make_trainer(tmp_path, callbacks=[method], max_epochs=3).fit(model, ckpt_path=path)
    assert_same_masks(masks_of(method), masks)
    assert method.step == 16


@every_method
def test_going_on_after_validating_a_checkpoint_takes_its_masks(case: Case, tmp_path: Path) -> None:
    method = case.make()
    path = tmp_path / "early.ckpt"

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(path)
                saved.update(masks_of(method))

    saved: dict[str, torch.Tensor] = {}
    model = fit(method, tmp_path, Save())
    make_trainer(tmp_path, callbacks=[method]).validate(model, ckpt_path=path, verbose=False)
    look = _FirstLook(method)
    make_trainer(tmp_path, callbacks=[method, look], max_epochs=2).fit(model)
    assert_same_masks(look.masks, saved)


@every_gradual_method
def test_two_optimizers_and_max_steps_reach_the_final_sparsity(case: Case, tmp_path: Path) -> None:
    method = case.make(update_every=1, start=0, stop=0.8)
    fit(method, tmp_path, model=TwoOptimizers(), max_steps=20, max_epochs=-1)
    assert method.step == 10
    for group in method.groups:
        assert group.num_active == num_active(method.target_sparsity(), group.numel)


@every_method
@pytest.mark.filterwarnings("ignore:.* training ended at [sb]")  # at its first step
def test_an_optimizer_that_moves_weights_without_a_step_is_named(case: Case, tmp_path: Path) -> None:
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
