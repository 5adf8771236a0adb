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
    "loss_scale",
    "scaler_of_step",
    "skipped_step",
    "warm_moments",
]

# If a weight, its gradient and its moments are zero, a step of these optimizers leaves it exactly zero: they compute
# element by element, and every term is a product with one of the three. tests/masks/test_moments.py shows it for each.
# Muon is not among them, because it mixes the entries of a matrix. Subclasses are not, because they may do anything.
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


# The names that optimizers give to a running average, sum or maximum of squared gradients: exp_avg_sq and
# max_exp_avg_sq (Adam and others), square_avg (RMSprop, Adadelta), sum (Adagrad), variance (Adafactor), exp_avg_var
# (AdaBelief), nu, second_moment. Adamax has exp_inf instead of the root of one: a running maximum of magnitudes.
_SECOND_MOMENT = re.compile(r"(^|_)(sq|square|squares|sum|var|variance|second|nu|inf)(_|$)")
_ROOT = re.compile(r"(^|_)inf(_|$)")


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Whether a step of ``optimizer`` leaves a pruned weight exactly zero if its gradient and moments are zero.

    Example:
        >>> weights = [nn.Parameter(torch.zeros(2))]
        >>> keeps_zeros(torch.optim.SGD(weights, lr=0.1)), keeps_zeros(torch.optim.LBFGS(weights))
        (True, False)
    """
    return type(optimizer) in _KEEP_ZEROS and not any(_divides_by_zero(group) for group in optimizer.param_groups)


def _divides_by_zero(param_group: Mapping[str, Any]) -> bool:
    """Whether eps is 0, so that 0 / (√0 + eps) is NaN. Adafactor has a pair; the first one matters here."""
    eps = param_group.get("eps")
    return (eps[0] if isinstance(eps, tuple | list) else eps) == 0.0


@torch.no_grad()
def clear_moments(optimizer: Optimizer, parameter: nn.Parameter, changed: Tensor) -> None:
    """Make ``optimizer`` forget the weights that were just pruned or grown.

    Zeroes their entries in every tensor of its state that has the parameter's shape: momentum, second moments,
    averages. Factored moments (Adafactor's rows and columns) are shared by many weights and do not change.

    Args:
        optimizer: Any torch optimizer, or one that wraps another.
        parameter: One of its parameters.
        changed: ``bool``, the shape of the parameter, or of the part of it that this process holds.
    """
    unchanged = ~changed
    for key, value in _like(parameter, optimizer):
        if key == "step_size":  # Rprop's step sizes begin at the learning rate
            value.masked_fill_(changed, _learning_rate(optimizer, parameter))
        else:
            zero_pruned_(value, unchanged)


def is_second_moment(key: str) -> bool:
    """Whether a tensor of an optimizer's state divides the steps, judged by its name: a second moment, or its root.

    Example:
        >>> [is_second_moment(key) for key in ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg")]
        [False, True, False, True]
    """
    return _SECOND_MOMENT.search(key) is not None


def has_second_moments(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ``optimizer`` has, for at least one of these parameters, a second moment for each entry."""
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
    r"""Let weights that were just grown take steps as long as those of their neighbours.

    The moments of a grown weight are cleared, but its whole tensor shares one step count. So under Adam, its first step
    is :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}` learning rates long, 3.2 by default, and the steps after it are up to
    twice as long; survivors move 0.15 learning rates. To prevent this, the function sets

    .. math:: v = \max\bigl(g^2,\ \overline{v}_{\text{survivors}}\bigr)

    for the grown weights, in every second moment that has the parameter's shape. First moments stay cleared.

    Args:
        optimizer: Any torch optimizer; one without second moments is left alone.
        parameter: One of its parameters.
        grown: ``bool``, the shape of the parameter: the weights that were just grown, with cleared moments.
        survivors: ``bool``: the weights that were active before and still are.
        gradient: The parameter's gradient, as the optimizer sees it; zeros where it is unknown.
        layout: Where the entries of the parameter are, if this process does not hold all of them. The mean is then that
            of the whole, which takes a collective.
    """
    for key, value in _like(parameter, optimizer):
        if is_second_moment(key):
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            mean = _mean(wide, survivors, layout)
            own = gradient.to(wide.dtype)
            own = own.abs() if _ROOT.search(key) else own.square()
            value.copy_(torch.where(grown, torch.maximum(own, mean), wide))


def _like(parameter: nn.Parameter, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """Names and local parts of an optimizer's state tensors that have one value for each entry of a parameter."""
    states = [getattr(its, "state", {}).get(parameter, {}) for its in _with_inner(optimizer)]
    every = [(key, value) for state in states for key, value in state.items() if isinstance(value, Tensor)]
    return [(key, local_part(value)) for key, value in every if value.shape == parameter.shape]


def _with_inner(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizer and those that it wraps, as Lookahead does; each may have a state of its own."""
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer):
            yield from _with_inner(value)


def _mean(values: Tensor, among: Tensor, layout: Layout | None) -> Tensor:
    """The mean of some values of a whole weight; 0 if there are none."""
    total, number = _sum(values, among), among.count_nonzero()
    if layout is not None and not layout.is_whole:
        sums = layout.sum(torch.stack([total.double(), number.double()]))
        total, number = sums[0], sums[1]
    return (total / number.clamp(min=1)).to(values.dtype)


def _sum(values: Tensor, among: Tensor) -> Tensor:
    """The sum of some values, in double precision, so that it does not matter in which order parts are added."""
    if on_cpu(values):
        return torch.tensor(values.numpy()[among.numpy()].sum(dtype=np.float64))
    return torch.where(among, values, 0.0).sum(dtype=values.dtype if values.is_mps else torch.float64)


def _learning_rate(optimizer: Optimizer, parameter: nn.Parameter) -> float:
    return next(
        float(group["lr"]) for group in optimizer.param_groups if any(other is parameter for other in group["params"])
    )


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether no gradient holds inf or NaN; takes one or two transfers from the device."""
    # A sum that includes inf or NaN is inf or NaN. So a finite sum is proof, in a twentieth of the second check's time.
    sums = torch.stack(
        [gradient.sum(dtype=torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
    )
    return bool(sums.isfinite().all()) or bool(torch.stack([grad.isfinite().all() for grad in gradients]).all())


def skipped_step(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer skips its current step, because the GradScaler has told it of inf gradients."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def gradient_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """The scale of the gradients on which ``optimizer`` is about to step: 1, except for fused optimizers in float16.

    A fused optimizer unscales them itself, inside its step.
    """
    return 1.0 if scaler_of_step(trainer, optimizer) is None else loss_scale(trainer)


def loss_scale(trainer: pl.Trainer) -> float:
    """The factor by which a GradScaler has multiplied the loss of this step; 1 where there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def scaler_of_step(trainer: pl.Trainer, optimizer: Optimizer) -> torch.amp.GradScaler | None:
    """The GradScaler whose scale ``optimizer`` removes inside its step, as fused ones do; None for other optimizers."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if getattr(optimizer, "_step_supports_amp_scaling", False) else None


def as_stepped_on(trainer: pl.Trainer, optimizer: Optimizer) -> Callable[[Tensor], Tensor]:
    """Return a function that turns a gradient into the one on which ``optimizer`` steps: unscaled, or clipped.

    Call this when the gradients are those that the Trainer will clip.
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
