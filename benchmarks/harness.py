"""What the benchmarks share: runs that alternate, ratios of medians, and printing."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median, quantiles
from threading import Condition
from typing import Any

import lightning as L
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import lightning_sparse


class Baton:
    """Lets threads take turns: the one that holds it runs, and all others wait."""

    def __init__(self, runners: Sequence[str]) -> None:
        self._queue = list(runners)
        self._changed = Condition()

    def wait_for_turn(self, runner: str) -> None:
        """Return when it is the turn of ``runner``."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue[0] == runner)

    def pass_on(self) -> None:
        """Give the turn to the next thread, and put the current one at the end of the queue."""
        with self._changed:
            self._queue.append(self._queue.pop(0))
            self._changed.notify_all()

    def leave(self, runner: str) -> None:
        """Take no more turns."""
        with self._changed:
            self._queue.remove(runner)
            self._changed.notify_all()


class Turns(L.Callback):
    """Times steps, from one ``on_train_batch_start`` to the next, and passes the baton on after some of them.

    The first step of a turn does not count, because the caches are full of other fits' data.

    Args:
        runner: Name of this fit.
        baton: Shared by all fits.
        every: Steps in a turn, at least 2.
        clock: Tells the time in seconds.
    """

    def __init__(self, runner: str, baton: Baton, every: int, clock: Callable[[], float]) -> None:
        self.runner = runner
        self.baton = baton
        self.every = every
        self.clock = clock
        self.seconds: list[float] = []
        self._start: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the time, or wait if the turn is over."""
        if self._start is not None:
            self.seconds.append(self.clock() - self._start)
        if batch_idx % self.every:
            self._start = self.clock()
        else:
            self._start = None
            self.baton.pass_on()
            self.baton.wait_for_turn(self.runner)


def alternate(
    fits: Mapping[str, Callable[[L.Callback], None]], *, rounds: int, every: int, skip: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Run fits in turns of a few steps, in one process, one at a time.

    The other load of a machine changes within milliseconds, so a time is compared only with one measured right beside
    it. The start and end of a fit are not timed. Which fit goes first, and where its memory lies, changes results by a
    few per cent, so in each round another fit goes first.

    Args:
        fits: By name, functions that train with a given callback; all take the same number of steps.
        rounds: How often each is run.
        every: Steps in a turn; the first is not timed.
        skip: Timed steps at the beginning that do not count.
        clock: Tells the time in seconds.

    Returns:
        Seconds of each step of each fit. Steps of the same index were measured beside each other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in fits}
    names = list(fits)
    for _ in range(rounds):
        for name, of_round in _one_round({name: fits[name] for name in names}, every, clock).items():
            seconds[name] += of_round[skip:]
        names.append(names.pop(0))
    return seconds


def _one_round(
    fits: Mapping[str, Callable[[L.Callback], None]], every: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    baton = Baton(list(fits))

    def run(name: str) -> list[float]:
        baton.wait_for_turn(name)
        try:
            turns = Turns(name, baton, every, clock)
            fits[name](turns)
        finally:
            baton.leave(name)
        return turns.seconds

    with ThreadPoolExecutor(len(fits)) as pool:
        futures = {name: pool.submit(run, name) for name in fits}
    return {name: future.result() for name, future in futures.items()}


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and the quartiles of the ratios of neighbouring steps.

    Example:
        >>> Ratio.of([2.0, 3.0, 2.0], [1.0, 1.0, 1.0])
        Ratio(value=2.0, low=2.0, high=2.5)
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float], baseline: Sequence[float]) -> Ratio:
        """Compare with a baseline; entries of the same index were measured beside each other."""
        low, _, high = quantiles(
            [some / base for some, base in zip(seconds, baseline, strict=True)], method="inclusive"
        )
        return cls(median(seconds) / median(baseline), low, high)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


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
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def versions() -> dict[str, str]:
    """Return the versions that a figure depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": L.__version__,
        "lightning_sparse": lightning_sparse.__version__,
    }


@lru_cache
def cpu_name() -> str:
    """Return the processor's name, and whether it has AVX-512."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    wide = any("avx512f" in line for line in lines if line.startswith("flags"))
    return f"{name}, AVX-512" if wide else name


def machine() -> str:
    """Return the processor and how many cores there are."""
    return f"{cpu_name()}, {os.cpu_count()} cores"


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options that the speed benchmarks share, and silence Lightning's remarks."""
    silence_lightning()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smallest", action="store_true", help="one tiny case, in seconds: to see that it runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--cpu-time",
        action="store_const",
        dest="clock",
        default=wall_time,
        const=time.process_time,
        help="count the processor's time, not the wall's, where others use it too; meant for OMP_NUM_THREADS=1",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def wall_time() -> float:
    """Return the time in seconds, once a GPU has finished all its work."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def conditions() -> dict[str, Any]:
    """Return the versions and the machine of a measurement."""
    device = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return versions() | {"cpu": cpu_name(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()} | device


def report(title: str, rows: Sequence[Mapping[str, Any]], json_file: Path | None = None) -> None:
    """Print a table of ``rows``, whose keys are its columns, below a line on machine and versions."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    print(f"{title}: " + ", ".join(f"{name} {value}" for name, value in conditions().items()), flush=True)
    print_table(table)
    write(title, rows, json_file)


def write(title: str, rows: Sequence[Mapping[str, Any]], json_file: Path | None) -> None:
    """Write the figures to a file, if there is one."""
    if json_file is not None:
        # what rows say themselves, as the number of threads, differs between them
        common = {name: value for name, value in conditions().items() if name not in rows[0]}
        content = {"title": title, "conditions": common, "rows": [dict(row) for row in rows]}
        json_file.write_text(json.dumps(content, default=vars, indent=2) + "\n")


def print_table(table: Table) -> None:
    """Print a table in Markdown, as wide as it needs."""
    table.box = box.MARKDOWN
    Console(width=240).print(table)
