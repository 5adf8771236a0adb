"""What the runs show: accuracy by network, sparsity and method; ranks with intervals; who loses to a baseline."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.evidence.contenders import BASELINES, METHODS, VARIANTS
from benchmarks.evidence.networks import NETWORKS
from benchmarks.evidence.training import Run
from benchmarks.runs import mean_and_deviation, read

__all__ = ["MARGIN", "RESULTS", "Evidence", "Ranks", "beside_baselines", "markdown", "on_cnns"]

RESULTS = Path(__file__).parents[1] / "results" / "evidence.jsonl"
ALL = (*BASELINES, *METHODS, *VARIANTS)
_RIVALS = BASELINES[1:]
COMPETE = (*_RIVALS, *METHODS)
"""Those that are ranked. The dense network is not, as it is larger; variants are not, as no method is ranked twice."""

MISSES = 0.1
"""The share of the target density by which a run may miss it and still count for that sparsity."""
MARGIN = 0.3
"""Percentage points that count as a difference: about as much as two seeds differ."""

_RESAMPLES = 5_000
_TITLES = {
    "dense": "dense",
    "equal-weights": "small dense, equal weights",
    "static": "random masks (ERK)",
    "one-shot": "one-shot magnitude",
}

Row = Mapping[str, Any]
Cell = tuple[str, float]


@dataclass(frozen=True)
class Ranks:
    """Average ranks, 1 the best, over blocks of one network, sparsity and seed.

    Attributes:
        average: By method, best first.
        intervals: By method, 95 % intervals of a bootstrap over blocks.
        blocks: The number of blocks.
        critical: Nemenyi's critical difference at 5 %. Averages that differ by less cannot be told apart.
        p_value: Of Friedman's test that all are equal.
    """

    average: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    blocks: int
    critical: float
    p_value: float


class Evidence:
    """The finished runs.

    Args:
        rows: One for each run.
        train_images: Keeps the rows of a shorter trial on so many images; 0 keeps those on all images.
        epochs: Keeps the rows of a shorter trial of so many epochs; 0 keeps those of full length.
    """

    def __init__(self, rows: Iterable[Row], train_images: int = 0, epochs: int = 0) -> None:
        self.rows = [row for row in rows if (row["train_images"], row["epochs"]) == (train_images, epochs)]
        self._cells: dict[Cell, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows:
            self._cells[row["network"], row["sparsity"]][row["method"]].append(row)

    @classmethod
    def read(cls, path: Path = RESULTS, train_images: int = 0, epochs: int = 0) -> Evidence:
        """Read the runs from a file with one result in each line."""
        return cls(read(path, Run).values(), train_images, epochs)

    @property
    def networks(self) -> list[str]:
        """The networks that have a run, in the order of the evidence."""
        return [name for name in NETWORKS if any(row["network"] == name for row in self.rows)]

    def sparsities(self, network: str) -> list[float]:
        """The sparsities of a network's sparse runs."""
        return sorted(sparsity for name, sparsity in self._cells if name == network and sparsity)

    def of(self, network: str, sparsity: float, method: str) -> list[Row]:
        """The runs of a cell, seed by seed."""
        key = (network, 0.0 if method == "dense" else sparsity)
        return sorted(self._cells[key][method], key=lambda row: row["seed"]) if key in self._cells else []

    def accuracies(self, network: str, sparsity: float, method: str) -> list[float]:
        """The accuracies of a cell in percent, without runs that failed."""
        return [row["accuracy"] for row in self.of(network, sparsity, method) if row["accuracy"] is not None]

    def misses(self, network: str, sparsity: float, method: str) -> bool:
        """Whether a run of a cell missed its sparsity: it ended denser, by more than a little."""
        density = 1.0 - sparsity
        return method != "dense" and any(
            row["accuracy"] is not None and 1.0 - row["achieved_sparsity"] > (1.0 + MISSES) * density + 1e-9
            for row in self.of(network, sparsity, method)
        )

    def methods(self, network: str) -> list[str]:
        """The methods that have a run of the network."""
        return [name for name in ALL if any(self.of(network, s, name) for s in self.sparsities(network))]

    def ranks(self) -> Ranks | None:
        """Rank the competing methods, in every block that has all of them.

        Methods are left out that miss a sparsity, or have no run of a network of which most others have one. Returns
        None if there are fewer than two blocks or three methods.
        """
        methods = [method for method in COMPETE if not self._left_out(method)]
        blocks = list(self._blocks(methods))
        if len(blocks) < 2 or len(methods) < 3:
            return None
        placed = [_ranked(block) for block in blocks]
        average = {method: mean(block[index] for block in placed) for index, method in enumerate(methods)}
        intervals = _bootstrap(placed, methods)
        order = sorted(methods, key=lambda method: average[method])
        return Ranks(
            {method: average[method] for method in order},
            {method: intervals[method] for method in order},
            len(blocks),
            *_friedman(placed),
        )

    def _left_out(self, method: str) -> bool:
        ever = [other for other in COMPETE if any(self._has(network, other) for network in self.networks)]
        for network in self.networks:
            begun = [other for other in ever if self._has(network, other)]
            if method not in begun and 2 * len(begun) > len(ever):
                return True
            if any(self.misses(network, sparsity, method) for sparsity in self.sparsities(network)):
                return True
        return method not in ever

    def _has(self, network: str, method: str) -> bool:
        return any(self.of(network, sparsity, method) for sparsity in self.sparsities(network))

    def _blocks(self, methods: Sequence[str]) -> Iterable[list[float]]:
        for network, sparsity in sorted(self._cells):
            by_seed: dict[int, dict[str, float]] = defaultdict(dict)
            for method in methods:
                for row in self.of(network, sparsity, method) if sparsity else ():
                    by_seed[row["seed"]][method] = -1.0 if row["accuracy"] is None else row["accuracy"]
            for _, its in sorted(by_seed.items()):
                if len(its) == len(methods):
                    yield [its[method] for method in methods]


def _ranked(accuracies: Sequence[float]) -> list[float]:
    """The rank of each, 1 for the highest; equal ones share the mean of their ranks."""
    return [
        1 + sum(other > its for other in accuracies) + (sum(other == its for other in accuracies) - 1) / 2
        for its in accuracies
    ]


def _bootstrap(placed: Sequence[Sequence[float]], methods: Sequence[str]) -> dict[str, tuple[float, float]]:
    draw = random.Random(0)
    samples = [[draw.choice(placed) for _ in placed] for _ in range(_RESAMPLES)]
    intervals: dict[str, tuple[float, float]] = {}
    for index, method in enumerate(methods):
        averages = sorted(sum(block[index] for block in sample) / len(sample) for sample in samples)
        intervals[method] = averages[int(0.025 * _RESAMPLES)], averages[int(0.975 * _RESAMPLES)]
    return intervals


def _friedman(placed: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Nemenyi's critical difference at 5 %, and the p-value of Friedman's test."""
    from scipy.stats import friedmanchisquare, studentized_range

    n, k = len(placed), len(placed[0])
    critical = float(studentized_range.ppf(0.95, k, 10_000)) / 2**0.5 * (k * (k + 1) / (6 * n)) ** 0.5
    return critical, float(friedmanchisquare(*zip(*placed, strict=True)).pvalue)


def beside_baselines(evidence: Evidence) -> dict[str, list[str]]:
    """By method, one sentence for each baseline to which it loses by more than ``MARGIN`` in the mean, and where."""
    sentences: dict[str, list[str]] = {}
    for method in METHODS:
        for baseline in _RIVALS:
            places = {network: _lost_at(evidence, network, method, [baseline]) for network in evidence.networks}
            lost = [
                f"{NETWORKS[network].title} at {', '.join(f'{percent} %' for percent in where)}"
                for network, where in places.items()
                if where
            ]
            if lost:
                sentences.setdefault(method, []).append(f"{_TITLES[baseline]}: {'; '.join(lost)}")
    return sentences


def on_cnns(evidence: Evidence, method: str) -> str:
    """A sentence for a method's card: where on the CNNs it loses to a baseline by more than ``MARGIN`` in the mean."""
    normalized, plain = (
        " and ".join(", ".join(_lost_at(evidence, network, method, _RIVALS)).rsplit(", ", 1))
        for network in ("cnn-bn", "cnn")
    )
    if not (normalized or plain):
        return "On a small CNN it loses to no baseline."
    if normalized and plain:
        where = f"{normalized} % with BatchNorm, and at {plain} % without"
    else:
        where = f"{normalized} % with BatchNorm" if normalized else f"{plain} % without BatchNorm"
    return f"On a small CNN it loses to a baseline at {where}."


def _lost_at(evidence: Evidence, network: str, method: str, baselines: Sequence[str]) -> list[str]:
    """The sparsities of a network, in percent, at which a method loses to one of the baselines."""
    return [
        f"{100 * s:g}"
        for s in evidence.sparsities(network)
        if any(_loses(evidence, network, s, method, baseline) for baseline in baselines)
    ]


def _loses(evidence: Evidence, network: str, sparsity: float, method: str, baseline: str) -> bool:
    own = evidence.accuracies(network, sparsity, method)
    its = evidence.accuracies(network, sparsity, baseline)
    return bool(own and its) and mean(own) < mean(its) - MARGIN


def markdown(evidence: Evidence) -> str:
    """All tables, as they appear in the documentation."""
    parts = [_conditions(evidence)]
    for network in evidence.networks:
        parts += [f"### {NETWORKS[network].title}", _accuracy_table(evidence, network), _cost_table(evidence, network)]
    parts += ["### Average ranks", _rank_table(evidence), "### Who loses to a baseline", _losers(evidence)]
    return "\n\n".join(parts)


def _conditions(evidence: Evidence) -> str:
    machines = sorted({row["machine"] for row in evidence.rows})
    versions = sorted({" ".join(f"{key} {value}" for key, value in row["versions"].items()) for row in evidence.rows})
    seconds = sum(row["cpu_seconds"] for row in evidence.rows)
    seeds = {
        network: len({row["seed"] for row in evidence.rows if row["network"] == network})
        for network in evidence.networks
    }
    told = "; ".join(f"{NETWORKS[name].title}: {count}" for name, count in seeds.items())
    return (
        f"{len(evidence.rows)} runs, {seconds / 3600:.1f} hours of one core ({' and '.join(machines)}; "
        f"{'; '.join(versions)}). Seeds so far: {told}. `python -m benchmarks.evidence --data data` trains the missing"
        " runs; with `--docs` it writes these tables."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(method: str) -> str:
    return _TITLES.get(method, f"`{method}`")


def _accuracy_table(evidence: Evidence, network: str) -> str:
    sparsities = evidence.sparsities(network)
    best = {
        s: max(
            (mean(a) for m in evidence.methods(network) if m != "dense" and (a := evidence.accuracies(network, s, m))),
            default=0.0,
        )
        for s in sparsities
    }
    rows: list[list[str]] = []
    for method in evidence.methods(network):
        cells: list[str] = []
        for sparsity in sparsities:
            accuracies = evidence.accuracies(network, sparsity, method)
            failed = len(evidence.of(network, sparsity, method)) - len(accuracies)
            text = mean_and_deviation(accuracies) if accuracies else ("failed" if failed else "")
            if accuracies and mean(accuracies) == best[sparsity]:
                text = f"**{text}**"
            if evidence.misses(network, sparsity, method):
                reached = mean(row["achieved_sparsity"] for row in evidence.of(network, sparsity, method))
                text += f" (at {100 * reached:.1f} %)"
            cells.append(text)
        rows.append([_name(method), *cells])
    head = ["test accuracy, %, at sparsity", *(f"{100 * sparsity:g} %" for sparsity in sparsities)]
    return _table(head, rows)


def _cost_table(evidence: Evidence, network: str, sparsity: float = 0.95) -> str:
    """The costs at one sparsity: operations, weights ever active, dead units, speed, size."""
    rows: list[list[str]] = []
    for method in evidence.methods(network):
        runs = [row for row in evidence.of(network, sparsity, method) if row["accuracy"] is not None]
        if runs:
            cells = [_mean(runs, key, form) for key, form in _COSTS.values()]
            rows.append([_name(method), *cells])
    if not rows:
        return ""
    head = [f"at {100 * sparsity:g} %", *_COSTS]
    return _table(head, rows)


_COSTS = {
    "training FLOPs": ("training_flops", "{:.3f}"),
    "inference FLOPs": ("inference_flops", "{:.3f}"),
    "ever active": ("ever_active", "{:.2f}"),
    "dead units": ("dead_units", "{:.0f}"),
    "times faster": ("speed_gain", "{:.1f}"),
    "file, kB": ("file_bytes", "{:.1f}"),
    "CPU s": ("cpu_seconds", "{:.0f}"),
}


def _mean(runs: Sequence[Row], key: str, form: str) -> str:
    values = [row[key] for row in runs if row.get(key) is not None]
    # The median of times: on a machine that others use too, one of them can be far off.
    typical = median if key == "speed_gain" else mean
    return form.format(typical(values) / (1000 if key == "file_bytes" else 1)) if values else ""


def _rank_table(evidence: Evidence) -> str:
    ranks = evidence.ranks()
    if ranks is None:
        return "There are too few runs so far."
    rows = [
        [_name(method), f"{average:.1f}", f"{ranks.intervals[method][0]:.1f} to {ranks.intervals[method][1]:.1f}"]
        for method, average in ranks.average.items()
    ]
    absent = [_name(method) for method in COMPETE if method not in ranks.average]
    left_out = f" Left out, because a run is missing or ended too dense: {', '.join(absent)}." if absent else ""
    told_apart = sum(
        abs(ranks.average[one] - ranks.average[other]) > ranks.critical for one, other in combinations(ranks.average, 2)
    )
    pairs = len(ranks.average) * (len(ranks.average) - 1) // 2
    note = (
        f"Over {ranks.blocks} blocks, each of one network, sparsity and seed; 1 is the best of {len(ranks.average)}."
        " The intervals are 95 % of a bootstrap over the blocks."
        f" Friedman's test that all are equal: p = {ranks.p_value:.1g}."
        f" Nemenyi's critical difference at 5 % is {ranks.critical:.1f}; {told_apart} of {pairs} pairs differ by more."
        f"{left_out}"
    )
    return f"{note}\n\n{_table(['method', 'average rank', '95 %'], rows)}"


def _losers(evidence: Evidence) -> str:
    sentences = beside_baselines(evidence)
    if not sentences:
        return f"No method, by more than {MARGIN} percentage points in the mean."
    lines = [f"- `{method}`, to {'; to '.join(its)}" for method, its in sentences.items()]
    return f"By more than {MARGIN} percentage points in the mean:\n\n" + "\n".join(lines)
