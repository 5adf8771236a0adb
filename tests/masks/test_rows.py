from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.masks import Candidate, select_weights


def candidate_of(module: nn.Module, name: str = "weight") -> Candidate:
    return next(candidate for candidate in select_weights(module) if candidate.name == name)


class Conv1D(nn.Module):
    """Like Hugging Face's: ``y = x @ weight + bias``."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.nx, self.nf = in_features, out_features
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight + self.bias


def test_hugging_face_conv1d_is_masked() -> None:
    assert [candidate.name for candidate in select_weights(Conv1D(3, 4)).masked] == ["weight"]


def convolution(dims: int, transposed: bool, groups: int) -> nn.Module:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    return kind(4, 6, kernel_size=(2, 3, 2)[:dims], groups=groups)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "Linear": (nn.Linear(4, 6), (2, 4)),
    "Conv1D of Hugging Face": (Conv1D(6, 4), (2, 4)),
    **{
        f"{'transposed ' if transposed else ''}{dims}d convolution of {groups} groups": (
            convolution(dims, transposed, groups),
            (1, 4, *(5, 5, 5)[:dims]),
        )
        for dims in (1, 2, 3)
        for transposed in (False, True)
        for groups in (1, 2)
    },
}


@pytest.mark.parametrize(("layer", "input_shape"), LAYERS.values(), ids=LAYERS)
def test_a_row_holds_the_weights_of_one_output(layer: nn.Module, input_shape: tuple[int, ...]) -> None:
    candidate = candidate_of(layer)
    weight = candidate.parameter
    rows_of_indices = candidate.rows(torch.arange(weight.numel()).view(weight.shape))
    outputs = layer(torch.randn(input_shape, generator=torch.Generator().manual_seed(0))).movedim(1, 0)
    assert len(rows_of_indices) == len(outputs)
    for row, output in zip(rows_of_indices, outputs, strict=True):
        (grad,) = torch.autograd.grad(output.square().sum(), weight, retain_graph=True)  # what the output depends on
        assert grad.flatten().nonzero().squeeze(1).tolist() == sorted(row.tolist())


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_transposed_convolution_are_those_of_an_explicit_loop(groups: int) -> None:
    layer = nn.ConvTranspose2d(4, 6, (2, 3), groups=groups)
    per_group = 6 // groups
    expected = [
        torch.stack([layer.weight[i, out % per_group] for i in range(4) if i // (4 // groups) == out // per_group])
        for out in range(6)
    ]
    assert torch.equal(candidate_of(layer).rows(layer.weight), torch.stack(expected).flatten(1))


@pytest.mark.parametrize("layer", [nn.RNN(3, 4), nn.LSTM(3, 4), nn.GRU(3, 4)], ids=repr)
def test_rows_of_a_recurrent_layer_are_the_gates_of_its_units(layer: nn.RNNBase) -> None:
    candidate = candidate_of(layer, "weight_hh_l0")
    expected = torch.stack(list(candidate.parameter))
    assert torch.equal(candidate.rows(candidate.parameter), expected)


def test_rows_of_attention_are_queries_keys_and_values() -> None:
    layer = nn.MultiheadAttention(4, 2)
    assert candidate_of(layer, "in_proj_weight").rows(layer.in_proj_weight).shape == (12, 4)


def test_rows_of_a_bilinear_layer_hold_a_matrix_for_each_output() -> None:
    layer = nn.Bilinear(2, 3, 4)
    assert torch.equal(candidate_of(layer).rows(layer.weight), layer.weight.flatten(1))


@pytest.mark.parametrize("layer", [layer for layer, _ in LAYERS.values()], ids=LAYERS)
def test_from_rows_undoes_rows(layer: nn.Module) -> None:
    candidate = candidate_of(layer)
    assert torch.equal(candidate.from_rows(candidate.rows(candidate.parameter)), candidate.parameter)
