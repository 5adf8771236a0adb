"""Tiny models that bring their own data and are the same on every construction, and the optimizers that train them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch.optim import Optimizer

    OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

__all__ = [
    "OPTIMIZERS",
    "ConvToy",
    "NonFiniteGradients",
    "StepIndexedToy",
    "ToyClassifier",
    "ToyModel",
    "TwoOptimizers",
]

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def _muon(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Muon takes matrices alone."""
    return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.05, momentum=0.9)


OPTIMIZERS: Mapping[str, OptimizerFactory] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "adafactor": partial(torch.optim.Adafactor, lr=0.05),
    "muon": _muon,
}
"""Optimizers of different kinds, by name, with the arguments that make pruned weights hardest to keep at zero."""


class ToyClassifier(L.LightningModule):
    """A classifier of three classes that brings its own data and is the same on every construction.

    The data are drawn from a fixed generator and come in a fixed order, so that two processes with batch ``B`` see at
    each step the samples that one process sees with batch ``2 * B``.
    """

    def __init__(
        self,
        network: Callable[[], nn.Sequential],
        sample_shape: Sequence[int],
        optimizer: OptimizerFactory,
        batch_size: int,
        samples: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.optimizer_factory = optimizer
        self.batch_size = batch_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = network()
        self.train_data = self._draw(samples, sample_shape, seed=1)
        self.val_data = self._draw(32, sample_shape, seed=2)

    @staticmethod
    def _draw(samples: int, sample_shape: Sequence[int], seed: int) -> TensorDataset:
        inputs = torch.randn(samples, *sample_shape, generator=torch.Generator().manual_seed(seed))
        labels = inputs.flatten(1)[:, :3].argmax(dim=1)  # a rule that can be learned
        return TensorDataset(inputs, labels)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, shape ``(N, 3)``."""
        return self.network(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the cross entropy of a batch as ``val_loss``."""
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Optimizer:
        """Make the optimizer."""
        return self.optimizer_factory(self.parameters())

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the samples in their fixed order."""
        return DataLoader(self.train_data, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return 32 other samples."""
        return DataLoader(self.val_data, batch_size=self.batch_size)


class ToyModel(ToyClassifier):
    """An MLP of 344 weights in three linear layers (12-16-8-3) and one LayerNorm: 64 samples, 8 steps per epoch."""

    def __init__(
        self, optimizer: OptimizerFactory = SGD, batch_size: int = 8, samples: int = 64, seed: int = 0
    ) -> None:
        super().__init__(self.build, (12,), optimizer, batch_size, samples, seed)

    @staticmethod
    def build() -> nn.Sequential:
        """The network: ``network.0``, ``network.2`` and ``network.4`` are the linear layers."""
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3))


class ConvToy(ToyClassifier):
    """A small CNN on 2x6x6 images: a convolution, a BatchNorm, a grouped convolution and a linear classifier."""

    def __init__(
        self, optimizer: OptimizerFactory = SGD, batch_size: int = 8, samples: int = 64, seed: int = 0
    ) -> None:
        super().__init__(self.build, (2, 6, 6), optimizer, batch_size, samples, seed)

    @staticmethod
    def build() -> nn.Sequential:
        """The network: ``network.0`` and ``network.3`` (grouped) are convolutions, ``network.6`` is linear."""
        return nn.Sequential(
            nn.Conv2d(2, 8, kernel_size=3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, kernel_size=3, stride=2, padding=1, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 3 * 3, 3),
        )


class StepIndexedToy(ToyModel):
    """Trains at global step ``t`` on batch ``t``; every process takes its part of the batch.

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
    """Manual optimization: two optimizers, which both step in every batch."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        """One optimizer for the first layer, another for the rest."""
        layers = list(self.network.children())
        rest = nn.ModuleList(layers[1:])
        return [self.optimizer_factory(layers[0].parameters()), torch.optim.AdamW(rest.parameters(), lr=0.01)]

    def training_step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
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
