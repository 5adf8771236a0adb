"""Layers are recognised by what they are: by torch's classes, or by the sizes that they state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D as HuggingFaceConv1D

from lightning_sparse import DST, RigL
from lightning_sparse.functional.allocation import erdos_renyi, erdos_renyi_kernel
from lightning_sparse.masks import Candidate, select_weights
from tests.helpers import make_trainer


def candidates_of(module: nn.Module) -> dict[str, Candidate]:
    return {candidate.name: candidate for candidate in select_weights(module).masked}


# Classes, not names of classes


class Conv1D(nn.Conv1d):
    """What many call so: no layer of Hugging Face."""


class LinearNorm(nn.Linear):
    """As in Tacotron."""


class ConvNorm(nn.Conv2d):
    pass


class EmbeddingLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    "layer",
    [Conv1D(2, 3, 3), LinearNorm(2, 3), ConvNorm(2, 3, 3), EmbeddingLinear(2, 3), HuggingFaceConv1D(3, 2)],
    ids=repr,
)
def test_a_class_is_judged_by_what_it_comes_from(layer: nn.Module) -> None:
    candidate = candidates_of(layer)["weight"]
    assert candidate.input_first == isinstance(layer, HuggingFaceConv1D)
    assert len(candidate.rows(candidate.parameter)) == 3


class Named(nn.Module):
    """A matrix in a class of some name, that says nothing of its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(2, 2), nn.Parameter(torch.ones(3, 2))


@pytest.mark.parametrize("name", ["Conv1D", "Linear", "Conv2d"])
def test_a_name_alone_makes_no_layer(name: str) -> None:
    kind: Any = type(name, (Named,), {})
    assert list(candidates_of(kind())) == ["linear.weight"]


class Weird(nn.Module):
    def __init__(self, shape: tuple[int, ...], **sizes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        vars(self).update(sizes)


@pytest.mark.parametrize(
    ("sizes", "shape", "input_first", "copies"),
    [
        ({"in_channels": 4, "out_channels": 3}, (3, 4), False, 1),  # PyTorch Geometric's Linear
        ({"in_features": 4, "out_features": 3}, (4, 3), True, 1),  # a graph convolution's
        ({"in_features": 4, "out_features": 4}, (4, 4), False, 1),
        ({"in_channels": 4, "out_channels": 3, "num_types": 2}, (2, 4, 3), True, 2),  # HeteroLinear
        ({"input_size": 4, "output_size": 3, "num_experts": 2}, (2, 3, 4), False, 2),  # JetMoE's parallel experts
        ({"in_feat": 4, "out_feat": 3, "num_expert": 1}, (1, 3, 4), False, 1),  # FastMoE's
    ],
)
def test_a_linear_layer_is_known_by_the_sizes_that_it_states(
    sizes: dict[str, int], shape: tuple[int, ...], input_first: bool, copies: int
) -> None:
    candidate = candidates_of(Weird(shape, **sizes))["weight"]
    assert (candidate.input_first, candidate.copies) == (input_first, copies)
    assert candidate.layer_shape == shape[-2:]
    inputs, outputs, *_ = sizes.values()
    assert candidate.rows(candidate.parameter).shape == (copies * outputs, inputs)
    assert candidate.columns(candidate.parameter).shape == (copies * inputs, outputs)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"in_channels": 4, "out_channels": 3}, (3, 5)),
        ({"in_channels": 4, "out_channels": 3}, (2, 3, 4)),  # of what are there two?
        ({"in_channels": -1, "out_channels": 3}, (3, 4)),
        ({"in_channels": True, "out_channels": 3}, (3, 1)),
    ],
)
def test_what_has_not_the_sizes_that_it_states_is_not_known(sizes: dict[str, int], shape: tuple[int, ...]) -> None:
    module = nn.ModuleDict({"linear": nn.Linear(2, 2), "it": Weird(shape, **sizes)})
    assert list(candidates_of(module)) == ["linear.weight"]


def test_sizes_may_be_numbers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    layer: Any = Weird((3, 4), in_channels=numpy.int64(4), out_channels=numpy.int32(3))
    assert candidates_of(layer)["weight"].layer_shape == (3, 4)


class StoredTheOtherWay(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(self.weight.detach().t().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight


def test_a_linear_layer_that_stores_inputs_first_has_a_row_for_each_output() -> None:
    candidate = candidates_of(StoredTheOtherWay(4, 3))["weight"]
    assert torch.equal(candidate.rows(candidate.parameter), candidate.parameter.t())


# Stacks of experts, those of transformers as they are

_SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def _mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_SMALL, num_local_experts=4))


def _qwen() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**_SMALL, num_experts=4, moe_intermediate_size=24, num_experts_per_tok=2)
    return transformers.Qwen3MoeForCausalLM(config)


def _gpt_oss() -> nn.Module:
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**_SMALL, num_local_experts=4))


STACKS: dict[str, Callable[[], nn.Module]] = {"Mixtral": _mixtral, "Qwen3": _qwen, "gpt-oss": _gpt_oss}


def experts_of(module: nn.Module) -> tuple[nn.Module, dict[str, Candidate]]:
    found = candidates_of(module)
    (path,) = {name.rpartition(".")[0] for name in found if name.endswith("down_proj") and ".experts." in name}
    return module.get_submodule(path), {
        name.rpartition(".")[2]: candidate for name, candidate in found.items() if name.rpartition(".")[0] == path
    }


@pytest.mark.parametrize("make", STACKS.values(), ids=STACKS)
def test_experts_are_masked_and_their_routers_and_biases_are_not(make: Callable[[], nn.Module]) -> None:
    module = make()
    _, experts = experts_of(module)
    assert set(experts) == {"gate_up_proj", "down_proj"}
    reasons = {candidate.name: candidate.reason for candidate in select_weights(module)}
    assert all(reason for name, reason in reasons.items() if "router" in name or "bias" in name or "gate.w" in name)


@pytest.mark.parametrize("make", STACKS.values(), ids=STACKS)
def test_each_output_neuron_of_each_expert_is_a_row(make: Callable[[], nn.Module]) -> None:
    """Asked of the projections themselves: zeroing a row silences one output of one expert, and no other."""
    layer, experts = experts_of(make())
    transposed = bool(getattr(layer, "is_transposed", False))
    for candidate in experts.values():
        weight = candidate.parameter.detach()
        outputs = weight.shape[2 if transposed else 1]
        assert candidate.layer_shape == tuple(weight.shape[1:])
        rows = candidate.rows(weight)
        assert rows.shape == (4 * outputs, weight.numel() // (4 * outputs))
        without = rows.clone()
        without[outputs + 1] = 0.0  # the second output of the second expert
        changed = candidate.from_rows(without)
        inputs = torch.randn(5, rows.shape[1])
        before, after = (inputs @ each if transposed else inputs @ each.mT for each in (weight, changed))
        silent = (before != after).any(dim=1).nonzero().tolist()
        assert silent == [[1, 1]]
        assert torch.equal(candidate.from_rows(rows), weight)


class LlamaExperts(nn.Module):
    """As Llama 4's: inputs first, which nothing but its sizes says."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = 2, 4, 3
        self.gate_up_proj = nn.Parameter(torch.randn(2, 4, 6))
        self.down_proj = nn.Parameter(torch.randn(2, 3, 4))


class GroupedExperts(nn.Module):
    """As torchtitan's."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.num_experts, self.dim = 2, dim
        self.w1, self.w3 = (nn.Parameter(torch.randn(2, 3, dim)) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(2, dim, 3))


class TransposedExperts(nn.Module):
    """As torchtune's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden_dim = 2, 4, 3
        self.gate_proj, self.up_proj = (nn.Parameter(torch.randn(2, 4, 3)) for _ in range(2))
        self.down_proj = nn.Parameter(torch.randn(2, 3, 4))


class Dbrx(nn.Module):
    """As DBRX's: the rows of all experts one below the other."""

    def __init__(self) -> None:
        super().__init__()
        self.moe_num_experts, self.ffn_hidden_size, self.hidden_size = 2, 3, 4
        self.w1, self.v1, self.w2 = (nn.Parameter(torch.randn(6, 4)) for _ in range(3))


@pytest.mark.parametrize(
    ("layer", "rows"),
    [
        (LlamaExperts(), {"gate_up_proj": (12, 4), "down_proj": (8, 3)}),
        (GroupedExperts(), {"w1": (6, 4), "w3": (6, 4), "w2": (8, 3)}),
        (TransposedExperts(), {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (8, 3)}),
        (Dbrx(), {"w1": (6, 4), "v1": (6, 4), "w2": (8, 3)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_stacks_that_do_not_say_how_they_are_stored_are_known_by_their_sizes(
    layer: nn.Module, rows: dict[str, tuple[int, int]]
) -> None:
    found = {name: tuple(each.rows(each.parameter).shape) for name, each in candidates_of(layer).items()}
    assert found == rows
    assert all(candidate.copies == 2 for candidate in candidates_of(layer).values())


def test_a_stack_of_one_expert_is_one_layer() -> None:
    layer = GroupedExperts()
    layer.num_experts = 1
    layer.w1 = nn.Parameter(torch.randn(1, 3, 4))
    assert candidates_of(layer)["w1"].layer_shape == (3, 4)


@pytest.mark.parametrize("allocation", [erdos_renyi, erdos_renyi_kernel])
def test_a_stack_of_experts_has_the_budget_of_its_experts_one_by_one(allocation: Callable[..., list[int]]) -> None:
    apart = allocation([(8, 8), (10, 20), (10, 20), (10, 20), (10, 20)], total=440)
    together = allocation([(8, 8), (10, 20)], total=440, copies=[1, 4])
    assert together == [apart[0], sum(apart[1:])]


class MixtureOfExperts(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = GroupedExperts(), nn.Linear(4, 2)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        experts = self.experts
        hidden = torch.relu(batch[0] @ experts.w1.mT) * (batch[0] @ experts.w3.mT)
        return self.head((hidden @ experts.w2.mT).mean(0)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(method: L.Callback, path: Path) -> MixtureOfExperts:
    module = MixtureOfExperts()
    data = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4)
    make_trainer(path, callbacks=[method], max_epochs=1).fit(module, data)
    return module


def test_dst_has_a_threshold_for_each_neuron_of_each_expert(tmp_path: Path) -> None:
    train(method := DST(alpha=1e-3), tmp_path)
    thresholds = {name: threshold.numel() for name, threshold in method.thresholds.items()}
    assert thresholds == {"experts.w1": 6, "experts.w3": 6, "experts.w2": 8, "head.weight": 2}


def test_erk_gives_a_stack_what_its_experts_would_have(tmp_path: Path) -> None:
    train(method := RigL(sparsity=0.5, allocation="erk"), tmp_path)
    apart = erdos_renyi_kernel([(3, 4)] * 4 + [(4, 3)] * 2 + [(2, 4)], total=40, min_active=1)
    assert method.registry.num_active == 40
    for name, budget in {"w1": sum(apart[:2]), "w3": sum(apart[2:4]), "w2": sum(apart[4:6])}.items():
        assert abs(method.registry[f"experts.{name}"].num_active - budget) <= 1  # who has a remainder is rounded up
