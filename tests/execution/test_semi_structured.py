"""2:4: which layers satisfy it, what it costs, and what a GPU would be given. Tested by shapes and types, on a CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_sparse.execution import accelerate, project_to_2_4, satisfies_2_4
from lightning_sparse.execution.layers import SEMI_STRUCTURED, reason_to_stay_dense, sparse_layer
from lightning_sparse.execution.semi_structured import groups_beyond_2_4, semi_structured_linear
from tests.execution.networks import sparsify


@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([0.0, 0.5, 0.95]), st.integers(0, 99))
def test_the_two_largest_of_four_stay(rows: int, groups: int, sparsity: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(4 * groups, rows)
    layer.weight.data.mul_(torch.rand_like(layer.weight) >= sparsity)
    before = layer.weight.detach().clone()
    after: Any = project_to_2_4(layer).module.weight
    assert torch.equal(layer.weight, before)
    for old, new in zip(before.flatten().split(4), after.detach().flatten().split(4), strict=True):
        kept = sorted(old.abs().tolist())[-2:]
        assert sorted(new.abs().tolist())[-2:] == kept
        assert new.count_nonzero() == min(2, old.count_nonzero())
        assert all(n in (0, o) for n, o in zip(new.tolist(), old.tolist(), strict=True))
    assert groups_beyond_2_4(after) == 0


def test_its_cost_is_counted() -> None:
    torch.manual_seed(0)
    network = sparsify(nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10), nn.Linear(10, 5)), 0.95)
    projection = project_to_2_4(network)
    # Of random masks at 95 % a group has three weights with probability 4.8e-4, of 0.2 on average: 0.24 % of them.
    assert 0.0018 < projection.share < 0.0030
    assert list(projection.left) == ["3"]
    assert [layer.name for layer in projection.layers] == ["0", "2"]
    assert satisfies_2_4(projection.module.get_parameter("0.weight"))


def test_tied_weights_are_projected_and_counted_once() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    network[1].weight = network[0].weight
    projection = project_to_2_4(network)
    assert len(projection.layers) == 1
    assert projection.module.get_parameter("0.weight") is projection.module.get_parameter("1.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_projection_takes_any_floating_type(dtype: torch.dtype) -> None:
    assert satisfies_2_4(project_to_2_4(nn.Linear(8, 8, dtype=dtype)).module.get_parameter("weight"))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear(64, 32), "float16 and bfloat16"),
        (nn.Linear(64, 30, dtype=torch.float16), "multiple of 32 × 64"),
        (nn.Linear(96, 32, dtype=torch.bfloat16), "multiple of 32 × 64"),
        (nn.Linear(64, 32, dtype=torch.float16), "see project_to_2_4"),
        (nn.Conv2d(64, 32, 1, dtype=torch.float16), "no 2:4 form"),
    ],
)
def test_layers_that_a_gpu_would_refuse_say_why(layer: nn.Module, message: str) -> None:
    reason = reason_to_stay_dense(layer, SEMI_STRUCTURED)
    assert reason is not None
    assert message in reason


def test_what_a_gpu_is_given_is_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []

    def stored(weight: torch.Tensor) -> torch.Tensor:
        given.append(weight)
        return weight.clone()

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", stored)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    layer: Any = project_to_2_4(nn.Linear(64, 32, dtype=torch.bfloat16)).module
    own: Any = sparse_layer(layer, SEMI_STRUCTURED, 1)
    assert torch.equal(given[0], layer.weight)
    assert not given[0].requires_grad
    assert own.weight is not layer.weight
    assert torch.equal(own.bias, layer.bias)


def test_a_layer_on_the_cpu_is_refused_in_words() -> None:
    layer: Any = project_to_2_4(nn.Linear(64, 32, dtype=torch.float16)).module
    with pytest.raises(ValueError, match="2:4 is for GPUs"):
        semi_structured_linear(layer)


def test_a_module_without_linear_layers_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="no linear layer"):
        project_to_2_4(nn.Conv2d(3, 3, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 needs an NVIDIA GPU")
def test_on_a_gpu_the_outputs_are_the_same() -> None:
    network = project_to_2_4(nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))).module
    network = network.eval().half().cuda()
    x = torch.randn(512, 1024, dtype=torch.float16, device="cuda")
    fast = accelerate(network, x)
    assert torch.allclose(fast(x), copy.deepcopy(network)(x), atol=1e-2)
