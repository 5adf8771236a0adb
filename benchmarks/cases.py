"""What the speed benchmarks train: four networks, their batches, and a module that adds no cost of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models import VisionTransformer

from lightning_sparse.zoo import LeNet300100, ResNet50

Optimizer = Callable[..., torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=1e-4),
    "AdamW-fused": partial(torch.optim.AdamW, lr=1e-4, fused=True),
}
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A network, its batch, and how it is timed.

    Attributes:
        name: Its name in the tables.
        network: Makes it.
        batch: Shape of a batch of images on a CPU.
        rounds: How often each contender trains.
        steps: Steps of each of these trainings.
        every: Steps in a turn; the first is not timed.
        skip: Timed steps at the beginning of a training that do not count.
    """

    name: str
    network: Callable[[], nn.Module]
    batch: tuple[int, int, int, int]
    rounds: int
    steps: int
    every: int
    skip: int


def resnet18() -> nn.Module:
    """Make torchvision's ResNet-18 for 32 x 32 images: with a 3 x 3 stem, and no pooling after it."""
    network = torchvision.models.resnet18(num_classes=CLASSES)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    network.add_module("maxpool", nn.Identity())
    return network


def vit() -> nn.Module:
    """Make torchvision's vision transformer: six layers of 384 with six heads, on 64 patches of 4 x 4."""
    return VisionTransformer(
        image_size=32, patch_size=4, num_layers=6, num_heads=6, hidden_dim=384, mlp_dim=1536, num_classes=CLASSES
    )


CASES = {
    "lenet": Case("LeNet-300-100", LeNet300100, (64, 1, 28, 28), rounds=5, steps=156, every=6, skip=10),
    "resnet18": Case("ResNet-18", resnet18, (32, 3, 32, 32), rounds=4, steps=9, every=3, skip=2),
    "resnet50": Case("ResNet-50", ResNet50, (16, 3, 32, 32), rounds=3, steps=9, every=3, skip=2),
    "vit": Case("ViT, 6 layers", vit, (16, 3, 32, 32), rounds=4, steps=9, every=3, skip=2),
}
SMALLEST = Case("LeNet-300-100", LeNet300100, (64, 1, 28, 28), rounds=1, steps=8, every=2, skip=1)


class Timed(L.LightningModule):
    """Trains a network on noise that is in memory, and logs nothing.

    Args:
        network: What is trained.
        batch: Shape of a batch of images.
        steps: Steps in an epoch.
        optimizer: Makes the optimizer from the parameters.
    """

    def __init__(self, network: nn.Module, batch: tuple[int, ...], steps: int, optimizer: Optimizer) -> None:
        super().__init__()
        self.network = network
        self.batch = batch
        self.steps = steps
        self.optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def train_dataloader(self) -> DataLoader[Any]:
        """Make batches of noise."""
        distinct = min(self.steps, 8)
        batches = [(torch.randn(self.batch), torch.randint(0, CLASSES, self.batch[:1])) for _ in range(distinct)]
        return DataLoader([batches[step % distinct] for step in range(self.steps)], batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return self.optimizer(self.parameters())
