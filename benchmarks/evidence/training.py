"""One run of the evidence: a Trainer trains with the method's callback, and the results are measured."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from benchmarks.evidence.contenders import METHODS, VARIANTS
from benchmarks.evidence.networks import NETWORKS, Network, equal_width, num_weights
from benchmarks.harness import machine, quiet_trainer, versions
from benchmarks.runs import Plain, begin, truncate
from lightning_sparse import FixedMask, SparsityMonitor, accelerate, prune, save_sparse
from lightning_sparse.metrics import ForwardFLOPs
from lightning_sparse.zoo import CIFAR10DataModule, MNISTDataModule

__all__ = ["Falling", "Run", "fit", "new_module", "train"]


@dataclass(frozen=True)
class Run:
    """One training run: its network, method, sparsity and seed, and the numbers of images and epochs.

    ``train_images`` of 0 means all images; ``epochs`` of 0 means the network's own number of epochs.
    """

    network: str
    method: str
    sparsity: float
    seed: int
    train_images: int = 0
    epochs: int = 0

    def __str__(self) -> str:
        return f"{self.network} {self.method} {self.sparsity:g} seed {self.seed}"

    @property
    def setting(self) -> Network:
        """The network, and how it is trained."""
        return NETWORKS[self.network]


class Falling(Plain):
    """The classifier, with a learning rate that falls to 0 along a cosine, step by step."""

    @override
    def configure_optimizers(self) -> Any:
        """Make the optimizer and the scheduler."""
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = LambdaLR(optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(run: Run, data: Path) -> dict[str, Any]:
    """Train, and return the run with its results.

    Args:
        run: What to train.
        data: Folder of MNIST's files, or of CIFAR-10.
    """
    begin(run.seed)
    module = new_module(run)
    start = time.process_time()
    try:
        accuracy, watched = _fit(run, module, data)
    except (MisconfigurationException, RuntimeError, ValueError) as error:  # a failure is a result too
        return asdict(run) | {"accuracy": None, "error": f"{type(error).__name__}: {error}", **_conditions(start)}
    conditions = _conditions(start)
    weights = {name: value for name, value in module.network.named_parameters() if value.dim() > 1}
    active = {name: int(value.count_nonzero()) for name, value in weights.items()}
    total = num_weights(run.setting.make())
    return asdict(run) | {
        "accuracy": 100.0 * accuracy,
        "achieved_sparsity": 1.0 - sum(active.values()) / total,
        "active": active,
        "weights": total,
        **watched,
        "file_bytes": _file_bytes(module.network),
        **_speed(module.network, run),
        **conditions,
    }


def new_module(run: Run) -> Falling:
    """Make the module that a run trains: of full width, except for the narrow baseline."""
    setting = run.setting
    width = equal_width(setting.make, run.sparsity) if run.method == "equal-weights" else 1.0
    L.seed_everything(run.seed, verbose=False)  # trying widths has drawn random numbers
    optimizer = partial(torch.optim.SGD, lr=setting.lr, momentum=0.9, weight_decay=setting.weight_decay)
    return Falling(setting.make(width), optimizer)


def _conditions(start: float) -> dict[str, Any]:
    return {
        "cpu_seconds": round(time.process_time() - start, 1),
        "machine": machine(),
        "versions": versions(),
    }


def _fit(run: Run, module: Falling, data: Path) -> tuple[float, dict[str, Any]]:
    """Train, and return the accuracy in [0, 1] and what the monitor measured."""
    epochs = run.epochs or run.setting.epochs
    if run.method in ("dense", "equal-weights"):
        accuracy, _ = fit(run, module, data, epochs, [])
        operations = _operations(module.network, run.setting) / _operations(run.setting.make(), run.setting)
        return accuracy, _watched(operations, operations, 1.0, 0)
    if run.method == "one-shot":
        first = epochs - epochs // 2
        fit(run, module, data, first, [])
        prune(module, run.sparsity)
        accuracy, values = fit(run, module, data, epochs // 2, [FixedMask()])
        training = (first + (epochs // 2) * values["training_flops"]) / epochs
        return accuracy, values | {"training_flops": training, "ever_active": 1.0}
    if run.method == "static":
        generator = torch.Generator().manual_seed(run.seed)
        prune(
            module,
            run.sparsity,
            allocation="erk",
            scores=lambda _, weight: torch.rand(weight.shape, generator=generator),
        )
        return fit(run, module, data, epochs, [FixedMask()])
    make = {**METHODS, **VARIANTS}[run.method]
    return fit(run, module, data, epochs, make(run.sparsity, module.network, run.network))


def fit(
    run: Run, module: Falling, data: Path, epochs: int, callbacks: list[L.Callback]
) -> tuple[float, dict[str, Any]]:
    """Train with callbacks, and return the accuracy in [0, 1] and what the monitor measured.

    Args:
        run: Says which data to use, and how many images.
        module: The module to train.
        data: Folder of the data.
        epochs: Number of epochs.
        callbacks: Callbacks of a method, if any.
    """
    monitor = [SparsityMonitor(per_layer=False, histograms=False, heatmap=False)] if callbacks else []
    trainer = quiet_trainer(
        max_epochs=epochs,
        precision=run.setting.precision,
        check_val_every_n_epoch=epochs,
        callbacks=[*callbacks, *monitor],
        gradient_clip_val=None,
    )
    trainer.fit(module, _data(run, data))
    accuracy = float(trainer.callback_metrics["accuracy"])
    if not monitor:
        return accuracy, {}
    values = monitor[0].values
    return accuracy, _watched(
        values.get("flops/inference"),
        values.get("flops/training"),
        values.get("masks/ever_active"),
        values.get("masks/num_dead_neurons"),
    )


def _watched(
    inference: float | None, training: float | None, explored: float | None, dead: float | None
) -> dict[str, Any]:
    return {"inference_flops": inference, "training_flops": training, "ever_active": explored, "dead_units": dead}


def _data(run: Run, folder: Path) -> MNISTDataModule | CIFAR10DataModule:
    kind = MNISTDataModule if run.setting.data == "mnist" else CIFAR10DataModule
    own = folder / run.setting.data  # each data set has a folder of its own, or all files lie together
    data = kind(own if own.is_dir() else folder, batch_size=run.setting.batch_size)
    if run.train_images:
        truncate(data, run.train_images)
    return data


def _operations(network: nn.Module, setting: Network) -> int:
    with torch.no_grad(), ForwardFLOPs(dict(network.named_parameters())) as flops:
        network.eval()(torch.zeros(1, *setting.shape))
    return flops.total


def _file_bytes(network: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.sparse"
        save_sparse(network, path, signed_zeros=False)
        return path.stat().st_size


def _speed(network: nn.Module, run: Run) -> dict[str, Any]:
    """How many times as fast as dense: accelerated over plain, or narrow over wide; one thread, a batch of 64."""
    network.eval()
    images = torch.randn(64, *run.setting.shape)
    if run.method == "dense":
        return {"speed_gain": 1.0}
    if run.method == "equal-weights":
        return {"speed_gain": round(_times_faster(network, run.setting.make().eval(), images), 3)}
    fast = accelerate(network, images, threads=1, seconds=0.2)
    return {"speed_gain": round(_times_faster(fast, network, images), 3), "kernels": fast.report.kernels}


def _times_faster(one: nn.Module, other: nn.Module, images: torch.Tensor, rounds: int = 40) -> float:
    """The median processor time of ten calls of ``other`` over that of ``one``; the two take turns."""
    seconds: dict[nn.Module, list[float]] = {one: [], other: []}
    with torch.inference_mode():
        for _ in range(rounds):
            for network in (one, other):
                network(images)
                start = time.process_time()
                for _ in range(10):
                    network(images)
                seconds[network].append(time.process_time() - start)
    return median(seconds[other]) / median(seconds[one])
