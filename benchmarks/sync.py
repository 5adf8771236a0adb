"""What masks add to the communication of two processes: transfers, bytes and time of an update.

Two processes train under DDP (gloo; with ``--device cuda``, NCCL on two GPUs). This counts what the callback asks of
``torch.distributed`` while it updates masks, before the optimizer's step and after it, and the time that this takes. If
the processes share cores, most of it is waiting. For comparison, it measures the update as a whole, and the bytes of
the gradients that DDP reduces at every step anyway.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import argument_parser, quiet_trainer, report
from benchmarks.update import METHODS, Call, ManyWeights

TITLE = "An update on two processes"
COLLECTIVES = ("broadcast", "all_reduce", "all_gather", "reduce")
FLOAT = 4  # bytes


@dataclass
class Transfers:
    """What passed through ``torch.distributed``, and how long updates took.

    Attributes:
        calls: Number of transfers.
        bytes: Their size.
        seconds: The time that they took.
        updates: The time of the updates that they are part of.
    """

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0
    updates: float = 0.0


class Watch:
    """Counts the transfers between ``begin`` and ``end``, step by step. ``out`` is the file for the results."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.now = Transfers()
        self.steps: list[Transfers] = []
        self._start = 0.0
        self._originals: dict[str, Callable[..., Any]] = {}

    def begin(self) -> None:
        """Called before the callback."""
        self._originals = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, collective in self._originals.items():
            setattr(dist, name, partial(self._call, collective))
        self._start = time.perf_counter()

    def end(self) -> None:
        """Called after the callback."""
        self.now.updates += time.perf_counter() - self._start
        for name, collective in self._originals.items():
            setattr(dist, name, collective)

    def _call(self, collective: Callable[..., Any], tensor: Tensor, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = collective(tensor, *args, **options)
        self.now.seconds += time.perf_counter() - start
        self.now.calls += 1
        self.now.bytes += tensor.nbytes
        return result


class Steps(L.Callback):
    """Closes the account of each step; one of the processes writes all accounts to the file."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the account of the step."""
        self.watch.steps.append(self.watch.now)
        self.watch.now = Transfers()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the accounts."""
        if trainer.is_global_zero:
            self.watch.out.write_text(json.dumps([asdict(step) for step in self.watch.steps]))


def fit(method: L.Callback, module: ManyWeights, device: str) -> list[Transfers]:
    """Train on two processes; return the transfers of each step in the first one."""
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder, "steps.json"))
        callbacks = [Call(watch.begin), method, Call(watch.end), Steps(watch)]
        # Forked processes begin at once, but CUDA does not allow them.
        strategy = "ddp_fork" if device == "cpu" else "ddp_spawn"
        trainer = quiet_trainer(max_epochs=1, callbacks=callbacks, devices=2, strategy=strategy, accelerator=device)
        trainer.fit(module)
        return [Transfers(**step) for step in json.loads(watch.out.read_text())]


def measure(num_weights: int, updates: int, names: Sequence[str], device: str) -> list[dict[str, Any]]:
    """Return a row for each method."""
    rows: list[dict[str, Any]] = []
    for name in names:
        L.seed_everything(0, verbose=False)
        steps = updates + 2  # SET and RigL change nothing at the first step; the second warms up
        module = ManyWeights(num_weights, 2 * steps)  # each process takes half of the batches
        of_steps = fit(METHODS[name](steps), module, device)[2:]
        seconds, of_updates = median(step.seconds for step in of_steps), median(step.updates for step in of_steps)
        rows.append(
            {
                "method": name,
                "weights": f"{module.num_weights:,}",
                "transfers of an update": max(step.calls for step in of_steps),
                "bytes / weight": max(step.bytes for step in of_steps) / module.num_weights,
                "of the gradients' bytes": max(step.bytes for step in of_steps) / module.num_weights / FLOAT,
                "update, ms": 1e3 * of_updates,
                "transfers, ms": 1e3 * seconds,
                "transfers / update": seconds / of_updates,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--weights", type=int, default=25_000_000)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=[*METHODS], default=[*METHODS], help="some of the methods")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # a forked process would wait forever for threads that only its parent has
    num_weights, updates = (100_000, 2) if arguments.smallest else (arguments.weights, arguments.updates)
    names = ["RigL"] if arguments.smallest else arguments.only
    report(TITLE, measure(num_weights, updates, names, arguments.device), arguments.json)


if __name__ == "__main__":
    main()
