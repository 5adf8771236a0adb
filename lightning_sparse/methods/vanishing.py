"""Whether gradients reach the layers of a network that begins sparse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.layout import local_part
from lightning_sparse.masks.sums import sum_over_processes
from lightning_sparse.masks.weight import MaskedWeight

__all__ = ["vanished"]

# Norm of the gradient over that of the weights, at the start. A small CNN without normalisation has 6e-3 in its first
# layer when dense, 5e-5 at a sparsity of 0.95, from which it still learns, and 2e-6 at 0.99, where it stays at chance.
_LEAST = 1e-5
_SHARE = 1 / 3  # of the layers: a transformer's queries and keys are as many


def vanished(module: nn.Module, group: MaskGroup) -> list[str]:
    """Names of the layers whose active weights get hardly any gradient, if those are more than a third of all layers.

    Empty if a gain or a layer begins at zero, as the last norm of a residual branch often does: gradients behind it
    are zero at first, by design.

    Args:
        module: The whole module.
        group: Its gradients are those of the first step.
    """
    layers = [weight for weight in group if weight.parameter.grad is not None and weight.num_active]
    if not layers:
        return []
    if group.is_spread:
        return _of_shards(module, layers)
    ratios = [_norm(weight.grad * weight.mask) / _norm(weight.value) for weight in layers]
    gains = [parameter.any() for name, parameter in module.named_parameters() if not name.endswith("bias")]
    # One transfer from the device: the ratios, and whether every gain has something in it.
    *found, all_live = torch.stack([*ratios, torch.stack(gains).all().float()]).tolist()
    return _named(layers, found, all_live)


def _of_shards(module: nn.Module, layers: Sequence[MaskedWeight]) -> list[str]:
    """The same where processes hold parts of the weights; one transfer."""
    gains = [parameter for name, parameter in module.named_parameters() if not name.endswith("bias")]
    counted = [weight.layout.owned for weight in layers]
    gradients = [_square(weight.grad * weight.mask) * owned for weight, owned in zip(layers, counted, strict=True)]
    values = [_square(weight.value) * owned for weight, owned in zip(layers, counted, strict=True)]
    live = [local_part(gain).count_nonzero().double() for gain in gains]
    sums = sum_over_processes(torch.stack([*gradients, *values, *live])).tolist()
    n = len(layers)
    ratios = [math.sqrt(g / v) if v else math.inf for g, v in zip(sums[:n], sums[n : 2 * n], strict=True)]
    return _named(layers, ratios, all(sums[2 * n :]))


def _named(layers: Sequence[MaskedWeight], ratios: Sequence[float], all_live: float) -> list[str]:
    names = [weight.name for weight, ratio in zip(layers, ratios, strict=True) if ratio < _LEAST]
    # A few layers with small gradients are no sign: those that feed a softmax or a gate have small ones when dense too.
    return names if all_live and len(names) > _SHARE * len(layers) else []


def _square(tensor: Tensor) -> Tensor:
    return tensor.double().square().sum()


def _norm(tensor: Tensor) -> Tensor:
    return tensor.norm(dtype=torch.promote_types(tensor.dtype, torch.float32)).float()
