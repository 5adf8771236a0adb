"""What looks at masks from outside works on sharded weights too."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lightning_sparse import (
    DST,
    FGGP,
    SNFS,
    FixedMask,
    RigL,
    SparsityMonitor,
    apply_masks,
    load_masks,
    report,
    save_masks,
)
from lightning_sparse.methods import SparseMethod, holding
from tests.sharded.processes import (
    ONE,
    Mesh,
    ShardedToy,
    fit,
    forked,
    make_trainer,
    masks_of,
    processes_of,
    recorded,
)

TIMES: dict[str, Any] = {"update_every": 2, "stop": 11}


class Watched(L.Callback):
    """Saves what the monitor, the report and files say at the end."""

    def __init__(self, monitor: SparsityMonitor, method: SparseMethod, root: Path) -> None:
        self.monitor, self.method, self.root = monitor, method, root

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.monitor.state_dict()
        layers = [
            (layer.name, layer.num_active, layer.dead_rows, layer.dead_columns) for layer in report(pl_module).layers
        ]
        save_masks(self.root / "method.masks", self.method)
        save_masks(self.root / "module.masks", pl_module)
        state = self.monitor.state_dict()
        if trainer.is_global_zero:
            values = {name: value for name, value in self.monitor.values.items() if not name.startswith("flops")}
            torch.save({"values": values, "layers": layers, "history": state["history"]}, self.root / "seen.pt")


def watch(mesh: Mesh, root: Path) -> None:
    monitor, method = SparsityMonitor(), RigL(0.8, **TIMES)
    make_trainer(mesh, callbacks=[method, monitor, Watched(monitor, method, root)]).fit(ShardedToy())


@pytest.mark.parametrize("mesh", [(2, 1), (2, 2)], ids=str)
@pytest.mark.filterwarnings("ignore:SparsityMonitor")
def test_monitor_report_and_files_say_what_they_say_of_one_process(mesh: Mesh, tmp_path: Path) -> None:
    for number, its in enumerate((ONE, mesh)):
        (tmp_path / str(number)).mkdir()
        forked(processes_of(its), watch, its, tmp_path / str(number))
    one, many = (torch.load(tmp_path / name / "seen.pt", weights_only=True) for name in "01")
    assert many["values"] == pytest.approx(one["values"])
    assert many["layers"] == one["layers"]
    for part, bits in one["history"].items():
        assert all(torch.equal(many["history"][part][name], its) for name, its in bits.items())
    for name in ("method.masks", "module.masks"):
        first, second = (load_masks(tmp_path / number / name) for number in "01")
        assert all(torch.equal(first[key], second[key]) for key in first)


class Masked(ShardedToy):
    """Gets its masks before it is sharded, or after."""

    def __init__(self, path: Path, *, sharded: bool) -> None:
        super().__init__()
        self.path, self.after = path, sharded
        if not sharded:
            apply_masks(self, path)

    def on_train_start(self) -> None:
        pass

    def configure_model(self) -> None:
        super().configure_model()
        if self.after:
            apply_masks(self, self.path)


@pytest.mark.parametrize("sharded", [False, True])
def test_masks_that_are_given_are_taken_over(sharded: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = {
        f"network.{n}.weight": torch.rand(s, generator=generator) < 0.3
        for n, s in ((0, (16, 12)), (2, (8, 16)), (4, (3, 8)))
    }
    save_masks(tmp_path / "given.masks", masks)

    def run() -> None:
        fit((2, 1), FixedMask(), tmp_path / "left.pt", partial(Masked, tmp_path / "given.masks", sharded=sharded))
        fit((2, 1), FixedMask(tmp_path / "given.masks"), tmp_path / "read.pt")

    forked(2, run)
    for name in ("left.pt", "read.pt"):
        for _, found in recorded(tmp_path / name)["masks"]:
            assert all(torch.equal(found[key], mask) for key, mask in masks.items())


def test_a_second_fit_goes_on_from_the_masks_of_the_first(tmp_path: Path) -> None:
    def run() -> None:
        model = ShardedToy()
        first = RigL(0.8, **TIMES)
        trainer = make_trainer((2, 1), callbacks=[first], max_steps=12)
        trainer.fit(model)
        masks = masks_of(first)
        trainer.fit_loop.epoch_loop.max_steps = 14  # after the last update
        trainer.fit(model)
        assert first.step == 14
        assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(first).items())

    forked(2, run)


class Meta(ShardedToy):
    """Built on the meta device, and filled when it is sharded."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.network = self.build().double()

    def shard(self, network: Any, data: Any, tensor: Any) -> None:
        super().shard(network, data, tensor)
        network.to_empty(device="cpu")
        torch.manual_seed(0)
        for child in network.children():
            if isinstance(child, nn.Linear | nn.LayerNorm):
                child.reset_parameters()


class HalfPrecision(ShardedToy):
    """Computes in bfloat16, and reduces gradients in single precision."""

    def __init__(self) -> None:
        super().__init__(double=False)

    def shard(self, network: Any, data: Any, tensor: Any) -> None:
        fully_shard(network, mesh=data, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


@pytest.mark.parametrize("model", [Meta, HalfPrecision])
def test_budgets_are_met_however_the_module_is_built(model: Any, tmp_path: Path) -> None:
    forked(2, lambda: fit((2, 1), FGGP(0.8, **TIMES), tmp_path / "made.pt", model) and None)
    _, masks = recorded(tmp_path / "made.pt")["masks"][-1]
    assert sum(int(mask.sum()) for mask in masks.values()) == 344 // 5


def test_nothing_is_repaired_where_nobody_writes(tmp_path: Path) -> None:
    def run() -> None:
        told = list[str]()  # torch 2.9 counts writes of its own, which are looked at and found to be none
        holding._say = lambda method, weights, cause: told.append(cause)
        fit((2, 1), RigL(0.8, **TIMES), tmp_path / "made.pt", limit_val_batches=1, val_check_interval=2)
        assert not told

    forked(2, run)


class Writes(L.Callback):
    """Writes to a weight of one process between two steps."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step in (5, 9) and trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.network[0].weight.to_local().add_(1.0)


def test_what_one_process_writes_is_zero_again(tmp_path: Path) -> None:
    forked(2, lambda: fit((2, 1), RigL(0.8, **TIMES), tmp_path / "made.pt", callbacks=[Writes()]) and None)


class NaNs(ShardedToy):
    """One gradient of one process is NaN at the steps of updates."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 4 and self.trainer.global_rank == 1:
            network: Any = self.network
            network[0].weight.grad.to_local()[0, 0] = torch.nan


@pytest.mark.parametrize(
    "make", [partial(RigL, 0.8, update_replaces_step=False, **TIMES), partial(SNFS, 0.8, **TIMES), partial(DST, 0.03)]
)
def test_a_gradient_that_is_not_finite_defers_updates_everywhere(make: Any, tmp_path: Path) -> None:
    def run() -> None:
        method = make()
        trainer = make_trainer((2, 1), callbacks=[method], max_steps=5)
        trainer.fit(NaNs())
        assert method.step == 5

    forked(2, run)
