r"""DST: masks from trainable thresholds, and their gradients in closed form.

A weight matrix :math:`W` of shape ``(outputs, fan-in)`` has a threshold :math:`t_i` for each row:

.. math:: Q_{ij} = |W_{ij}| - t_i, \qquad M = S(Q), \qquad P = W \odot M

with the unit step :math:`S`, strict: :math:`S(0) = 0`.

References:
    Liu et al., `Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable Masked Layers
    <https://arxiv.org/abs/2005.06870>`_, ICLR 2020, §3; code https://github.com/junjieliu2910/DynamicSparseTraining
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "long_tailed_estimator",
    "threshold_gradients",
    "threshold_gradients_",
    "threshold_mask",
    "threshold_penalty",
]

# Entries of a block of rows on the CPU: what is computed on the way stays in the cache.
_BLOCK = 1 << 16


def threshold_mask(weight: Tensor, thresholds: Tensor) -> Tensor:
    """Active are the weights whose magnitude is above their row's threshold.

    Args:
        weight: Shape ``(outputs, fan-in)``.
        thresholds: Shape ``(outputs,)``.

    Returns:
        ``bool``, the shape of ``weight``.

    Example:
        >>> threshold_mask(torch.tensor([[0.5, -2.0], [0.0, 0.1]]), torch.tensor([1.0, 0.0]))
        tensor([[False,  True],
                [False,  True]])
    """
    return weight.abs() > thresholds.unsqueeze(1)


def long_tailed_estimator(q: Tensor) -> Tensor:
    r"""The stand-in for the derivative of the unit step: :math:`2 - 4|x|` up to 0.4, then 0.4 up to 1, then 0.

    Paper: eq. 3, after Xu & Cheung 2019. It is continuous at 0.4.

    Args:
        q: Any shape.

    Example:
        >>> long_tailed_estimator(torch.tensor([0.0, -0.25, 0.4, 1.0, 1.1]))
        tensor([2.0000, 1.0000, 0.4000, 0.4000, 0.0000])
    """
    distance = q.abs().nan_to_num_(nan=2.0)
    near = torch.le(distance, 1.0, out=torch.empty_like(distance))  # as numbers: a bool tensor takes four times as long
    return torch.rsub(distance, 2.0, alpha=4.0).clamp_(min=0.4).mul_(near)


def threshold_gradients(grad: Tensor, weight: Tensor, thresholds: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    r"""Gradients of :math:`J = L + \alpha \sum_i e^{-t_i}` from :math:`G = \partial L / \partial P`.

    .. math::

        \partial J / \partial W_{ij} &= G_{ij} M_{ij} + G_{ij} W_{ij} H(Q_{ij}) \operatorname{sgn} W_{ij} \\
        \partial J / \partial t_i &= -\sum_j G_{ij} W_{ij} H(Q_{ij}) - \alpha e^{-t_i}

    with the estimator :math:`H` of :func:`long_tailed_estimator`. The first is the performance gradient and the
    structure gradient of the paper; a pruned weight receives the second of them, and so can wake.

    Args:
        grad: :math:`G`, shape ``(outputs, fan-in)``.
        weight: The dense :math:`W`, same shape.
        thresholds: Shape ``(outputs,)``.
        alpha: Strength of the regulariser, at least 0.

    Returns:
        The gradients of the weights and of the thresholds.

    Example:
        >>> weight, thresholds = torch.tensor([[0.5, 2.0]]), torch.tensor([1.0])
        >>> threshold_gradients(torch.ones(1, 2), weight, thresholds, alpha=0.0)
        (tensor([[0.2000, 1.8000]]), tensor([-1.]))
    """
    magnitude = weight.abs()
    q = magnitude - thresholds.unsqueeze(1)
    estimate = long_tailed_estimator(q)  # H(Q)
    active = torch.gt(q, 0.0, out=torch.empty_like(q))  # M
    weight_grad = active.addcmul_(magnitude, estimate).mul_(grad)  # G · (M + |W| · H(Q)), for W · sgn W is |W|
    threshold_grad = -(grad * weight).mul_(estimate).sum(dim=1) - alpha * torch.exp(-thresholds)
    return weight_grad, threshold_grad


def threshold_gradients_(grad: Tensor, weight: Tensor, thresholds: Tensor, alpha: float) -> Tensor:
    r"""Like :func:`threshold_gradients`, with the gradient of the weights in the place of ``grad``.

    On the CPU a block of rows at a time, which takes a fourth of the time.

    Args:
        grad: :math:`G`, shape ``(outputs, fan-in)``; becomes :math:`\partial J / \partial W`.
        weight: The dense :math:`W`, same shape.
        thresholds: Shape ``(outputs,)``.
        alpha: Strength of the regulariser, at least 0.

    Returns:
        The gradient of the thresholds.

    Example:
        >>> grad = torch.ones(1, 2)
        >>> threshold_gradients_(grad, torch.tensor([[0.5, 2.0]]), torch.tensor([1.0]), alpha=0.0), grad
        (tensor([-1.]), tensor([[0.2000, 1.8000]]))
    """
    of_thresholds: list[Tensor] = []
    for rows in _blocks_of_rows(weight):
        of_weights, of_rows = threshold_gradients(grad[rows], weight[rows], thresholds[rows], alpha)
        grad[rows] = of_weights
        of_thresholds.append(of_rows)
    return torch.cat(of_thresholds) if of_thresholds else torch.zeros_like(thresholds)


def _blocks_of_rows(weight: Tensor) -> list[slice]:
    rows = max(1, _BLOCK // max(1, weight.shape[1])) if weight.is_cpu else max(1, len(weight))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def threshold_penalty(thresholds: Tensor) -> Tensor:
    r"""The layer's part of the regulariser, :math:`R = \sum_i e^{-t_i}`: large for low thresholds, never below 0.

    Example:
        >>> threshold_penalty(torch.zeros(3))
        tensor(3.)
    """
    return torch.exp(-thresholds).sum()
