"""Dynamic ReLU: the maximum of lines whose slopes and intercepts depend on the input, and its way back to ReLU.

References:
    Chen et al., `Dynamic ReLU <https://arxiv.org/abs/2003.10027>`_, ECCV 2020.
    Li et al., `Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning
    <https://arxiv.org/abs/2411.13545>`_, TMLR 2025.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dyrelu", "dyrelu_coefficients"]

_SLOPE_RANGE, _INTERCEPT_RANGE = 1.0, 0.5  # λ_a and λ_b of the paper


def dyrelu_coefficients(theta: Tensor, beta: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Slopes and intercepts from the output of the hyper-function; they approach ReLU's as ``beta`` falls.

    .. math:: a_1 = 1 + \beta\,\theta_{a_1}, \qquad a_2 = \beta\,\theta_{a_2}, \qquad b_k = \tfrac12 \beta\,\theta_{b_k}

    They are Dynamic ReLU's at :math:`\beta = 1` and ReLU's at 0: :math:`\beta\,[a, b] + (1 - \beta)\,[1, 0, 0, 0]`.
    The coefficients are interpolated, not the outputs.

    Args:
        theta: Residuals :math:`2 \sigma(\cdot) - 1` in (-1, 1), shape ``(N, 4, C)``: of :math:`a_1, a_2, b_1, b_2`.
        beta: Share of Dynamic ReLU, in [0, 1]; a number or a tensor of shape ``()``.

    Returns:
        Slopes and intercepts, each of shape ``(2, N, C)``.

    Example:
        >>> import torch
        >>> slopes, intercepts = dyrelu_coefficients(torch.full((1, 4, 1), 0.5), beta=0.5)
        >>> slopes.flatten().tolist(), intercepts.flatten().tolist()
        ([1.25, 0.25], [0.125, 0.125])
    """
    residual = beta * theta.movedim(1, 0)
    slopes = _SLOPE_RANGE * residual[:2]
    slopes = slopes + slopes.new_tensor([1.0, 0.0]).view(2, 1, 1)
    return slopes, _INTERCEPT_RANGE * residual[2:]


def dyrelu(inputs: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    r"""The largest of two lines in every channel: :math:`y_c = \max_k (a_{k,c}\, x_c + b_{k,c})`.

    Args:
        inputs: Shape ``(N, C, ...)``.
        slopes: Shape ``(2, N, C)``.
        intercepts: Shape ``(2, N, C)``.

    Returns:
        Shape of ``inputs``.

    Example:
        ReLU is the case of slopes 1 and 0 without intercepts:

        >>> import torch
        >>> slopes = torch.tensor([[[1.0]], [[0.0]]])
        >>> dyrelu(torch.tensor([[-2.0], [3.0]]), slopes.expand(2, 2, 1), torch.zeros(2, 2, 1))
        tensor([[0.],
                [3.]])
    """
    over_positions = (*inputs.shape[:2], *(1 for _ in inputs.shape[2:]))
    lines = [
        torch.addcmul(intercept.view(over_positions), slope.view(over_positions), inputs)
        for slope, intercept in zip(slopes, intercepts, strict=True)
    ]
    return torch.maximum(lines[0], lines[1])
