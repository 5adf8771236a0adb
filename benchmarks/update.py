"""What one update of the masks costs, in units of one ``torch.sort`` of the same weights.

A real Trainer trains a network of so many weights, with SGD and momentum, and masks change at every step. The time is
that of the whole update: the choice of weights, the optimizer's moments, the masks of weights and gradients. Right
after it, ``torch.sort`` sorts the magnitudes of the initial weights, as other libraries do to find a threshold. GMP and
FGGP rank all weights together and prune some more each time, from dense to 95 %. SET, RigL, EAST, MEST, SNFS and SRigL
exchange 30 % of each layer at 99 %; DSR exchanges what falls below its threshold. GraNet does both. The masks of DST,
SR-STE, STR, Top-KAST and Feather always change at every step: these methods are timed before and after the optimizer's
step.

The rivals do the same on the same weights: a sort of all magnitudes; RigL with two sorts of each layer, as in the code
of ITOP and GraNet; ``torch.nn.utils.prune.global_unstructured``; Lightning's ``ModelPruning``; torch.ao's sparsifier::

    python -m benchmarks.update --weights 1_000_000 25_000_000 100_000_000
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier
from torch.nn.utils import prune
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.harness import Ratio, argument_parser, quiet_trainer, report, write
from lightning_sparse import (
    DSR,
    DST,
    EAST,
    FGGP,
    GMP,
    MEST,
    SET,
    SNFS,
    SRSTE,
    STR,
    Feather,
    GraNet,
    RigL,
    SRigL,
    TopKAST,
)
from lightning_sparse.schedules import Constant

TITLE = "An update over one torch.sort"
LAYERS = 10
ALPHA = 1e-6


class ManyWeights(L.LightningModule):
    """Square linear layers whose loss gives every weight its own gradient, at little cost.

    Args:
        num_weights: About how many weights there are; each layer is square.
        steps: Steps in an epoch.
        layers: How many layers there are.
    """

    def __init__(self, num_weights: int, steps: int, layers: int = LAYERS) -> None:
        super().__init__()
        self.width = math.isqrt(num_weights // layers) // 4 * 4  # 2:4 needs groups of four inputs
        self.layers = nn.ModuleList(nn.Linear(self.width, self.width, bias=False) for _ in range(layers))
        self.steps = steps

    @property
    def num_weights(self) -> int:
        """How many weights there are."""
        return len(self.layers) * self.width**2

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return a sum whose gradient is the outer product of two random vectors in each layer."""
        vectors = torch.randn(len(self.layers), self.width, device=batch.device)
        return torch.stack([vector @ layer(batch[0]) for vector, layer in zip(vectors, self.layers, strict=True)]).sum()

    def train_dataloader(self) -> DataLoader[Any]:
        """Make a random vector for each step."""
        return DataLoader([torch.randn(1, self.width) for _ in range(self.steps)], batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=1e-6, momentum=0.9)


METHODS: dict[str, Callable[[int], L.Callback]] = {
    "GMP": lambda steps: GMP(0.95, allocation="global", update_every=1, stop=steps - 1),
    "FGGP": lambda steps: FGGP(0.95, update_every=1, stop=steps - 1),
    "SET": lambda steps: SET(0.99, **_every_step(steps)),
    "RigL": lambda steps: RigL(0.99, **_every_step(steps), update_replaces_step=False),
    "EAST": lambda steps: EAST(0.99, **_every_step(steps), cycles=0, phasing=False, sharing=False),
    "GraNet": lambda steps: GraNet(0.95, drop_fraction=Constant(0.3), update_every=1, stop=steps),
    "MEST": lambda steps: MEST(0.99, **_every_step(steps)),
    "SNFS": lambda steps: SNFS(0.99, **_every_step(steps)),
    "DSR": lambda steps: DSR(0.99, update_every=1, stop=steps),
    "SRigL": lambda steps: SRigL(0.99, **_every_step(steps), update_replaces_step=False),
    "DST": lambda steps: DST(ALPHA),
    "SRSTE": lambda steps: SRSTE("2:4"),
    "STR": lambda steps: STR(-5.0, decay=1e-4),
    "TopKAST": lambda steps: TopKAST(0.95),
    "Feather": lambda steps: Feather(0.95, stop=steps - 1),
}
"""Each method, with settings that change the masks at every one of so many steps."""

GOALS: dict[str, float] = {name: 0.12 for name in METHODS if name != "SNFS"} | {"GMP": 0.08, "FGGP": 0.08, "RigL": 0.08}


def _every_step(steps: int) -> dict[str, Any]:
    return {"drop_fraction": Constant(0.3), "update_every": 1, "stop": steps}


class Rival(L.Callback):
    """Updates masks at every step in another way."""

    def begin(self, layers: Sequence[nn.Linear]) -> None:
        """Prepare for the layers."""
        self.layers = layers

    def update(self, sparsity: float) -> None:
        """Change the masks."""
        raise NotImplementedError

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin."""
        self.begin([module for module in pl_module.modules() if isinstance(module, nn.Linear)])

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Update."""
        self.update(0.95 * (trainer.global_step + 1) / pl_module.steps)  # type: ignore[operator]


class GlobalSort(Rival):
    """Gradual magnitude pruning with a sort of all magnitudes and masks of floats."""

    @override
    def update(self, sparsity: float) -> None:
        weights = [layer.weight for layer in self.layers]
        magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
        threshold = torch.sort(magnitudes).values[int(sparsity * len(magnitudes))]
        for weight in weights:
            weight.mul_((weight.abs() > threshold).to(weight.dtype))


class LayerSorts(Rival):
    """RigL with two sorts of each layer."""

    @override
    def begin(self, layers: Sequence[nn.Linear]) -> None:
        super().begin(layers)
        self.masks = [torch.rand_like(layer.weight) < 0.01 for layer in layers]

    @override
    def update(self, sparsity: float) -> None:
        for layer, mask in zip(self.layers, self.masks, strict=True):
            update_by_sorting(layer.weight, layer.weight.grad, mask, 0.3)  # type: ignore[arg-type]
            layer.weight.mul_(mask)


def update_by_sorting(weight: Tensor, grad: Tensor, mask: Tensor, fraction: float) -> None:
    """Prune and grow one layer as RigL does, with a sort of all magnitudes and a sort of all gradients.

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


class TorchPrune(Rival):
    """``torch.nn.utils.prune``, all layers together. What one update made is removed before the next."""

    @override
    def update(self, sparsity: float) -> None:
        weights = [(layer, "weight") for layer in self.layers]
        prune.global_unstructured(weights, prune.L1Unstructured, amount=sparsity)  # type: ignore[no-untyped-call]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make masks permanent, so that they do not add up."""
        for layer in self.layers:
            prune.remove(layer, "weight")


class TorchAO(Rival):
    """torch.ao's WeightNormSparsifier, which ranks each layer by itself, with blocks of one weight."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.sparsifier = WeightNormSparsifier(0.95, sparse_block_shape=(1, 1), zeros_per_block=1)
        names = [name for name, module in pl_module.named_modules() if isinstance(module, nn.Linear)]
        self.sparsifier.prepare(pl_module, [{"tensor_fqn": f"{name}.weight"} for name in names])

    @override
    def update(self, sparsity: float) -> None:
        self.sparsifier.step()


class PruneNow(ModelPruning):
    """Lightning's callback, which prunes here at every step, and makes masks permanent each time."""

    def __init__(self) -> None:
        super().__init__("l1_unstructured", amount=0.95, apply_pruning=False, use_lottery_ticket_hypothesis=False)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Prune."""
        self.apply_pruning(0.1)


RIVALS: dict[str, Callable[[], L.Callback]] = {
    "a sort of all weights": GlobalSort,
    "two sorts of each layer": LayerSorts,
    "torch.nn.utils.prune": TorchPrune,
    "ModelPruning": PruneNow,
    "torch.ao": TorchAO,
}


@dataclass
class Figures:
    """Seconds of each update, and of the sort after it."""

    updates: list[float] = field(default_factory=list[float])
    sorts: list[float] = field(default_factory=list[float])


class Call(L.Callback):
    """Calls a function where methods work: before the optimizer's step, and after it.

    Put a method between two of them in the list of callbacks: its time is that between their calls.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Also call it after the optimizer's step, where hooks run in the order in which they were registered."""
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.function())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Call it."""
        self.function()


class Watch(L.Callback):
    """Times what happens between ``begin`` and ``end``, and, after each step, a sort of the initial magnitudes."""

    def __init__(self, clock: Callable[[], float], *, sort: bool) -> None:
        self.clock = clock
        self.sort = sort
        self.figures = Figures()
        self.scores = torch.empty(0)
        self._start = self._of_step = 0.0

    def begin(self) -> None:
        """Called before the method."""
        self._start = self.clock()

    def end(self) -> None:
        """Called after the method, which has two turns in a step."""
        self._of_step += self.clock() - self._start

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the magnitudes of the weights before anything is pruned."""
        if self.sort:
            self.scores = torch.cat([weight.detach().abs().flatten() for weight in pl_module.parameters()])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the time of the step's update, and sort."""
        start = self.clock()
        torch.sort(self.scores)
        self.figures.sorts.append(self.clock() - start)
        self.figures.updates.append(self._of_step)
        self._of_step = 0.0


def fit(
    method: L.Callback, module: ManyWeights, clock: Callable[[], float], *, sort: bool = True, device: str = "cpu"
) -> Figures:
    """Train ``module``; return the times of its updates, and of the sorts after them."""
    watch = Watch(clock, sort=sort)
    callbacks = [Call(watch.begin), method, Call(watch.end), watch]
    quiet_trainer(max_epochs=1, callbacks=callbacks, accelerator=device).fit(module)
    return watch.figures


def measure(
    num_weights: int,
    updates: int,
    clock: Callable[[], float],
    *,
    methods: Mapping[str, Callable[[int], L.Callback]] = METHODS,
    rivals: Mapping[str, Callable[[], L.Callback]] = RIVALS,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Return a row for each method and each rival."""
    steps = updates + 2  # SET and RigL change nothing at the first step; the second warms up
    everyone = {name: make(steps) for name, make in methods.items()} | {name: make() for name, make in rivals.items()}
    rows: list[dict[str, Any]] = []
    for name, callback in everyone.items():
        L.seed_everything(0, verbose=False)
        module = ManyWeights(num_weights, steps)
        figures = fit(callback, module, clock, device=device)
        seconds, sorts = figures.updates[2:], figures.sorts[2:]
        rows.append(
            {
                "weights": f"{module.num_weights:,}",
                "contender": name,
                "torch.sort, ms": 1e3 * median(sorts),
                "update, ms": 1e3 * median(seconds),
                "update / sort (quartiles)": Ratio.of(seconds, sorts),
                "goal": GOALS.get(name, ""),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each number of weights."""
    parser = argument_parser(__doc__)
    parser.add_argument("--weights", type=int, nargs="+", default=[25_000_000], help="how many weights the network has")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=[*METHODS, *RIVALS], help="some of the contenders")
    arguments = parser.parse_args(argv)
    chosen = arguments.only or [*METHODS, *RIVALS]
    updates = 2 if arguments.smallest else arguments.updates
    tables: list[dict[str, Any]] = []
    for num_weights in [100_000] if arguments.smallest else arguments.weights:
        rows = measure(
            num_weights,
            updates,
            arguments.clock,
            methods={name: make for name, make in METHODS.items() if name in chosen},
            rivals={name: make for name, make in RIVALS.items() if name in chosen},
            device=arguments.device,
        )
        report(TITLE, rows)
        tables += rows
        write(TITLE, tables, arguments.json)


if __name__ == "__main__":
    main()
