"""What zeros gain: how much smaller the file and a shrunk network are, and how many FLOPs are saved in which layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple, final

from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from lightning_sparse.execution.files import sparse_nbytes
from lightning_sparse.execution.notes import printable
from lightning_sparse.execution.shrink import Shrinkage
from lightning_sparse.functional.allocation import erdos_renyi_kernel, uniform
from lightning_sparse.functional.masks import count_true

__all__ = ["GAINS", "Gains", "LayerGain"]

GAINS = ("2:4 groups", "file, bytes", "times smaller")
"""The headers of what is told of each layer."""


class Layer(NamedTuple):
    """A weight as this module sees it.

    Args:
        value: The weight.
        rows: The same as one row of inputs for each output.
        dense_flops: FLOPs of the layer if it were dense; ``None`` if they are not known.
    """

    value: Tensor
    rows: Tensor
    dense_flops: int | None = None


@final
@dataclass(frozen=True)
class LayerGain:
    """What the zeros of one weight gain.

    Args:
        name: The weight.
        two_of_four: Share of the groups of four neighbouring inputs with at most two nonzero weights, in [0, 1]. If it
            is 1, the sparse tensor cores of GPUs can use the weight without further pruning.
        nbytes: Bytes of the dense weight.
        sparse_nbytes: Approximate bytes of the weight in a sparse file.
        needs_compiler: Whether it is a convolution larger than 1 × 1, which torch's own sparse product cannot do.
        num_zeros: Number of weights that are zero.
    """

    name: str
    two_of_four: float
    nbytes: int
    sparse_nbytes: int
    needs_compiler: bool
    num_zeros: int

    @classmethod
    def of(cls, name: str, layer: Layer) -> LayerGain:
        """Look at a weight."""
        value = layer.value
        needs_compiler = math.prod(value.shape[2:]) > 1
        num_zeros = value.numel() - count_true(value != 0)
        share = _share_of_two_of_four(layer.rows)
        return cls(name, share, value.nbytes, sparse_nbytes(value), needs_compiler, num_zeros)

    def cells(self) -> tuple[str, str, str]:
        """What is told of it, under the headers of ``GAINS``."""
        smaller = self.nbytes / max(1, self.sparse_nbytes)
        return f"{self.two_of_four:.2%}", f"{self.sparse_nbytes:,}", f"{smaller:.1f}"


@final
@dataclass(frozen=True)
class Gains:
    """What the zeros of a network gain.

    Args:
        layers: Each weight.
        nbytes: Bytes of all tensors of the module or the file, including those without zeros.
        sparse_nbytes: Approximate bytes of all tensors in a sparse file.
        units: What :func:`~lightning_sparse.execution.shrink` would remove; ``None`` without an example input.
        uniform_flops: FLOPs of a forward pass through these layers if all had the same sparsity; ``None`` as above.
        erk_flops: The same with the Erdős–Rényi–Kernel allocation.
    """

    layers: tuple[LayerGain, ...]
    nbytes: int
    sparse_nbytes: int
    units: Shrinkage | None = None
    uniform_flops: int | None = None
    erk_flops: int | None = None

    @classmethod
    def of(cls, layers: Mapping[str, Layer], others: Sequence[Tensor], units: Shrinkage | None = None) -> Gains:
        """Look at the weights of a network.

        Args:
            layers: By name, the weights that are counted.
            others: All other tensors that a file would hold.
            units: What shrinking would remove.
        """
        gains = tuple(LayerGain.of(name, layer) for name, layer in layers.items())
        nbytes = sum(gain.nbytes for gain in gains) + sum(tensor.nbytes for tensor in others)
        sparse = sum(gain.sparse_nbytes for gain in gains) + sum(map(sparse_nbytes, others))
        return cls(gains, nbytes, sparse, units, *_flops_by_allocation([*layers.values()]))

    @property
    def compiled_zeros(self) -> int:
        """Zeros in convolutions larger than 1 × 1, which torch's own sparse product cannot use."""
        return sum(gain.num_zeros for gain in self.layers if gain.needs_compiler)

    def sentences(self) -> Iterator[str]:
        """What the zeros of the whole network gain, one sentence each."""
        yield (
            f"A sparse file takes about {_megabytes(self.sparse_nbytes)} of {_megabytes(self.nbytes)} MB"
            f" ({self.nbytes / max(1, self.sparse_nbytes):.1f} times smaller)."
        )
        zeros = sum(gain.num_zeros for gain in self.layers)
        if self.compiled_zeros and find_spec("llvmlite") is None:
            yield (
                f"{self.compiled_zeros:,} of {zeros:,} zeros are in convolutions larger than 1 × 1, and accelerate can"
                " use those only with llvmlite: pip install 'lightning_sparse[fast]'."
            )
        if self.units is not None and self.units.obstacle:
            yield f"shrink cannot remove dead units: the module cannot be traced ({printable(self.units.obstacle)})."
        elif self.units is not None:
            yield (
                f"shrink removes {self.units.dead:,} dead units of {self.units.units:,} and leaves"
                f" {self.units.parameters_left:,} of {self.units.parameters:,} parameters."
            )
        if self.uniform_flops and self.erk_flops:
            fewer, more = sorted((self.uniform_flops, self.erk_flops))
            faster = "uniform" if fewer == self.uniform_flops else "erk"
            if more > 1.01 * fewer:
                yield (
                    f"As many weights take {self.uniform_flops:,} FLOPs with allocation='uniform' and"
                    f" {self.erk_flops:,} with allocation='erk': {faster!r} needs {more / fewer:.2f} times fewer."
                )

    def table(self) -> Table:
        """What the zeros of each layer gain, as a table for a terminal."""
        table = Table()
        table.add_column("layer", overflow="fold")
        for header in GAINS:
            table.add_column(header, justify="right")
        for gain in self.layers:
            table.add_row(escape(printable(gain.name)), *gain.cells())
        return table


def _share_of_two_of_four(rows: Tensor) -> float:
    active = (rows != 0).flatten(1)
    groups = F.pad(active, (0, -active.shape[1] % 4)).reshape(-1, 4)
    return float((groups.sum(dim=1) <= 2).double().mean()) if len(groups) else 1.0


def _flops_by_allocation(layers: Sequence[Layer]) -> tuple[int, int] | tuple[None, None]:
    """FLOPs with the same number of active weights, with uniform sparsity and with ERK."""
    dense = [layer.dense_flops for layer in layers]
    sizes = [layer.value.numel() for layer in layers]
    if any(flops is None for flops in dense) or not all(sizes):
        return None, None
    shapes = [tuple(layer.value.shape) for layer in layers]
    total = sum(count_true(layer.value != 0) for layer in layers)
    uniform_flops, erk_flops = (
        round(sum((flops or 0) * budget / size for flops, budget, size in zip(dense, budgets, sizes, strict=True)))
        for budgets in (uniform(shapes, total), erdos_renyi_kernel(shapes, total))
    )
    return uniform_flops, erk_flops


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.3g}"
