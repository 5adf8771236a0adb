"""SparseLinear and SparseConv2d stand in for the layers that they were made of."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_sparse.execution import SparseConv2d, SparseLinear
from lightning_sparse.execution.kernels import available_kernels
from lightning_sparse.execution.layers import layers_with_zeros, reason_to_stay_dense
from tests.execution.networks import assert_close, in_float64, sparsify


@pytest.mark.parametrize("kernels", available_kernels())
class TestSparseLinear:
    @pytest.mark.parametrize("shape", [(24,), (1, 24), (0, 24), (5, 24), (2, 3, 24), (2, 0, 24)], ids=str)
    def test_takes_inputs_of_any_dimensions(self, shape: tuple[int, ...], kernels: str) -> None:
        layer = sparsify(nn.Linear(24, 17))
        x = torch.randn(shape)
        assert_close(SparseLinear.of(layer, kernels=kernels)(x), in_float64(layer, x))

    def test_takes_inputs_laid_out_in_any_way(self, kernels: str) -> None:
        layer = sparsify(nn.Linear(24, 17))
        sparse = SparseLinear.of(layer, kernels=kernels)
        for x in (torch.randn(24, 9).t(), torch.randn(9, 48)[:, ::2], torch.randn(1, 24).expand(9, 24)):
            assert_close(sparse(x), in_float64(layer, x))

    @pytest.mark.parametrize("sparsity", [0.0, 1.0])
    def test_takes_layers_without_zeros_and_without_anything_else(self, sparsity: float, kernels: str) -> None:
        layer = sparsify(nn.Linear(24, 17, bias=False), sparsity)
        for batch in (1, 3, 100):
            x = torch.randn(batch, 24)
            assert_close(SparseLinear.of(layer, kernels=kernels)(x), in_float64(layer, x))

    def test_is_pickled_and_copied(self, kernels: str) -> None:
        sparse = SparseLinear.of(sparsify(nn.Linear(24, 17)), kernels=kernels)
        x = torch.randn(3, 24)
        for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
            assert torch.equal(other(x), sparse(x))

    @pytest.mark.parametrize(
        "x", [torch.zeros(3, 23), torch.zeros(3, 24).double(), torch.zeros(24, 3), torch.zeros(())]
    )
    def test_refuses_other_inputs_in_words(self, x: torch.Tensor, kernels: str) -> None:
        with pytest.raises(ValueError, match="24 inputs in"):
            SparseLinear.of(nn.Linear(24, 17), kernels=kernels)(x)

    def test_refuses_to_compute_a_gradient(self, kernels: str) -> None:
        sparse = SparseLinear.of(nn.Linear(24, 17), kernels=kernels)
        x = torch.randn(3, 24, requires_grad=True)
        with pytest.raises(ValueError, match="no_grad"):
            sparse(x)
        with torch.no_grad():
            assert sparse(x).shape == (3, 17)

    def test_weights_are_its_own(self, kernels: str) -> None:
        layer = nn.Linear(24, 17)
        sparse = SparseLinear.of(layer, kernels=kernels)
        x = torch.randn(3, 24)
        before = sparse(x)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        assert torch.equal(sparse(x), before)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 4, "padding": "valid", "bias": False},
        {"kernel_size": (3, 1), "stride": 2, "padding": (1, 0), "groups": 2},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_convolutions_take_images_of_any_size(settings: dict[str, Any]) -> None:
    layer = sparsify(nn.Conv2d(6, 8, **settings), 0.7)
    sparse = SparseConv2d(layer, kernels="llvm")
    for shape in [(2, 6, 9, 10), (6, 7, 7), (0, 6, 8, 8)]:
        x = torch.randn(shape)
        assert_close(sparse(x), in_float64(layer, x))
    channels_last = torch.randn(2, 6, 9, 10).contiguous(memory_format=torch.channels_last)
    assert_close(sparse(channels_last), in_float64(layer, channels_last))


def test_torch_alone_computes_convolutions_of_one_pixel() -> None:
    layer = sparsify(nn.Conv2d(6, 8, 1))
    sparse = SparseConv2d(layer, kernels="torch_csr")
    for shape in [(2, 6, 9, 10), (1, 6, 5, 5), (6, 7, 7), (0, 6, 8, 8)]:
        x = torch.randn(shape)
        assert_close(sparse(x), in_float64(layer, x))


@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ({"kernel_size": 3}, "torch_csr"),
        ({"kernel_size": 1, "stride": 2}, "torch_csr"),
        ({"kernel_size": 3, "stride": 3}, "llvm"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, "llvm"),
        ({"kernel_size": 4, "padding": "same"}, "llvm"),
    ],
)
def test_what_does_not_serve_is_refused_in_words(settings: dict[str, Any], kernels: str) -> None:
    with pytest.raises(ValueError, match="Leave it dense"):
        SparseConv2d(nn.Conv2d(6, 8, **settings), kernels=kernels)


def test_a_convolution_of_other_channels_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="6 channels"):
        SparseConv2d(nn.Conv2d(6, 8, 3), kernels="llvm")(torch.zeros(1, 5, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.complex64])
def test_zeros_are_counted_in_every_type_and_layers_of_most_stay_dense(dtype: torch.dtype) -> None:
    layer = sparsify(nn.Linear(8, 4), 1.0)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    assert [share for _, _, share in layers_with_zeros(layer)] == [1.0]
    assert str(dtype) in (reason_to_stay_dense(layer, "llvm") or "")


def test_wide_images_with_an_odd_number_of_rows() -> None:
    layer = sparsify(nn.Conv2d(2, 3, 3, stride=2), 0.5)
    x = torch.randn(1, 2, 5, 1031)
    assert_close(SparseConv2d(layer, kernels="llvm")(x), in_float64(layer, x))
