"""What one global update of the masks costs, in units of one ``torch.sort`` of the same weights, and what masks weigh.

A real Trainer trains a network of ``--weights`` weights with SGD and momentum. At every step the method prunes some
more, from dense to 95 %: the first update prunes a dense network, the others ever sparser ones. Timed is the whole
the choice, the optimizer's moments, the masks of weights and gradients. Right after it ``torch.sort`` sorts the
magnitudes of the initial weights, as other libraries do to find a threshold.

RigL's update, which ranks each layer by itself, is measured on the weights of ResNet-50 with CIFAR's stem (23.5 M),
over the same update with two sorts of each layer, of magnitudes and of gradients, as ITOP's and GraNet's code do it.

Memory is counted in a dense fit and in sparse ones, at the end of a step: the storages of all tensors that Python's
garbage collector knows, whoever holds them, and as a check what the process occupies.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.harness import Ratio, argument_parser, quiet_trainer, report, silence_lightning
from lightning_sparse import FGGP, GMP, RigL
from lightning_sparse.schedules import Constant
from lightning_sparse.zoo import ResNet50

METHODS: dict[str, Callable[..., FGGP | GMP]] = {"GMP": GMP, "FGGP": FGGP}
LAYERS = 10
GOAL = 0.15
STATM = Path("/proc/self/statm")


class ManyWeights(L.LightningModule):
    """Square linear layers whose loss gives every weight a gradient of its own, at little cost."""

    def __init__(self, num_weights: int, steps: int) -> None:
        super().__init__()
        width = math.isqrt(num_weights // LAYERS)
        self.width = width
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(LAYERS))
        self.steps = steps

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return a sum whose gradient is the outer product of two random vectors in each layer."""
        return torch.stack([torch.randn(self.width) @ layer(batch[0]) for layer in self.layers]).sum()

    def train_dataloader(self) -> DataLoader[Any]:
        """Make a random vector for each step."""
        return DataLoader([torch.randn(1, self.width) for _ in range(self.steps)], batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=1e-6, momentum=0.9)


class Weights(L.LightningModule):
    """The weights of a network, each with a gradient of its own that costs nothing to compute."""

    def __init__(self, network: nn.Module, steps: int) -> None:
        super().__init__()
        self.network = network
        self.gradients = [torch.randn_like(weight) for weight in network.parameters()]
        self.steps = steps

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return a number whose gradient is given."""
        weights = self.network.parameters()
        return torch.stack([(w * g).sum() for w, g in zip(weights, self.gradients, strict=True)]).sum()

    def train_dataloader(self) -> DataLoader[Any]:
        """Count the steps."""
        return DataLoader(torch.zeros(self.steps, 1))  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=1e-6, momentum=0.9)


class Before(L.Callback):
    """Notes when the next callback's turn comes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.start = 0.0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the time."""
        self.start = self.clock()


@dataclass
class Figures:
    """What a fit tells: seconds of each update and of each sort, and bytes in use after the last step."""

    updates: list[float] = field(default_factory=list[float])
    sorts: list[float] = field(default_factory=list[float])
    in_tensors: int = 0
    resident: int = 0


class After(L.Callback):
    """Times what ran since ``before``, and then a sort of ``scores``; takes stock of the memory after each step."""

    def __init__(self, before: Before, scores: Tensor | None, figures: Figures) -> None:
        self.before = before
        self.scores = scores
        self.figures = figures

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Time the callback in between, and a sort."""
        self.figures.updates.append(self.before.clock() - self.before.start)
        if self.scores is not None:
            start = self.before.clock()
            torch.sort(self.scores)
            self.figures.sorts.append(self.before.clock() - start)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the bytes."""
        self.figures.in_tensors, self.figures.resident = bytes_in_tensors(), bytes_of_process()


class SortedUpdate(L.Callback):
    """Times what ran since ``before``, and then the same update done by sorting, on copies of the masks."""

    def __init__(self, before: Before, method: RigL, figures: Figures) -> None:
        self.before = before
        self.method = method
        self.figures = figures

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Time the callback in between, and its rival."""
        self.figures.updates.append(self.before.clock() - self.before.start)
        fraction = self.method.drop_fraction(self.method.progress)
        masks = [weight.mask.clone() for weight in self.method.weights]
        start = self.before.clock()
        for weight, mask in zip(self.method.weights, masks, strict=True):
            update_by_sorting(weight.parameter, weight.grad, mask, fraction)
        self.figures.sorts.append(self.before.clock() - start)


def update_by_sorting(weight: Tensor, grad: Tensor, mask: Tensor, fraction: float) -> None:
    """Prune and grow one layer as by RigL, with a sort of all magnitudes and a sort of all gradients.

    Example:
        >>> mask = torch.tensor([True, True, False, False])
        >>> update_by_sorting(torch.tensor([2.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 3.0]), mask, 0.5)
        >>> mask
        tensor([ True, False, False,  True])
    """
    flat, active = mask.view(-1), int(mask.sum())
    k = int(fraction * active)
    magnitudes = torch.where(mask, weight.abs(), torch.inf).flatten()
    flat[torch.sort(magnitudes).indices[:k]] = False
    growth = torch.where(mask, -1.0, grad.abs()).flatten()
    flat[torch.sort(growth, descending=True).indices[:k]] = True


def bytes_in_tensors() -> int:
    """Return the size of all storages that some Python object refers to."""
    gc.collect()
    # Subclasses such as the fake tensors of torch.compile have no storage of their own.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bytes_of_process() -> int:
    """Return what the process occupies in memory; 0 where the system does not tell."""
    return int(STATM.read_text().split()[1]) * 4096 if STATM.exists() else 0


def fit(method: L.Callback | None, num_weights: int, steps: int, clock: Callable[[], float]) -> Figures:
    """Train for ``steps``, all but the first with a sort; return what was noted."""
    L.seed_everything(0, verbose=False)
    module = ManyWeights(num_weights, steps)
    scores = torch.cat([weight.detach().abs().flatten() for weight in module.parameters()]) if steps > 1 else None
    before, figures = Before(clock), Figures()
    after = After(before, scores, figures)
    callbacks = [before, after] if method is None else [before, method, after]
    quiet_trainer(max_epochs=1, callbacks=callbacks).fit(module)
    return figures


def measure(num_weights: int, steps: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Return a row for each method."""
    num_weights = LAYERS * math.isqrt(num_weights // LAYERS) ** 2
    fit(None, num_weights, 1, clock)  # so that nothing is loaded for the first time, or grows, below
    rows: list[dict[str, Any]] = []
    for name, make in METHODS.items():
        dense = fit(None, num_weights, 1, clock)
        held = fit(make(0.95, allocation="global", update_every=1, stop=0), num_weights, 1, clock)
        timed = fit(make(0.95, allocation="global", update_every=1, stop=steps - 1), num_weights, steps, clock)
        # The first step, at which the schedule still asks for no sparsity, warms up.
        updates, sorts = timed.updates[1:], timed.sorts[1:]
        ratio = Ratio.of(updates, sorts)
        rows.append(
            {
                "method": name,
                "weights": f"{num_weights:,}",
                "torch.sort, ms": 1e3 * median(sorts),
                "update, ms": 1e3 * median(updates),
                "update / sort (quartiles)": ratio,
                "first": updates[0] / sorts[0],
                "goal": GOAL,
                "extra bytes / weight": (held.in_tensors - dense.in_tensors) / num_weights,
                "by the process's size": (held.resident - dense.resident) / num_weights,
            }
        )
    return rows


def measure_rigl(network: nn.Module, steps: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Return the row of RigL at 99 %."""
    L.seed_everything(0, verbose=False)
    module = Weights(network, steps)
    rigl = RigL(0.99, drop_fraction=Constant(0.3), update_every=1, stop=steps, update_replaces_step=False)
    before, figures = Before(clock), Figures()
    quiet_trainer(max_epochs=1, callbacks=[before, rigl, SortedUpdate(before, rigl, figures)]).fit(module)
    updates, sorts = figures.updates[2:], figures.sorts[2:]  # there is none at the first step; the second warms up
    return {
        "method": "RigL",
        "weights": f"{rigl.registry.numel:,}",
        "update by sorting, ms": 1e3 * median(sorts),
        "update, ms": 1e3 * median(updates),
        "update / by sorting (quartiles)": Ratio.of(updates, sorts),
        "goal": GOAL,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--weights", type=int, default=25_000_000, help="how many weights the network has")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--only", choices=["global", "rigl"], help="one of the two")
    arguments = parser.parse_args(argv)
    silence_lightning()
    num_weights, updates = (100_000, 2) if arguments.smallest else (arguments.weights, arguments.updates)
    if arguments.only != "rigl":
        rows = measure(num_weights, updates + 1, arguments.clock)
        report("A global update over one torch.sort", rows, arguments.json)
    if arguments.only != "global":
        network = ResNet50(width=8 if arguments.smallest else 64)
        rows = [measure_rigl(network, updates + 2, arguments.clock)]
        report("RigL's update over the same by sorting", rows, None if arguments.only is None else arguments.json)


if __name__ == "__main__":
    main()
