"""Training runs whose results are kept: each has a process of its own, appends a line of JSON, and is done once."""

from __future__ import annotations

import json
import multiprocessing
import os
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

import lightning as L
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import print_table, silence_lightning
from lightning_sparse.zoo import CIFAR10DataModule, MNISTDataModule

R = TypeVar("R")

# The environment of a run's process. By default, glibc returns freed memory to the system and asks for it again at
# every step, which takes a tenth of the time.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 28), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


class Plain(L.LightningModule):
    """A classifier that logs nothing in training: logging would take a third of LeNet-300-100's step.

    Args:
        network: What is trained.
        optimizer: Makes the optimizer from its parameters.
    """

    def __init__(self, network: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        # oneDNN's convolutions take half the time in this memory format.
        self.network = network.to(memory_format=torch.channels_last)
        self.optimizer = optimizer

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits. Methods that examine a module outside of training call this."""
        return self.network(images)

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
        return self.optimizer(self.parameters())


def begin(seed: int) -> None:
    """Prepare the process of a run: one thread, no remarks, and its seed."""
    torch.set_num_threads(1)
    silence_lightning()
    L.seed_everything(seed, verbose=False)


def truncate(data: MNISTDataModule | CIFAR10DataModule, train_images: int) -> None:
    """Keep only the first ``train_images`` images for training."""
    data.train_set.images = data.train_set.images[:train_images]
    data.train_set.labels = data.train_set.labels[:train_images]


def argument_parser(description: str | None, *, out: str, data: str, epochs: int, images: int) -> ArgumentParser:
    """Make a parser with the options that the reproductions share.

    Args:
        description: The benchmark's docstring.
        out: Default of ``--out``.
        data: What the folder of ``--data`` holds.
        epochs: Default of ``--epochs``.
        images: Default of ``--train-images``.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help=f"folder of {data}")
    parser.add_argument("--out", type=Path, default=Path(out), help="file that runs are appended to")
    parser.add_argument("--table", action="store_true", help="train nothing; print the table of what is in --out")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--train-images", type=int, default=images, help="train on the first so many")
    return parser


def reproduce(
    runs: Sequence[R],
    train: Callable[..., dict[str, Any]],
    tabulate: Callable[[Sequence[dict[str, Any]]], Table],
    arguments: Namespace,
) -> None:
    """Train the missing runs, unless only the table is asked for, and print the table of all finished runs.

    Args:
        runs: The runs to train, dataclasses of one kind.
        train: Called with a run and ``data=``, in a process of its own.
        tabulate: Makes the table from the results.
        arguments: What :func:`argument_parser` has parsed.
    """
    if not arguments.table:
        train_missing(runs, train, arguments.out, arguments.jobs, data=arguments.data)
    print_table(tabulate(list(read(arguments.out, type(runs[0])).values())))


def read(out: Path, kind: type[R]) -> dict[R, dict[str, Any]]:
    """Read the finished runs. A line that was cut short by a stop does not count.

    Args:
        out: File with one result in each line.
        kind: Dataclass of a run; its fields are in each result.
    """
    finished: dict[R, dict[str, Any]] = {}
    for line in out.read_text().splitlines() if out.exists() else ():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        finished[run_of(result, kind)] = result
    return finished


def train_missing(
    runs: Sequence[R], train: Callable[..., dict[str, Any]], out: Path, jobs: int, **arguments: Any
) -> None:
    """Train the runs that ``out`` does not hold, ``jobs`` at a time, and append each as it finishes.

    Args:
        runs: The runs to train, dataclasses.
        train: Called with a run and the arguments, in a process of its own; returns the run's fields and its results.
        out: File with one result in each line.
        jobs: Runs at a time, one thread each.
        arguments: Given to ``train``.
    """
    if not runs:
        return
    kind = type(runs[0])
    finished = read(out, kind)
    missing = [run for run in runs if run not in finished]
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    # Imported once, by a process that computes nothing: torch, Lightning and torchvision take as long as a short run.
    context.set_forkserver_preload(["benchmarks.runs", train.__module__])
    one_process_per_run = context.Pool(jobs, maxtasksperchild=1)
    with one_process_per_run as pool, out.open("a") as file:
        if out.stat().st_size and not out.read_bytes().endswith(b"\n"):
            file.write("\n")
        results = pool.imap_unordered(partial(train, **arguments), missing)
        for number, result in enumerate(results, start=1):
            file.write(json.dumps(result) + "\n")
            file.flush()
            reached = "failed" if result["accuracy"] is None else f"{result['accuracy']:.2f} %"
            cost = f"{reached}, {result['cpu_seconds']:.0f} s of one core"
            print(f"{number}/{len(missing)}  {run_of(result, kind)}: {cost}", flush=True)


def mean_and_deviation(values: Sequence[float]) -> str:
    """Format mean ± sample standard deviation; with fewer than two values, whatever there is."""
    if not values:
        return "not measured"
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def run_of(result: dict[str, Any], kind: type[R]) -> R:
    """Return the run to which ``result`` belongs."""
    return kind(**{field.name: result[field.name] for field in fields(kind) if field.name in result})  # type: ignore[arg-type]
