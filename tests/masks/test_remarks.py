"""What a user is told of a plan: a sentence of what was found and one of what to do, over all layers."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import GMP
from lightning_sparse.masks import select_weights
from tests.helpers import make_trainer


class Mixer(nn.Module):
    """A module that says nothing of what its matrices do."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.matrices = nn.ParameterDict()
        self.mixing = nn.Parameter(torch.ones(sizes or (10, 10)))


class Gated(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.gates = nn.Parameter(torch.ones(30, 2))


def remark_on(module: nn.Module, **patterns: Any) -> str:
    remarks = select_weights(module, **patterns).remarks
    return remarks[0] if len(remarks) == 1 else str(remarks or "")


def advised(sentence: str) -> list[str]:
    found = re.search(r"include=(\[.*\])\.", sentence)
    assert found
    return ast.literal_eval(found[1])


def test_a_large_share_of_unknown_modules_is_told_with_counts_and_names() -> None:
    module = nn.ModuleDict({"a": Mixer(), "b": Mixer(), "linear": nn.Linear(10, 10), "norm": nn.LayerNorm(10)})
    assert remark_on(module) == (
        "200 of 300 weights in matrices (67%) stay dense, because their modules are unknown: Mixer. To mask them,"
        " write include=['*', 'Mixer']."
    )


@pytest.mark.parametrize(
    "module",
    [
        nn.ModuleDict({"it": Mixer(), "linear": nn.Linear(10, 10)}),
        nn.ModuleDict({"it": nn.ParameterList([torch.ones(9, 9)]), "linear": nn.Linear(2, 2)}),
        nn.ModuleDict({"it": Gated(), "linear": nn.Linear(2, 2)}),
        nn.Sequential(*(Gated() for _ in range(150)), nn.Linear(2, 2)),
        nn.ModuleDict({"a": Mixer(), "b": nn.ParameterList([torch.ones(9, 9)]), "c": Gated(), "d": nn.Linear(2, 2)}),
    ],
)
def test_what_is_advised_masks_it(module: nn.Module) -> None:
    include = advised(remark_on(module))
    plan = select_weights(module, include=include)
    assert plan.coverage == 1.0
    assert not plan.remarks


def test_the_advice_on_many_layers_is_short() -> None:
    sentence = remark_on(nn.Sequential(*(Gated() for _ in range(150))))
    assert advised(sentence) == ["*", "*.gates"]
    assert len(sentence) < 200


def test_what_include_says_already_stays_in_the_advice() -> None:
    module = nn.ModuleDict({"it": nn.ModuleList([Mixer(), nn.Linear(3, 3)]), "linear": nn.Linear(10, 10)})
    assert advised(remark_on(module, include=["it.*", "@last"])) == ["it.*", "@last", "Mixer"]


@pytest.mark.parametrize(
    ("module", "patterns"),
    [
        (nn.ModuleDict({"it": Mixer(2, 2), "linear": nn.Linear(10, 10)}), {}),
        (nn.ModuleDict({"it": Mixer(), "linear": nn.Linear(2, 2)}), {"exclude": ["it.*"]}),
        (nn.ModuleDict({"it": Mixer(), "linear": nn.Linear(2, 2)}), {"include": ["linear.*"]}),
        (nn.ModuleDict({"it": Mixer().requires_grad_(False), "linear": nn.Linear(2, 2)}), {}),
        (nn.ModuleDict({"it": nn.Embedding(100, 10), "linear": nn.Linear(2, 2)}), {}),
    ],
)
def test_what_is_small_or_left_out_is_not_told(module: nn.Module, patterns: dict[str, Any]) -> None:
    assert not select_weights(module, **patterns).remarks


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_large_share_of_parametrized_weights_is_told_and_the_plan_says_what_to_do() -> None:
    module = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(10, 10)), nn.utils.weight_norm(nn.Linear(10, 10)), nn.Linear(2, 2)
    )
    assert re.match(
        r"\d+ of \d+ weights in matrices \(98%\) stay dense because their layers compute", remark_on(module)
    )
    table = str(select_weights(module))
    for name in ("0.parametrizations.weight.original1", "1.weight_v"):
        assert re.search(rf"{re.escape(name)} .* remove the norm before fit, or give its full name in include=", table)
        assert select_weights(module, include=["*", name]).coverage == pytest.approx(104 / 224)


def test_the_direction_of_a_weight_norm_that_is_named_is_masked_with_the_danger_told() -> None:
    module = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 6, 3, groups=2)))
    plan = select_weights(module, include=["0.parametrizations.weight.original1"])
    (candidate,), (remark,) = plan.masked, plan.remarks
    assert candidate.rows(candidate.parameter).shape == (6, 18)
    assert "under weight norm, an output becomes NaN when all its weights are pruned" in remark


def test_a_zero_of_a_direction_is_a_zero_of_the_weight_and_a_row_of_zeros_is_nan() -> None:
    """Why a direction is masked only where it is named: the first holds exactly, and the second ends a training."""
    layer: Any = parametrizations.weight_norm(nn.Linear(4, 3))
    direction = layer.get_parameter("parametrizations.weight.original1")
    direction.data[0, 1] = 0.0
    direction.data[2] = 0.0
    assert layer.weight[0, 1] == 0
    assert layer.weight[:2].isfinite().all()
    assert layer.weight[2].isnan().all()


@pytest.mark.parametrize(
    ("include", "idle"),
    [
        (["linear.*", "*norm*"], "'*norm*' (norm)"),
        (["linear.*", "linear.bias"], "'linear.bias' (bias)"),
        (["linear.*", "norm.weight", "LayerNorm"], "'norm.weight' (norm), 'LayerNorm' (norm)"),
    ],
)
def test_a_pattern_that_masks_nothing_is_told_with_the_reason(include: list[str], idle: str) -> None:
    module = nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    assert remark_on(module, include=include).startswith(f"These patterns in include= mask nothing: {idle}. To mask")


def test_a_pattern_for_what_is_frozen_yet_is_not_idle() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4).requires_grad_(False)})
    assert not select_weights(module, include=["a.*", "b.*"]).remarks


class Told(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.it, self.head = Mixer(4, 4), nn.Linear(4, 2)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.head(batch[0] @ self.it.mixing).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_method_warns_once_when_training_begins(tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4)
    with pytest.warns(UserWarning, match=r"16 of 24 weights in matrices \(67%\) stay dense") as caught:
        make_trainer(tmp_path, callbacks=[GMP(sparsity=0.5)], max_epochs=1).fit(Told(), data)
    assert len([warning for warning in caught if "Mixer" in str(warning.message)]) == 1
