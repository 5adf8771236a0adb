"""What limits a sparse linear layer with one input: its kernel, the memory, and a call from Python.

A square layer is timed dense; sparse, as ``accelerate`` returns it; and by its kernel alone, without Python's part. The
floor below these times is the time in which this machine sums as many bytes as the weights have, plus a call of a
module that only makes its output. If the dense time over the floor is below a goal, no kernel reaches that goal::

    OMP_NUM_THREADS=1 python -m benchmarks.limits --json benchmarks/results/limits.json
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from typing_extensions import override

from benchmarks.harness import argument_parser, print_table, write
from benchmarks.inference import least_times
from lightning_sparse.execution import accelerate
from lightning_sparse.execution.formats import pack
from lightning_sparse.execution.kernels.llvm.compiler import library
from lightning_sparse.execution.kernels.llvm.rows import RowChain
from lightning_sparse.execution.linear import linear_step
from lightning_sparse.execution.timing import num_threads

GOALS = {0.9: 5, 0.95: 10, 0.99: 30}


class Nothing(nn.Module):
    """Makes its output, and computes nothing: the least that any module costs."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return memory for the output."""
        return x.new_empty(x.shape)


def measure(width: int, sparsity: float, seconds: float) -> dict[str, Any]:
    """Time a layer, its kernel and its floor; return a row of the results."""
    torch.manual_seed(0)
    layer = nn.Linear(width, width).eval().requires_grad_(False)
    layer.weight.mul_(torch.rand_like(layer.weight) >= sparsity)
    x, y = torch.randn(1, width), torch.empty(1, width)
    fast = accelerate(layer, x, threads=1)
    step = linear_step(layer.weight, layer.bias)
    chain = RowChain(library(torch.float32), [step], threads=1)
    kernel, source, target = chain.single(), x.data_ptr(), y.data_ptr()
    sell = pack(layer.weight).sell(chain.library.lanes)
    weights = torch.ones((sell.values.nbytes + sell.columns.nbytes) // 4)
    nothing = Nothing()
    calls = {
        "dense": lambda: layer(x),
        "accelerated": lambda: fast(x),
        "kernel": lambda: kernel.run(source, target),
        "bytes": weights.sum,
        "call": lambda: nothing(x),
    }
    times = {name: 1e6 * value for name, value in least_times(calls, seconds).items()}
    floor = times["bytes"] + times["call"]
    return {
        "width": width,
        "sparsity": sparsity,
        "goal": GOALS[sparsity],
        "times as fast": round(times["dense"] / times["accelerated"], 1),
        "at the floor": round(times["dense"] / floor, 1),
        "kernel's share": round(times["kernel"] / times["accelerated"], 2),
        "kB": round(weights.nbytes / 1e3),
    } | {f"{name}, µs": round(value, 1) for name, value in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it."""
    parser = argument_parser(__doc__)
    options = parser.parse_args(arguments)
    widths, sparsities, seconds = ((64,), (0.9,), 0.05) if options.smallest else ((1024, 4096), tuple(GOALS), 4.0)
    with num_threads(1), torch.no_grad():
        rows = [measure(width, sparsity, seconds) for width in widths for sparsity in sparsities]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    print_table(table)
    write("What bounds a sparse linear layer of one input", rows, options.json)


if __name__ == "__main__":
    main()
