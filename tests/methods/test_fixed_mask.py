"""FixedMask: where its masks come from, that they stay, and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse import GMP, FixedMask, save_masks
from lightning_sparse.cli import SparseCLI
from lightning_sparse.functional import unpack
from lightning_sparse.masks import CheckpointError, MaskGroup, MaskRegistry, select_weights
from tests.helpers import ToyModel, fit_two_processes, make_trainer, within_training
from tests.methods.cases import random_masks
from tests.methods.spies import ZeroWatch, masks_of


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, mask in first.items():
        assert torch.equal(mask, second[name]), name


def zero(model: nn.Module, masks: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)


def fit(method: FixedMask, root: Path, model: Any = None, **overrides: Any) -> ToyModel:
    model = ToyModel() if model is None else model
    make_trainer(root, callbacks=[method], **overrides).fit(model)
    return model


# By hand. Eight weights of one neuron, of which the loss is their sum of squares with inputs of one:
#   index   0    1    2    3    4    5    6    7
WEIGHTS = [0.5, 0.0, -1.0, 0.0, 0.0, 2.0, 0.0, 0.25]


class Neuron(L.LightningModule):
    """One neuron with eight weights; its loss is the sum of (w - 1)², so that the gradient of each is 2 (w - 1)."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1, bias=False)
        self.layer.weight = nn.Parameter(torch.tensor([weights]))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.mse_loss(self.layer.weight, torch.ones(1, 8), reduction="sum")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.25)

    def train_dataloader(self) -> list[Tensor]:
        return [torch.zeros(1)]


def test_a_step_trains_the_active_weights_alone(tmp_path: Path) -> None:
    # w - 0.25 * 2 (w - 1) = (w + 1) / 2 where w is not zero; zeros stay.
    neuron, fixed = Neuron(WEIGHTS), FixedMask()
    make_trainer(tmp_path, callbacks=[fixed], max_epochs=1).fit(neuron)
    assert neuron.layer.weight.tolist() == [[0.75, 0, 0.0, 0, 0, 1.5, 0, 0.625]]
    assert fixed.registry["layer.weight"].mask.tolist() == [[True, False, True, False, False, True, False, True]]
    assert fixed.registry.sparsity == fixed.target_sparsity() == fixed.target_sparsity("layer.weight") == 0.5


def test_an_active_weight_that_has_become_zero_is_trained_on(tmp_path: Path) -> None:
    # Weight 2 is zero after the first step, as above, and 0.5 after the second: the masks were read once.
    neuron = Neuron(WEIGHTS)
    make_trainer(tmp_path, callbacks=[FixedMask()], max_epochs=2).fit(neuron)
    assert neuron.layer.weight.tolist() == [[0.875, 0, 0.5, 0, 0, 1.25, 0, 0.8125]]


def test_masks_that_are_given_are_laid_on_dense_weights(tmp_path: Path) -> None:
    mask = torch.tensor([[True, True, False, False, False, False, False, False]])
    neuron = Neuron([0.5] * 8)
    make_trainer(tmp_path, callbacks=[FixedMask({"layer.weight": mask})], max_epochs=1).fit(neuron)
    assert neuron.layer.weight.tolist() == [[0.75, 0.75, 0, 0, 0, 0, 0, 0]]


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5]), min_size=1, max_size=8), min_size=1, max_size=4))
def test_zeros_and_nothing_else_are_masked(rows: list[list[float]]) -> None:
    rows[0][0] = 0.0  # not dense
    module = nn.ModuleList(nn.Linear(len(row), 1, bias=False) for row in rows)
    for layer, row in zip(module, rows, strict=True):
        layer.weight = nn.Parameter(torch.tensor([row]))
    method, group = _claimed(module)
    method.initialize_masks(group)
    assert group.mask.tolist() == [value != 0.0 for row in rows for value in row]
    assert [weight.budget for weight in group] == [len(row) - row.count(0.0) for row in rows]


def _claimed(module: nn.Module) -> tuple[FixedMask, MaskGroup]:
    method = FixedMask()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (group,) = MaskRegistry().claim("method", select_weights(module).masked, [optimizer])
    return within_training(method, [group]), group


# Where masks come from.


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """The checkpoint of a network pruned by GMP, and its masks."""
    method = GMP(0.8, update_every=1, stop=3)
    trainer = make_trainer(tmp_path, callbacks=[method], max_epochs=1)
    trainer.fit(ToyModel())
    trainer.save_checkpoint(tmp_path / "gmp.ckpt")
    return tmp_path / "gmp.ckpt", masks_of(method)


def test_masks_of_another_runs_checkpoint(checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path, masks = checkpoint
    method = FixedMask(path)
    model = fit(method, tmp_path, ToyModel(seed=5))
    assert_same(masks_of(method), masks)
    for name, mask in masks.items():
        assert model.get_parameter(name)[~mask].count_nonzero() == 0


def test_masks_of_a_file(checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    save_masks(tmp_path / "gmp.masks", checkpoint[1])
    method = FixedMask(str(tmp_path / "gmp.masks"))
    fit(method, tmp_path)
    assert_same(masks_of(method), checkpoint[1])


def test_masks_of_a_state_dict_that_nothing_of_ours_has_trained(tmp_path: Path) -> None:
    masks = random_masks(ToyModel())
    masks["network.4.weight"] = torch.ones(3, 8, dtype=torch.bool)  # a layer without zeros is there too
    donor = ToyModel()
    zero(donor, masks)
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "theirs.ckpt")
    method = FixedMask(tmp_path / "theirs.ckpt")
    fit(method, tmp_path)
    assert_same(masks_of(method), masks)


def test_the_zeros_of_loaded_weights(tmp_path: Path, checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    method = FixedMask()
    fit(method, tmp_path, ToyModel.load_from_checkpoint(checkpoint[0]))
    assert_same(masks_of(method), checkpoint[1])


def test_masks_that_are_given_win_over_a_checkpoints(
    tmp_path: Path, checkpoint: tuple[Path, dict[str, Tensor]]
) -> None:
    masks = random_masks(ToyModel())
    method = FixedMask(masks)
    trainer = make_trainer(tmp_path, callbacks=[method])
    with pytest.warns(UserWarning, match="Please add the following callbacks"):
        trainer.fit(ToyModel(), ckpt_path=checkpoint[0])
    assert_same(masks_of(method), masks)


def test_excluded_weights_need_no_mask_and_stay_dense(tmp_path: Path) -> None:
    masks = random_masks(ToyModel())
    del masks["network.4.weight"]
    method = FixedMask(masks, exclude=["network.4.weight"])
    watch = ZeroWatch(method)
    model = ToyModel()
    make_trainer(tmp_path, callbacks=[method, watch]).fit(model)
    assert watch.leaks == []
    assert list(method.registry) == ["network.0.weight", "network.2.weight"]
    assert model.get_parameter("network.4.weight").count_nonzero() == 24


def test_masks_of_excluded_weights_are_not_used(tmp_path: Path) -> None:
    method = FixedMask(random_masks(ToyModel()), include=["network.0.*"])
    model = fit(method, tmp_path)
    assert list(method.registry) == ["network.0.weight"]
    assert model.get_parameter("network.4.weight").count_nonzero() == 24


def test_resuming_does_not_read_the_file_again(checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path, masks = checkpoint
    trainer = make_trainer(tmp_path, callbacks=[FixedMask(path)], max_epochs=1)
    trainer.fit(ToyModel())
    trainer.save_checkpoint(tmp_path / "fixed.ckpt")
    path.unlink()
    resumed = FixedMask(path)
    make_trainer(tmp_path, callbacks=[resumed]).fit(ToyModel(seed=9), ckpt_path=tmp_path / "fixed.ckpt")
    assert_same(masks_of(resumed), masks)
    assert resumed.step == 16


def test_two_processes_hold_the_masks_of_the_file(checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path, masks = checkpoint
    first, second = fit_two_processes(ToyModel(), tmp_path, [FixedMask(path)])
    for name, mask in masks.items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        for dump in (first, second):
            (state,) = dump["callbacks"].values()
            assert torch.equal(unpack(state["masks"][name]["bits"], mask.shape), mask)
            assert dump["weights"][name][~mask].count_nonzero() == 0


@pytest.mark.parametrize("kind", ["checkpoint", "masks"])
def test_a_path_can_be_given_on_the_command_line(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / kind)
    arguments = ["--trainer.callbacks=FixedMask", f"--trainer.callbacks.masks={path}", "--trainer.logger=false"]
    model = ["--model=lightning.pytorch.demos.boring_classes.BoringModel", "--seed_everything=0"]
    cli = SparseCLI([*model, *arguments], run=False)
    (method,) = (item for item in cli.trainer.callbacks if isinstance(item, FixedMask))  # pyright: ignore[reportAttributeAccessIssue]
    assert str(method.masks) == path


# What is refused.


def test_a_dense_module_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    model = ToyModel()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=r"no zero in network\.0\.weight, .* FixedMask\(masks=PATH\)"):
        fit(FixedMask(), tmp_path, model)
    assert_same(model.state_dict(), before)


def test_names_that_the_module_does_not_have_are_refused(tmp_path: Path) -> None:
    masks = random_masks(ToyModel())
    masks["network.zero.weight"] = masks.pop("network.0.weight")
    with pytest.raises(MisconfigurationException, match=r"masks of network\.zero\.weight, which .*network\.0\.weight"):
        fit(FixedMask(masks), tmp_path)


def test_weights_without_a_mask_are_refused(tmp_path: Path) -> None:
    masks = random_masks(ToyModel())
    del masks["network.2.weight"]
    sentence = r"no mask for network\.2\.weight; it has masks of network\.0\.weight, .*exclude=\['network\.2\.weight'\]"
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(FixedMask(masks), tmp_path)


def test_masks_of_other_shapes_are_refused_with_both(tmp_path: Path) -> None:
    masks = random_masks(ToyModel())
    masks["network.2.weight"] = masks["network.2.weight"].T
    with pytest.raises(MisconfigurationException, match=r"network\.2\.weight is \(8, 16\) and its mask \(16, 8\)"):
        fit(FixedMask(masks), tmp_path)


def test_a_mask_that_is_no_bool_tensor_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"masks\['weight'\] is torch\.float32; give a tensor of torch\.bool"):
        FixedMask({"weight": torch.eye(2)})


def test_a_file_that_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not masks")
    with pytest.raises(CheckpointError, match=r"notes\.txt is damaged or is not a checkpoint.*It is not a file of"):
        fit(FixedMask(tmp_path / "notes.txt"), tmp_path)


def test_a_dense_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save(ToyModel().state_dict(), tmp_path / "dense.pt")
    with pytest.raises(CheckpointError, match=r"dense\.pt is dense"):
        fit(FixedMask(tmp_path / "dense.pt"), tmp_path)


def test_a_layer_without_active_weights_is_named(tmp_path: Path) -> None:
    masks = random_masks(ToyModel())
    masks["network.4.weight"][:] = False
    with pytest.warns(UserWarning, match=r"network\.4\.weight has no active weight left; no signal passes"):
        fit(FixedMask(masks), tmp_path)


def test_before_training_there_is_no_sparsity() -> None:
    assert FixedMask().target_sparsity() == 0.0


class Thaw(L.Callback):
    """Lets the first layer be trained from an epoch on."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch >= self.epoch:
            pl_module.get_parameter(FIRST).requires_grad_(True)


FIRST = "network.0.weight"


def frozen_toy() -> ToyModel:
    module = ToyModel()
    module.get_parameter(FIRST).requires_grad_(False)
    return module


def pruned_are_zero(module: L.LightningModule, masks: dict[str, Tensor]) -> bool:
    return all(not module.get_parameter(name).detach()[~mask].any() for name, mask in masks.items())


def test_a_layer_that_is_trainable_at_the_second_fit_is_masked(tmp_path: Path) -> None:
    module, masks = frozen_toy(), random_masks(ToyModel())
    method = FixedMask(masks)
    make_trainer(tmp_path, max_epochs=1, callbacks=[method]).fit(module)
    module.get_parameter(FIRST).requires_grad_(True)
    make_trainer(tmp_path, max_epochs=1, callbacks=[method]).fit(module)
    assert pruned_are_zero(module, masks)
    assert torch.equal(method.registry[FIRST].mask, masks[FIRST])


@pytest.mark.parametrize("given", [True, False])
def test_a_layer_that_is_trainable_at_a_resume_is_masked(given: bool, tmp_path: Path) -> None:
    module, masks = frozen_toy(), random_masks(ToyModel())
    first = make_trainer(tmp_path, max_epochs=1, callbacks=[FixedMask(masks)])
    first.fit(module)
    first.save_checkpoint(tmp_path / "frozen.ckpt")
    again, method = ToyModel(), FixedMask(masks if given else None)
    make_trainer(tmp_path, max_epochs=2, callbacks=[method]).fit(again, ckpt_path=tmp_path / "frozen.ckpt")
    assert pruned_are_zero(again, masks)
    assert torch.equal(method.registry[FIRST].mask, masks[FIRST])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 1.0])
def test_a_given_mask_of_a_frozen_layer_is_honoured_whatever_its_zeros(sparsity: float, tmp_path: Path) -> None:
    masks = random_masks(ToyModel())
    masks[FIRST] = torch.rand(masks[FIRST].shape) >= sparsity
    module = frozen_toy()
    with torch.no_grad():
        module.get_parameter(FIRST)[:, ::2] = 0.0  # active, and zero by chance
    method = FixedMask(masks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer without an active weight is named
        make_trainer(tmp_path, max_epochs=2, callbacks=[Thaw(1), method]).fit(module)
    assert torch.equal(method.registry[FIRST].mask, masks[FIRST])
    assert pruned_are_zero(module, masks)


@pytest.mark.filterwarnings("ignore:FixedMask at step.*so left dense")
def test_zeros_that_a_dense_layer_comes_by_later_are_no_mask(tmp_path: Path) -> None:
    class Zero(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            with torch.no_grad():
                pl_module.get_parameter(FIRST)[0] = 0.0

    masks = random_masks(ToyModel())
    del masks[FIRST]
    method = FixedMask(masks)
    make_trainer(tmp_path, max_epochs=2, callbacks=[Thaw(0), Zero(), method]).fit(frozen_toy())
    assert FIRST not in method.registry


def test_a_network_whose_masked_weights_are_all_frozen_begins(tmp_path: Path) -> None:
    masks = {FIRST: random_masks(ToyModel())[FIRST]}
    others = GMP(0.5, exclude=[FIRST], update_every=1, stop=4)
    module, method = frozen_toy(), FixedMask(masks, include=[FIRST])
    trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[others, method, Thaw(1)])
    trainer.fit(module)
    assert pruned_are_zero(module, masks)
    assert torch.equal(method.registry[FIRST].mask, masks[FIRST])


def test_the_best_checkpoint_of_fewer_layers_is_compared_by_what_both_have(tmp_path: Path) -> None:
    masks = random_masks(ToyModel())
    first = make_trainer(tmp_path, max_epochs=2, callbacks=[FixedMask(masks), Thaw(1)])
    module = frozen_toy()
    first.fit(module)
    first.save_checkpoint(tmp_path / "thawed.ckpt")
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    again = make_trainer(tmp_path, max_epochs=3, callbacks=[FixedMask(masks), best], enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the best checkpoint")
        again.fit(frozen_toy(), ckpt_path=tmp_path / "thawed.ckpt")


class OwnLinear(nn.Module):
    """A class of somebody's own that holds a weight, which no rule knows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.t()


class OwnLayers(ToyModel):
    @staticmethod
    def build() -> nn.Sequential:
        return nn.Sequential(OwnLinear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), OwnLinear(8, 3))


def own_masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {name: value for name, value in OwnLayers().named_parameters() if value.dim() > 1}
    return {name: torch.rand(value.shape, generator=generator) < 0.2 for name, value in weights.items()}


@pytest.mark.filterwarnings("ignore:FixedMask at step 0. .* weights in matrices .* stay dense")
@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("are_zero", [False, True])
def test_masks_that_are_given_of_unknown_modules_are_held(as_file: bool, are_zero: bool, tmp_path: Path) -> None:
    masks, model = own_masks(), OwnLayers()
    if are_zero:
        zero(model, masks)
    save_masks(tmp_path / "own.masks", masks)
    method = FixedMask(tmp_path / "own.masks" if as_file else masks)
    fit(method, tmp_path, model)
    assert {weight.name for weight in method.weights} == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask), name


@pytest.mark.filterwarnings("ignore:FixedMask at step 0. .* weights in matrices .* stay dense")
def test_zeros_of_unknown_modules_without_masks_are_told_with_counts(tmp_path: Path) -> None:
    masks, model = own_masks(), OwnLayers()
    zero(model, masks)
    zeros = int((~masks["network.0.weight"]).sum())
    sentence = rf"zeros in weights that stay dense will be trained again: network\.0\.weight \({zeros}\)"
    with pytest.warns(UserWarning, match=sentence):
        fit(FixedMask(), tmp_path, model)
