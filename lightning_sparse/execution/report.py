"""What ``accelerate`` chose, layer by layer, with the times it chose by."""

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
    """What was chosen for one layer.

    Args:
        name: Of the layer in the module.
        shape: Of its weight.
        sparsity: Fraction of zeros.
        sparse: Whether it is executed sparsely.
        dense_seconds: Of a call of the dense layer on the layer's own input; ``None`` if it was not timed.
        sparse_seconds: Of the sparse one.
        reason: Why it was left dense, if it was.

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
    """What was chosen, and what it gained.

    Args:
        layers: Every layer that has zeros.
        kernels: What executes sparse layers.
        threads: How many threads computed.
        input_shapes: Of the example.
        dense_seconds: Of a call of the module as it was given, on the example.
        fast_seconds: Of a call of what is returned; ``None`` if nothing was tried.
        accelerated: Whether what is returned differs from the module that was given.
        notes: What else is to be known, a sentence each.

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
    accelerated: bool = False
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def gain(self) -> float:
        """How many times faster a call is than one of the module that was given; 1 where that is returned."""
        if self.dense_seconds is None or self.fast_seconds is None:
            return 1.0
        return self.dense_seconds / self.fast_seconds

    @property
    def conditions(self) -> str:
        """What the times depend on: shapes, threads, kernels, versions and processor."""
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.input_shapes)
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"input {shapes}, {threads}, kernels {self.kernels}, torch {torch.__version__}, {platform.machine()}"

    def __str__(self) -> str:
        """Return the table, with what it was measured on above and the whole below."""
        table = Table("layer", "shape", "sparsity", "dense, µs", "sparse, µs", "gain", "chosen", box=box.MARKDOWN)
        for layer in self.layers:
            times = [_microseconds(layer.dense_seconds), _microseconds(layer.sparse_seconds)]
            gain = "" if layer.gain is None else f"{layer.gain:.2f}"
            chosen = "sparse" if layer.sparse else f"dense: {layer.reason}"
            table.add_row(layer.name, "×".join(map(str, layer.shape)), f"{layer.sparsity:.4f}", *times, gain, chosen)
        stream = io.StringIO()
        Console(file=stream, width=160, color_system=None, force_jupyter=False).print(table)
        lines = [self.conditions]
        if self.layers:
            lines.append("\n".join(line.rstrip() for line in stream.getvalue().strip("\n").splitlines()))
        if self.dense_seconds is not None and self.fast_seconds is not None:
            times = f"{_microseconds(self.dense_seconds)} µs dense, {_microseconds(self.fast_seconds)} µs now"
            lines.append(f"whole: {times}, {self.gain:.2f} times as fast")
        return "\n".join([*lines, *self.notes])


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.1f}"
