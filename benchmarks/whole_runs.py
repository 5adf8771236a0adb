"""What whole training runs cost with default settings, updates included, relative to dense ones, in a real Trainer.

An MLP 784-1000-500-10 with batch size 64 trains for a given number of steps; contenders take turns of a few steps in
one process. The median step is one between updates. The mean includes the updates, so its ratio is that of whole runs.

    OMP_NUM_THREADS=1 python -m benchmarks.whole_runs --threads 1 2 --steps 120 300 3000
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, median, quantiles
from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks.cases import OPTIMIZERS, Timed
from benchmarks.harness import alternate, argument_parser, quiet_trainer, report, write
from lightning_sparse import EAST, FGGP, GMP, SET, FixedMask, RigL, SparseMethod, prune

TITLE = "Whole runs with default settings, over dense"
SPARSITY = 0.9
BATCH = (64, 784)
METHODS: dict[str, Callable[[], SparseMethod]] = {
    "GMP": lambda: GMP(SPARSITY),
    "FGGP": lambda: FGGP(SPARSITY),
    "SET": lambda: SET(SPARSITY),
    "RigL": lambda: RigL(SPARSITY),
    "EAST": lambda: EAST(SPARSITY, phasing=False, sharing=False),
    "FixedMask": FixedMask,
}
GOALS = {120: None, 300: 1.3, 3000: 1.2}
"""Goals for the mean step over dense, by the number of steps."""


def mlp() -> nn.Module:
    """Make the network: 1.29 million weights."""
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 500), nn.ReLU(), nn.Linear(500, 10))


def fit(turns: L.Callback, *, steps: int, method: Callable[[], SparseMethod] | None, device: str) -> None:
    """Train for ``steps``."""
    torch.manual_seed(0)
    network = mlp()
    callbacks = [turns]
    if method is not None:
        callbacks.append(method())
    module = Timed(network, BATCH, steps, OPTIMIZERS["SGD"])
    if method is FixedMask:
        prune(module, SPARSITY)
    quiet_trainer(max_epochs=1, callbacks=callbacks, accelerator=device).fit(module)


def measure(
    steps: int, rounds: int, names: Sequence[str], clock: Callable[[], float], device: str
) -> Mapping[str, Any]:
    """Seconds of each step of each contender, dense first, with one list for each round."""
    everyone: dict[str, Callable[[], SparseMethod] | None] = {"dense": None, **{name: METHODS[name] for name in names}}
    fits = {name: partial(fit, steps=steps, method=make, device=device) for name, make in everyone.items()}
    every = min(10, max(2, steps // 4))
    taken = [alternate(fits, rounds=1, every=every, skip=0, clock=clock) for _ in range(rounds)]
    return {name: [of_round[name] for of_round in taken] for name in everyone}


def rows(
    seconds: Mapping[str, Sequence[Sequence[float]]], conditions: Mapping[str, Any], goal: Any
) -> list[dict[str, Any]]:
    """Make a row for each contender: its steps, and the quartiles of the ratios of rounds."""
    table: list[dict[str, Any]] = []
    for name, rounds in seconds.items():
        pairs = list(zip(rounds, seconds["dense"], strict=True))
        medians = [median(its) / median(dense) for its, dense in pairs]
        means = [fmean(its) / fmean(dense) for its, dense in pairs]
        table.append(
            {
                **conditions,
                "contender": name,
                "mean step, ms": 1e3 * fmean([fmean(its) for its in rounds]),
                "median step over dense": _range(medians),
                "whole run over dense": _range(means),
                "goal": "" if goal is None or name == "dense" else goal,
            }
        )
    return table


def _range(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, _, high = quantiles(values, method="inclusive")
    return f"{median(values):.2f} ({low:.2f} to {high:.2f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each number of threads and steps."""
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", nargs="+", type=int, default=[120, 300, 3000])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--only", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    cells = [(threads, steps) for threads in arguments.threads for steps in arguments.steps]
    rounds = arguments.rounds
    if arguments.smallest:
        cells, rounds = [(1, 24)], 1
    before, tables = torch.get_num_threads(), list[dict[str, Any]]()
    try:
        for threads, steps in cells:
            torch.set_num_threads(threads)
            seconds = measure(steps, rounds, arguments.only, arguments.clock, arguments.device)
            conditions = {"network": "MLP 784-1000-500-10, batch 64", "threads": threads, "steps": steps}
            tables += rows(seconds, conditions, GOALS.get(steps))
            report(TITLE, tables[-len(seconds) :])
            write(TITLE, tables, arguments.json)
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
