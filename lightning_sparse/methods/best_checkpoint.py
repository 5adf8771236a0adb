"""The best checkpoint by a metric is often one from before the last weights were pruned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sparse.functional.masks import count_true
from lightning_sparse.masks.checkpoint import CheckpointError, load_checkpoint, masks_by_method
from lightning_sparse.trainer import callbacks_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lightning_sparse.methods.base import SparseMethod

__all__ = ["denser_checkpoints"]

# Of the weights; less is rounding, or an epoch of a method that moves weights about.
_TOLERANCE = 0.005


def denser_checkpoints(method: SparseMethod, trainer: pl.Trainer) -> list[str]:
    """A sentence on each checkpoint that a ``ModelCheckpoint`` holds for the best, and that is denser than the end."""
    sentences: list[str] = []
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint) and callback.monitor and Path(callback.best_model_path).is_file():
            masks = _masks_in(callback.best_model_path, method.state_key)
            weights = [weight for weight in method.weights if weight.name in masks]
            numel = sum(weight.unshared_numel for weight in weights)
            at_the_end = sum(weight.num_active for weight in weights)
            active = sum(count_true(masks[weight.name]) for weight in weights)
            if active - at_the_end > _TOLERANCE * numel:
                its, last = 1 - active / numel, 1 - at_the_end / numel
                sentences.append(
                    f"the best checkpoint by {callback.monitor}, {Path(callback.best_model_path).name}, has sparsity"
                    f" {its:.4f}, and training ended with {last:.4f}: it is from before the last weights were pruned."
                    " Add a ModelCheckpoint() without monitor=, which keeps the last epoch, or let this one wait until"
                    " the sparsity is reached, as the page on getting started shows"
                )
    return sentences


def _masks_in(path: str, state_key: str) -> Mapping[str, Tensor]:
    """The masks that the checkpoint at ``path`` holds of a method; none where it does not tell."""
    try:
        return masks_by_method(load_checkpoint(path), path).get(state_key, {})
    except CheckpointError:  # of a user's own making, with objects that are not to be loaded; this is a hint alone
        return {}
