"""How much memory masks take: between updates, during an update, and in a checkpoint.

Each contender trains 25 million weights in ten layers with SGD and momentum for a few steps, in a process of its own:

- bytes between updates: the storages of all tensors that Python's garbage collector knows at the end of a step, whoever
  holds them, minus those of dense training, for each weight;
- peak of an update: how much the memory of the process (on CUDA: of torch's allocator) rose at most while masks were
  chosen and set, for each weight; the rivals' masks do not change here;
- checkpoint: how much larger the file is than that of dense training, over the bytes of the weights;
- peak of training: the most memory that a process held while it trained ResNet-18 for a few steps, minus that of dense
  training, for each weight. If it is about 0, masks take less memory than backward does.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks import contenders, overhead, update
from benchmarks.cases import CASES, OPTIMIZERS, PRECISIONS, SMALLEST, Case
from benchmarks.contenders import Contender
from benchmarks.harness import argument_parser, quiet_trainer, report, silence_lightning
from benchmarks.update import Call, ManyWeights

TITLE = "Bytes of masks"
GOAL_OF_HARD_MASKS = 2.1
HARD_MASKS = ("GMP", "FGGP", "SET", "RigL", "EAST", "GraNet", "MEST", "DSR", "SRigL")  # SNFS remembers gradients too
GOALS = {**dict.fromkeys(HARD_MASKS, GOAL_OF_HARD_MASKS), "DST": 6.1}
GOAL_OF_CHECKPOINT = 1 / 32 + 0.01
STEPS = 4
FLOAT = 4  # bytes
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
DENSE = "dense"


@dataclass(frozen=True)
class Bytes:
    """The results of one process."""

    weights: int
    in_tensors: int
    peak_of_update: int
    checkpoint: int
    peak_of_training: int


class Scale(L.Callback):
    """Measures the memory of the callback that runs between ``begins`` and ``ends``."""

    def __init__(self) -> None:
        self.before = self.peak = self.in_tensors = 0

    def begins(self) -> None:
        """Called before the update."""
        self.before = reset_peak()

    def ends(self) -> None:
        """Called after the update."""
        self.peak = max(self.peak, peak_bytes() - self.before)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what is held between updates, at the last step."""
        if trainer.is_last_batch:
            self.in_tensors = bytes_in_tensors()


def bytes_in_tensors() -> int:
    """Return the size of all storages that some Python object refers to."""
    gc.collect()
    # Subclasses such as the fake tensors of torch.compile have no storage of their own.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bytes_of_process() -> int:
    """Return the memory of the process, or that of torch on the GPU; 0 if the system does not say."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def reset_peak() -> int:
    """Let :func:`peak_bytes` count from now on; return what is held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")
    return bytes_of_process()


def peak_bytes() -> int:
    """Return the most that was held since :func:`reset_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", STATUS.read_text()) if STATUS.exists() else None
    return 1024 * int(found[1]) if found else 0


def weigh(name: str, *, num_weights: int, case: Case, device: str) -> Bytes:
    """Train as the contender of that name does; return its memory. Call this in a process of its own."""
    torch.set_num_threads(1)
    silence_lightning()
    L.seed_everything(0, verbose=False)
    peak = peak_of_training(name, case, device)  # first, because it is the peak of the whole process
    gc.collect()
    module = ManyWeights(num_weights, STEPS)
    weights = module.num_weights
    callbacks: list[L.Callback] = []
    if name in update.METHODS:
        callbacks = [update.METHODS[name](STEPS)]
    elif name != DENSE:
        contender = contenders.RIVALS[name]
        contender.prepare(module)
        callbacks = [*contender.callbacks()]
    scale = Scale()
    watch = [Call(scale.begins), *callbacks, Call(scale.ends), scale]
    trainer = quiet_trainer(max_epochs=1, callbacks=watch, accelerator=device)
    trainer.fit(module)
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_checkpoint(Path(folder, "last.ckpt"))
        checkpoint = Path(folder, "last.ckpt").stat().st_size
    return Bytes(weights, scale.in_tensors, scale.peak, checkpoint, peak)


def peak_of_training(name: str, case: Case, device: str) -> int:
    """Train ``case`` for a few steps; return the most that the process held."""
    everyone = {DENSE: Contender()} | contenders.METHODS | contenders.RIVALS
    overhead.fit(
        replace(case, steps=STEPS),
        L.Callback(),
        contender=everyone[name],
        optimizer=OPTIMIZERS["SGD"],
        precision=PRECISIONS["fp32"],
        device=device,
    )
    return peak_bytes()


def measure(num_weights: int, case: Case, names: Sequence[str], device: str) -> list[dict[str, Any]]:
    """Return a row for each contender, each in a process of its own."""
    found: dict[str, Bytes] = {}
    for name in (DENSE, *names):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(weigh, (name,), {"num_weights": num_weights, "case": case, "device": device})
    dense, weights = found.pop(DENSE), sum(parameter.numel() for parameter in case.network().parameters())
    return [
        {
            "contender": name,
            "bytes / weight between updates": (its.in_tensors - dense.in_tensors) / its.weights,
            "goal": GOALS.get(name, ""),
            "peak of an update, bytes / weight": its.peak_of_update / its.weights if name in update.METHODS else "",
            "checkpoint, share of the weights' bytes": (its.checkpoint - dense.checkpoint) / its.weights / FLOAT,
            "goal ": f"{GOAL_OF_CHECKPOINT:.4f}" if GOALS.get(name) == GOAL_OF_HARD_MASKS else "",
            f"peak of training {case.name}, bytes / weight": (its.peak_of_training - dense.peak_of_training) / weights,
        }
        for name, its in found.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--weights", type=int, default=25_000_000)
    everyone = [*update.METHODS, *contenders.RIVALS]
    parser.add_argument("--only", nargs="+", choices=everyone, default=everyone, help="some of the contenders")
    arguments = parser.parse_args(argv)
    names = ["RigL"] if arguments.smallest else arguments.only
    num_weights, case = (100_000, SMALLEST) if arguments.smallest else (arguments.weights, CASES["resnet18"])
    report(TITLE, measure(num_weights, case, names, arguments.device), arguments.json)


if __name__ == "__main__":
    main()
