"""ResNet-20 on CIFAR-10, dense and at extreme sparsity with SET, RigL and EAST, all for the same few epochs.

A small trial for a CPU, far from the 250 epochs of the papers: it compares the methods with each other. All train with
SGD (Nesterov 0.9; learning rate 0.1, a tenth of it after one half and a hundredth after three quarters; weight decay
1e-4), batch size 128, and gradients clipped to a norm of 1. SET and RigL have ITOP's settings, with the intervals
scaled to the length: updates every 0.017 and 0.045 of training (1500 and 4000 of 88 000 steps). EAST has its defaults.
``east-masks`` is EAST without DyReLU and weight sharing; ``rigl+dyrelu`` and ``rigl+sharing`` are RigL with one of
EAST's parts.

Results are those after the last epoch: test accuracy; the share of weights that were ever active (ITOP's R_s); the
share of filters without an active weight. Each run is a process of its own with one thread, and appends one line to
``--out``. Runs that are already there are not repeated::

    python -m benchmarks.cifar --data data --out cifar.jsonl --jobs 2
    python -m benchmarks.cifar --out cifar.jsonl --table
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import torch
from rich.table import Table
from torch.optim.lr_scheduler import MultiStepLR
from typing_extensions import override

from benchmarks.harness import quiet_trainer, versions
from benchmarks.runs import Plain, argument_parser, begin, mean_and_deviation, reproduce, truncate
from lightning_sparse import EAST, SET, DyReLUPhasing, RigL, SparseMethod, WeightSharing
from lightning_sparse.functional.topology import dead_neurons
from lightning_sparse.metrics.history import MaskHistory
from lightning_sparse.schedules import Cosine
from lightning_sparse.zoo import CIFAR10DataModule, ResNet20

ITOP: dict[str, Any] = {"drop_fraction": Cosine(0.5, 0.005), "stop": 1.0}
rigl = partial(RigL, **ITOP, update_every=0.045, update_replaces_step=False)
METHODS: dict[str, Callable[[float], list[L.Callback]]] = {
    "dense": lambda _: [],
    "set": lambda sparsity: [SET(sparsity, **ITOP, update_every=0.017)],
    "rigl": lambda sparsity: [rigl(sparsity)],
    "east": lambda sparsity: [EAST(sparsity)],
    "east-masks": lambda sparsity: [EAST(sparsity, phasing=False, sharing=False)],
    "rigl+dyrelu": lambda sparsity: [rigl(sparsity), DyReLUPhasing()],
    "rigl+sharing": lambda sparsity: [rigl(sparsity), WeightSharing()],
}
SPARSITIES = (0.99, 0.999)


@dataclass(frozen=True)
class Run:
    """One training run: its method, sparsity, seed and length."""

    method: str
    sparsity: float
    seed: int
    epochs: int = 5
    train_images: int = 50_000

    def __str__(self) -> str:
        return f"{self.method} {self.sparsity:g} seed {self.seed}"


class Scheduled(Plain):
    """The classifier, with the learning rates of the papers."""

    @override
    def configure_optimizers(self) -> Any:
        """Make the optimizer, and a scheduler that acts at every step."""
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Explored(L.Callback):
    """Records which weights were ever active."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method
        self.history: MaskHistory | None = None
        self._seen = -1

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Observe the masks, if they have changed."""
        registry = self.method.registry
        if registry.num_updates != self._seen:
            self._seen = registry.num_updates
            masks = {name: weight.mask for name, weight in registry.items()}
            if self.history is None:
                self.history = MaskHistory(masks)
            self.history.observe(masks)


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)


def train(run: Run, data: Path) -> dict[str, Any]:
    """Train, and return the run with its results.

    Args:
        run: What to train.
        data: Folder of CIFAR-10.
    """
    begin(run.seed)
    cifar = CIFAR10DataModule(data, batch_size=128)
    truncate(cifar, run.train_images)
    module = Scheduled(ResNet20(), SGD)
    callbacks = METHODS[run.method](run.sparsity)
    method = next((callback for callback in callbacks if isinstance(callback, SparseMethod)), None)
    explored = [Explored(method)] if method else []
    trainer = quiet_trainer(
        max_epochs=run.epochs,
        check_val_every_n_epoch=run.epochs,
        callbacks=[*callbacks, *explored],
        gradient_clip_val=1.0,
    )
    start = time.process_time()
    trainer.fit(module, cifar)
    result: dict[str, Any] = {
        "accuracy": 100 * float(trainer.callback_metrics["accuracy"]),
        "cpu_seconds": round(time.process_time() - start, 1),
        "versions": versions(),
    }
    if method:
        history = explored[0].history
        result |= {
            "active": {name: weight.num_active for name, weight in method.registry.items()},
            "weights": method.registry.unshared_numel,
            "ever_active": history.ever_active if history else None,
            "dead_filters": dead_neurons([weight.rows(weight.mask) for weight in method.registry.values()]),
        }
    return asdict(run) | result


def all_runs(
    only: Sequence[str] = (), seeds: Sequence[int] = (0,), sparsities: Sequence[float] = SPARSITIES, **settings: int
) -> list[Run]:
    """Return the runs, seed by seed.

    Args:
        only: Names of methods; dense, SET, RigL and EAST if empty.
        seeds: Seeds of each.
        sparsities: Sparsities of each method but dense.
        settings: Other values for fields of :class:`Run`.
    """
    return [
        Run(method, sparsity, seed, **settings)
        for seed in seeds
        for method in only or ("dense", "set", "rigl", "east")
        for sparsity in ((0.0,) if method == "dense" else sparsities)
    ]


def tabulate(finished: Sequence[dict[str, Any]]) -> Table:
    """Make the table: mean ± sample standard deviation over the seeds."""
    table = Table("method", "sparsity", "active", "test accuracy, %", "ever active", "dead filters", "seeds")
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in finished:
        cells.setdefault((result["method"], result["sparsity"]), []).append(result)
    for method, sparsity in sorted(cells, key=lambda cell: (cell[1], list(METHODS).index(cell[0]))):
        results = cells[method, sparsity]
        sparse = "active" in results[0]
        table.add_row(
            method,
            f"{sparsity:g}",
            f"{sum(results[0]['active'].values()):,} of {results[0]['weights']:,}" if sparse else "",
            mean_and_deviation([result["accuracy"] for result in results]),
            f"{mean(result['ever_active'] for result in results):.3f}" if sparse else "",
            f"{mean(result['dead_filters'] for result in results):.3f}" if sparse else "",
            str(len(results)),
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, and print the table."""
    parser = argument_parser(__doc__, out="cifar.jsonl", data="CIFAR-10", epochs=5, images=50_000)
    parser.add_argument("--only", nargs="+", default=[], choices=[*METHODS])
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    arguments = parser.parse_args(argv)
    settings = {"epochs": arguments.epochs, "train_images": arguments.train_images}
    runs = all_runs(arguments.only, arguments.seeds or (0,), arguments.sparsities, **settings)
    reproduce(runs, train, tabulate, arguments)


if __name__ == "__main__":
    main()
