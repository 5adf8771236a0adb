"""Tiny models, quiet trainers and two-process fits shared by the tests."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from torch.optim import Optimizer

    OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

__all__ = ["ConvToy", "DumpRank", "RankDump", "SeedPerRank", "ToyModel", "fit_two_processes", "make_trainer"]

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def make_trainer(root: Path, **overrides: Any) -> L.Trainer:
    """A silent CPU trainer of two epochs that writes only below ``root``; ``overrides`` are Trainer arguments."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "default_root_dir": root,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**(settings | overrides))


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
        return self.network(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer_factory(self.parameters())

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train_data, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
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


class RankDump(TypedDict):
    """What one process leaves behind at the end of training."""

    weights: dict[str, Tensor]
    callbacks: dict[str, dict[str, Any]]


class DumpRank(L.Callback):
    """Saves a :class:`RankDump` to ``root/rank{r}.pt`` at the end of training; a forked child returns nothing else."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the module's weights and the state of every callback that has one, by its ``state_key``."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        states = {callback.state_key: callback.state_dict() for callback in callbacks}
        dump: RankDump = {
            "weights": pl_module.state_dict(),
            "callbacks": {key: state for key, state in states.items() if state},
        }
        torch.save(dump, self.root / f"rank{trainer.global_rank}.pt")


class SeedPerRank(L.Callback):
    """Gives every rank another random state, so that equal masks cannot come from equal global generators."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Seed torch's global generator by the rank."""
        torch.manual_seed(1000 + trainer.global_rank)


def fit_two_processes(
    model: L.LightningModule, root: Path, callbacks: Sequence[L.Callback] = (), **overrides: Any
) -> tuple[RankDump, RankDump]:
    """Fit in two forked processes (DDP over gloo) and return what each rank dumped; errors of a rank are raised here.

    Callbacks live on in the children alone: read ``dump["callbacks"][callback.state_key]``, not their attributes.
    """
    make_trainer(
        root, strategy="ddp_fork", devices=2, callbacks=[SeedPerRank(), *callbacks, DumpRank(root)], **overrides
    ).fit(model)
    first, second = (torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second
