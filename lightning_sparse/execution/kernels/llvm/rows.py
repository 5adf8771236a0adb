"""Chains of linear layers as one program. Each feature's values lie side by side, from the first layer to the last."""

from __future__ import annotations

import threading
from typing import Any, final

import numpy as np
from torch import Tensor

from lightning_sparse.execution.formats import balanced_blocks
from lightning_sparse.execution.kernels.llvm.activations import GELU
from lightning_sparse.execution.kernels.llvm.compiler import Library
from lightning_sparse.execution.kernels.llvm.emitter import LANES_OF_A_LINE
from lightning_sparse.execution.kernels.llvm.layouts import TRANSPOSE
from lightning_sparse.execution.kernels.llvm.offsets import OFFSETS, TILE_VECTORS
from lightning_sparse.execution.kernels.llvm.program import Program, address_of, aligned, bits_of
from lightning_sparse.execution.kernels.llvm.vectors import VECTORS_16, VECTORS_32
from lightning_sparse.execution.kernels.steps import LinearStep

__all__ = ["RowChain"]

PANEL = 64
"""Columns of a batch that go through all layers together: four cache lines for each feature."""


class _Panel:
    """A program for up to ``pitch`` columns: transpose, all layers, transpose back."""

    def __init__(self, library: Library, steps: list[LinearStep], pitch: int, threads: int) -> None:
        self.program = program = Program(library, threads)
        dtype = steps[0].weight.values.dtype
        features = [steps[0].weight.num_columns, *(step.weight.num_rows for step in steps)]
        buffers = [program.hold(aligned((max(1, count), pitch), dtype)) for count in features]
        lanes = library.lanes
        enter = program.add(
            TRANSPOSE, -(-features[0] // lanes),
            x=0, y=buffers[0], rows=0, columns=features[0], x_stride=features[0], y_stride=pitch,
            x_padded=0, y_padded=1,
        )  # fmt: skip
        for step, x, y in zip(steps, buffers, buffers[1:], strict=False):
            _add_step(program, step, x, y, pitch)
            if step.gelu:
                program.add(GELU, step.weight.num_rows, x=y, length=pitch, stride=pitch)
        leave = program.add(
            TRANSPOSE, -(-pitch // lanes),
            x=buffers[-1], y=0, rows=features[-1], columns=0, x_stride=pitch, y_stride=features[-1],
            x_padded=1, y_padded=0,
        )  # fmt: skip
        self.x = program.port(enter, TRANSPOSE, "x")
        self.y = program.port(leave, TRANSPOSE, "y")
        self.counts = [program.port(enter, TRANSPOSE, "rows"), program.port(leave, TRANSPOSE, "columns")]
        program.seal()

    def run(self, x: int, y: int, count: int) -> None:
        """Read ``count`` rows at address ``x``, and write the results to address ``y``."""
        words = self.program.words
        words[self.x], words[self.y] = x, y
        for port in self.counts:
            words[port] = count
        self.program.run()


def _add_step(program: Program, step: LinearStep, x: int, y: int, pitch: int) -> None:
    lanes = program.library.lanes
    vectors = pitch // lanes
    tiles = [
        (start, start, min(TILE_VECTORS, vectors - start // lanes)) for start in range(0, pitch, TILE_VECTORS * lanes)
    ]
    blocks = balanced_blocks(step.weight.rows, program.threads)
    integers = np.int32 if step.weight.values.itemsize == 4 else np.int64
    program.add(
        OFFSETS, len(tiles) * program.threads,
        x=x, y=y, residual=0,
        rows=program.hold(step.weight.rows), offsets=program.hold(step.weight.columns * np.int32(pitch)),
        values=program.hold(step.weight.values), bias=program.hold(step.bias),
        keep=program.hold(np.full(pitch, -1, integers)), tiles=program.hold(np.array(tiles, np.int64)),
        blocks=program.hold(blocks), num_blocks=program.threads, plane=pitch,
        low=bits_of(step.low), high=bits_of(step.high),
    )  # fmt: skip


class _Single:
    """A program for one column, which stays a vector from the first layer to the last."""

    def __init__(self, library: Library, steps: list[LinearStep], threads: int) -> None:
        self.program = program = Program(library, threads)
        dtype = steps[0].weight.values.dtype
        # GELU computes whole vectors.
        whole = [-(-step.weight.num_rows // LANES_OF_A_LINE) * LANES_OF_A_LINE for step in steps]
        between = [program.hold(aligned((max(1, length),), dtype)) for length in whole[:-1]]
        numbers: list[tuple[int, Any]] = []
        for step, length, x, y in zip(steps, whole, [0, *between], [*between, 0], strict=True):
            numbers.append(self._add(step, x, y))
            if step.gelu:
                lanes = program.library.lanes
                program.add(GELU, length // lanes, x=y, length=lanes, stride=lanes)
        self.x = program.port(*numbers[0], "x")
        self.y = program.port(*numbers[-1], "y")
        program.seal()
        self.words, self.compute = program.words, program.run  # a call takes microseconds, so it looks nothing up

    def _add(self, step: LinearStep, x: int, y: int) -> tuple[int, Any]:
        program = self.program
        sell = step.weight.sell(program.library.lanes)
        kernel = VECTORS_16 if sell.columns.dtype == np.uint16 else VECTORS_32
        number = program.add(
            kernel, len(sell.slices) - 1,
            x=x, y=y, slices=program.hold(sell.slices), columns=program.hold(sell.columns),
            values=program.hold(sell.values), bias=program.hold(sell.arranged(step.bias)),
            order=program.hold(sell.order), low=bits_of(step.low), high=bits_of(step.high),
        )  # fmt: skip
        return number, kernel

    def run(self, x: int, y: int) -> None:
        """Read one row at address ``x``, and write the result to address ``y``."""
        words = self.words
        words[self.x] = x
        words[self.y] = y
        self.compute()


@final
class RowChain:
    """A chain of linear layers, for the rows of a batch.

    Args:
        library: The kernels.
        steps: The layers, at least one; the outputs of each are the inputs of the next.
        threads: How many threads compute.
    """

    def __init__(self, library: Library, steps: list[LinearStep], threads: int) -> None:
        self.library = library
        self.steps = steps
        self.threads = threads
        self.in_features = steps[0].weight.num_columns
        self.out_features = steps[-1].weight.num_rows
        self._lock = threading.Lock()  # one call at a time: a program has only one set of buffers
        self._single: _Single | None = None
        self._panels: dict[int, _Panel] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Return the last layer's outputs (rows, out_features) for rows (rows, in_features)."""
        count = x.shape[0]
        if not x.is_contiguous():
            x = x.contiguous()
        source = address_of(x, count)
        y = x.new_empty(count, self.out_features)
        with self._lock:
            if count == 1:
                (self._single or self.single()).run(source, y.data_ptr())
            elif self.out_features:
                self._run_panels(source, y.data_ptr(), count, x.element_size())
        return y

    def _run_panels(self, source: int, target: int, count: int, size: int) -> None:
        for start in range(0, count, PANEL):
            length = min(PANEL, count - start)
            pitch = -(-length // LANES_OF_A_LINE) * LANES_OF_A_LINE
            if pitch not in self._panels:
                self._panels[pitch] = _Panel(self.library, self.steps, pitch, self.threads)
            x, y = source + start * self.in_features * size, target + start * self.out_features * size
            self._panels[pitch].run(x, y, length)

    def single(self) -> _Single:
        """Return the program for one row."""
        if self._single is None:
            self._single = _Single(self.library, self.steps, self.threads)
        return self._single
