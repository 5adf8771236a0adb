"""What cannot work is refused in words, in every process, before a weight has changed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_sparse import DST, GMP, GraSP, RigL, prune
from lightning_sparse.masks import select_weights
from lightning_sparse.methods import SparseMethod, grasp
from lightning_sparse.methods.requirements import refuse_strategy
from lightning_sparse.testing import OPTIMIZERS
from tests.sharded.processes import Mesh, ShardedToy, forked, make_trainer


def train(mesh: Mesh, make: Callable[[], SparseMethod], model: Callable[[], Any], *callbacks: L.Callback) -> None:
    make_trainer(mesh, callbacks=[make(), *callbacks]).fit(model())


def refused(match: str, mesh: Mesh, make: Callable[[], SparseMethod], model: Any = ShardedToy, *callbacks: Any) -> None:
    with pytest.raises(Exception, match=match):
        forked(mesh[0] * mesh[1], train, mesh, make, model, *callbacks)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("FSDPStrategy", r"FSDP1 flattens .* Use FSDP2, .* strategy=ModelParallelStrategy\(\)"),
        ("DeepSpeedStrategy", "its engine owns the optimizer step. Use strategy='ddp', strategy=ModelParallelStrategy"),
        ("XLAFSDPStrategy", "does not support XLAFSDPStrategy: it flattens the weights"),
        ("XLAStrategy", "does not support XLAStrategy: it compiles the step"),
    ],
)
def test_strategies_that_hide_weights(name: str, match: str) -> None:
    trainer: Any = type("Trainer", (), {"strategy": type(name, (), {})()})()
    with pytest.raises(Exception, match=match):
        refuse_strategy("GMP", trainer)


class Uneven(ShardedToy):
    """Rows that FSDP2 and tensor parallelism together divide into parts that are not equal."""

    def shard(self, network: Any, data: Any, tensor: Any) -> None:
        network[0] = nn.Linear(12, 18).double()
        network[2] = nn.Linear(18, 8).double()
        parallelize_module(network, tensor, {"0": ColwiseParallel(output_layouts=None)})
        fully_shard(network, mesh=data)


def test_shards_that_interleave_unevenly() -> None:
    refused(
        r"network\.0\.weight are divided in a way that masks cannot follow: by DeepSpeed, .* into unequal parts",
        (2, 2),
        partial(GMP, 0.5),
        Uneven,
    )


def test_averages_that_copy_the_module() -> None:
    refused(
        "EMAWeightAveraging copies the module, which FSDP2 does not allow",
        (2, 1),
        partial(GMP, 0.5),
        ShardedToy,
        EMAWeightAveraging(),
    )


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (OPTIMIZERS["adafactor"], "Adafactor computes means over a whole weight"),
        (partial(torch.optim.SGD, lr=0.1, foreach=True), "cannot step sharded and whole weights at once"),
    ],
)
def test_optimizers_that_fail_on_shards(optimizer: Any, match: str) -> None:
    refused(match, (1, 2), partial(GMP, 0.5), partial(ShardedToy, optimizer))  # whose last layer is not sharded


class InputFirst(nn.Linear):
    """A layer that stores its inputs first."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(self.weight.detach().t().contiguous())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight + self.bias


class InputsFirst(ShardedToy):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(InputFirst(12, 3)).double()

    def shard(self, network: Any, data: Any, tensor: Any) -> None:
        fully_shard(network, mesh=data)


def test_thresholds_of_outputs_that_no_process_holds() -> None:
    refused(
        "cannot mask any weight of this module: .*it stores its inputs first", (2, 1), partial(DST, 1e-3), InputsFirst
    )


def test_second_derivatives_under_fsdp() -> None:
    refused("which FSDP2 cannot compute: .* tensor parallelism alone", (2, 1), partial(GraSP, 0.5))


def test_second_derivatives_that_torch_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grasp, "differentiates_twice", lambda parameter: parameter.shape[0] != 8)
    refused("loses it in layers under tensor parallelism", (1, 2), partial(GraSP, 0.5))


def test_patterns_that_parts_would_cut() -> None:
    refused(
        "divided into 2 parts, none of which may cut 16",
        (1, 2),
        partial(RigL, 0.5, pattern="8:16", include=["network.2.*"]),
    )


def test_pruning_at_once() -> None:
    def run() -> None:
        class Prunes(ShardedToy):
            def on_train_start(self) -> None:
                prune(self, 0.5)

        make_trainer((2, 1)).fit(Prunes())

    with pytest.raises(Exception, match=r"is sharded, and prune works on whole weights. Call it before fully_shard"):
        forked(2, run)


# Processes that differ.


class OtherLayout(ShardedToy):
    """Rank 1 leaves its last layer whole."""

    def shard(self, network: Any, data: Any, tensor: Any) -> None:
        for number in (0, 2, 4):
            if number != 4 or data.get_local_rank() == 0:
                fully_shard(network[number], mesh=data)


def in_seconds(match: str, run: Callable[[], None], limit: float) -> None:
    began = time.monotonic()
    with pytest.raises(Exception, match=match):
        forked(2, run)
    assert time.monotonic() - began < limit


def test_processes_whose_layouts_differ() -> None:
    match = r"The processes differ in the weights of GMP.*divided by"
    in_seconds(match, lambda: train((2, 1), partial(GMP, 0.5), OtherLayout), limit=60.0)


def test_processes_whose_settings_differ() -> None:
    def run() -> None:
        train((2, 1), partial(GMP, 0.5 if os.environ["RANK"] == "0" else 0.75), ShardedToy)

    in_seconds("The processes differ in the arguments of GMP", run, limit=60.0)


class Dies(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank == 1:
            raise ValueError("process one is ill")


def test_a_process_that_dies_ends_the_others() -> None:
    in_seconds(
        "process one is ill|[Cc]onnection|peer",
        lambda: train((2, 1), partial(RigL, 0.8, update_every=2, stop=11), ShardedToy, Dies()),
        limit=30.0,
    )


class CorruptsACopy(L.Callback):
    """Turns a mask around on one of two processes that hold copies of a weight."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 3:
            self.method.registry["network.4.weight"].mask.logical_not_()


def test_copies_that_differ_are_named() -> None:
    def run() -> None:
        method = GMP(0.5, update_every=1, start=4, stop=11)
        make_trainer((1, 2), callbacks=[method, CorruptsACopy(method)]).fit(ShardedToy())

    in_seconds(r"masks of network\.4\.weight differ between the processes", run, limit=60.0)


def test_the_plan_knows_layers_that_are_sharded() -> None:
    def run() -> None:
        class Looks(ShardedToy):
            def on_train_start(self) -> None:
                plan = select_weights(self)
                assert [candidate.module_type for candidate in plan.masked] == ["Linear"] * 3
                assert [candidate.keeps_zeros for candidate in plan.masked] == [True] * 3

        make_trainer((2, 1), max_steps=1).fit(Looks())

    forked(2, run)
