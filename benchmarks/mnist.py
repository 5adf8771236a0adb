"""What GMP and FGGP reach on MNIST, compared with dense training: two LeNets, three sparsities, three seeds.

Settings of "Dynamic Sparse Training" (Liu et al., ICLR 2020, https://arxiv.org/abs/2005.06870): batch size 64, 20
epochs, SGD with learning rate 0.01 and momentum 0.9, no weight decay. All methods train with these; nothing is tuned.
The test accuracy is that after the last epoch: no epoch is chosen by it.

Each run is a process of its own with one thread, and appends one line to ``--out``. Runs that are already there are not
repeated, so you can stop the command and start it again::

    python -m benchmarks.mnist --data data --out mnist.jsonl --jobs 2
    python -m benchmarks.mnist --out mnist.jsonl --table
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table

from benchmarks.harness import quiet_trainer, versions
from benchmarks.runs import Plain, argument_parser, begin, mean_and_deviation, reproduce, truncate
from lightning_sparse import FGGP, GMP
from lightning_sparse.zoo import LeNet5Caffe, LeNet300100, MNISTDataModule

NETWORKS = {"lenet300": LeNet300100, "lenet5": LeNet5Caffe}
METHODS = {"gmp": GMP, "fggp": FGGP}
SPARSITIES = (0.9, 0.95, 0.98)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """One training run: its network, method, sparsity, seed and length."""

    network: str
    method: str
    sparsity: float
    seed: int
    epochs: int = 20
    train_images: int = 60_000

    def __str__(self) -> str:
        return f"{self.network} {self.method} {self.sparsity:g} seed {self.seed}"


def train(run: Run, data: Path) -> dict[str, Any]:
    """Train, and return the run with its results: test accuracy in percent, active weights, CPU seconds.

    Args:
        run: What to train.
        data: Folder of MNIST's four files.
    """
    begin(run.seed)
    module = Plain(NETWORKS[run.network](), partial(torch.optim.SGD, lr=0.01, momentum=0.9))
    mnist = MNISTDataModule(data, batch_size=64)
    truncate(mnist, run.train_images)
    callbacks = [METHODS[run.method](run.sparsity)] if run.method in METHODS else []
    trainer = quiet_trainer(max_epochs=run.epochs, check_val_every_n_epoch=run.epochs, callbacks=callbacks)
    start = time.process_time()
    trainer.fit(module, mnist)
    seconds = time.process_time() - start
    # Counted in the weights themselves, so that the callback is not trusted.
    weights = {name: value for name, value in module.network.state_dict().items() if value.dim() > 1}
    return asdict(run) | {
        "accuracy": 100 * float(trainer.callback_metrics["accuracy"]),
        "active": {name: int(value.count_nonzero()) for name, value in weights.items()},
        "weights": sum(value.numel() for value in weights.values()),
        "cpu_seconds": round(seconds, 1),
        "versions": versions(),
    }


def all_runs(only: Sequence[str] = (), seeds: Sequence[int] = SEEDS, **settings: int) -> list[Run]:
    """Return the runs of the reproduction, seed by seed.

    Args:
        only: Names of networks and methods; all if empty.
        seeds: Seeds of each.
        settings: Other values for fields of :class:`Run` than the reproduction's.
    """
    variants = [("dense", 0.0), *((method, sparsity) for sparsity in SPARSITIES for method in METHODS)]
    networks = set(only) & NETWORKS.keys() or NETWORKS.keys()
    methods = set(only) - NETWORKS.keys() or {"dense", *METHODS}
    return [
        Run(network, method, sparsity, seed, **settings)
        for seed in seeds
        for network in NETWORKS
        for method, sparsity in variants
        if network in networks and method in methods
    ]


def tabulate(finished: Sequence[dict[str, Any]]) -> Table:
    """Make the table: mean ± sample standard deviation over the seeds, and the sparsity counted in the weights."""
    table = Table("network", "method", "sparsity", "active weights", "test accuracy, %", "− dense", "seeds")
    cells: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for result in finished:
        cells.setdefault((result["network"], result["method"], result["sparsity"]), []).append(result)
    order = ["dense", *METHODS]
    for network, method, sparsity in sorted(cells, key=lambda cell: (cell[0], cell[2], order.index(cell[1]))):
        results = cells[network, method, sparsity]
        active = {sum(result["active"].values()) for result in results}
        accuracies = [result["accuracy"] for result in results]
        dense = [result["accuracy"] for result in cells.get((network, "dense", 0.0), ())]
        table.add_row(
            network,
            method,
            " / ".join(f"{1 - count / results[0]['weights']:.6f}" for count in sorted(active)),
            " / ".join(f"{count:,}" for count in sorted(active)) + f" of {results[0]['weights']:,}",
            mean_and_deviation(accuracies),
            f"{mean(accuracies) - mean(dense):+.2f}" if dense and method != "dense" else "",
            str(len(results)),
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, and print the table."""
    parser = argument_parser(__doc__, out="mnist.jsonl", data="MNIST's four files", epochs=20, images=60_000)
    parser.add_argument(
        "--only", nargs="+", default=[], choices=[*NETWORKS, "dense", *METHODS], help="networks, methods"
    )
    arguments = parser.parse_args(argv)
    settings = {"epochs": arguments.epochs, "train_images": arguments.train_images}
    runs = all_runs(arguments.only, arguments.seeds or SEEDS, **settings)
    reproduce(runs, train, tabulate, arguments)


if __name__ == "__main__":
    main()
