"""What GMP and FGGP reach on MNIST beside dense training: two LeNets, three sparsities, three seeds.

Set-up of "Dynamic Sparse Training" (Liu et al., ICLR 2020, https://arxiv.org/abs/2005.06870): batch 64, 20 epochs, SGD
with learning rate 0.01 and momentum 0.9, no weight decay. Every method trains with the same; nothing is tuned. Reported
is the test accuracy after the last epoch: no epoch is chosen by it.

Each run is a process of its own with one thread, and appends one line to ``--out``; runs that are there already are not
repeated, so the command may be stopped and given again::

    python -m benchmarks.mnist --data data --out mnist.jsonl --jobs 2
    python -m benchmarks.mnist --out mnist.jsonl --table
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import print_table, quiet_trainer, silence_lightning, versions
from lightning_sparse import FGGP, GMP
from lightning_sparse.zoo import LeNet5Caffe, LeNet300100, MNISTDataModule

NETWORKS = {"lenet300": LeNet300100, "lenet5": LeNet5Caffe}
METHODS = {"gmp": GMP, "fggp": FGGP}
SPARSITIES = (0.9, 0.95, 0.98)
SEEDS = (0, 1, 2)

# Of a run's process, read when it starts. glibc returns freed memory to the system by default, and asks for it again at
# every step: a tenth of the time.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 28), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


@dataclass(frozen=True)
class Run:
    """One training: what is trained, how sparse, from which seed, for how long."""

    network: str
    method: str
    sparsity: float
    seed: int
    epochs: int = 20
    train_images: int = 60_000

    def __str__(self) -> str:
        return f"{self.network} {self.method} {self.sparsity:g} seed {self.seed}"


class Plain(L.LightningModule):
    """A classifier that logs nothing in training, where logging would take a third of LeNet-300-100's step."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # oneDNN's convolutions take half the time in this order of memory.
        self.network = network.to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy; Lightning weights its mean by the batches' sizes."""
        images, labels = batch
        correct = self.network(images).argmax(dim=1) == labels
        self.log("accuracy", correct.double().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the paper's optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def train(run: Run, data: Path) -> dict[str, Any]:
    """Train, and return the run with its results: test accuracy in percent, active weights, CPU seconds.

    Args:
        run: What to train.
        data: Folder of MNIST's four files.
    """
    torch.set_num_threads(1)
    silence_lightning()
    L.seed_everything(run.seed, verbose=False)
    module = Plain(NETWORKS[run.network]())
    mnist = MNISTDataModule(data, batch_size=64)
    mnist.train_set.images = mnist.train_set.images[: run.train_images]
    mnist.train_set.labels = mnist.train_set.labels[: run.train_images]
    callbacks = [METHODS[run.method](run.sparsity)] if run.method in METHODS else []
    trainer = quiet_trainer(max_epochs=run.epochs, check_val_every_n_epoch=run.epochs, callbacks=callbacks)
    start = time.process_time()
    trainer.fit(module, mnist)
    seconds = time.process_time() - start
    # Counted on the weights themselves, not asked of the callback.
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
        only: Names of networks and methods; all where it has none.
        seeds: Seeds of each.
        settings: Fields of :class:`Run` that are to differ from the reproduction's.
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


def read(out: Path) -> dict[Run, dict[str, Any]]:
    """Read what is finished; a line that was cut short by a stop does not count."""
    finished: dict[Run, dict[str, Any]] = {}
    for line in out.read_text().splitlines() if out.exists() else ():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        finished[_run_of(result)] = result
    return finished


def train_missing(runs: Sequence[Run], data: Path, out: Path, jobs: int) -> None:
    """Train the runs that ``out`` does not hold, ``jobs`` at a time, and append each as it finishes."""
    finished = read(out)
    missing = [run for run in runs if run not in finished]
    os.environ.update(ENVIRONMENT)
    one_process_per_run = multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1)
    with one_process_per_run as pool, out.open("a") as file:
        if out.stat().st_size and not out.read_bytes().endswith(b"\n"):
            file.write("\n")
        results = pool.imap_unordered(partial(train, data=data), missing)
        for number, result in enumerate(results, start=1):
            file.write(json.dumps(result) + "\n")
            file.flush()
            cost = f"{result['accuracy']:.2f} %, {result['cpu_seconds']:.0f} s of one core"
            print(f"{number}/{len(missing)}  {_run_of(result)}: {cost}", flush=True)


def _run_of(result: dict[str, Any]) -> Run:
    return Run(**{field.name: result[field.name] for field in fields(Run) if field.name in result})


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
            f"{mean(accuracies):.2f} ± {stdev(accuracies) if len(accuracies) > 1 else float('nan'):.2f}",
            f"{mean(accuracies) - mean(dense):+.2f}" if dense and method != "dense" else "",
            str(len(results)),
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of MNIST's four files")
    parser.add_argument("--out", type=Path, default=Path("mnist.jsonl"), help="file that runs are appended to")
    parser.add_argument("--table", action="store_true", help="train nothing; print the table of what is in --out")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=[*NETWORKS, "dense", *METHODS], help="networks, methods"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--train-images", type=int, default=60_000, help="train on the first so many")
    arguments = parser.parse_args(argv)
    settings = {"epochs": arguments.epochs, "train_images": arguments.train_images}
    runs = all_runs(arguments.only, arguments.seeds, **settings)
    if not arguments.table:
        train_missing(runs, arguments.data, arguments.out, arguments.jobs)
    finished = read(arguments.out)
    print_table(tabulate([finished[run] for run in runs if run in finished]))


if __name__ == "__main__":
    main()
