"""Trainings on sharded weights in forked processes, as torchrun would have started them, on a CPU over gloo."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F

from lightning_sparse.masks.plan import canonical_name
from lightning_sparse.methods import SparseMethod
from lightning_sparse.testing import ToyModel
from lightning_sparse.testing.toys import SGD
from tests.ports import free_port

Mesh = tuple[int, int]
"""Data-parallel by tensor-parallel processes."""

ONE: Mesh = (1, 1)
MESHES: list[Mesh] = [(2, 1), (1, 2), (2, 2), (4, 1)]


def forked(number: int, call: Callable[..., None], *arguments: Any) -> None:
    """Call a function in so many processes; the error of one is raised here."""
    context = start_processes(
        _work, args=(number, free_port(), call, arguments), nprocs=number, start_method="fork", join=False
    )
    assert context is not None
    while not context.join(grace_period=1.0):  # who survives waits for who has failed, and hears no SIGTERM
        pass


def _work(rank: int, number: int, port: int, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch|lightning")
            call(*arguments)
    finally:
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()


class ShardedToy(ToyModel):
    """The toy in double precision, sharded as its Trainer says; each step has one batch, whoever shares it."""

    def __init__(self, optimizer: Any = SGD, *, double: bool = True, batch_size: int = 16, samples: int = 64) -> None:
        super().__init__(optimizer, batch_size=batch_size, samples=samples)
        if double:
            self.double()

    def shard(self, network: Any, data: Any, tensor: Any) -> None:
        """Divide the network over a mesh of each kind."""
        if tensor.size() > 1:
            parallelize_module(network, tensor, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if data.size() > 1:
            for child in network.children():
                if isinstance(child, nn.Linear | nn.Conv2d):
                    fully_shard(child, mesh=data)
            fully_shard(network, mesh=data)

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is not None and not any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            self.shard(self.network, mesh["data_parallel"], mesh["tensor_parallel"])

    def share(self) -> tuple[int, int]:
        """Among how many a batch is divided, and the part that is this process'."""
        if self.device_mesh is not None:
            data = self.device_mesh["data_parallel"]
            return data.size(), data.get_local_rank()
        return self.trainer.world_size, self.trainer.global_rank

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (parts, part), accumulated = self.share(), self.trainer.accumulate_grad_batches
        size = self.batch_size // parts
        step = self.trainer.global_step * accumulated + batch_idx % accumulated
        first = (step * self.batch_size + part * size) % len(self.train_data)
        inputs, labels = self.train_data[first : first + size]
        return F.cross_entropy(self(inputs.to(self.dtype)), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0].to(self.dtype))


def make_trainer(mesh: Mesh | str, **overrides: Any) -> L.Trainer:
    """A quiet Trainer over a mesh; over one process, or with DDP over two where it is ``"ddp"``."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 16,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
    }
    if mesh == "ddp":
        settings |= {"devices": 2, "strategy": "ddp"}
    elif mesh == ONE:
        settings |= {"devices": 1}
    else:
        data, tensor = mesh
        strategy = ModelParallelStrategy(
            data_parallel_size=int(data),
            tensor_parallel_size=int(tensor),
            save_distributed_checkpoint=overrides.pop("save_distributed_checkpoint", True),
        )
        settings |= {"devices": int(data) * int(tensor), "strategy": strategy}
    return L.Trainer(**(settings | overrides))


def processes_of(mesh: Mesh | str) -> int:
    return 2 if mesh == "ddp" else int(mesh[0]) * int(mesh[1])


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Record(L.Callback):
    """Keeps every mask that there was and the last weights, all whole, in a file that rank 0 writes."""

    def __init__(self, method: SparseMethod, path: Path) -> None:
        self.method, self.path = method, path
        self.masks: list[tuple[int, dict[str, Tensor]]] = []
        self.updates = -1

    def on_train_batch_start(self, *_: Any) -> None:
        if self.method.registry.num_updates != self.updates:
            self.updates = self.method.registry.num_updates
            self.masks.append((self.method.step, masks_of(self.method)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        masks = masks_of(self.method)
        for weight in self.method.weights:
            assert not weight.value[~weight.mask].any()
            assert int(masks[weight.name].sum()) == weight.num_active
        self.masks.append((self.method.step, masks))
        weights = {canonical_name(name): whole(value) for name, value in pl_module.named_parameters()}
        if trainer.is_global_zero:
            torch.save({"masks": self.masks, "weights": weights}, self.path)


def masks_of(method: SparseMethod) -> dict[str, Tensor]:
    """The masks of whole weights; every process must ask."""
    return {weight.name: weight.layout.whole(weight.mask).clone() for weight in method.weights}


def fit(
    mesh: Mesh | str, method: SparseMethod, path: Path, model: Callable[[], Any] = ShardedToy, **more: Any
) -> L.Trainer:
    """Train in the processes that are here, and record it."""
    callbacks = [method, *more.pop("callbacks", []), Record(method, path)]
    ckpt_path = more.pop("ckpt_path", None)
    trainer = make_trainer(mesh, callbacks=callbacks, **more)
    trainer.fit(model(), ckpt_path=ckpt_path)
    return trainer


def recorded(path: Path) -> Mapping[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same(
    found: Mapping[str, Any], expected: Mapping[str, Any], *, bitwise: bool = False, rtol: float = 1e-9, what: str = ""
) -> None:
    """Equal masks after every update, and equal weights; to rounding, or to the bit."""
    assert [step for step, _ in found["masks"]] == [step for step, _ in expected["masks"]]
    for (step, its), (_, those) in zip(found["masks"], expected["masks"], strict=True):
        differ = [name for name in those if not torch.equal(its[name], those[name])]
        assert not differ, f"{what} at step {step}: {differ}"
    rtol, atol = (0.0, 0.0) if bitwise else (rtol, 1e-3 * rtol)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(
            found["weights"][name], weight, rtol=rtol, atol=atol, msg=lambda text: f"{what} {text}"
        )
