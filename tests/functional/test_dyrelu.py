from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_sparse.functional.dyrelu import dyrelu, dyrelu_coefficients


def slow(inputs: torch.Tensor, theta: torch.Tensor, beta: float) -> torch.Tensor:
    """Number by number, as the paper writes it: interpolate [a1, a2, b1, b2] with [1, 0, 0, 0], take the maximum."""
    out = torch.empty_like(inputs)
    for n in range(inputs.shape[0]):
        for c in range(inputs.shape[1]):
            a1, a2, b1, b2 = theta[n, :, c].tolist()
            dynamic = [1 + a1, a2, 0.5 * b1, 0.5 * b2]
            s1, s2, i1, i2 = (
                beta * value + (1 - beta) * plain for value, plain in zip(dynamic, [1, 0, 0, 0], strict=True)
            )
            for p in range(inputs.shape[2]):
                x = float(inputs[n, c, p])
                out[n, c, p] = max(s1 * x + i1, s2 * x + i2)
    return out


@given(st.floats(0, 1), st.integers(0, 2**31))
def test_it_is_the_maximum_of_the_interpolated_lines(beta: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    theta = torch.rand(3, 4, 2, generator=generator, dtype=torch.float64) * 2 - 1
    assert_close(dyrelu(inputs, *dyrelu_coefficients(theta, beta)), slow(inputs, theta, beta))


def test_without_beta_it_is_relu_exactly() -> None:
    inputs = torch.randn(4, 3, 5, 5)
    theta = torch.rand(4, 4, 3) * 2 - 1
    assert torch.equal(dyrelu(inputs, *dyrelu_coefficients(theta, 0.0)), inputs.relu())


def test_two_values_by_hand() -> None:
    # a = (1 + 0.5·0.4, 0.5·0.2), b = (0.5·0.5·0.8, 0.5·0.5·(−0.4)): x = 1: max(1.4, 0); x = −1: max(−1, −0.2).
    theta = torch.tensor([[[0.4], [0.2], [0.8], [-0.4]]])
    slopes, intercepts = dyrelu_coefficients(theta.expand(2, 4, 1), beta=0.5)
    assert_close(dyrelu(torch.tensor([[1.0], [-1.0]]), slopes, intercepts), torch.tensor([[1.4], [-0.2]]))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 2)])
def test_any_number_of_positions(shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape)
    theta = torch.rand(2, 4, 3) * 2 - 1
    flat = inputs.reshape(2, 3, math.prod(shape[2:]))
    assert_close(dyrelu(inputs, *dyrelu_coefficients(theta, 0.7)), slow(flat, theta, 0.7).reshape(shape))
