"""What is gained if a grown weight takes steps like its neighbours: a small transformer under AdamW, RigL and SET.

Adam divides by the root of a second moment, and the whole tensor shares one step count. A weight that grows with a
moment of 0 takes a first step of 3.2 learning rates, and of up to 6.6 a dozen steps later; its neighbours take 0.15.
With ``warm_moments``, which is on by default, its second moment begins at the square of its gradient, or at the mean of
the layer's survivors if that is larger (docs/decisions/0011).

torchvision's vision transformer (two layers of 64 or 128, four heads) trains on scikit-learn's 8 x 8 digits: AdamW with
learning rate 1e-3, batch size 64, 12 epochs, 95 %, an update every 6 steps until three quarters of training (34
updates). Accuracy is on the 360 held-out images, after the last epoch, with five seeds::

    python -m benchmarks.moments --out moments.jsonl
    python -m benchmarks.moments --out moments.jsonl --table
    python -m benchmarks.moments --docs
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from torchvision.models import VisionTransformer
from typing_extensions import override

from benchmarks.harness import machine, quiet_trainer, versions
from benchmarks.pages import as_markdown, put_into
from benchmarks.runs import Plain, begin, mean_and_deviation, read, train_missing
from lightning_sparse import SET, RigL
from lightning_sparse.zoo import DigitsDataModule

WIDTHS = (64, 128)
METHODS = {"RigL": RigL, "SET": SET}
RESULTS = Path(__file__).parent / "results" / "moments.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"


@dataclass(frozen=True)
class Run:
    """One training run: its method, whether moments are warm, its seed, and the transformer's width."""

    method: str
    warm: bool
    seed: int
    width: int = 128
    epochs: int = 12

    def __str__(self) -> str:
        return f"{self.method} {'warm' if self.warm else 'cold'} seed {self.seed} width {self.width}"


class Noted(Plain):
    """The classifier, which records its accuracy at the end of each epoch."""

    epochs_accuracy: list[float]

    @override
    def on_fit_start(self) -> None:
        self.epochs_accuracy = []

    @override
    def on_validation_epoch_end(self) -> None:
        self.epochs_accuracy.append(round(100.0 * float(self.trainer.callback_metrics["accuracy"]), 2))


def network(width: int) -> VisionTransformer:
    """Make torchvision's vision transformer for one channel of 8 x 8 pixels."""
    its = VisionTransformer(
        image_size=8, patch_size=2, num_layers=2, num_heads=4, hidden_dim=width, mlp_dim=2 * width, num_classes=10
    )
    its.conv_proj = torch.nn.Conv2d(1, width, kernel_size=2, stride=2)
    return its


def train(run: Run) -> dict[str, Any]:
    """Train, and return the run with its results.

    Args:
        run: What to train.
    """
    begin(run.seed)
    module = Noted(network(run.width), partial(torch.optim.AdamW, lr=1e-3))
    callbacks = []
    if run.method in METHODS:
        callbacks = [METHODS[run.method](0.95, update_every=6, warm_moments=run.warm)]
    trainer = quiet_trainer(max_epochs=run.epochs, callbacks=callbacks)
    start = time.process_time()
    trainer.fit(module, DigitsDataModule(batch_size=64))
    return asdict(run) | {
        "accuracy": module.epochs_accuracy[-1],
        "epochs_accuracy": module.epochs_accuracy,
        "cpu_seconds": round(time.process_time() - start, 1),
        "machine": machine(),
        "versions": versions(),
    }


def all_runs(seeds: Sequence[int] = range(5), widths: Sequence[int] = WIDTHS) -> list[Run]:
    """Return the runs, width by width and seed by seed."""
    kinds = [("dense", False), *((method, warm) for method in METHODS for warm in (False, True))]
    return [Run(method, warm, seed, width) for width in widths for seed in seeds for method, warm in kinds]


def _cells(finished: Sequence[dict[str, Any]]) -> dict[tuple[int, str, bool], list[dict[str, Any]]]:
    cells: dict[tuple[int, str, bool], list[dict[str, Any]]] = defaultdict(list)
    for result in sorted(finished, key=lambda result: result["seed"]):
        cells[result["width"], result["method"], result["warm"]].append(result)
    return cells


def tabulate(finished: Sequence[dict[str, Any]]) -> Table:
    """Make the table: mean ± sample standard deviation, and every seed."""
    table = Table("width", "method", "grown weights' second moments", "accuracy, %", "each seed")
    order = ["dense", *METHODS]
    cells = _cells(finished)
    for width, method, warm in sorted(cells, key=lambda cell: (cell[0], order.index(cell[1]), cell[2])):
        told = "" if method == "dense" else "max(g², mean of survivors)" if warm else "0"
        values = [result["accuracy"] for result in cells[width, method, warm]]
        each = ", ".join(f"{value:.1f}" for value in values)
        table.add_row(str(width), method, told, mean_and_deviation(values), each)
    return table


def draw(finished: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy over epochs: a thin line for each seed, a thick one for the mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "moments"
    cells = _cells(finished)
    widths = sorted({width for width, _, _ in cells})
    panels = [(width, method) for width in widths for method in METHODS]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3.2), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (width, method) in zip(axes[0], panels, strict=True):
        for kind, warm, colour, label in (
            ("dense", False, "#444444", "dense"),
            (method, False, "#d55e00", "moments of 0"),
            (method, True, "#0072b2", "warm moments"),
        ):
            curves = [result["epochs_accuracy"] for result in cells.get((width, kind, warm), ())]
            for curve in curves:
                axis.plot(range(1, len(curve) + 1), curve, color=colour, linewidth=0.6, alpha=0.4)
            if curves:
                axis.plot(
                    range(1, len(curves[0]) + 1),
                    [mean(its) for its in zip(*curves, strict=True)],
                    color=colour,
                    linewidth=2,
                    label=label,
                )
        axis.set(title=f"{method}, 95 %, width {width}", xlabel="epoch")
        axis.legend(frameon=False, fontsize=8, loc="lower right")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("accuracy, %")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def figures(finished: Sequence[dict[str, Any]]) -> str:
    """The text for the documentation: the table, and how it was measured."""
    measured_on = sorted(
        {", ".join([result["machine"], *map(" ".join, result["versions"].items())]) for result in finished}
    )
    return f"{as_markdown(tabulate(finished))}\n\n`python -m benchmarks.moments`: {'; '.join(measured_on)}."


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that runs are appended to")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--table", action="store_true", help="train nothing; print the table of what is in --out")
    parser.add_argument("--docs", action="store_true", help="train nothing; write table and figure into the docs")
    arguments = parser.parse_args(argv)
    if not (arguments.table or arguments.docs):
        train_missing(all_runs(arguments.seeds), train, arguments.out, arguments.jobs)
    finished = list(read(arguments.out, Run).values())
    if arguments.docs:
        put_into(PAGE, "moments", figures(finished))
        draw(finished, PAGE.with_name("warm-moments.svg"))
    else:
        print(figures(finished))


if __name__ == "__main__":
    main()
