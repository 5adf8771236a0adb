"""What DST reaches on MNIST: how many weights are left, and the accuracy, as alpha grows (table 1 of the paper).

Settings of "Dynamic Sparse Training" (Liu et al., ICLR 2020, https://arxiv.org/abs/2005.06870) and of its authors'
code: 20 epochs; the LeNets with batch size 64 and SGD (learning rate 0.01, momentum 0.9), the LSTMs with batch size 100
and Adam (learning rate 0.001); no weight decay. As there, the classifier of the LSTMs stays dense and is not counted,
and pixels are in [0, 1]. The alphas of the paper's rows are not known, so several are tried. Because users ask for a
sparsity, ``DST(sparsity=)`` is also run with the sparsities of the paper's rows.

The table shows the last epoch. Beside it are the two choices of the authors' code, which picks an epoch of each run on
the test set: the one with the best accuracy, and the one with the fewest weights left. Each run is a process of its own
with one thread, and appends one line to ``--out``. Runs that are already there are not repeated, so you can stop the
command and start it again::

    python -m benchmarks.dst --data data --out dst.jsonl --jobs 2
    python -m benchmarks.dst --out dst.jsonl --table
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import torch
from rich.table import Table
from torch import nn
from typing_extensions import override

from benchmarks.harness import quiet_trainer, versions
from benchmarks.runs import Plain, argument_parser, begin, mean_and_deviation, reproduce, run_of, truncate
from lightning_sparse import DST, shrink
from lightning_sparse.zoo import LeNet5Caffe, LeNet300100, MNISTDataModule, RowLSTM

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """How one network of the table is trained, with which alphas, and its sparsity in the paper."""

    network: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    batch_size: int
    alphas: tuple[float, ...]
    sparsity: float
    exclude: tuple[str, ...] = ()


SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=1e-3)
CLASSIFIER = ("*classifier.*",)
SETTINGS = {
    "lenet300": Setting(LeNet300100, SGD, 64, (5e-4, 7e-4, 1e-3), 0.9752),
    "lenet5": Setting(LeNet5Caffe, SGD, 64, (5e-4, 1e-3), 0.9836),
    "lstm-a": Setting(partial(RowLSTM, hidden_size=128), ADAM, 100, (1e-4, 3e-4, 7e-4), 0.9807, CLASSIFIER),
    "lstm-b": Setting(partial(RowLSTM, hidden_size=256), ADAM, 100, (3e-4, 7e-4), 0.9902, CLASSIFIER),
}


@dataclass(frozen=True)
class Run:
    """One training run: its network, its alpha or target sparsity (neither if dense), and its seed."""

    network: str
    alpha: float | None
    seed: int
    epochs: int = 20
    train_images: int = 60_000
    sparsity: float | None = None

    @property
    def variant(self) -> str:
        """What distinguishes the run from other runs of its network."""
        if self.sparsity is not None:
            return f"sparsity {self.sparsity:g}"
        return "dense" if self.alpha is None else f"alpha {self.alpha:g}"

    def __str__(self) -> str:
        return f"{self.network} {self.variant} seed {self.seed}"


class Remaining(L.Callback):
    """Records the accuracy and the share of weights left after each epoch, both in percent."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = weights
        self.accuracy: list[float] = []
        self.remaining: list[float] = []

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count in the weights themselves."""
        left = sum(int(weight.count_nonzero()) for weight in self.weights)
        self.accuracy.append(100 * float(trainer.callback_metrics["accuracy"]))
        self.remaining.append(100 * left / sum(weight.numel() for weight in self.weights))


def train(run: Run, data: Path) -> dict[str, Any]:
    """Train, and return the run with its results: by epoch, test accuracy and remaining weights in percent.

    Args:
        run: What to train.
        data: Folder of MNIST's four files.
    """
    begin(run.seed)
    setting = SETTINGS[run.network]
    module = Plain(setting.network(), setting.optimizer)
    mnist = MNISTDataModule(data, batch_size=setting.batch_size, standardize=False)
    truncate(mnist, run.train_images)
    weights = [
        value
        for name, value in module.network.named_parameters()
        if value.dim() > 1 and not any(fnmatchcase(name, pattern) for pattern in setting.exclude)
    ]
    notes = Remaining(weights)
    dense = run.variant == "dense"
    methods = [] if dense else [DST(run.alpha, sparsity=run.sparsity, exclude=setting.exclude or None)]
    trainer = quiet_trainer(max_epochs=run.epochs, callbacks=[*methods, notes])
    start = time.process_time()
    trainer.fit(module, mnist)
    return asdict(run) | {
        "accuracy": notes.accuracy[-1],
        "epochs_accuracy": notes.accuracy,
        "epochs_remaining": notes.remaining,
        "layers_remaining": [round(100 * int(value.count_nonzero()) / value.numel(), 3) for value in weights],
        "shrunk_percent": round(100 * _size(shrink(module.network, _example(mnist))) / _size(module.network), 2),
        "resets": sum(sum(method.resets.values()) for method in methods),
        "cpu_seconds": round(time.process_time() - start, 1),
        "versions": versions(),
    }


def _example(mnist: L.LightningDataModule) -> torch.Tensor:
    """One batch of images."""
    return next(iter(mnist.train_dataloader()))[0]


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def all_runs(
    only: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    alphas: Sequence[float] = (),
    sparsity: float | None = None,
    **settings: int,
) -> list[Run]:
    """Return the runs of the reproduction, seed by seed.

    Args:
        only: Names of networks; all if empty.
        seeds: Seeds of each.
        alphas: Strengths of the regulariser; those of each network's setting if empty.
        sparsity: The target sparsity of DST; that of each network's setting if ``None``.
        settings: Other values for fields of :class:`Run` than the reproduction's.
    """
    runs: list[Run] = []
    for seed in seeds:
        for network in only or SETTINGS:
            runs += [Run(network, alpha, seed, **settings) for alpha in (None, *(alphas or SETTINGS[network].alphas))]
            runs.append(Run(network, None, seed, **settings, sparsity=sparsity or SETTINGS[network].sparsity))
    return runs


def tabulate(finished: Sequence[dict[str, Any]]) -> Table:
    """Make the table: mean ± sample standard deviation over the seeds."""
    table = Table(
        "network", "DST", "left, %", "test accuracy, %", "− dense", "best epoch, %", "sparsest epoch, %", "seeds"
    )
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in sorted(finished, key=lambda result: (result["alpha"] or 0.0, result.get("sparsity") or 0.0)):
        variant = run_of(result, Run).variant
        cells.setdefault((result["network"], variant), []).append(result)
    for network, variant in sorted(cells, key=lambda cell: list(SETTINGS).index(cell[0])):
        results = cells[network, variant]
        sparse = variant != "dense"
        last = [result["epochs_accuracy"][-1] for result in results]
        dense = [result["epochs_accuracy"][-1] for result in cells.get((network, "dense"), ())]
        epochs = [list(zip(result["epochs_accuracy"], result["epochs_remaining"], strict=True)) for result in results]
        table.add_row(
            network,
            variant,
            mean_and_deviation([result["epochs_remaining"][-1] for result in results]) if sparse else "100",
            mean_and_deviation(last),
            f"{mean(last) - mean(dense):+.2f}" if dense and sparse else "",
            _chosen([max(each) for each in epochs]),
            _chosen([min(each, key=lambda epoch: epoch[1]) for each in epochs]) if sparse else "",
            str(len(results)),
        )
    return table


def _chosen(epochs: Sequence[tuple[float, float]]) -> str:
    accuracy, left = mean_and_deviation([accuracy for accuracy, _ in epochs]), mean(left for _, left in epochs)
    return f"{accuracy} ({left:.2f} % left)" if left < 100 else accuracy


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, and print the table."""
    parser = argument_parser(__doc__, out="dst.jsonl", data="MNIST's four files", epochs=20, images=60_000)
    parser.add_argument("--only", nargs="+", default=[], choices=[*SETTINGS], help="networks")
    parser.add_argument("--alphas", nargs="+", type=float, default=[], help="instead of the settings'")
    parser.add_argument("--sparsity", type=float, help="instead of the settings'")
    arguments = parser.parse_args(argv)
    settings = {"epochs": arguments.epochs, "train_images": arguments.train_images}
    runs = all_runs(arguments.only, arguments.seeds or SEEDS, arguments.alphas, arguments.sparsity, **settings)
    reproduce(runs, train, tabulate, arguments)


if __name__ == "__main__":
    main()
