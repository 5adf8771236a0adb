"""Pruning by Wanda's scores: worked out by hand, against a slow reference, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse import prune
from lightning_sparse.masks import MaskRegistry
from lightning_sparse.masks.plan import judge_parameters
from lightning_sparse.methods.wanda import wanda_scores


def two_by_four() -> nn.Linear:
    layer = nn.Linear(4, 2, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0, 4.0], [8.0, 7.0, -6.0, 5.0]]))
    return layer


# Columns of norms sqrt(9 + 16) = 5, 2, 1 and sqrt(1 + 0) = 1.
BATCHES = [torch.tensor([[3.0, 0.0, 1.0, 1.0]]), torch.tensor([[4.0, -2.0, 0.0, 0.0]])]


def test_eight_weights_by_hand() -> None:
    layer = two_by_four()
    # |W| * norms: [5 4 3 4], [40 14 6 5]. Each output keeps its two largest; of the equal ones the first.
    masks = prune(layer, 0.5, scores="wanda", batches=BATCHES)
    assert masks["weight"].tolist() == [[True, True, False, False], [True, True, False, False]]
    # By magnitude each output would have kept others.
    magnitude = prune(two_by_four(), 0.5, allocation="uniform")
    assert magnitude["weight"].tolist() == [[False, False, False, False], [True, True, True, True]]


def test_all_outputs_together_where_that_is_asked_for() -> None:
    masks = prune(two_by_four(), 0.625, scores="wanda", batches=BATCHES, pattern="any")
    assert masks["weight"].tolist() == [[False, False, False, False], [True, True, True, False]]


def test_two_of_four_of_each_output() -> None:
    masks = prune(two_by_four(), 0.5, scores="wanda", batches=BATCHES, pattern="2:4")
    assert masks["weight"].sum(dim=1).tolist() == [2, 2]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv1d(6, 4, 3, padding=1),
        nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(6, 6, 3, groups=6, padding="same"),
        nn.ConvTranspose2d(6, 4, 3, stride=2),
    ],
    ids=lambda layer: f"{type(layer).__name__}",
)
def test_the_norm_is_of_exactly_what_a_weight_meets(layer: nn.Module) -> None:
    # A weight meets x where its product with x is what it adds: the outputs' sum changes by x if it grows by 1.
    torch.manual_seed(0)
    dims = (2, 5, 6) if isinstance(layer, nn.Linear) else (3, 6, 8) if isinstance(layer, nn.Conv1d) else (2, 6, 7, 7)
    batches = [torch.randn(dims) for _ in range(2)]
    scores = wanda_scores(layer, batches, judge_parameters(layer).weights)["weight"]
    weight = layer.get_parameter("weight")
    for index in (0, weight.numel() // 3, weight.numel() - 1):
        one = torch.zeros(weight.numel())
        one[index] = 1.0
        own = {"weight": one.view_as(weight), "bias": torch.zeros_like(layer.get_parameter("bias"))}
        met = torch.cat([torch.func.functional_call(layer, own, (batch,)).flatten() for batch in batches])
        expected = weight.flatten()[index].abs() * met.norm()
        torch.testing.assert_close(scores.flatten()[index], expected.detach())


class Conv1D(nn.Module):
    """The linear layer of transformers' GPT-2, which stores (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_a_layer_that_stores_inputs_first() -> None:
    layer, x = Conv1D(4, 6), torch.randn(3, 5, 6)
    scores = wanda_scores(layer, [x], judge_parameters(layer).weights)["weight"]
    torch.testing.assert_close(scores, layer.weight.detach().abs() * x.flatten(0, 1).norm(dim=0).unsqueeze(1))
    masks = prune(layer, 0.5, scores="wanda", batches=[x])
    assert masks["weight"].sum(dim=0).tolist() == [3] * 4


class Network(nn.Module):
    """Dropout, BatchNorm, and a call by keyword: what calibration must leave as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, 2)

    def forward(self, inputs: Tensor, scale: float = 1.0) -> Tensor:
        return self.last(input=self.drop(F.relu(self.norm(self.first(inputs)))) * scale)


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(4, 6),
        (torch.ones(4, 6), torch.zeros(4)),
        [torch.ones(4, 6), torch.zeros(4)],
        {"inputs": torch.ones(4, 6), "scale": 1.0},
    ],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_batches_as_loaders_give_them_and_nothing_else_changes(batch: Any) -> None:
    network = Network()
    network.norm.eval()
    before = {name: value.clone() for name, value in network.state_dict().items() if "weight" not in name}
    random = torch.get_rng_state()
    masks = prune(network, 0.5, scores="wanda", batches=[batch])
    assert masks.keys() == {"first.weight", "last.weight"}
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training
    assert not network.norm.training
    assert not network.first._forward_pre_hooks
    assert all(parameter.grad is None for parameter in network.parameters())


def test_half_precision_does_not_overflow() -> None:
    layer = nn.Linear(4, 2).half()
    scores = wanda_scores(layer, [torch.full((64, 4), 300.0).half()], judge_parameters(layer).weights)["weight"]
    assert scores.dtype == torch.float32
    assert bool(scores.isfinite().all())


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        (two_by_four, {"scores": "wanda"}, r"give batches= too"),
        (two_by_four, {"batches": BATCHES}, r"only with scores='wanda'"),
        (two_by_four, {"scores": "wander", "batches": BATCHES}, r"scores is 'wander'; give 'wanda'"),
        (two_by_four, {"scores": "wanda", "batches": []}, r"batches is empty"),
        (two_by_four, {"scores": "wanda", "batches": [torch.ones(3, 7)]}, r"cannot compute on a calibration batch"),
        (two_by_four, {"scores": "wanda", "batches": [torch.full((1, 4), torch.nan)]}, r"8 scores of weight are NaN"),
        (attention, {"scores": "wanda", "batches": [torch.ones(1, 3, 8)]}, r"not self_attn\.in_proj_weight"),
        (
            attention,
            {"scores": "wanda", "batches": [torch.ones(1, 3, 8)], "exclude": ["*in_proj*"]},
            r"No input came to self_attn\.out_proj\.weight",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(module: Any, arguments: dict[str, Any], sentence: str) -> None:
    network = module()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        prune(network, 0.5, **arguments)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert MaskRegistry.last_left(network) is None
