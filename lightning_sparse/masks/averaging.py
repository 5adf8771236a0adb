"""Averaged copies of the weights (EMA, SWA): they too are sparse."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_sparse.functional.masks import zero_pruned_
from lightning_sparse.masks.plan import canonical_name
from lightning_sparse.masks.registry import MaskGroup
from lightning_sparse.trainer import callbacks_of

__all__ = ["mask_averaged_weights"]


@torch.no_grad()
def mask_averaged_weights(trainer: Trainer, group: MaskGroup) -> None:
    """Zero the pruned weights in the copy that an averaging callback of ``trainer`` keeps.

    An average of zeros is zero, so once at each change of the masks is enough.
    """
    for copy in _averaged_copies(trainer):
        plain = copy.module if isinstance(copy, AveragedModel) else copy
        parameters = {canonical_name(name): value for name, value in plain.named_parameters()}
        for weight in group:
            if weight.name in parameters:
                zero_pruned_(parameters[weight.name], weight.mask.to(parameters[weight.name].device))


def _averaged_copies(trainer: Trainer) -> Iterator[nn.Module]:
    # Lightning's WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging keep the copy under this name.
    for callback in callbacks_of(trainer):
        copy = getattr(callback, "_average_model", None)
        if isinstance(copy, nn.Module):
            yield copy
