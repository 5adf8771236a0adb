"""One method after another: by ``ckpt_path``, on the same module, and from weights alone."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import Tensor

from lightning_sparse import DST, FGGP, GMP, SET, FixedMask, RigL, SparseMethod
from lightning_sparse.functional import num_active
from lightning_sparse.schedules import Constant, Polynomial
from lightning_sparse.trainer import callbacks_of, set_callbacks
from tests.helpers import DumpRank, ToyModel, fit_two_processes, make_trainer
from tests.methods.spies import Kill, KilledError, StepIndexedToy, ZeroWatch, masks_of

pytestmark = [
    # Lightning's, where the method that wrote the checkpoint is not in the Trainer: that is what is meant here.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:DST. "),
    # Masks that do not move while they are looked at.
    pytest.mark.filterwarnings("ignore:.*update_every is \\d+ steps, but updates begin"),
]

Masks = dict[str, Tensor]


class Look(L.Callback):
    """Copies masks, weights and moments before the first step, and masks after each."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method
        self.start: Masks = {}
        self.weights: Masks = {}
        self.moments: Masks = {}
        self.steps: list[Masks] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look."""
        self.start = masks_of(self.method)
        self.weights = {weight.name: weight.parameter.detach().clone() for weight in self.method.weights}
        state = trainer.optimizers[0].state
        self.moments = {
            weight.name: state[weight.parameter]["momentum_buffer"].clone()
            for weight in self.method.weights
            if weight.parameter in state
        }

    def on_train_batch_end(self, *_: Any) -> None:
        """Look."""
        self.steps.append(masks_of(self.method))


def assert_same(first: Masks, second: Masks) -> None:
    assert first.keys() == second.keys()
    for name, mask in first.items():
        assert torch.equal(mask, second[name]), name


def first_run(method: SparseMethod | None, root: Path, **overrides: Any) -> tuple[Path, Masks, ToyModel]:
    """Train for eight steps; the checkpoint, the masks and the module."""
    model = StepIndexedToy()
    trainer = make_trainer(root, callbacks=[method] if method else [], max_epochs=1, **overrides)
    trainer.fit(model)
    trainer.save_checkpoint(root / "first.ckpt")
    return root / "first.ckpt", masks_of(method) if method else {}, model


def second_run(method: SparseMethod, root: Path, path: Path, **overrides: Any) -> tuple[Look, ZeroWatch, ToyModel]:
    """Go on until step 24, from the checkpoint, with another module."""
    look, zeros, model = Look(method), ZeroWatch(method), StepIndexedToy(seed=7)
    make_trainer(root, callbacks=[method, look, zeros], **({"max_epochs": 3} | overrides)).fit(model, ckpt_path=path)
    return look, zeros, model


def gmp() -> GMP:
    return GMP(0.8, update_every=1, stop=4)


def dst() -> DST:
    return DST(alpha=0.1)


FIRST: dict[str, Any] = {"gmp": gmp, "rigl": lambda: RigL(0.8, update_every=2, stop=0.9), "dst": dst}
every_first = pytest.mark.parametrize("name", FIRST)


# By ckpt_path.


@every_first
def test_fixed_masks_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    path, masks, _ = first_run(FIRST[name](), tmp_path)
    method = FixedMask()
    look, zeros, model = second_run(method, tmp_path, path)
    assert_same(look.start, masks)
    assert_same(masks_of(method), masks)
    assert zeros.leaks == []
    assert method.step == 16
    saved = torch.load(path, weights_only=True)["state_dict"]
    for weight, mask in masks.items():
        assert torch.equal(look.weights[weight], saved[weight])
        assert look.weights[weight][~mask].count_nonzero() == 0
        assert look.moments[weight][~mask].count_nonzero() == 0  # DST's sleeping weights have some
        assert look.moments[weight][mask].count_nonzero() > 0
        assert not torch.equal(model.get_parameter(weight)[mask], saved[weight][mask])


def test_a_weight_that_was_just_grown_is_zero_and_active(tmp_path: Path) -> None:
    # The last of eight steps is an update, which replaces the step: what it has grown is zero in the checkpoint.
    method = RigL(0.8, update_every=7, stop=1.0, drop_fraction=Constant(0.5), regrow=False)
    path, masks, _ = first_run(method, tmp_path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert any((saved[name][mask] == 0).any() for name, mask in masks.items())
    look, _, _ = second_run(FixedMask(), tmp_path, path)
    assert_same(look.start, masks)


@every_first
def test_gradual_pruning_goes_on_from_the_masks(name: str, tmp_path: Path) -> None:
    path, masks, _ = first_run(FIRST[name](), tmp_path)
    method = FGGP(0.95, update_every=1, stop=0.9)
    look, zeros, _ = second_run(method, tmp_path, path)
    assert_same(look.start, masks)
    assert zeros.leaks == []
    for before, after in zip([look.start, *look.steps], look.steps, strict=False):
        for weight, mask in after.items():
            assert not (mask & ~before[weight]).any(), "what is pruned stays pruned"
    assert method.registry.num_active == num_active(0.95, method.registry.numel)


def test_the_schedule_spans_the_steps_that_are_left(tmp_path: Path) -> None:
    path, _, _ = first_run(RigL(0.8), tmp_path)
    method = GMP(Polynomial(0.8, 0.95), update_every=1, start=0, stop=0.5, allocation="global")
    second_run(method, tmp_path, path)
    # 16 of 24 steps are left, so half of training is at step 8, and not at 12.
    assert method.step == 16
    assert method.run.timetable is not None
    assert method.run.timetable.stop == 8
    assert method.registry.num_active == num_active(0.95, method.registry.numel)


def test_a_schedule_that_begins_sparse_prunes_by_its_own_criterion_at_the_first_update(tmp_path: Path) -> None:
    path, masks, _ = first_run(RigL(0.8), tmp_path)
    method = GMP(Polynomial(0.9, 0.95), update_every=4, start=0, stop=8, allocation="global")
    look, _, _ = second_run(method, tmp_path, path)
    assert_same(look.start, masks)
    assert sum(int(mask.sum()) for mask in look.steps[0].values()) == num_active(0.9, method.registry.numel)
    values = torch.cat([look.weights[name][mask].abs() for name, mask in masks.items()])
    kept = torch.cat([look.weights[name][look.steps[0][name]].abs() for name in masks])
    assert kept.min() >= values.sort(descending=True).values[len(kept) - 1]


@pytest.mark.parametrize("kind", [RigL, SET])
def test_prune_and_grow_goes_on_from_the_masks_at_its_own_budgets(kind: Any, tmp_path: Path) -> None:
    path, masks, _ = first_run(gmp(), tmp_path)
    alone = kind(0.7, update_every=4)
    make_trainer(tmp_path, callbacks=[alone], max_epochs=1).fit(ToyModel())
    method = kind(0.7, update_every=4)
    look, zeros, _ = second_run(method, tmp_path, path)
    assert zeros.leaks == []
    assert method.registry.num_active == num_active(0.7, method.registry.numel)
    for name, mask in look.start.items():
        before, budget = masks[name], alone.registry[name].budget
        assert int(mask.sum()) == method.registry[name].budget == budget
        if budget >= before.sum():
            assert (mask & before).sum() == before.sum()
        else:
            assert not (mask & ~before).any()
        assert look.moments[name][~(mask & before)].count_nonzero() == 0


def test_a_latent_method_goes_on_from_the_zeros(tmp_path: Path) -> None:
    path, masks, _ = first_run(gmp(), tmp_path)
    look, zeros, _ = second_run(DST(alpha=1e-4), tmp_path, path)
    assert_same(look.start, masks)
    assert zeros.leaks == []


@pytest.mark.parametrize("step", [9, 12, 20])
def test_killed_after_the_change_of_methods_and_resumed_is_never_killed(step: int, tmp_path: Path) -> None:
    path, _, _ = first_run(RigL(0.8), tmp_path)
    expected, whole = FGGP(0.95, update_every=1, stop=0.8), StepIndexedToy(seed=7)
    make_trainer(tmp_path, callbacks=[expected], max_epochs=3).fit(whole, ckpt_path=path)
    killed = tmp_path / "killed.ckpt"
    with pytest.raises(KilledError):
        make_trainer(tmp_path, callbacks=[FGGP(0.95, update_every=1, stop=0.8), Kill(step, killed)], max_epochs=3).fit(
            StepIndexedToy(), ckpt_path=path
        )
    resumed, model = FGGP(0.95, update_every=1, stop=0.8), StepIndexedToy(seed=3)
    make_trainer(tmp_path, callbacks=[resumed], max_epochs=3).fit(model, ckpt_path=killed)
    assert_same(masks_of(resumed), masks_of(expected))
    assert resumed.step == expected.step == 16
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_three_methods_in_turn(tmp_path: Path) -> None:
    path, _, _ = first_run(RigL(0.5), tmp_path)
    middle = FGGP(0.9, update_every=1, stop=4)
    trainer = make_trainer(tmp_path, callbacks=[middle], max_epochs=2)
    trainer.fit(StepIndexedToy(), ckpt_path=path)
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    last = FixedMask()
    second_run(last, tmp_path, tmp_path / "second.ckpt")
    assert_same(masks_of(last), masks_of(middle))


def test_two_methods_give_way_to_one(tmp_path: Path) -> None:
    first = GMP(0.8, update_every=1, stop=4, include=["network.0.*"])
    second = RigL(0.5, exclude=["network.0.*"])
    trainer = make_trainer(tmp_path, callbacks=[first, second], max_epochs=1)
    trainer.fit(ToyModel())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    look, _, _ = second_run(FixedMask(), tmp_path, tmp_path / "two.ckpt")
    assert_same(look.start, masks_of(first) | masks_of(second))


def test_one_method_goes_on_and_another_takes_over(tmp_path: Path) -> None:
    def staying() -> GMP:
        return GMP(0.8, update_every=1, stop=4, include=["network.0.*"])

    first, second = staying(), RigL(0.5, exclude=["network.0.*"])
    trainer = make_trainer(tmp_path, callbacks=[first, second], max_epochs=1)
    trainer.fit(ToyModel())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    stays, takes_over = staying(), FixedMask(exclude=["network.0.*"])
    make_trainer(tmp_path, callbacks=[stays, takes_over]).fit(ToyModel(), ckpt_path=tmp_path / "two.ckpt")
    assert (stays.step, takes_over.step) == (16, 8)
    assert_same(masks_of(takes_over), masks_of(second))


def test_masks_that_no_method_takes_over_are_named(tmp_path: Path) -> None:
    path, _, _ = first_run(gmp(), tmp_path)
    with pytest.warns(UserWarning, match=r"network\.0\.weight had masks until now, but no method of this Trainer"):
        second_run(FixedMask(exclude=["network.0.*"]), tmp_path, path)


def test_two_processes_take_the_masks_over(tmp_path: Path) -> None:
    path, masks, _ = first_run(gmp(), tmp_path)

    trainer = make_trainer(
        tmp_path, strategy="ddp_fork", devices=2, max_epochs=2, callbacks=[FixedMask(), DumpRank(tmp_path)]
    )
    trainer.fit(StepIndexedToy(batch_size=4), ckpt_path=path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["weights"] for rank in (0, 1))
    for name, mask in masks.items():
        assert torch.equal(first[name], second[name])
        assert first[name][~mask].count_nonzero() == 0
        assert first[name][mask].count_nonzero() == mask.sum()


def test_a_dense_checkpoint_is_refused_and_its_weights_are_not(tmp_path: Path) -> None:
    path, _, _ = first_run(None, tmp_path)
    with pytest.raises(MisconfigurationException, match=r"holds no masks of FGGP.*load_from_checkpoint"):
        second_run(FGGP(0.9), tmp_path, path)
    method = FGGP(0.9, update_every=1)
    model = ToyModel.load_from_checkpoint(path)
    look = Look(method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, callbacks=[method, look]).fit(model)
    assert all(mask.all() for mask in look.start.values())
    assert method.registry.num_active == num_active(0.9, method.registry.numel)


def test_the_same_method_with_other_patterns_is_refused(tmp_path: Path) -> None:
    path, _, _ = first_run(gmp(), tmp_path)
    with pytest.raises(MisconfigurationException, match=r"holds no masks of GMP.*other include="):
        second_run(GMP(0.9, exclude=["network.0.*"]), tmp_path, path)


def test_masks_of_another_module_are_refused(tmp_path: Path) -> None:
    path, _, _ = first_run(gmp(), tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    state["masks"]["network.0.weight"]["shape"].reverse()
    torch.save(checkpoint, path)
    with pytest.raises(MisconfigurationException, match=r"mask of network\.0\.weight has shape \(12, 16\), but"):
        second_run(FixedMask(), tmp_path, path)


# On the same module, without a checkpoint.


@every_first
def test_fixed_masks_of_the_module_that_was_just_trained(name: str, tmp_path: Path) -> None:
    _, masks, model = first_run(FIRST[name](), tmp_path)
    method = FixedMask()
    look = Look(method)
    make_trainer(tmp_path, callbacks=[method, look]).fit(model)
    assert_same(look.start, masks)
    assert_same(masks_of(method), masks)


def test_gradual_pruning_of_the_module_that_was_just_trained(tmp_path: Path) -> None:
    _, masks, model = first_run(RigL(0.8), tmp_path)
    method = FGGP(0.95, update_every=1, stop=0.8)
    look = Look(method)
    make_trainer(tmp_path, callbacks=[method, look]).fit(model)
    assert_same(look.start, masks)
    assert method.registry.num_active == num_active(0.95, method.registry.numel)


def test_a_module_whose_weights_were_replaced_is_no_longer_the_sparse_one(tmp_path: Path) -> None:
    _, _, model = first_run(gmp(), tmp_path)
    model.load_state_dict(ToyModel().state_dict())
    method = FGGP(0.9, update_every=1)
    look = Look(method)
    make_trainer(tmp_path, callbacks=[method, look]).fit(model)
    assert all(mask.all() for mask in look.start.values())


def test_a_fit_that_is_refused_leaves_the_masks_to_the_next(tmp_path: Path) -> None:
    _, masks, model = first_run(gmp(), tmp_path)
    with pytest.raises(MisconfigurationException):
        make_trainer(tmp_path, callbacks=[FGGP(0.999, min_active=20)]).fit(model)
    method = FixedMask()
    make_trainer(tmp_path, callbacks=[method]).fit(model)
    assert_same(masks_of(method), masks)


@pytest.mark.parametrize("error", [False, True])
def test_a_resume_that_never_trains_is_forgotten_by_the_next_fit(error: bool, tmp_path: Path) -> None:
    """Its weights are there, with their masks; another Trainer begins a schedule of its own."""

    class Stops(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise RuntimeError("stopped here")

    path, masks, _ = first_run(gmp(), tmp_path)
    method, model = gmp(), StepIndexedToy(seed=7)
    others, epochs = ([Stops()], 3) if error else ([], 1)  # the checkpoint is from the end of the first epoch
    trainer = make_trainer(tmp_path, callbacks=[*others, method], max_epochs=epochs)
    with pytest.raises(RuntimeError, match="stopped here") if error else nullcontext():
        trainer.fit(model, ckpt_path=path)
    look = Look(method)
    make_trainer(tmp_path, callbacks=[method, look], max_epochs=2).fit(model)
    assert_same(look.start, masks)
    assert (method.step, method.run.origin, method.run.total_steps) == (24, 8, 16)


# From weights alone.


@every_first
def test_fixed_masks_are_the_zeros_of_loaded_weights(name: str, tmp_path: Path) -> None:
    path, _, _ = first_run(FIRST[name](), tmp_path)
    model = ToyModel.load_from_checkpoint(path)
    zeros = {weight: parameter != 0 for weight, parameter in model.named_parameters()}
    method = FixedMask()
    make_trainer(tmp_path, callbacks=[method]).fit(model)
    assert_same(masks_of(method), {weight: zeros[weight] for weight in method.registry})
    assert method.registry.sparsity > 0.3


def test_a_method_that_would_wake_the_zeros_says_so(tmp_path: Path) -> None:
    path, _, _ = first_run(gmp(), tmp_path)
    with pytest.warns(UserWarning, match=r"network\.0\.weight.* have zeros that look pruned.*FixedMask"):
        make_trainer(tmp_path, callbacks=[FGGP(0.9)]).fit(ToyModel.load_from_checkpoint(path))


def test_fixed_masks_by_path_go_on_two_processes(tmp_path: Path) -> None:
    path, masks, _ = first_run(dst(), tmp_path)
    first, second = fit_two_processes(ToyModel.load_from_checkpoint(path), tmp_path, [FixedMask(path)])
    for name, mask in masks.items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert first["weights"][name][~mask].count_nonzero() == 0


# A method less.


@pytest.mark.filterwarnings("ignore:GMP at step 8. resumed with 16 steps")
@pytest.mark.parametrize("goes_on", ["from a checkpoint", "in the module"])
@pytest.mark.parametrize("advice", [False, True])
def test_masks_of_a_method_that_is_left_out_are_missed(goes_on: str, advice: bool, tmp_path: Path) -> None:
    def stays() -> GMP:
        return GMP(0.5, include=["network.0.*"])

    kept, path = stays(), tmp_path / "both.ckpt"
    model: Any = ToyModel()
    trainer = make_trainer(tmp_path, callbacks=[kept, GMP(0.8, include=["network.2.*"])], max_epochs=1)
    trainer.fit(model)
    trainer.save_checkpoint(path)
    pruned: Tensor = model.network[2].weight == 0
    assert float(pruned.float().mean()) == pytest.approx(0.8, abs=0.01)

    more = [FixedMask(include=["network.2.*"])] if advice else []
    from_file = goes_on == "from a checkpoint"
    model = ToyModel() if from_file else model
    trainer = make_trainer(tmp_path, callbacks=[stays() if from_file else kept, *more], max_epochs=2)
    with nullcontext() if advice else pytest.warns(UserWarning, match="network.2.weight had masks until now"):
        trainer.fit(model, ckpt_path=path if from_file else None)
    assert bool((model.network[2].weight[pruned] == 0).all()) is advice


# A finder before a later training.


class Findable(StepIndexedToy):
    """What finders ask of a module: the numbers that they would set."""

    lr = 0.1
    batch_size = 8


def _finder(name: str) -> L.Callback:
    if name == "learning rate":
        return LearningRateFinder(num_training_steps=4, update_attr=False)
    return BatchSizeFinder(steps_per_trial=1, max_trials=1, init_val=8)


@pytest.mark.filterwarnings("ignore:RigL at step .*resumed with 16 steps")
@pytest.mark.parametrize("finder", ["learning rate", "batch size"])
@pytest.mark.parametrize("trains", ["another module", "the same module", "the same module in the same Trainer"])
@pytest.mark.parametrize("evaluates", [False, True])
def test_a_finder_does_not_change_how_a_later_training_begins(
    trains: str, finder: str, evaluates: bool, tmp_path: Path
) -> None:
    def second(*finders: L.Callback) -> tuple[Any, ...]:
        method, model = RigL(0.5, update_every=2), Findable()
        trainer = make_trainer(tmp_path, callbacks=[method], max_epochs=1)
        trainer.fit(model)
        if evaluates:
            trainer.save_checkpoint(tmp_path / "first.ckpt")
            trainer.validate(model, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
        if trains.endswith("Trainer"):
            set_callbacks(trainer, [*callbacks_of(trainer), *finders])
            trainer.fit_loop.max_epochs = 2
        else:
            trainer = make_trainer(tmp_path, callbacks=[method, *finders], max_epochs=1)
        trainer.fit(Findable(seed=1) if trains == "another module" else model)
        run = method.run
        return method.step, run.origin, run.timetable, method.registry.num_updates

    assert second(_finder(finder)) == second()
