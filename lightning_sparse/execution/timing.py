"""Timing of calls on a noisy machine: calls take turns in several rounds, and the fastest round of each counts.

On a terminal, a progress bar is shown.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

__all__ = ["compare", "compare_rounds", "num_threads", "shown"]

_Item = TypeVar("_Item")

_FINE = 1e-6  # seconds: what a clock has to tell apart


@contextmanager
def num_threads(threads: int) -> Generator[None]:
    """Let torch compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shown(items: Sequence[_Item], what: str) -> Iterable[_Item]:
    """Yield the items, with a progress bar if stderr is a terminal.

    The bar is drawn between two items and not by a thread, which would disturb what is timed.

    Args:
        items: What to iterate over.
        what: The description of the bar; if empty, there is none.

    Example:
        >>> list(shown([1, 2], "Counting"))
        [1, 2]
    """
    if not what or not sys.stderr.isatty():
        return items
    return track(items, what, console=Console(stderr=True), transient=True, auto_refresh=False)


def compare(
    calls: Mapping[str, Callable[[], Any]], *, budget: float = 0.03, rounds: int = 10, device: str = "cpu"
) -> dict[str, float]:
    """Return the seconds that each call takes: the least of :func:`compare_rounds`, with its arguments.

    What else a machine does can only slow a call down.

    Example:
        >>> seconds = compare({"few": lambda: sum(range(10)), "many": lambda: sum(range(10_000))})
        >>> seconds["few"] < seconds["many"]
        True
    """
    rounds_of = compare_rounds(calls, budget=budget, rounds=rounds, device=device)
    return {name: min(seconds) for name, seconds in rounds_of.items()}


def compare_rounds(
    calls: Mapping[str, Callable[[], Any]], *, budget: float, rounds: int, device: str = "cpu", what: str = ""
) -> dict[str, list[float]]:
    """Return the seconds that each call takes, round by round; in a round all are run one after the other.

    One thread on a CPU is timed by the processor time that it takes, whatever else the machine does; several threads,
    and a GPU, by the wall clock.

    Args:
        calls: By name, what is timed.
        budget: Seconds that each may take altogether, about; each is called ``rounds`` times and twice at least.
        rounds: How often each has its turn.
        device: What computes; a GPU is waited for.
        what: The description of the progress bar; see :func:`shown`.

    Example:
        >>> rounds_of = compare_rounds({"sum": lambda: sum(range(10))}, budget=0.01, rounds=3)
        >>> len(rounds_of["sum"])
        3
    """
    clock = _clock(device)
    repeats = {name: _repeats(call, budget / rounds, device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in shown(range(rounds), what):
        for name, call in calls.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            _wait_for(device)
            seconds[name].append((clock() - start) / repeats[name])
    return seconds


def _clock(device: str) -> Callable[[], float]:
    alone = device == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone and time.get_clock_info("thread_time").resolution < _FINE else time.perf_counter


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _repeats(call: Callable[[], Any], budget: float, device: str) -> int:
    """How many calls fit into a budget, after one that is not counted because it prepares."""
    call()
    _wait_for(device)
    start = time.perf_counter()
    call()
    _wait_for(device)
    return max(1, min(1000, int(budget / max(time.perf_counter() - start, 1e-7))))
