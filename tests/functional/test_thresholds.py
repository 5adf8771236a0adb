"""DST's tensor maths, against the paper's equations and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sparse.functional.thresholds import (
    long_tailed_estimator,
    threshold_gradients,
    threshold_mask,
    threshold_penalty,
)

ALPHA = 0.3


class _Step(torch.autograd.Function):
    """The unit step, with the estimator in place of its derivative."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, q: Tensor) -> Tensor:
        ctx.save_for_backward(q)
        return (q > 0).to(q.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        (q,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0] * long_tailed_estimator(q)


def _draw(rows: int = 7, columns: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    thresholds = torch.randn(rows, dtype=torch.float64, generator=generator)
    return weight, thresholds, torch.randn(rows, columns, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("distance", "estimate"),
    [(0.0, 2.0), (0.1, 1.6), (0.4, 0.4), (0.7, 0.4), (1.0, 0.4), (1.0 + 1e-9, 0.0), (9.0, 0.0)],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_estimator_is_the_papers_and_even(distance: float, estimate: float, sign: float) -> None:
    q = torch.tensor(sign * distance, dtype=torch.float64)
    assert float(long_tailed_estimator(q)) == pytest.approx(estimate, abs=1e-12)


def test_the_estimator_of_nan_is_not_a_number_that_moves_anything() -> None:
    assert float(long_tailed_estimator(torch.tensor(torch.nan))) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_estimator_keeps_the_type(dtype: torch.dtype) -> None:
    assert long_tailed_estimator(torch.zeros(2, dtype=dtype)).dtype == dtype


def test_a_weight_as_large_as_its_threshold_sleeps() -> None:
    mask = threshold_mask(torch.tensor([[-1.0, 1.0, 1.5], [0.0, 1e-9, -1e-9]]), torch.tensor([1.0, 0.0]))
    assert mask.tolist() == [[False, False, True], [False, True, True]]


def test_a_negative_threshold_keeps_every_weight_awake() -> None:
    assert threshold_mask(torch.zeros(2, 3), torch.tensor([-0.1, -1.0])).all()


def test_gradients_are_those_of_autograd_through_the_masked_weight() -> None:
    weight, thresholds, grad = _draw()
    weight.requires_grad_()
    thresholds.requires_grad_()
    product = weight * _Step.apply(weight.abs() - thresholds.unsqueeze(1))
    loss = (product * grad).sum() + ALPHA * threshold_penalty(thresholds)
    loss.backward()
    weight_grad, threshold_grad = threshold_gradients(grad, weight.detach(), thresholds.detach(), ALPHA)
    torch.testing.assert_close(weight_grad, weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(threshold_grad, thresholds.grad, rtol=1e-12, atol=1e-12)


def test_a_sleeping_weight_receives_the_structure_gradient_alone() -> None:
    weight, thresholds = torch.tensor([[0.5, -0.5, 5.0]]), torch.tensor([0.6])
    weight_grad, _ = threshold_gradients(torch.ones(1, 3), weight, thresholds, alpha=0.0)
    # |w| · (2 − 4 · 0.1); the last is 4.4 above its threshold, out of the estimator's reach
    torch.testing.assert_close(weight_grad, torch.tensor([[0.8, 0.8, 1.0]]))


def test_the_regulariser_pushes_thresholds_up_and_low_ones_more() -> None:
    _, low = threshold_gradients(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0.0]), ALPHA)
    _, high = threshold_gradients(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([2.0]), ALPHA)
    assert float(low) == pytest.approx(-ALPHA)
    assert float(low) < float(high) < 0.0


def test_nothing_that_is_given_is_written_to() -> None:
    weight, thresholds, grad = _draw()
    before = [tensor.clone() for tensor in (weight, thresholds, grad)]
    threshold_gradients(grad, weight, thresholds, ALPHA)
    assert all(torch.equal(tensor, was) for tensor, was in zip((weight, thresholds, grad), before, strict=True))


def test_the_penalty_is_a_sum_over_neurons_not_a_mean() -> None:
    assert float(threshold_penalty(torch.zeros(300))) == 300.0
