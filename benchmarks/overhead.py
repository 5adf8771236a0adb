"""What a sparse method costs a training step, beside dense training in the same run.

Dense and sparse fits, real ones by Trainers of their own, take turns of a few steps. A step lasts from one
``on_train_batch_start`` to the next, so that start and end of a fit do not count. Of each method there are two:

- between updates: 90 % are pruned at the first step, which does not count; then masks only hold;
- updating: masks change at every step. What that takes more is the cost of one update; the last column spreads it
  over 100 steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import lightning as L
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.harness import Ratio, alternate, argument_parser, quiet_trainer, report, silence_lightning
from lightning_sparse import FGGP, GMP
from lightning_sparse.zoo import LeNet300100

UPDATE_EVERY = 100
"""Steps over which the cost of an update is spread."""


@dataclass(frozen=True)
class Case:
    """A network, its batch, and how it is timed."""

    name: str
    network: Callable[[], nn.Module]
    batch: tuple[int, ...]
    rounds: int
    steps: int
    every: int
    skip: int
    goal: float


def resnet18() -> nn.Module:
    """Make torchvision's ResNet-18 as it is used on 32 x 32 images: a 3 x 3 stem, and no pooling after it."""
    network = torchvision.models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    network.add_module("maxpool", nn.Identity())
    return network


LENET = Case("LeNet-300-100, batch 64", LeNet300100, (64, 1, 28, 28), rounds=5, steps=156, every=6, skip=10, goal=1.10)
RESNET = Case("ResNet-18, batch 32", resnet18, (32, 3, 32, 32), rounds=5, steps=8, every=2, skip=1, goal=1.03)


class Fixed(L.LightningModule):
    """Trains a network on images that are in memory, with SGD and momentum, and logs nothing."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.network = case.network()
        self.case = case

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def train_dataloader(self) -> DataLoader[Any]:
        """Make batches, of noise."""
        size = self.case.batch
        batches = [(torch.randn(size), torch.randint(0, 10, size[:1])) for _ in range(min(self.case.steps, 8))]
        return DataLoader([batches[step % len(batches)] for step in range(self.case.steps)], batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(case: Case, turns: L.Callback, *, method: Callable[[], L.Callback] | None = None) -> None:
    """Train for the steps of ``case``."""
    callbacks = [turns] if method is None else [turns, method()]
    quiet_trainer(max_epochs=1, callbacks=callbacks).fit(Fixed(case))


def measure(case: Case, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Time the steps of ``case``; return a row for each method."""
    methods: dict[str, Callable[[], L.Callback] | None] = {
        "dense": None,
        "GMP": lambda: GMP(0.9, update_every=1, stop=0),
        "FGGP": lambda: FGGP(0.9, update_every=1, stop=0),
        "GMP, updating": lambda: GMP(0.9, update_every=1, stop=case.steps - 1),
        "FGGP, updating": lambda: FGGP(0.9, update_every=1, stop=case.steps - 1),
    }
    fits = {name: partial(fit, case, method=method) for name, method in methods.items()}
    seconds = alternate(fits, rounds=case.rounds, every=case.every, skip=case.skip, clock=clock)
    dense = median(seconds["dense"])
    rows: list[dict[str, Any]] = []
    for method in ("GMP", "FGGP"):
        update = median(seconds[f"{method}, updating"]) - median(seconds[method])
        rows.append(
            {
                "case": case.name,
                "method": method,
                "dense step, ms": 1e3 * dense,
                "sparse / dense (quartiles)": Ratio.of(seconds[method], seconds["dense"]),
                "goal": case.goal,
                "update, ms": 1e3 * update,
                f"update every {UPDATE_EVERY} steps / dense": update / UPDATE_EVERY / dense,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--only", choices=["lenet", "resnet"], help="one of the two networks")
    arguments = parser.parse_args(argv)
    silence_lightning()
    cases = [case for name, case in (("lenet", LENET), ("resnet", RESNET)) if arguments.only in (None, name)]
    if arguments.smallest:
        cases = [replace(LENET, rounds=1, steps=8, every=2, skip=1)]
    rows = [row for case in cases for row in measure(case, arguments.clock)]
    report("A training step, sparse over dense", rows, arguments.json)


if __name__ == "__main__":
    main()
