"""The zeros of layers, counted, and laid out as a table."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from lightning_sparse.execution.notes import printable
from lightning_sparse.reporting.gains import GAINS, Gains

__all__ = ["LayerSparsity", "SparsityReport", "sparsity_table", "width_of"]


@final
@dataclass(frozen=True)
class LayerSparsity:
    """How many weights of one tensor are zero.

    Args:
        name: Key of the tensor in the state dict.
        shape: Shape of the tensor.
        num_active: Number of weights that are not zero.
        dead_rows: Number of output neurons, filters or gate rows whose weights are all zero; ``None`` if the type of
            the layer is not known, as in a checkpoint.
        dead_columns: Number of input neurons or channels whose weights in this layer are all zero; ``None`` as above.
        flops: FLOPs of the layer in a forward pass without those of zero weights, two for each multiply-add; ``None``
            without an example input.
        masked: Whether a method has a mask for it; ``None`` if that is not known, as for weights that were loaded.

    Example:
        >>> from lightning_sparse.reporting import LayerSparsity
        >>> LayerSparsity("fc.weight", (10, 20), num_active=50).sparsity
        0.75
    """

    name: str
    shape: tuple[int, ...]
    num_active: int
    dead_rows: int | None = None
    dead_columns: int | None = None
    flops: int | None = None
    masked: bool | None = None

    @property
    def numel(self) -> int:
        """All weights, zero or not."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are zero; 0 for an empty tensor."""
        return 1 - self.num_active / self.numel if self.numel else 0.0


@final
@dataclass(frozen=True)
class SparsityReport:
    """The sparsity of each layer, and of all layers together; it prints as a table.

    Args:
        layers: The counted layers, in the order of the module.
        flops: FLOPs of a forward pass without those of zero weights; ``None`` without an example input.
        dense_flops: FLOPs of a forward pass of the same network if it were dense.
        gains: What the zeros gain; ``None`` if only the counts are known.
        remark: A sentence on what is counted, if that may be more than a method would mask, as in a file; else empty.
    """

    layers: tuple[LayerSparsity, ...]
    flops: int | None = None
    dense_flops: int | None = None
    gains: Gains | None = None
    remark: str = ""

    @property
    def numel(self) -> int:
        """All weights of the layers, zero or not."""
        return sum(layer.numel for layer in self.layers)

    @property
    def num_active(self) -> int:
        """Weights of the layers that are not zero."""
        return sum(layer.num_active for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the layers' weights that are zero."""
        return 1 - self.num_active / self.numel if self.numel else 0.0

    @property
    def masked(self) -> SparsityReport:
        """A report on only the layers that are known to be masked; the sparsity that a method was given is theirs."""
        return SparsityReport(tuple(layer for layer in self.layers if layer.masked))

    def to_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists and numbers, for JSON or a data frame."""
        layers = [{**asdict(layer), "shape": list(layer.shape), "sparsity": layer.sparsity} for layer in self.layers]
        return {
            "sparsity": self.sparsity,
            "numel": self.numel,
            "num_active": self.num_active,
            "flops": self.flops,
            "dense_flops": self.dense_flops,
            "layers": layers,
            "gains": None if self.gains is None else asdict(self.gains),
            "remark": self.remark,
        }

    def __rich__(self) -> RenderableType:
        return Group(*self._parts())

    def _parts(self, *, joined: bool = False) -> list[Table | str]:
        """What is printed: the table of zeros, and what they are good for, in the same table or below it."""
        table = sparsity_table(self.layers, gains=self.gains if joined else None)
        if self.flops is not None and self.dense_flops is not None:
            rest = self.flops - sum(layer.flops or 0 for layer in self.layers)
            table.caption = (
                f"{self.flops:,} of {self.dense_flops:,} dense FLOPs for the whole example, {rest:,} of them in layers"
                " that are not listed; theoretical: dense kernels compute all"
            )
        parts: list[Table | str] = [table]
        if self.gains is not None:
            parts += [*([] if joined else [self.gains.table()]), *self.gains.sentences()]
        return [*parts, self.remark] if self.remark else parts

    def __str__(self) -> str:
        parts = self._parts(joined=True)  # a row for each layer, as wide as it needs to be, unless a terminal breaks it
        width = max(width_of(part) for part in parts if isinstance(part, Table))
        if sys.stdout.isatty() and (columns := shutil.get_terminal_size().columns) < width:
            parts, width = self._parts(), columns
        console = Console(width=width, no_color=True, force_terminal=False, force_jupyter=False, highlight=False)
        with console.capture() as capture:
            console.print(*parts, sep="\n", soft_wrap=False)
        return capture.get().rstrip()


def sparsity_table(layers: Iterable[LayerSparsity], title: str | None = None, gains: Gains | None = None) -> Table:
    """Lay out layers and their total for a terminal.

    Args:
        layers: What :func:`checkpoint_sparsity` returned, or the layers of a report.
        title: Printed above the table.
        gains: What the zeros of these layers gain, in more columns.

    Example:
        >>> from lightning_sparse.reporting import LayerSparsity, sparsity_table
        >>> sparsity_table([LayerSparsity("fc.weight", (10, 20), num_active=50)]).row_count
        2
    """
    layers = list(layers)
    table = Table(title=None if title is None else escape(printable(title)))
    table.add_column("layer", overflow="fold")
    known = [
        (header, key)
        for header, key in (("dead rows", "dead_rows"), ("dead columns", "dead_columns"), ("FLOPs", "flops"))
        if any(getattr(layer, key) is not None for layer in layers)
    ]
    for header in ("shape", "weights", "active", "sparsity", *(header for header, _ in known)):
        table.add_column(header, justify="right")
    cells_of_gains = {} if gains is None else {gain.name: gain.cells() for gain in gains.layers}
    for header in () if gains is None else GAINS:
        table.add_column(header, justify="right")
    for layer in layers:
        shape = " × ".join(map(str, layer.shape)) or "scalar"
        counts = (getattr(layer, key) for _, key in known)
        table.add_row(
            escape(printable(layer.name)),
            shape,
            f"{layer.numel:,}",
            f"{layer.num_active:,}",
            f"{layer.sparsity:.2%}",
            *("" if count is None else f"{count:,}" for count in counts),
            *cells_of_gains.get(layer.name, ()),
        )
    table.add_section()
    total = SparsityReport(tuple(layers))
    if 0 < len(total.masked.layers) < len(layers):
        _add_sum(table, "masked", total.masked, [key for _, key in known])
    _add_sum(table, "total", total, [key for _, key in known])
    return table


def _add_sum(table: Table, title: str, of: SparsityReport, counts: Sequence[str]) -> None:
    sums = (sum(getattr(layer, key) or 0 for layer in of.layers) for key in counts)
    cells = (f"{of.numel:,}", f"{of.num_active:,}", f"{of.sparsity:.2%}", *(f"{count:,}" for count in sums))
    table.add_row(title, "", *cells, style="bold")


def width_of(table: Table) -> int:
    """The columns that a table takes if nothing in it is broken into lines, 120 at least for what is below it.

    Example:
        >>> from lightning_sparse.reporting import LayerSparsity, sparsity_table, width_of
        >>> width_of(sparsity_table([LayerSparsity("encoder." * 20 + "weight", (10, 20), num_active=50)]))
        210
    """
    console = Console(width=10_000)
    return max(120, Measurement.get(console, console.options, table).maximum)
