"""What the benchmarks share: runs that alternate, ratios of medians, and how they are printed."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning as L
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import lightning_sparse

Rounds = Sequence[Sequence[float]]
"""Seconds: one sequence for each round of :func:`alternate`."""


def alternate(variants: dict[str, Callable[[], Sequence[float]]], rounds: int) -> dict[str, list[Sequence[float]]]:
    """Run each variant once a round, after a round that does not count.

    What else the machine does changes from second to second, so figures are compared only with those taken beside them.
    The order is turned round every other time: no variant always follows the same one.

    Args:
        variants: By name, what runs a variant and returns the seconds of whatever it repeats.
        rounds: How often each is run.
    """
    seconds: dict[str, list[Sequence[float]]] = {name: [] for name in variants}
    for round_number in range(-1, rounds):
        for name in reversed(variants) if round_number % 2 else variants:
            measured = variants[name]()
            if round_number >= 0:
                seconds[name].append(measured)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and the quartiles of the same ratio taken round by round.

    Example:
        >>> Ratio.of([[2.0, 2.0], [3.0]], [[1.0], [1.0, 1.0]])
        Ratio(value=2.0, low=2.0, high=3.0)
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Rounds, baseline: Rounds) -> Ratio:
        """Compare rounds with those of the baseline that alternated with them."""
        by_round = [median(some) / median(base) for some, base in zip(seconds, baseline, strict=True)]
        low, _, high = quantiles(by_round, n=4, method="inclusive") if len(by_round) > 1 else by_round * 3
        return cls(median_of(seconds) / median_of(baseline), low, high)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def median_of(seconds: Rounds) -> float:
    """Return the median over all rounds together."""
    return median(second for some in seconds for second in some)


class Stopwatch(L.Callback):
    """Notes when each training batch starts; a step lasts from one such moment to the next.

    Args:
        skip: Steps at the beginning that do not count.
        clock: Tells the time in seconds.
    """

    def __init__(self, skip: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.skip = skip
        self.clock = clock
        self._starts: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the time."""
        self._starts.append(self.clock())

    def step_seconds(self) -> list[float]:
        """Return the duration of each step that counts; the last, which ends with the training, does not."""
        starts = self._starts[self.skip :]
        return [end - start for start, end in pairwise(starts)]


def quiet_trainer(**overrides: Any) -> L.Trainer:
    """Make a Trainer on the CPU that writes and shows nothing; ``overrides`` are its arguments."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**(settings | overrides))


def silence_lightning() -> None:
    """Keep Lightning's remarks on hardware and on worker processes out of the output."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def versions() -> dict[str, str]:
    """Return the versions that a figure depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": L.__version__,
        "lightning_sparse": lightning_sparse.__version__,
    }


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options that the benchmarks of speed share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smallest", action="store_true", help="one tiny case, in seconds: to see that it runs")
    parser.add_argument("--rounds", type=int, help="how often each variant is run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def report(title: str, rows: Sequence[Mapping[str, Any]], json_file: Path | None) -> None:
    """Print a table of ``rows``, whose keys are its columns, below a line on what was measured on."""
    conditions = versions() | {"cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    print(f"{title}: " + ", ".join(f"{name} {value}" for name, value in conditions.items()))
    print_table(table)
    if json_file is not None:
        content = {"title": title, "conditions": conditions, "rows": [dict(row) for row in rows]}
        json_file.write_text(json.dumps(content, default=vars, indent=2) + "\n")


def print_table(table: Table) -> None:
    """Print a table in Markdown, as wide as it needs."""
    table.box = box.MARKDOWN
    Console(width=200).print(table)
