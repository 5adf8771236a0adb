"""One-shot pruning without a Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_sparse import GMP, FixedMask, apply_masks, prune
from lightning_sparse.functional import num_active, uniform
from lightning_sparse.masks import MaskRegistry
from lightning_sparse.schedules import Linear
from tests.helpers import ToyModel, make_trainer

if TYPE_CHECKING:
    from pathlib import Path

#   index   0    1    2    3   |  4    5    6    7
A, B = [0.9, -0.6, 0.5, -0.7], [0.3, 0.1, -0.4, 0.05]


def network(rows: list[list[float]]) -> nn.ModuleList:
    module = nn.ModuleList(nn.Linear(len(row), 1, bias=False) for row in rows)
    for layer, row in zip(module, rows, strict=True):
        layer.weight = nn.Parameter(torch.tensor([row]))
    return module


def kept(masks: dict[str, torch.Tensor]) -> list[list[int]]:
    return [mask.flatten().nonzero().flatten().tolist() for mask in masks.values()]


def test_together_the_smallest_of_all_go() -> None:
    assert kept(prune(network([A, B]), 0.5)) == [[0, 1, 2, 3], []]


def test_layer_by_layer_the_smallest_of_each_go() -> None:
    assert kept(prune(network([A, B]), 0.5, allocation="uniform")) == [[0, 3], [0, 2]]


def test_by_scores_of_ones_own() -> None:
    scores = {"0.weight": torch.tensor([[1.0, 2.0, -3.0, 4.0]]), "1.weight": torch.zeros(1, 4)}
    assert kept(prune(network([A, B]), 0.75, scores=scores)) == [[2, 3], []]
    assert kept(prune(network([A, B]), 0.5, allocation="uniform", scores=lambda name, weight: 1 / weight)) == [
        [1, 2],
        [1, 3],
    ]


def test_two_of_four() -> None:
    assert kept(prune(network([A, B]), 0.5, allocation="uniform", pattern="2:4")) == [[0, 3], [0, 2]]


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
@pytest.mark.parametrize("allocation", ["global", "uniform", "er", "erk"])
def test_budgets_are_exact_and_weights_zero(sparsity: float, allocation: Any) -> None:
    model = ToyModel()
    masks = prune(model, sparsity, allocation=allocation)
    numel = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == num_active(sparsity, numel)
    for name, mask in masks.items():
        assert model.get_parameter(name)[~mask].count_nonzero() == 0
    if allocation == "uniform":
        shapes = [tuple(mask.shape) for mask in masks.values()]
        assert [int(mask.sum()) for mask in masks.values()] == uniform(shapes, num_active(sparsity, numel))


def test_frozen_weights_are_pruned_too() -> None:
    assert len(prune(ToyModel().requires_grad_(False), 0.5)) == 3


def test_a_method_goes_on_from_it(tmp_path: Path) -> None:
    model = ToyModel()
    masks = prune(model, 0.6)
    method = FixedMask()
    make_trainer(tmp_path, callbacks=[method]).fit(model)
    assert all(torch.equal(method.registry[name].mask, mask) for name, mask in masks.items())


@pytest.mark.parametrize("wrapper", [nn.DataParallel, AveragedModel, torch.compile])
def test_what_wraps_a_module_is_left_out_of_account(wrapper: Any, tmp_path: Path) -> None:
    model = ToyModel()
    wrapped = wrapper(model)
    masks = prune(wrapped, 0.8)
    inner = getattr(wrapped, "module", model)  # an average is a copy
    method = FixedMask()
    make_trainer(tmp_path, callbacks=[method], max_epochs=1).fit(inner)
    assert all(torch.equal(method.inherited[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("scores", [None, lambda name, weight: 1.0 / (1.0 + weight.abs())])
def test_pruned_further_nothing_wakes(scores: Any) -> None:
    model = ToyModel()
    first, second = prune(model, 0.5), prune(model, 0.8, scores=scores)
    assert not any((second[name] & ~first[name]).any() for name in first)


def test_a_loop_of_ones_own_holds_the_masks() -> None:
    model = ToyModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = prune(model, 0.8)
    for batch in model.train_dataloader():
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apply_masks(model, masks)
    assert all(model.get_parameter(name)[~mask].count_nonzero() == 0 for name, mask in masks.items())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sparsity": 80}, r"sparsity is 80.*Did you mean 0\.8"),
        ({"sparsity": 1.0}, r"sparsity is 1"),
        ({"sparsity": Linear(0.0, 0.5)}, r"sparsity is Linear.*give a finite number"),
        ({"sparsity": 0.5, "allocation": "all"}, r"allocation is 'all'"),
        ({"sparsity": 0.5, "pattern": "2:4"}, r"chosen layer by layer"),
        ({"sparsity": 0.5, "scores": {}}, r"scores has none for 0\.weight"),
        ({"sparsity": 0.5, "scores": lambda name, weight: weight[0]}, r"scores of 0\.weight are \(4,\)"),
        ({"sparsity": 0.5, "scores": lambda name, weight: weight * float("nan")}, r"4 scores of 0\.weight are NaN"),
        ({"sparsity": 0.5, "scores": lambda name, weight: None}, r"scores of 0\.weight are NoneType"),
        ({"sparsity": 0.9999}, r"largest feasible sparsity"),
        ({"sparsity": 0.5, "include": ["none"]}, r"matches no parameter"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(arguments: dict[str, Any], sentence: str) -> None:
    module = network([A, B])
    with pytest.raises(Exception, match=sentence):
        prune(module, **arguments)
    assert [weight.tolist() for weight in module.parameters()] == [torch.tensor([row]).tolist() for row in (A, B)]
    assert MaskRegistry.last_left(module) is None


def test_a_module_in_training_is_refused(tmp_path: Path) -> None:
    class Prunes(ToyModel):
        def on_train_epoch_end(self) -> None:
            prune(self, 0.5)

    with pytest.raises(ValueError, match=r"is in training, .* Call prune before fit"):
        make_trainer(tmp_path, callbacks=[GMP(0.5)]).fit(Prunes())
