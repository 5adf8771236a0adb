"""Callbacks and models that watch a method at work; listed after it, they see what it leaves."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import ToyModel

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_sparse.methods import SparseMethod

__all__ = [
    "Kill",
    "KilledError",
    "MaskWatch",
    "NonFiniteGradients",
    "StepIndexedToy",
    "TwoOptimizers",
    "ZeroWatch",
    "masks_of",
]


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
                    weight.name: [
                        value.clone()
                        for value in optimizer.state.get(weight.parameter, {}).values()
                        if isinstance(value, Tensor) and value.shape == weight.shape
                    ]
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


class StepIndexedToy(ToyModel):
    """Trains at global step ``t`` on batch ``t``, of which every process takes its part.

    A run resumed within an epoch sees what it would have seen, and two processes with batch ``B`` see together what one
    sees with batch ``2 * B``; Lightning's sampler for several processes shuffles.
    """

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy on this process' part of the batch of the global step."""
        part = self.global_step * self.trainer.world_size + self.trainer.global_rank
        first = self.batch_size * part % len(self.train_data)
        inputs, labels = self.train_data[first : first + self.batch_size]
        return F.cross_entropy(self(inputs.to(self.dtype)), labels)


class TwoOptimizers(ToyModel):
    """Manual optimization: two optimizers, each of which steps in every batch."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        """One optimizer for the first layer, another for the rest."""
        layers = list(self.network.children())
        rest = nn.ModuleList(layers[1:])
        return [self.optimizer_factory(layers[0].parameters()), torch.optim.AdamW(rest.parameters(), lr=0.01)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """A backward and a step for each optimizer."""
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


class NonFiniteGradients(ToyModel):
    """Gradients are NaN at the given batches."""

    def __init__(self, bad: range, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.bad = bad
        self.batches = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of the toy, or one whose gradient is NaN."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.batches += 1
        return loss * float("nan") if self.batches - 1 in self.bad else loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep NaN out of the weights, after the callbacks have seen it."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                torch.nan_to_num_(parameter.grad)


class KilledError(Exception):
    """The end that :class:`Kill` brings."""


class Kill(L.Callback):
    """Ends training by an exception after ``step`` steps, when a checkpoint of them is written."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save and raise."""
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KilledError
