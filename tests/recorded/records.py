"""Perform a run, keep what it came to, and tell in what two of them differ."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.recorded.modules import Toy
from tests.recorded.runs import RUNS, Run

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lightning_sparse import SparseMethod

__all__ = ["PATH", "TOLERANCE", "Record", "compare", "differences", "load", "perform", "save"]

PATH = Path(__file__).with_name("recorded.safetensors")

TOLERANCE = 1e-9
"""Of weights, in float64: far above what another machine rounds otherwise, far below what another mask makes."""


@dataclass(frozen=True)
class Record:
    """What a run came to.

    Args:
        steps: Optimizer steps after which masks were looked at.
        masks: Masks by parameter name, uint8 of shape ``(len(steps), ⌈numel / 8⌉)``, the bits of each packed.
        weights: The ``state_dict`` at the end of training, in float64.
        counters: Steps of the method and updates of its masks at the end.
    """

    steps: list[int]
    masks: dict[str, Tensor]
    weights: dict[str, Tensor]
    counters: dict[str, int]


class _Recorder(L.Callback):
    """Looks at masks after each batch; at the end, the first process writes the record to ``path``."""

    def __init__(self, method: SparseMethod, path: Path) -> None:
        self.method = method
        self.path = path
        self.looks: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        masks = {name: np.packbits(weight.mask.numpy()) for name, weight in self.method.registry.items()}
        self.looks[trainer.global_step] = {name: torch.from_numpy(bits) for name, bits in masks.items()}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            last = self.looks[max(self.looks)]
            record = Record(
                steps=list(self.looks),
                masks={name: torch.stack([masks[name] for masks in self.looks.values()]) for name in last},
                weights={name: value.detach().double().clone() for name, value in pl_module.state_dict().items()},
                counters=self._counters(),
            )
            save({"run": record}, self.path)

    def _counters(self) -> dict[str, int]:
        updates: int | None = getattr(self.method.registry, "num_updates", None)  # no promise of the library
        return {"step": self.method.step} | ({} if updates is None else {"num_updates": updates})


class _SaveAt(L.Callback):
    """Writes a checkpoint after ``step`` steps."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:  # on every rank: saving is a collective
            trainer.save_checkpoint(self.path)


def perform(run: Run) -> Record:
    """Train as ``run`` says, and return what it came to."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of collapsed layers, few workers and the like: they are tested elsewhere
        root = Path(folder)
        checkpoint = None
        if run.resumed_at is not None:
            checkpoint = root / "saved.ckpt"
            _fit(run, root, run.module(), run.methods(), _SaveAt(run.resumed_at, checkpoint))
        methods = run.methods()
        _fit(run, root, run.module(), methods, _Recorder(methods[0], root / "record"), checkpoint)
        return load(root / "record")["run"]


def _fit(
    run: Run,
    root: Path,
    module: Toy,
    methods: list[SparseMethod],
    observer: L.Callback,
    checkpoint: Path | None = None,
) -> None:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "precision": "64-true",
        "accelerator": "cpu",
        "devices": run.processes,
        "strategy": "auto" if run.processes == 1 else "ddp_fork",
        "use_distributed_sampler": False,  # the module divides batches
        "default_root_dir": root,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    torch.manual_seed(7)
    trainer = L.Trainer(**settings | dict(run.trainer), callbacks=[*methods, observer])
    trainer.fit(module, ckpt_path=checkpoint)


def save(records: Mapping[str, Record], path: Path) -> None:
    """Write records, by name, as one safetensors file."""
    tensors = {
        f"{run}/{kind}/{name}": value.contiguous()
        for run, record in records.items()
        for kind, values in (("masks", record.masks), ("weights", record.weights))
        for name, value in values.items()
    }
    metadata = {
        run: json.dumps({"steps": record.steps, "counters": record.counters}) for run, record in records.items()
    }
    save_file(tensors, path, metadata)


def load(path: Path = PATH, names: Iterable[str] | None = None) -> dict[str, Record]:
    """Read the records of ``names``, or all; a name without a record is left out."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        names = metadata if names is None else [name for name in names if name in metadata]
        records = {name: Record(masks={}, weights={}, **json.loads(metadata[name])) for name in names}
        for key in file.keys():  # noqa: SIM118  # the file is no mapping
            run, kind, name = key.split("/")
            if run in records:
                getattr(records[run], kind)[name] = file.get_tensor(key)
    return records


def compare(name: str) -> list[str]:
    """Perform the run ``name`` again; in what it differs from its record, a sentence each."""
    recorded = load(names=[name])
    if name not in recorded:
        return ["not recorded; run python -m tests.recorded"]
    return differences(recorded[name], perform(RUNS[name]))


def differences(recorded: Record, found: Record) -> list[str]:
    """In what ``found`` differs from ``recorded``, a sentence each."""
    aspects = (
        ("names of masks", sorted(recorded.masks), sorted(found.masks)),
        ("names of weights", sorted(recorded.weights), sorted(found.weights)),
        ("steps", recorded.steps, found.steps),
        ("counters", *_of_both(recorded.counters, found.counters)),
    )
    said = [f"other {what}: {before} recorded, {now} found" for what, before, now in aspects if before != now]
    return said + _of_masks(recorded, found) + _of_weights(recorded, found)


def _of_both(first: dict[str, int], second: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """What has a name in both."""
    names = first.keys() & second.keys()
    return {name: first[name] for name in sorted(names)}, {name: second[name] for name in sorted(names)}


def _of_masks(recorded: Record, found: Record) -> list[str]:
    """The first step after which masks differ, and in how many places."""
    both = sorted(recorded.masks.keys() & found.masks.keys())
    for step in sorted(set(recorded.steps) & set(found.steps)):
        rows = (recorded.steps.index(step), found.steps.index(step))
        counts = {name: _bits_that_differ(recorded.masks[name][rows[0]], found.masks[name][rows[1]]) for name in both}
        if any(counts.values()):
            places = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
            return [f"masks differ first after step {step}: {places}"]
    return []


def _bits_that_differ(first: Tensor, second: Tensor) -> int:
    if first.shape != second.shape:
        return 8 * max(first.numel(), second.numel())
    return int(np.unpackbits(np.bitwise_xor(first.numpy(), second.numpy())).sum())


def _of_weights(recorded: Record, found: Record) -> list[str]:
    """The largest difference of weights, where it is above the tolerance."""
    apart = {
        name: float((value - found.weights[name]).abs().max()) if value.shape == found.weights[name].shape else np.inf
        for name, value in recorded.weights.items()
        if name in found.weights
    }
    worst = max(apart, key=apart.__getitem__)
    return [f"weights differ by up to {apart[worst]:.1e}, in {worst}"] if not apart[worst] <= TOLERANCE else []
