"""Masks given to a plain module, and what the next training makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import DST, FGGP, GMP, SET, FixedMask, MaskRegistry, RigL, SparseMethod, apply_masks, save_masks
from lightning_sparse.functional import num_active
from lightning_sparse.masks import CheckpointError
from tests.helpers import ToyModel, make_trainer
from tests.methods.spies import ZeroWatch, masks_of

Masks = dict[str, Tensor]


class Look(L.Callback):
    """Copies the masks with which training begins, and those after each step."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method
        self.steps: list[Masks] = []

    def on_train_start(self, *_: Any) -> None:
        """Look."""
        self.steps.append(masks_of(self.method))

    def on_train_batch_end(self, *_: Any) -> None:
        """Look."""
        self.steps.append(masks_of(self.method))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Masks]:
    """A folder with the weights, the masks and the checkpoint of a training to 0.9; the masks."""
    method, model = FGGP(0.9, update_every=1), ToyModel()
    trainer = make_trainer(tmp_path, callbacks=[method])
    trainer.fit(model)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    save_masks(tmp_path / "fggp.masks", method)
    trainer.save_checkpoint(tmp_path / "fggp.ckpt")
    return tmp_path, masks_of(method)


def loaded(root: Path) -> ToyModel:
    """A module of another process: its weights are all that it knows of the training."""
    model = ToyModel(seed=7)
    model.load_state_dict(torch.load(root / "weights.pt", weights_only=True))
    return model


def train(method: SparseMethod, model: L.LightningModule, root: Path) -> Look:
    look, zeros = Look(method), ZeroWatch(method)
    make_trainer(root, callbacks=[method, look, zeros]).fit(model)
    assert zeros.leaks == []
    return look


def assert_same(first: Masks, second: Masks) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(mask, second[name]) for name, mask in first.items())


@pytest.mark.parametrize("source", ["fggp.masks", "fggp.ckpt", "mapping"])
@pytest.mark.parametrize("kind", [FGGP, GMP])
def test_gradual_pruning_goes_on_and_never_wakes_a_weight(kind: Any, source: str, saved: tuple[Path, Masks]) -> None:
    root, masks = saved
    model, method = loaded(root), kind(0.95, update_every=1, stop=0.8)
    apply_masks(model, masks if source == "mapping" else root / source)
    look = train(method, model, root)
    assert_same(look.steps[0], masks)
    assert not any((after[name] & ~mask).any() for after in look.steps for name, mask in masks.items())
    assert method.registry.num_active == num_active(0.95, method.registry.numel)


@pytest.mark.parametrize("kind", [RigL, SET])
def test_prune_and_grow_begins_among_the_masks(kind: Any, saved: tuple[Path, Masks]) -> None:
    root, masks = saved
    model, method = loaded(root), kind(0.95, update_every=3)
    apply_masks(model, root / "fggp.masks")
    look = train(method, model, root)
    for name, mask in look.steps[0].items():
        assert int((mask & masks[name]).sum()) == min(int(mask.sum()), int(masks[name].sum()))
    assert method.registry.num_active == num_active(0.95, method.registry.numel)


@pytest.mark.parametrize("method", [DST(1e-4, reset_sparsity=1.1), FixedMask()], ids=["dst", "fixed"])
def test_the_others_begin_with_the_masks(method: SparseMethod, saved: tuple[Path, Masks]) -> None:
    root, masks = saved
    model = loaded(root)
    apply_masks(model, root / "fggp.masks")
    assert_same(train(method, model, root).steps[0], masks)


def test_weights_that_were_dense_are_zeroed(saved: tuple[Path, Masks]) -> None:
    root, masks = saved
    model, before = ToyModel(seed=7), ToyModel(seed=7).state_dict()
    apply_masks(model, root / "fggp.masks")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] * masks[name] if name in masks else before[name])


def test_the_registry_of_a_method_is_a_mapping_too(saved: tuple[Path, Masks]) -> None:
    root, _ = saved
    method = GMP(0.5, update_every=1)
    make_trainer(root, callbacks=[method]).fit(ToyModel())
    model = ToyModel(seed=7)
    apply_masks(model, method.registry)
    assert_same(MaskRegistry.left_in(model), masks_of(method))


def test_the_zeros_of_a_checkpoint_without_masks_are_taken(saved: tuple[Path, Masks]) -> None:
    root, masks = saved
    model = ToyModel(seed=7)
    apply_masks(model, root / "weights.pt")
    assert_same(train(FixedMask(), model, root).steps[0], masks)


def test_the_method_that_trained_the_module_begins_anew(saved: tuple[Path, Masks]) -> None:
    root, masks = saved
    model, method = ToyModel(), FGGP(0.95, update_every=1)
    train(method, model, root)
    model.load_state_dict(loaded(root).state_dict())
    apply_masks(model, masks)
    assert_same(train(method, model, root).steps[0], masks)
    assert method.step == 16
    after = masks_of(method)
    assert_same(train(method, model, root).steps[0], after)  # a third fit goes on with its own


def test_what_was_pruned_before_and_is_not_named_stays_pruned() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    eye = torch.eye(2, dtype=torch.bool)
    apply_masks(model, {"0.weight": eye})
    apply_masks(model, {"1.weight": ~eye})
    assert_same(MaskRegistry.left_in(model), {"0.weight": eye, "1.weight": ~eye})


def test_a_compiled_module_is_the_one_inside() -> None:
    model = nn.Linear(2, 2)
    apply_masks(torch.compile(model), {"weight": torch.eye(2, dtype=torch.bool)})  # type: ignore[arg-type]
    assert list(MaskRegistry.left_in(model)) == ["weight"]


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    return model


def test_a_tied_weight_may_be_named_by_any_of_its_names() -> None:
    eye = torch.eye(2, dtype=torch.bool)
    for masks in ({"1.weight": eye}, {"0.weight": eye, "1.weight": eye}):
        apply_masks(model := tied(), masks)
        assert_same(MaskRegistry.left_in(model), {"0.weight": eye})


# What cannot be is refused, and nothing has changed.

GOOD = torch.eye(2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("masks", "sentence"),
    [
        ({}, "masks is empty; give a bool tensor"),
        ({"0.weight": GOOD.float()}, r"masks\['0\.weight'\] is torch\.float32; give a tensor of torch\.bool"),
        ({"0.weight": [[True]]}, r"masks\['0\.weight'\] is list; give a tensor"),
        ({"0.wieght": GOOD}, r"masks of 0\.wieght, which the module does not have\. .* near them: 0\.weight"),
        ({"0.weight": GOOD[0]}, r"0\.weight is \(2, 2\) and its mask \(2,\)"),
        ({"0.weight": GOOD, "1.weight": ~GOOD}, "different masks for 0.weight and 1.weight, which are one weight"),
        (GMP(0.5), "masks is a GMP; give a path, or a mapping"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks: Any, sentence: str) -> None:
    model = tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if isinstance(masks, dict) and masks and "1.weight" not in masks:
        masks = {"0.bias": torch.zeros(2, dtype=torch.bool), **masks}  # one that would fit, first
    with pytest.raises(ValueError, match=sentence):
        apply_masks(model, masks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert MaskRegistry.left_in(model) == {}


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no file"):
        apply_masks(nn.Linear(2, 2), tmp_path / "none.masks")


def test_masks_of_the_network_inside_are_refused_with_the_names_of_the_module(saved: tuple[Path, Masks]) -> None:
    root, _ = saved
    with pytest.raises(ValueError, match=r"network\.0\.weight,.* near them: 0\.weight,.* the one given to fit"):
        apply_masks(ToyModel().network, root / "fggp.masks")


def test_zeros_under_other_names_are_refused_with_both(tmp_path: Path) -> None:
    torch.save({"other": torch.eye(2)}, tmp_path / "eye.pt")
    with pytest.raises(CheckpointError, match=r"asked for, which are weight; it has other\."):
        apply_masks(nn.Linear(2, 2), tmp_path / "eye.pt")


def _evaluated(root: Path, ckpt_path: bool = True) -> tuple[FGGP, ToyModel, Masks]:
    """A method and its module, with the weights that validate has loaded; and masks other than its own."""
    model, method = ToyModel(), FGGP(0.95, update_every=1)
    trainer = make_trainer(root, callbacks=[method])
    trainer.fit(model)
    trainer.save_checkpoint(root / "own.ckpt")
    others = {name: torch.zeros_like(mask) for name, mask in masks_of(method).items()}
    for name, mask in others.items():
        mask.view(-1)[::3] = True
        assert not torch.equal(mask, masks_of(method)[name])
    if ckpt_path:
        make_trainer(root, callbacks=[method]).validate(model, ckpt_path=root / "own.ckpt", verbose=False)
    return method, model, others


def test_masks_go_before_the_state_of_a_checkpoint_that_was_validated_earlier(tmp_path: Path) -> None:
    method, model, others = _evaluated(tmp_path)
    apply_masks(model, others)
    train(method, model, tmp_path)
    assert_same(dict(method.inherited), others)


def test_masks_do_not_go_before_a_checkpoint_that_is_validated_later(tmp_path: Path) -> None:
    method, model, others = _evaluated(tmp_path, ckpt_path=False)
    own = masks_of(method)
    apply_masks(model, {name: mask | own[name] for name, mask in others.items()})  # which the checkpoint's weights fit
    make_trainer(tmp_path, callbacks=[method]).validate(model, ckpt_path=tmp_path / "own.ckpt", verbose=False)
    look = train(method, model, tmp_path)
    assert not method.inherited
    assert_same(look.steps[0], own)


@pytest.mark.filterwarnings("ignore:FGGP at step 16. resumed with 32 steps of training")
def test_the_checkpoint_of_a_fit_goes_before_masks_that_were_given(tmp_path: Path) -> None:
    method, model, others = _evaluated(tmp_path)
    own = masks_of(method)
    apply_masks(model, others)
    look = Look(method)
    make_trainer(tmp_path, callbacks=[method, look], max_epochs=4).fit(model, ckpt_path=tmp_path / "own.ckpt")
    assert not method.inherited
    assert_same(look.steps[0], own)


def test_a_module_in_training_is_refused(tmp_path: Path) -> None:
    class Apply(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            apply_masks(pl_module, {"network.0.weight": torch.ones(16, 12, dtype=torch.bool)})

    with pytest.raises(ValueError, match=r"ToyModel is in training.* before fit"):
        make_trainer(tmp_path, callbacks=[GMP(0.5), Apply()]).fit(ToyModel())
