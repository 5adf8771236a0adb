"""Whether gradients still come to the layers of a network that begins sparse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_sparse.masks.group import MaskGroup

__all__ = ["vanished"]

# Norm of the gradient over that of the weights, at the start. A small CNN without normalisation has 6e-3 in its first
# layer when dense, 5e-5 at a sparsity of 0.95, from which it still learns, and 2e-6 at 0.99, where it stays at chance.
_LEAST = 1e-5
_SHARE = 1 / 3  # of the layers: a transformer's queries and keys are as many


def vanished(module: nn.Module, group: MaskGroup) -> list[str]:
    """Names of the layers whose active weights get hardly any gradient, if those are more than a third of all layers.

    Empty where a gain or a layer begins at zero, as the last norm of a residual branch often does: gradients behind it
    are zero for now, and that is meant.

    Args:
        module: The whole module.
        group: Its gradients are those of the first step.
    """
    layers = [weight for weight in group if weight.parameter.grad is not None and weight.num_active]
    if not layers:
        return []
    ratios = [_norm(weight.grad * weight.mask) / _norm(weight.value) for weight in layers]
    gains = [parameter.any() for name, parameter in module.named_parameters() if not name.endswith("bias")]
    # One transfer from the device: the ratios, and whether every gain has something in it.
    *found, all_live = torch.stack([*ratios, torch.stack(gains).all().float()]).tolist()
    names = [weight.name for weight, ratio in zip(layers, found, strict=True) if ratio < _LEAST]
    # A few layers with small gradients are no sign: those that feed a softmax or a gate have small ones when dense too.
    return names if all_live and len(names) > _SHARE * len(layers) else []


def _norm(tensor: Tensor) -> Tensor:
    return tensor.norm(dtype=torch.promote_types(tensor.dtype, torch.float32)).float()
