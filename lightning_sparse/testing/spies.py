"""Callbacks that watch a method at work, or end it; listed after it, they see what it leaves."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import lightning as L
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_sparse.methods import SparseMethod

__all__ = ["Kill", "KilledError", "MaskWatch", "ZeroWatch", "masks_of"]


def masks_of(method: SparseMethod) -> dict[str, Tensor]:
    """A copy of the method's masks, by name."""
    return {weight.name: weight.mask.clone() for weight in method.weights}


class MaskWatch(L.Callback):
    """Keeps the masks and what was known of them after every change, seen before the optimizer steps."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method
        self.history: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Take a copy where the masks have changed since the last look."""
        updates = self.method.registry.num_updates
        if self.history and self.history[-1]["updates"] == updates:
            return
        self.history.append(
            {
                "updates": updates,
                "step": self.method.step,
                "target": self.method.target_sparsity(),
                "masks": masks_of(self.method),
                "weights": {weight.name: weight.parameter.detach().clone() for weight in self.method.weights},
                "grads": {weight.name: weight.grad.clone() for weight in self.method.weights},
                "moments": {
                    weight.name: {
                        key: value.clone()
                        for key, value in optimizer.state.get(weight.parameter, {}).items()
                        if isinstance(value, Tensor) and value.shape == weight.shape
                    }
                    for weight in self.method.weights
                },
            }
        )


class ZeroWatch(L.Callback):
    """Counts weights that are pruned and yet not zero, in every forward, validation and checkpoint."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method
        self.leaks: list[str] = []
        self.looks = 0

    def _look(self, where: str, trainer: L.Trainer) -> None:
        for weight in self.method.weights:
            self.looks += 1
            if weight.parameter.detach()[~weight.mask].count_nonzero():
                self.leaks.append(f"{where}, step {trainer.global_step}: {weight.name}")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look before each forward; not from another callback's hooks, whose order could hide a leak."""
        if stage == "fit":
            pl_module.register_forward_pre_hook(functools.partial(self._before_forward, trainer))

    def _before_forward(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._look("forward", trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look into what is written."""
        for weight in self.method.weights:
            saved = checkpoint["state_dict"][weight.name]
            if saved[~weight.mask].count_nonzero():
                self.leaks.append(f"checkpoint, step {trainer.global_step}: {weight.name}")


class KilledError(Exception):
    """The end that :class:`Kill` brings."""


class Kill(L.Callback):
    """Ends training by an exception after ``step`` steps, when a checkpoint of them is written."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and raise."""
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KilledError
