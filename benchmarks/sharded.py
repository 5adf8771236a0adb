r"""What an update of sharded masks sends and costs: collectives, bytes and CPU against weights, layers and processes.

Processes train under FSDP2 (gloo, on CPUs), and masks change at every step. This counts what the callback asks of
``torch.distributed`` before the optimizer's step, and times the CPU that process 0 spends on it. For comparison, it
does the same on one process that has as many weights as one of these holds.

The bytes follow from the algorithm, and do not depend on the number of weights. A selection finds the k-th key in
:math:`d` rounds of 256 counts of :math:`c` bytes each (4, or 8 from 2³¹ weights on); from 32 768 weights on, a sample
replaces the first round by rounds of its own. With :math:`L` layers that are ranked separately, or :math:`L = 1` pool,
an update sends from each process

.. math:: \text{bytes} \approx \text{selections} \cdot L \cdot d \cdot 256\, c

and each round is one all-reduce, whatever :math:`L` is; a ring sends twice its bytes from each process. The CPU time is
that of the shard, which has :math:`N / P` weights. The last rows extrapolate to ten billion weights on 64 processes,
with 30 µs for each transfer and 25 GB/s between machines::

    python -m benchmarks.sharded --weights 1_000_000 20_000_000 --processes 2 4
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes

from benchmarks.harness import argument_parser, quiet_trainer, report, write
from benchmarks.update import METHODS, ManyWeights
from lightning_sparse.methods.hard_mask import HardMaskMethod

TITLE = "An update of sharded masks"
GOALS = {"collectives": 20, "ratio": 1.5}
UPDATES = 9
NAMES = ("FGGP", "RigL")
LINK = 25e9  # bytes per second between machines, for the extrapolation
LATENCY = 30e-6  # seconds that a small all-reduce takes there


class Sharded(ManyWeights):
    """The layers, each divided among all processes."""

    def configure_model(self) -> None:
        """Shard each layer."""
        for layer in self.layers if dist.is_initialized() else ():
            fully_shard(layer)  # type: ignore[arg-type]


class Watch(L.Callback):
    """Counts what an update sends, and times it."""

    def __init__(self) -> None:
        self.updates: list[tuple[int, int, float]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Watch every update from now on."""
        method = next(callback for callback in trainer.callbacks if isinstance(callback, HardMaskMethod))  # type: ignore[attr-defined]
        before_step, all_reduce, sizes = method.before_step, dist.all_reduce, list[int]()

        def counted(tensor: Tensor, *arguments: Any, **more: Any) -> Any:
            sizes.append(tensor.numel() * tensor.element_size())
            return all_reduce(tensor, *arguments, **more)

        def watched(*arguments: Any) -> None:
            sizes.clear()
            dist.all_reduce, began = counted, time.process_time()
            before_step(*arguments)
            took, dist.all_reduce = time.process_time() - began, all_reduce
            self.updates.append((len(sizes), sum(sizes), took))

        method.before_step = watched  # type: ignore[method-assign]


def train(name: str, weights: int, layers: int, processes: int, out: Path) -> None:
    """Train in this process, one of several; the first one writes its updates to ``out``."""
    L.seed_everything(0, verbose=False)
    steps, watch = UPDATES + 2, Watch()
    strategy = ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1) if processes > 1 else "auto"
    trainer = quiet_trainer(
        callbacks=[METHODS[name](steps), watch], max_steps=steps, strategy=strategy, devices=processes
    )
    trainer.fit(Sharded(weights, steps, layers))
    if trainer.is_global_zero:
        out.write_text(json.dumps(watch.updates[2:]))


def forked(rank: int, processes: int, port: int, arguments: tuple[Any, ...]) -> None:
    """Call :func:`train` in a process that is set up as torchrun sets it up."""
    its = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in its.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "benchmark"}
    torch.set_num_threads(1)
    train(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


def measured(name: str, weights: int, layers: int, processes: int) -> dict[str, float]:
    """Collectives, kilobytes and CPU milliseconds of an update: the medians of some updates."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        out, port = Path(folder) / "updates.json", probe.getsockname()[1]
        probe.close()
        arguments = (name, weights, layers, processes, out)
        start_processes(forked, (processes, port, arguments), nprocs=processes, start_method="fork")
        updates = json.loads(out.read_text())
    calls, sent, seconds = (median(each) for each in zip(*updates, strict=True))
    return {"collectives": calls, "kB": sent / 1e3, "ms": 1e3 * seconds}


def extrapolated(rows: Sequence[dict[str, Any]], weights: float, layers: int, processes: int) -> dict[str, Any]:
    """Extrapolate to a larger network: CPU by a line through the measured milliseconds, bytes by the layers.

    Args:
        rows: Measured with growing numbers of weights; all else is equal.
        weights: Number of weights.
        layers: Number of layers.
        processes: Number of processes.
    """
    last, is_together = rows[-1], rows[-1]["ranked"] == "together"
    line = linear_regression([row["weights"] / row["processes"] for row in rows], [row["ms"] for row in rows])
    sent = last["kB"] * (2 if is_together and weights >= 1 << 31 else 1)  # counts of eight bytes
    sent *= 1 if is_together else layers / last["layers"]
    return {
        **last,
        "weights": f"{weights:.0e}",
        "processes": processes,
        "layers": layers,
        "kB": sent,
        "ms": line.intercept + line.slope * weights / processes,
        "alone": "",
        "ratio": "",
        "network ms": 1e3 * (last["collectives"] * LATENCY + 2 * 1e3 * sent / LINK),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--weights", nargs="+", type=int, default=[1_000_000, 5_000_000, 20_000_000])
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--layers", nargs="+", type=int, default=[10, 100])
    arguments = parser.parse_args(argv)
    sizes, counts, layers = arguments.weights, arguments.processes, arguments.layers
    if arguments.smallest:
        sizes, counts, layers = [10_000], [2], [4]
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        for weights in sizes:
            for number in layers if weights == max(sizes) else layers[:1]:
                for processes in counts:
                    many = measured(name, weights, number, processes)
                    alone = measured(name, weights // processes, number, 1)["ms"]
                    rows.append(
                        {
                            "method": name,
                            "weights": weights,
                            "layers": number,
                            "ranked": "together" if name == "FGGP" else "layer by layer",
                            "processes": processes,
                            **many,
                            "alone": alone,
                            "ratio": many["ms"] / alone,
                            "network ms": "",
                        }
                    )
                    write(TITLE, rows, arguments.json)
    for name in NAMES:
        same = [
            row
            for row in rows
            if row["method"] == name and row["processes"] == max(counts) and row["layers"] == layers[0]
        ]
        if len(same) > 1:
            rows.append(extrapolated(same, 1e10, 500, 64))
    write(TITLE, rows, arguments.json)
    report(TITLE, rows)


if __name__ == "__main__":
    main()
