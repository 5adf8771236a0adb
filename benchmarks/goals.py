"""The goals for speed and size, and the measured values: the summary in docs/measured.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["HEADER", "summary"]

Rows = Sequence[Mapping[str, Any]]
Read = Callable[[str], Rows]

HEADER = ["figure", "goal", "measured", "met"]
TORCH, BEST = "over torch", "over best fp32"
INFERENCE: dict[tuple[str, int | None], dict[str, dict[float, float]]] = {
    ("linear-1024", 1): {TORCH: {0.9: 5, 0.95: 10, 0.99: 30}},
    ("linear-1024", 64): {TORCH: {0.9: 4, 0.95: 7, 0.99: 15}},
    ("linear-4096", 1): {TORCH: {0.9: 5, 0.95: 10, 0.99: 30}},
    ("linear-4096", 64): {TORCH: {0.9: 4, 0.95: 7, 0.99: 15}},
    ("lenet300", None): {TORCH: {0.95: 4}},
    ("bert-ffn-128", None): {TORCH: {0.95: 4}},
    ("bert-block-128", None): {TORCH: {0.95: 4}},
    ("resnet18-32", 1): {TORCH: {0.95: 4.5}, BEST: {0.95: 2.5}},
    ("resnet18-224", 1): {TORCH: {0.95: 3.5}, BEST: {0.95: 1.6}},
}
"""How many times as fast networks should be, by network and batch size (all of them where there is none)."""
RIVALS = {"over prune (goal 0.97)": "`torch.nn.utils.prune`", "over parametrize (goal 0.97)": "`parametrize`"}


def summary(read: Read) -> list[list[str]]:
    """A line for each goal.

    Args:
        read: Reads the rows of a file of results, by its name.
    """
    parts = (_steps, _rivals, _whole_runs, _updates, _bytes, _files, _inference)
    return [line for part in parts for line in part(read)]


def _line(figure: str, goal: float, values: Sequence[float], *, digits: int = 2, at_least: bool = False) -> list[str]:
    reached = [value >= goal if at_least else round(value, digits) <= goal for value in values]
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    met = "yes" if all(reached) else "partly" if any(reached) else "no"
    return [figure, f"{'≥' if at_least else '≤'} {goal}", low if low == high else f"{low} to {high}", met]


def _groups(rows: Rows, *keys: str) -> dict[tuple[Any, ...], Rows]:
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return dict(found)


def _with_goal(rows: Rows) -> Rows:
    return [row for row in rows if row["goal"] != ""]


def _names(rows: Rows) -> str:
    return ", ".join(f"`{row['contender']}`" for row in rows)


def _step_rows(read: Read) -> Rows:
    return [*read("steps.json"), *read("overhead.json")]


def _steps(read: Read) -> list[list[str]]:
    rows = _with_goal(_step_rows(read))
    return [
        _line(
            f"step over dense, {'`DST`' if rows[0]['contender'] == 'DST' else 'masks alone'}: {network}, {optimizer}",
            goal,
            [row["over dense (quartiles)"]["value"] for row in rows],
        )
        for (network, optimizer, goal), rows in _groups(rows, "network", "optimizer", "goal").items()
    ]


def _rivals(read: Read) -> list[list[str]]:
    rows = [row for row in _step_rows(read) if row["optimizer"] == "SGD" and row["precision"] == "fp32"]
    lines: list[list[str]] = []
    for network, of_network in _groups(_with_goal(rows), "network").items():
        for key, name in RIVALS.items():
            values = [row[key] for row in of_network if row["contender"] != "DST" and key in row]
            lines += [_line(f"step over {name}: {network[0]}, SGD", 0.97, values)] if values else []
    return lines


def _whole_runs(read: Read) -> list[list[str]]:
    return [
        _line(
            f"time of a whole run over dense: {steps:,} steps, {threads} thread" + "s" * (threads > 1),
            goal,
            [float(row["whole run over dense"].split()[0]) for row in rows],
        )
        for (steps, threads, goal), rows in _groups(
            _with_goal(read("whole_runs.json")), "steps", "threads", "goal"
        ).items()
    ]


def _updates(read: Read) -> list[list[str]]:
    updates = [
        _line(
            f"time of an update of {row['weights']} weights over one `torch.sort`: `{row['contender']}`",
            row["goal"],
            [row["update / sort (quartiles)"]["value"]],
            digits=3,
        )
        for row in _with_goal(read("update.json"))
    ]
    growing = _with_goal(read("scaling.json"))
    exponents = [row["exponent"] for row in growing]
    figure = "exponent of the update time, from 1 to 100 million weights"
    return [*updates, _line(figure, growing[0]["goal"], exponents)]


def _bytes(read: Read) -> list[list[str]]:
    rows = _with_goal(read("memory.json"))
    lines = [
        _line(
            f"bytes per weight between updates: {_names(of_goal)}",
            goal,
            [row["bytes / weight between updates"] for row in of_goal],
            digits=1,
        )
        for (goal,), of_goal in _groups(rows, "goal").items()
    ]
    checkpoints = [row for row in rows if row["goal "] != ""]
    shares = [row["checkpoint, share of the weights' bytes"] for row in checkpoints]
    figure = "growth of a checkpoint, as a share of the weights' bytes"
    return [*lines, _line(figure, float(checkpoints[0]["goal "]), shares, digits=3)]


def _files(read: Read) -> list[list[str]]:
    return [
        _line(
            f"file of a ResNet-18, times smaller: {100 * row['sparsity']:g} % zeros",
            row["goal"],
            [row["times smaller"]],
            digits=1,
            at_least=True,
        )
        for row in _with_goal(read("files.json"))
    ]


def _inference(read: Read) -> list[list[str]]:
    rows = [row for row in read("inference.jsonl") if row.get("threads") == 1]
    lines: list[list[str]] = []
    for (network, batch), goals in INFERENCE.items():
        of_network = [row for row in rows if row["network"] == network and batch in (None, row["batch"])]
        batches = ", ".join(f"{size}" for size in sorted({row["batch"] for row in of_network}))
        for over, of_sparsity in goals.items():
            engine = "dense torch" if over == TORCH else "the best dense engine"
            for sparsity, goal in of_sparsity.items():
                figure = f"times as fast as {engine}: {network}, batch {batches}, {100 * sparsity:g} % zeros"
                values = [row[over] for row in of_network if row["sparsity"] == sparsity]
                lines.append(_line(figure, goal, values, digits=1, at_least=True))
    return lines
