"""The modules of the recorded runs: small, in float64, the same on every machine and with every version of torch."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from numpy.random import RandomState  # its streams are frozen, those of torch and of numpy's Generator are not
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.optim import Optimizer

    MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

__all__ = ["BATCHES", "MLP", "SAMPLES", "ConvNet", "Recurrent", "ResidualNet", "Toy", "TwoOptimizers", "adamw", "sgd"]

BATCHES = 12
"""Batches in an epoch."""

SAMPLES = 16
"""Samples in a batch, of all processes together."""


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """SGD with all that moves a pruned weight."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.05)


class Toy(L.LightningModule):
    """A classifier of three classes that trains at batch ``i`` on samples that depend on ``i`` alone.

    So a run that is resumed within an epoch sees what it would have seen, and two processes see together, half each,
    what one sees. Activations are smooth, but where they have to be ReLUs: no neuron is dead, and no scores are tied.
    """

    sample_shape: tuple[int, ...]

    def __init__(self, optimizer: MakeOptimizer = sgd, bad_batches: range = range(0)) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.bad_batches = bad_batches
        self.network = self.build().double()
        self._draw_weights()
        draws = RandomState(1)
        shape = (BATCHES * SAMPLES, *self.sample_shape)
        self.inputs = torch.from_numpy(draws.standard_normal(shape))
        mixed = self.inputs.flatten(1) @ torch.from_numpy(draws.standard_normal((self.inputs[0].numel(), 3)))
        self.labels = mixed.argmax(dim=1)

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the network."""

    @torch.no_grad()
    def _draw_weights(self) -> None:
        draws = RandomState(0)
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                is_gain = isinstance(module, nn.LayerNorm | nn.BatchNorm2d) and name == "weight"
                bound = (3.0 * parameter.shape[0] / parameter.numel()) ** 0.5 if parameter.dim() > 1 else 0.1
                drawn = torch.from_numpy(draws.uniform(-bound, bound, tuple(parameter.shape)))
                parameter.copy_(drawn + is_gain)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def loss(self, batch_idx: int) -> Tensor:
        """Cross entropy on this process' part of a batch."""
        part = SAMPLES // self.trainer.world_size
        first = batch_idx * SAMPLES + self.trainer.global_rank * part
        loss = F.cross_entropy(self(self.inputs[first : first + part]), self.labels[first : first + part])
        bad = self.current_epoch * BATCHES + batch_idx in self.bad_batches
        return loss * float("nan") if bad else loss

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.loss(batch_idx)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.bad_batches:  # keep NaN out of the weights, after the callbacks have seen it
            for parameter in self.parameters():
                if parameter.grad is not None:
                    torch.nan_to_num_(parameter.grad)

    @override
    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.arange(BATCHES)), batch_size=None)


class MLP(Toy):
    """Three linear layers, 470 weights: ``network.0``, ``network.2``, ``network.5``."""

    sample_shape = (12,)

    @override
    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 10), nn.LayerNorm(10), nn.Tanh(), nn.Linear(10, 3)
        )


class TwoOptimizers(MLP):
    """Manual optimization: one optimizer for the first layer, another for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    @override
    def configure_optimizers(self) -> Any:
        first, *others = self.network.children()
        return [sgd(first.parameters()), adamw(nn.ModuleList(others).parameters())]

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch_idx))
            optimizer.step()


class ConvNet(Toy):
    """A convolution, a grouped one and a linear layer, 504 weights: ``network.0``, ``network.3``, ``network.6``."""

    sample_shape = (2, 6, 6)

    @override
    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1, bias=False),  # before a norm its gradient would be rounding alone
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(8 * 3 * 3, 3),
        )


class _LastOutput(nn.Module):
    def forward(self, outputs: tuple[Tensor, Any]) -> Tensor:
        return outputs[0][:, -1]


class Recurrent(Toy):
    """An LSTM and a linear layer on its last output, 408 weights: ``network.0`` and ``network.2``."""

    sample_shape = (5, 4)

    @override
    def build(self) -> nn.Module:
        return nn.Sequential(nn.LSTM(4, 8, batch_first=True), _LastOutput(), nn.Linear(8, 3))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.relu(self.norm(self.conv(inputs)))


class ResidualNet(Toy):
    """A stage of four equal blocks, whose convolutions can be shared and whose ReLUs can be phased."""

    sample_shape = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = self.inputs[:2]  # asked for the channels of each ReLU

    @override
    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Sequential(*(_Block(4) for _ in range(4))),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 3 * 3, 3),
        )
