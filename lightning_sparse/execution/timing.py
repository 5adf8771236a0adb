"""Timing of calls on a noisy machine: calls take turns in several rounds, and the fastest round of each counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["compare", "num_threads"]


@contextmanager
def num_threads(threads: int) -> Generator[None]:
    """Let torch compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(
    calls: Mapping[str, Callable[[], Any]], *, budget: float = 0.03, rounds: int = 10, device: str = "cpu"
) -> dict[str, float]:
    """Return the seconds that each call takes, from runs that alternate.

    Each is the least over rounds of the mean of a few calls. What else a machine does can only slow a call down, and in
    a round all are run one after the other.

    Args:
        calls: By name, what is timed.
        budget: Seconds that each may take altogether, about; each is called ``rounds`` times and twice at least.
        rounds: How often each has its turn.
        device: What computes; a GPU is waited for.

    Example:
        >>> seconds = compare({"few": lambda: sum(range(10)), "many": lambda: sum(range(10_000))})
        >>> seconds["few"] < seconds["many"]
        True
    """
    repeats = {name: _repeats(call, budget / rounds, device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            _wait_for(device)
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: min(of_call) for name, of_call in seconds.items()}


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
