"""What optimizers do to pruned weights: their moments, and whether zeros stay zero."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.functional.masks import on_cpu, zero_pruned_
from lightning_sparse.masks.layout import Layout, is_sharded, layout_of, local_part
from lightning_sparse.masks.sums import sum_over_processes
from lightning_sparse.trainer import clips_gradients

__all__ = [
    "all_finite",
    "as_stepped_on",
    "clear_moments",
    "gradient_scale",
    "has_second_moments",
    "is_second_moment",
    "keeps_zeros",
    "scaler_of_step",
    "skipped_step",
    "warm_moments",
]

# With zero weight, zero gradient and cleared moments these leave a weight exactly zero: their arithmetic is element
# by element, and every term is a product with one of the three. tests/masks/test_optimizer_state.py shows it for each.
# Muon, which mixes the entries of a matrix, is not among them, nor is any subclass, which may do anything.
_KEEP_ZEROS = frozenset(
    getattr(torch.optim, name)
    for name in (
        "SGD",
        "ASGD",
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
    )
    if hasattr(torch.optim, name)
)


# What optimizers call a running average, sum or maximum of squared gradients: exp_avg_sq and max_exp_avg_sq (Adam and
# others), square_avg (RMSprop, Adadelta), sum (Adagrad), variance (Adafactor), exp_avg_var (AdaBelief), nu,
# second_moment. Adamax's exp_inf, a running maximum of magnitudes, stands for their root.
_SECOND_MOMENT = re.compile(r"(^|_)(sq|square|squares|sum|var|variance|second|nu|inf)(_|$)")
_ROOT = re.compile(r"(^|_)inf(_|$)")


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Whether a step of ``optimizer`` leaves a pruned weight exactly zero when its gradient and moments are zero.

    Example:
        >>> weights = [nn.Parameter(torch.zeros(2))]
        >>> keeps_zeros(torch.optim.SGD(weights, lr=0.1)), keeps_zeros(torch.optim.LBFGS(weights))
        (True, False)
    """
    return type(optimizer) in _KEEP_ZEROS and not any(_divides_by_zero(group) for group in optimizer.param_groups)


def _divides_by_zero(param_group: Mapping[str, Any]) -> bool:
    """Whether eps is 0, so that 0 / (√0 + eps) is NaN. Adafactor has a pair, of which the first counts."""
    eps = param_group.get("eps")
    return (eps[0] if isinstance(eps, tuple | list) else eps) == 0.0


@torch.no_grad()
def clear_moments(optimizer: Optimizer, parameter: nn.Parameter, changed: Tensor) -> None:
    """Make ``optimizer`` forget the weights that were just pruned or grown.

    Zeroed is every tensor of its state with the shape of the parameter: momentum, second moments, averages. Factored
    moments (Adafactor's rows and columns) are shared by many weights and stay.

    Args:
        optimizer: Any torch optimizer, or one that wraps another.
        parameter: One of its parameters.
        changed: ``bool``, the shape of the parameter, or of what this process holds of it.
    """
    unchanged = ~changed
    for key, value in _like(parameter, optimizer):
        if key == "step_size":  # Rprop's begin at the learning rate
            value.masked_fill_(changed, _learning_rate(optimizer, parameter))
        else:
            zero_pruned_(value, unchanged)


def is_second_moment(key: str) -> bool:
    """Whether a tensor of an optimizer's state, by its name, divides the steps: a second moment, or its root.

    Example:
        >>> [is_second_moment(key) for key in ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg")]
        [False, True, False, True]
    """
    return _SECOND_MOMENT.search(key) is not None


def has_second_moments(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ``optimizer`` has stepped some of these, and keeps a second moment of each of their entries."""
    return any(is_second_moment(key) for parameter in parameters for key, _ in _like(parameter, optimizer))


@torch.no_grad()
def warm_moments(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    grown: Tensor,
    survivors: Tensor,
    gradient: Tensor,
    layout: Layout | None = None,
) -> None:
    r"""Let the steps of weights that were just grown be as long as those of their neighbours.

    With cleared moments under the step count that a whole tensor shares, the first step of a grown weight under Adam is
    :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}` learning rates long, 3.2 by default, and those after it are up to twice
    that; survivors move 0.15. Instead

    .. math:: v = \max\bigl(g^2,\ \overline{v}_{\text{survivors}}\bigr)

    in every second moment of the shape of the parameter. First moments stay cleared.

    Args:
        optimizer: Any torch optimizer; one without second moments is left alone.
        parameter: One of its parameters.
        grown: ``bool``, the shape of the parameter: what was just grown, with cleared moments.
        survivors: ``bool``: what was active before, and is.
        gradient: Of the parameter, as the optimizer sees it; zeros where it is not known.
        layout: Where the entries of the parameter are, where not all of them are here; the mean is that of the whole
            then, and comes by a collective.
    """
    for key, value in _like(parameter, optimizer):
        if is_second_moment(key):
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            mean = _mean(wide, survivors, layout)
            own = gradient.to(wide.dtype)
            own = own.abs() if _ROOT.search(key) else own.square()
            value.copy_(torch.where(grown, torch.maximum(own, mean), wide))


def _like(parameter: nn.Parameter, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """What an optimizer keeps for each entry of a parameter, of those that this process holds."""
    states = [getattr(its, "state", {}).get(parameter, {}) for its in _with_inner(optimizer)]
    every = [(key, value) for state in states for key, value in state.items() if isinstance(value, Tensor)]
    return [(key, local_part(value)) for key, value in every if value.shape == parameter.shape]


def _with_inner(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizer, and those that it wraps, as Lookahead does; their state may be theirs alone."""
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer):
            yield from _with_inner(value)


def _mean(values: Tensor, among: Tensor, layout: Layout | None) -> Tensor:
    """The mean of some of the values of a whole weight; 0 where there are none."""
    total, number = _sum(values, among), among.count_nonzero()
    if layout is not None and not layout.is_whole:
        sums = layout.sum(torch.stack([total.double(), number.double()]))
        total, number = sums[0], sums[1]
    return (total / number.clamp(min=1)).to(values.dtype)


def _sum(values: Tensor, among: Tensor) -> Tensor:
    """The sum of some values, in double precision: parts are added in another order than the whole, and none shows."""
    if on_cpu(values):
        return torch.tensor(values.numpy()[among.numpy()].sum(dtype=np.float64))
    return torch.where(among, values, 0.0).sum(dtype=values.dtype if values.is_mps else torch.float64)


def _learning_rate(optimizer: Optimizer, parameter: nn.Parameter) -> float:
    return next(
        float(group["lr"]) for group in optimizer.param_groups if any(other is parameter for other in group["params"])
    )


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether no gradient holds inf or NaN; one transfer from the device, or two."""
    # A sum with inf or NaN in it is inf or NaN: a finite one is proof, for a twentieth of the time of the second look.
    sums = torch.stack(
        [gradient.sum(dtype=torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
    )
    return bool(sums.isfinite().all()) or bool(torch.stack([grad.isfinite().all() for grad in gradients]).all())


def skipped_step(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer, which is told of inf gradients by the GradScaler, skips the step that it is taking."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def gradient_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """By how much the gradients that ``optimizer`` is about to step on are scaled: 1 but for fused ones in float16.

    A fused optimizer unscales them itself, within its step.
    """
    scaler = scaler_of_step(trainer, optimizer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def scaler_of_step(trainer: pl.Trainer, optimizer: Optimizer) -> torch.amp.GradScaler | None:
    """The GradScaler whose scale ``optimizer`` takes off within its step, as fused ones do; None for all others."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if getattr(optimizer, "_step_supports_amp_scaling", False) else None


def as_stepped_on(trainer: pl.Trainer, optimizer: Optimizer) -> Callable[[Tensor], Tensor]:
    """What becomes of a gradient until ``optimizer`` steps on it: it is unscaled, or clipped by the Trainer.

    To be called when the gradients are those that will be clipped.
    """
    limit, scale = trainer.gradient_clip_val, gradient_scale(trainer, optimizer)
    if not limit or not clips_gradients(trainer):
        return lambda gradient: gradient / scale
    if trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
        return lambda gradient: gradient.clamp(-limit, limit)
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if any(map(is_sharded, stepped)):
        squares = [local_part(p.grad).double().square().sum() * layout_of(p).owned for p in stepped]
        widest = torch.promote_types(stepped[0].grad.dtype, torch.float32)
        norm = sum_over_processes(torch.stack(squares).sum()).sqrt().to(widest)
    else:
        norm = torch.stack([p.grad.norm() for p in stepped]).norm()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    return lambda gradient: gradient * factor
