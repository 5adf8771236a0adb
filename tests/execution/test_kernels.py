"""Kernels compute what torch computes in float64, on vectors of every width."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_sparse.execution.formats import pack
from lightning_sparse.execution.kernels import KernelsUnavailableError, available_kernels, chain
from lightning_sparse.execution.kernels.llvm import compiler
from lightning_sparse.execution.kernels.llvm.planes import PlaneNetwork
from lightning_sparse.execution.kernels.llvm.rows import RowChain
from lightning_sparse.execution.kernels.steps import ConvStep, LinearStep, MeanStep, PoolStep
from tests.execution.networks import assert_close

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
BATCHES = [0, 1, 2, 15, 16, 17, 64, 65, 130]


def narrow_library() -> compiler.Library:
    """Kernels with vectors of 16 bytes, as on a machine without AVX."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("vectors of 16 bytes are this machine's own")
    return compiler._compiled(torch.float32, compiler.Target("x86-64", "", 16))


def random_steps(widths: Sequence[int], sparsity: float, dtype: torch.dtype) -> tuple[list[LinearStep], list[Tensor]]:
    generator = torch.Generator().manual_seed(sum(widths))
    steps: list[LinearStep] = []
    dense: list[Tensor] = []
    for inputs, outputs in pairwise(widths):
        weight = torch.randn(outputs, inputs, generator=generator, dtype=dtype)
        weight *= torch.rand(outputs, inputs, generator=generator) >= sparsity
        bias = torch.randn(outputs, generator=generator, dtype=dtype)
        steps.append(LinearStep(pack(weight), bias.numpy(), low=0.0 if outputs != widths[-1] else -np.inf))
        dense += [weight, bias]
    return steps, dense


def computed_densely(x: Tensor, dense: Sequence[Tensor], steps: Sequence[LinearStep]) -> Tensor:
    x = x.double()
    for weight, bias, step in zip(dense[::2], dense[1::2], steps, strict=True):
        x = F.linear(x, weight.double(), bias.double()).clamp(step.low, step.high)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernels", available_kernels())
@pytest.mark.parametrize("batch", BATCHES)
def test_a_chain_of_linear_layers_is_dense_ones(batch: int, kernels: str, dtype: torch.dtype) -> None:
    steps, dense = random_steps([37, 50, 21], 0.8, dtype)
    x = torch.randn(batch, 37, dtype=dtype)
    for threads in (1, 2):
        y = chain(steps, kernels=kernels, threads=threads)(x)
        assert_close(y, computed_densely(x, dense, steps), TOLERANCE[dtype])


@settings(max_examples=40)
@given(
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    st.sampled_from([1, 3, 16, 33]),
    st.sampled_from(available_kernels()),
)
def test_any_matrix_times_any_batch(inputs: int, outputs: int, sparsity: float, batch: int, kernels: str) -> None:
    steps, dense = random_steps([inputs, outputs], sparsity, torch.float64)
    x = torch.randn(batch, inputs, dtype=torch.float64)
    assert_close(chain(steps, kernels=kernels, threads=1)(x), computed_densely(x, dense, steps), 1e-12)


@pytest.mark.parametrize("batch", BATCHES)
def test_narrow_vectors_give_the_same(batch: int) -> None:
    steps, dense = random_steps([37, 50, 21], 0.8, torch.float32)
    x = torch.randn(batch, 37)
    y = RowChain(narrow_library(), steps, threads=1)(x)
    assert_close(y, computed_densely(x, dense, steps))


@pytest.mark.parametrize("kernels", available_kernels())
def test_nan_passes_through_a_relu(kernels: str) -> None:
    steps = [LinearStep(pack(torch.eye(3)), np.zeros(3, np.float32), low=0.0)]
    for batch in (1, 2):
        y = chain(steps, kernels=kernels, threads=1)(torch.tensor([[float("nan"), -1.0, 2.0]]).repeat(batch, 1))
        assert torch.isnan(y[0, 0])
        assert y[0, 1:].tolist() == [0.0, 2.0]


def test_inputs_more_than_16_bits_can_count() -> None:
    weight = torch.zeros(3, 70000)
    weight[1, 69999] = 2.0
    steps = [LinearStep(pack(weight), np.ones(3, np.float32))]
    assert chain(steps, kernels="llvm", threads=1)(torch.ones(1, 70000)).tolist() == [[1.0, 3.0, 1.0]]


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel": (3, 3), "padding": (1, 1)},
    {"kernel": (1, 1)},
    {"kernel": (1, 1), "stride": 2},
    {"kernel": (3, 3), "stride": 2, "padding": (1, 1)},
    {"kernel": (7, 7), "stride": 2, "padding": (3, 3)},
    {"kernel": (5, 5)},
    {"kernel": (1, 3), "padding": (0, 1)},
    {"kernel": (3, 3), "padding": (2, 2), "dilation": (2, 2)},
    {"kernel": (3, 3), "padding": (1, 1), "groups": 2},
    {"kernel": (3, 3), "padding": (1, 1), "groups": 4, "stride": 2},
    {"kernel": (2, 2), "stride": 2},
    {"kernel": (3, 3), "padding": (4, 4)},
]
SIZES = [(1, 12, 12), (3, 9, 7), (20, 8, 8)]


def convolved(dtype: torch.dtype, settings: dict[str, Any]) -> tuple[ConvStep, Tensor, Tensor]:
    settings = {"stride": 1, "padding": (0, 0), "dilation": (1, 1), "groups": 1} | settings
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 4 // settings["groups"], *settings.pop("kernel"), generator=generator, dtype=dtype)
    weight *= torch.rand(weight.shape, generator=generator) >= 0.7
    bias = torch.randn(8, generator=generator, dtype=dtype)
    return ConvStep(pack(weight), bias.numpy(), "x", "y", **settings), weight, bias


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_convolutions_are_dense_ones(settings: dict[str, Any], size: tuple[int, int, int]) -> None:
    images, height, width = size
    for dtype in (torch.float32, torch.float64):
        step, weight, bias = convolved(dtype, settings)
        x = torch.randn(images, 4, height, width, dtype=dtype)
        expected = F.conv2d(
            x.double(), weight.double(), bias.double(), step.stride, step.padding, step.dilation, step.groups
        )
        for threads in (1, 2):
            network = PlaneNetwork(compiler.library(dtype), [step], ["x"], ["y"], threads)
            for _ in range(2):  # buffers are used again
                assert_close(network(x)[0], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_convolutions_with_narrow_vectors(settings: dict[str, Any]) -> None:
    step, weight, bias = convolved(torch.float32, settings)
    x = torch.randn(2, 4, 12, 10)
    expected = F.conv2d(x, weight, bias, step.stride, step.padding, step.dilation, step.groups)
    assert_close(PlaneNetwork(narrow_library(), [step], ["x"], ["y"], 1)(x)[0], expected)


def identity(channels: int, x: str, y: str, **more: Any) -> ConvStep:
    weight = torch.ones(channels, 1, 1, 1, dtype=torch.float64)
    return ConvStep(pack(weight), np.zeros(channels), x, y, groups=channels, **more)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (3, 2, 0), (1, 2, 0)])
def test_pooling_is_that_of_torch(kernel: int, stride: int, padding: int) -> None:
    x = torch.rand(3, 5, 11, 9, dtype=torch.float64)
    steps = [
        identity(5, "x", "a"),
        PoolStep("a", "y", (kernel, kernel), stride, (padding, padding)),
        MeanStep("y", "m"),
    ]
    y, mean = PlaneNetwork(compiler.library(torch.float64), steps, ["x"], ["y", "m"], 2)(x)
    expected = F.max_pool2d(x, kernel, stride, padding)
    assert torch.equal(y, expected)
    assert_close(mean, expected.mean((2, 3), keepdim=True), 1e-12)


def test_pooling_without_padding_takes_negative_numbers_and_nan() -> None:
    x = -torch.rand(1, 2, 6, 6, dtype=torch.float64)
    x[0, 0, 0, 0] = float("nan")
    steps = [identity(2, "x", "a"), PoolStep("a", "y", (2, 2), 2, (0, 0))]
    y = PlaneNetwork(compiler.library(torch.float64), steps, ["x"], ["y"], 1)(x)[0]
    torch.testing.assert_close(y, F.max_pool2d(x, 2), equal_nan=True)


def test_a_residual_is_added_before_the_clamp_and_survives() -> None:
    x, r = torch.randn(2, 3, 5, 5, dtype=torch.float64), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    steps = [identity(3, "x", "y", residual="r", low=0.0, high=1.0), identity(3, "r", "again")]
    y, again = PlaneNetwork(compiler.library(torch.float64), steps, ["x", "r"], ["y", "again"], 1)(x, r)
    assert_close(y, (x + r).clamp(0, 1), 1e-12)
    assert torch.equal(again, r)


def test_infinities_beside_images_stay_there() -> None:
    # What is computed in the borders of planes is cleared whatever it is.
    step = ConvStep(pack(torch.full((1, 1, 3, 3), 3e38)), np.zeros(1, np.float32), "x", "y", padding=(1, 1))
    network = PlaneNetwork(compiler.library(torch.float32), [step, identity32("y", "z")], ["x"], ["z"], 1)
    network(torch.full((1, 1, 4, 4), 3e38))
    assert network(torch.zeros(1, 1, 4, 4))[0].abs().max() == 0


def identity32(x: str, y: str) -> ConvStep:
    return ConvStep(pack(torch.ones(1, 1, 1, 1)), np.zeros(1, np.float32), x, y)


def test_images_of_another_size_are_planned_anew() -> None:
    step, weight, bias = convolved(torch.float32, {"kernel": (3, 3), "padding": (1, 1)})
    network = PlaneNetwork(compiler.library(torch.float32), [step], ["x"], ["y"], 1)
    for size in [(8, 8), (5, 12), (8, 8), (1, 1)] * 3:
        x = torch.randn(2, 4, *size)
        assert_close(network(x)[0], F.conv2d(x, weight, bias, padding=1))


def test_images_smaller_than_the_window_are_refused_in_words() -> None:
    step, _, _ = convolved(torch.float32, {"kernel": (5, 5)})
    with pytest.raises(ValueError, match="smaller than a window"):
        PlaneNetwork(compiler.library(torch.float32), [step], ["x"], ["y"], 1)(torch.zeros(1, 4, 3, 3))


def test_unknown_kernels_are_refused_in_words() -> None:
    steps, _ = random_steps([3, 2], 0.5, torch.float32)
    with pytest.raises(KernelsUnavailableError, match="lightning-sparse"):
        chain(steps, kernels="numba", threads=1)


@pytest.mark.parametrize("index", ["16 bits", "32 bits"])
def test_gathering_by_one_instruction_and_one_by_one_are_the_same(index: str) -> None:
    weight = torch.randn(37, 100 if index == "16 bits" else 70000) * (torch.rand(37, 1) > 0.2)
    weight *= torch.rand(weight.shape) > 0.97
    steps, x = [LinearStep(pack(weight), np.zeros(37, np.float32))], torch.randn(1, weight.shape[1])
    host = compiler.host_target()
    for gathers in (True, False):
        made = compiler._compiled(torch.float32, replace(host, gathers=gathers))
        assert_close(RowChain(made, steps, 1)(x), x.double() @ weight.double().t())
