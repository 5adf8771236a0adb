"""What optimizers do to pruned weights: their moments, and whether zeros stay zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.functional.masks import zero_pruned_

__all__ = ["all_finite", "clear_moments", "gradient_scale", "keeps_zeros", "skipped_step"]

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
        optimizer: Any torch optimizer.
        parameter: One of its parameters.
        changed: ``bool``, the shape of the parameter.
    """
    unchanged = ~changed
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            if key == "step_size":  # Rprop's begin at the learning rate
                value.masked_fill_(changed, _learning_rate(optimizer, parameter))
            else:
                zero_pruned_(value, unchanged)


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
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
