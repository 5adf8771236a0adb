"""What ``accelerate`` chose, layer by layer, with the measured times."""

from __future__ import annotations

import io
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["AccelerationReport", "LayerChoice"]


@final
@dataclass(frozen=True)
class LayerChoice:
    """The choice for one layer.

    Args:
        name: Name of the layer in the module.
        shape: Shape of its weight.
        sparsity: Fraction of zeros.
        sparse: Whether the layer is executed sparsely.
        dense_seconds: Time of a call of the dense layer on its own input; ``None`` if it was not timed.
        sparse_seconds: Time of a call of the sparse layer.
        reason: Why the layer stays dense; or why it does not, where the sparse one is no faster.

    Example:
        >>> LayerChoice("fc", (10, 20), 0.9, True, dense_seconds=2e-5, sparse_seconds=5e-6).gain
        4.0
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    sparse: bool
    dense_seconds: float | None = None
    sparse_seconds: float | None = None
    reason: str = ""

    @property
    def gain(self) -> float | None:
        """How many times faster the sparse layer was."""
        if self.dense_seconds is None or self.sparse_seconds is None:
            return None
        return self.dense_seconds / self.sparse_seconds


@final
@dataclass(frozen=True)
class AccelerationReport:
    """The choices, and the gain of each.

    Args:
        layers: Every layer that has zeros.
        kernels: The kernels that execute sparse layers.
        threads: Number of threads.
        input_shapes: Shapes of the example's tensors.
        dense_seconds: Time of a call of the original module on the example, in the round that had the median gain.
        fast_seconds: Time of a call of the returned module, in the same round; ``None`` if nothing was tried.
        gain_range: Quartiles of the gain over the rounds: how far it can be trusted on this machine.
        accelerated: Whether the returned module differs from the original.
        notes: Other remarks, one sentence each.

    Example:
        >>> report = AccelerationReport([], "llvm", 1, [(1, 4)], dense_seconds=3e-5, fast_seconds=1e-5)
        >>> round(report.gain, 6)
        3.0
    """

    layers: Sequence[LayerChoice]
    kernels: str
    threads: int
    input_shapes: Sequence[tuple[int, ...]]
    dense_seconds: float | None = None
    fast_seconds: float | None = None
    gain_range: tuple[float, float] | None = None
    accelerated: bool = False
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def gain(self) -> float:
        """How many times as fast a call is as one of the original module; 1 if that is returned."""
        if self.dense_seconds is None or self.fast_seconds is None:
            return 1.0
        return self.dense_seconds / self.fast_seconds

    @property
    def conditions(self) -> str:
        """The shapes, threads, kernels, versions and processor on which the times depend, as one line."""
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.input_shapes)
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"input {shapes}, {threads}, kernels {self.kernels}, torch {torch.__version__}, {platform.machine()}"

    def __str__(self) -> str:
        """Return the table, with what it was measured on above and the whole below."""
        table = Table("layer", "shape", "sparsity", "dense, µs", "sparse, µs", "gain", "chosen", box=box.MARKDOWN)
        for layer in self.layers:
            times = [_microseconds(layer.dense_seconds), _microseconds(layer.sparse_seconds)]
            gain = "" if layer.gain is None else f"{layer.gain:.2f}"
            chosen = ("sparse" if layer.sparse else "dense") + (f": {layer.reason}" if layer.reason else "")
            table.add_row(layer.name, "×".join(map(str, layer.shape)), f"{layer.sparsity:.4f}", *times, gain, chosen)
        stream = io.StringIO()
        Console(file=stream, width=160, color_system=None, force_jupyter=False).print(table)
        lines = [self.conditions]
        if self.layers:
            lines.append("\n".join(line.rstrip() for line in stream.getvalue().strip("\n").splitlines()))
        if self.dense_seconds is not None and self.fast_seconds is not None:
            times = f"{_microseconds(self.dense_seconds)} µs dense, {_microseconds(self.fast_seconds)} µs now"
            between = "" if self.gain_range is None else " ({:.2f} to {:.2f})".format(*self.gain_range)
            lines.append(f"whole: {times}, {self.gain:.2f} times as fast{between}")
        return "\n".join([*lines, *self.notes])


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.1f}"
