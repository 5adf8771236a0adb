"""``python -m lightning_sparse.zoo.demo``: the same network on the same digits, dense and 95 % sparse.

It prints both accuracies and what is left of each layer, draws how they came about in ``demo/training.png``, and leaves
the logs for TensorBoard. It ends with what the zeros bring: the size of both networks' files, and how long both take.
Everything it writes is below ``demo`` in the current folder.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sparse import FGGP, MaskRegistry, accelerate, save_sparse
from lightning_sparse.execution import AccelerationReport
from lightning_sparse.execution.kernels import available_kernels
from lightning_sparse.monitor import SparsityMonitor
from lightning_sparse.zoo.classifier import Classifier
from lightning_sparse.zoo.data import DigitsDataModule
from lightning_sparse.zoo.networks import LeNet300100

if TYPE_CHECKING:
    from lightning import Callback
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

__all__ = ["Curve", "Run", "main"]

SPARSITY = 0.95
BATCH_SIZE = 64
DENSE_COLOUR, SPARSE_COLOUR, LAYER_COLOUR = "#6b7280", "#d1495b", "#7f9cc0"


@dataclass(frozen=True)
class Curve:
    """Values of one quantity at optimizer steps."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Run:
    """What a training leaves behind: its final validation accuracy, the curves that TensorBoard shows, the network."""

    accuracy: float
    curves: Mapping[str, Curve]
    network: nn.Module


def main(folder: Path = Path("demo"), epochs: int = 60) -> int:
    """Train dense and sparse, and show the difference.

    Args:
        folder: Where logs and picture go.
        epochs: Length of each training.

    Returns:
        The exit code 0.
    """
    console = Console()

    console.print(f"Training LeNet-300-100 on 8 × 8 digits for {epochs} epochs: first dense …")
    dense = train("dense", folder, epochs, callbacks=[])
    console.print(f"… and again, from the same weights, with FGGP(sparsity={SPARSITY}).")
    method = FGGP(sparsity=SPARSITY)
    sparse = train("fggp", folder, epochs, callbacks=[method, SparsityMonitor()])

    picture = folder / "training.png"
    draw(dense, sparse, method.registry).savefig(picture, dpi=160)
    console.print(summary(dense, sparse, method.registry))
    console.print(f"The picture:  {picture}")
    console.print(f"The curves:   {tensorboard_command()} --logdir {folder / 'logs'}", soft_wrap=True)

    console.print("\nWhat the zeros bring:", style="bold")
    console.print(gains(dense.network, sparse.network, folder))
    if "llvm" not in available_kernels():
        console.print(
            "llvmlite is not installed, so the sparse network ran by torch alone. With it, it is about twice as fast:"
            " pip install llvmlite"
        )
    return 0


def train(name: str, folder: Path, epochs: int, callbacks: list[Callback]) -> Run:
    """Train the demo's network from the demo's seed, with whatever callbacks; log under ``folder/logs/name``."""
    L.seed_everything(0, verbose=False)
    model = Classifier(
        LeNet300100(in_features=64),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
    )
    logger = TensorBoardLogger(folder / "logs", name=name)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",  # for a network of this size the fastest device
        logger=logger,
        log_every_n_steps=5,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=DigitsDataModule(batch_size=BATCH_SIZE))
    logger.finalize("success")
    return Run(trainer.callback_metrics["val_accuracy"].item(), read_curves(logger.log_dir), model.network)


def read_curves(log_dir: str) -> dict[str, Curve]:
    """Read every scalar that TensorBoard shows for a log, at all of its steps."""
    log = EventAccumulator(log_dir, size_guidance={"scalars": 0})
    log.Reload()
    tags: dict[str, Any] = log.Tags()
    events = {name: log.Scalars(name) for name in tags["scalars"]}
    return {name: Curve([e.step for e in events[name]], [e.value for e in events[name]]) for name in events}


def summary(dense: Run, sparse: Run, registry: MaskRegistry) -> Table:
    """Lay out the accuracies of both runs, and what is left of each layer."""
    images = len(DigitsDataModule().val_set)
    table = Table("", caption=f"accuracy on {images} unseen images; one image is {1 / images:.2%}")
    for header in ("weights", "active", "sparsity", "accuracy"):
        table.add_column(header, justify="right")
    numel, active = registry.numel, registry.num_active
    table.add_row("dense network", f"{numel:,}", f"{numel:,}", "0.00%", f"{dense.accuracy:.2%}")
    row = (f"{numel:,}", f"{active:,}", f"{registry.sparsity:.2%}", f"{sparse.accuracy:.2%}")
    table.add_row("sparse network", *row, style="bold")
    for name, weight in registry.items():
        table.add_row(f"  {name}", f"{weight.numel:,}", f"{weight.num_active:,}", f"{weight.sparsity:.2%}", "")
    return table


def gains(dense: nn.Module, sparse: nn.Module, folder: Path) -> Table:
    """Save both networks, make the sparse one fast, and compare size and time."""
    dense_file, sparse_file = folder / "dense.pt", folder / "fggp.sparse"
    torch.save(dense.state_dict(), dense_file)
    save_sparse(sparse, sparse_file)
    sizes = [file.stat().st_size for file in (dense_file, sparse_file)]

    images = DigitsDataModule().val_set.images
    example = images[:BATCH_SIZE]
    fast = accelerate(sparse, example, threads=1, kernels=available_kernels()[0], seconds=0.3)
    with torch.no_grad():
        same = int((fast(images).argmax(1) == sparse.eval()(images).argmax(1)).sum())

    table = Table("", caption=f"It gives the same answer as before on {same} of {len(images)} unseen images.")
    for header in ("file", "size", f"time for {len(example)} images"):
        table.add_column(header, justify="right")
    dense_time, fast_time, faster = times(fast.report)
    table.add_row("dense network", str(dense_file), f"{sizes[0] / 1000:.1f} kB", dense_time)
    table.add_row("sparse network", str(sparse_file), f"{sizes[1] / 1000:.1f} kB", fast_time, style="bold")
    table.add_row("", "", f"1/{sizes[0] / sizes[1]:.1f} of it", faster)
    return table


def times(report: AccelerationReport) -> tuple[str, str, str]:
    """The time that the network takes dense, that it takes now, and how they compare. Zeros alone change no time."""
    if report.dense_seconds is None or report.fast_seconds is None:
        return "", "", "not faster here"
    dense, fast = (f"{1e6 * seconds:.0f} µs" for seconds in (report.dense_seconds, report.fast_seconds))
    return dense, fast, f"{report.gain:.1f} times as fast"


def tensorboard_command() -> Path:
    """The TensorBoard beside the Python that runs, as one would type it here."""
    command = Path(sys.executable).with_name("tensorboard")
    return command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command


def draw(dense: Run, sparse: Run, registry: MaskRegistry) -> Figure:
    """Draw accuracy and sparsity over training, and which pixels the first layer still looks at."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    left, right = ["accuracy"] * 2 + ["sparsity"] * 2, ["pixels"] * 3 + ["layers"]
    axes = figure.subplot_mosaic([list(row) for row in zip(left, right, strict=True)], width_ratios=[1.75, 1])
    axes["accuracy"].sharex(axes["sparsity"])
    draw_accuracy(axes["accuracy"], dense, sparse)
    draw_sparsity(axes["sparsity"], sparse, list(registry))
    draw_pixels(axes["pixels"], registry)
    draw_layers(axes["layers"], registry)
    figure.suptitle(
        f"LeNet-300-100 on 8 × 8 digits: {registry.sparsity:.0%} of the weights pruned while it learns (FGGP)",
        x=0.01,
        horizontalalignment="left",
        fontsize=14,
        fontweight="bold",
    )
    return figure


def draw_accuracy(axes: Axes, dense: Run, sparse: Run) -> None:
    """Validation accuracy of both runs after each epoch; the first epochs, below the axis, are cut off."""
    for label, run, colour, above in (("dense", dense, DENSE_COLOUR, False), ("sparse", sparse, SPARSE_COLOUR, True)):
        curve = run.curves["val_accuracy"]
        axes.plot(curve.steps, percent(curve.values), color=colour, linewidth=1.8)
        axes.annotate(
            f"{label} {run.accuracy:.1%}",
            (curve.steps[-1], 100 * run.accuracy),
            xytext=(6, 7 if above else -7),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
            verticalalignment="center",
            annotation_clip=False,
        )
    lowest = min(100 * run.accuracy for run in (dense, sparse))
    axes.set_ylim(min(90, 10 * (lowest // 10)), 100)
    axes.set_title("Validation accuracy (%)", loc="left", fontsize=11)
    axes.tick_params(labelbottom=False)
    tidy(axes)


def draw_sparsity(axes: Axes, sparse: Run, layers: list[str]) -> None:
    """Sparsity of each layer and of all, as it was and as the schedule asked for it."""
    actual, target = sparse.curves["sparsity"], sparse.curves["sparsity_target"]
    for name in layers:
        curve = sparse.curves[f"sparsity_layer/{name}"]
        axes.step(curve.steps, percent(curve.values), where="post", color=LAYER_COLOUR, linewidth=1.2)
        axes.annotate(
            short(name),
            (curve.steps[-1], 100 * curve.values[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            color=LAYER_COLOUR,
            # away from the curve of the network, which runs between
            verticalalignment="bottom" if curve.values[-1] > actual.values[-1] else "top",
            annotation_clip=False,
        )
    axes.step(actual.steps, percent(actual.values), where="post", color=SPARSE_COLOUR, linewidth=2.4, label="network")
    axes.plot(target.steps, percent(target.values), color="black", linewidth=1, linestyle="--", label="target")
    axes.set_ylim(0, 102)
    axes.set_title("Sparsity (%)", loc="left", fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.legend(frameon=False, loc="lower right")
    tidy(axes)


def draw_pixels(axes: Axes, registry: MaskRegistry) -> None:
    """How many weights each pixel of the input keeps in the first layer."""
    first = next(iter(registry.values()))
    active = first.mask.sum(dim=0).reshape(8, 8).numpy()
    axes.imshow(active, cmap="magma", vmin=0)
    for row, counts in enumerate(active.tolist()):
        for column, count in enumerate(counts):
            light = count < 0.6 * active.max()
            axes.text(column, row, count, ha="center", va="center", fontsize=9, color="white" if light else "black")
    axes.set_title(f"Weights left at each pixel (of {len(first.mask)})", loc="left", fontsize=11)
    axes.set_axis_off()
    axes.set_anchor("N")


def draw_layers(axes: Axes, registry: MaskRegistry) -> None:
    """How many weights each layer had and has."""
    for row, weight in enumerate(registry.values()):
        axes.barh(row, weight.numel, color="#e5e7eb")
        axes.barh(row, weight.num_active, color=SPARSE_COLOUR)
        text = f"  {weight.num_active:,} of {weight.numel:,}"
        axes.text(weight.num_active, row, text, verticalalignment="center", fontsize=9)
    axes.set_yticks(range(len(registry)), [short(name) for name in registry])
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_title("Weights left in each layer", loc="left", fontsize=11)
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False)


def short(name: str) -> str:
    """The layer that a parameter's name says."""
    return name.removeprefix("network.").removesuffix(".weight")


def percent(fractions: Sequence[float]) -> list[float]:
    """Fractions as percentages."""
    return [100 * fraction for fraction in fractions]


def tidy(axes: Axes) -> None:
    """Leave of the frame what carries a scale."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # in matrices of this size more threads find nothing to do but to wait for each other
    sys.exit(main())
