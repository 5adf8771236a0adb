from __future__ import annotations

import csv
import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from lightning_sparse import DST, FGGP, GMP, DyReLUPhasing, FixedMask, MaskRegistry
from lightning_sparse.functional.masks import unpack
from lightning_sparse.functional.topology import exploration_rate, mask_change
from lightning_sparse.monitor import SparsityMonitor
from lightning_sparse.schedules import Polynomial
from lightning_sparse.testing import random_masks
from tests.helpers import ConvToy, ToyModel, fit_two_processes, make_trainer


class Memory(Logger):
    """A logger that remembers what it is told, by name and step."""

    def __init__(self) -> None:
        super().__init__()
        self.curves: dict[str, dict[int, float]] = {}

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to remember."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.curves.setdefault(name, {})[cast(int, step)] = value


OURS = ("sparsity_layer", "masks/", "flops/")


def ours(logger: Memory) -> dict[str, dict[int, float]]:
    """The curves that the monitor alone writes."""
    return {name: curve for name, curve in logger.curves.items() if name.startswith(OURS)}


def gmp(**overrides: Any) -> GMP:
    """Masks change at steps 4, 8 and 12 of the 16 of two epochs."""
    settings: dict[str, Any] = {"sparsity": 0.75, "update_every": 4, "start": 0, "stop": 12}
    return GMP(**(settings | overrides))


def fit(
    root: Path, *callbacks: L.Callback, model: L.LightningModule | None = None, **overrides: Any
) -> tuple[Memory, L.LightningModule]:
    logger, model = Memory(), model or ToyModel()
    ckpt_path = overrides.pop("ckpt_path", None)
    make_trainer(root, callbacks=list(callbacks), logger=logger, **overrides).fit(model, ckpt_path=ckpt_path)
    return logger, model


def nothing_is_left_on() -> bool:
    return _get_current_dispatch_mode() is None


HALF_AT_FIRST = Polynomial(0.5, 0.75)


def assert_same_weights(one: L.LightningModule, other: L.LightningModule) -> None:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class KeepMasks(L.Callback):
    """The masks before the first step and after each update."""

    def __init__(self) -> None:
        self.at_each_update: list[list[Tensor]] = []
        self.num_updates = -1

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        registry = MaskRegistry.of(pl_module)
        if registry.num_updates != self.num_updates:
            self.num_updates = registry.num_updates
            self.at_each_update.append([weight.mask.clone() for weight in registry.values()])


class KilledError(Exception):
    """A machine that goes away."""


class Kill(L.Callback):
    """Ends a training without a word when ``step`` steps are taken."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise KilledError


class SkipsTwo(ToyModel):
    """Skips its first two batches."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cast(Tensor, None) if self.global_step < 2 else super().training_step(batch, batch_idx)


class SkipsAnEpoch(ToyModel):
    """Skips its first epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 else None


class Hidden(ToyModel):
    """Computes where no operation can be seen."""

    def forward(self, inputs: Tensor) -> Tensor:
        with _disable_current_modes():
            return super().forward(inputs)


class SameBatch(ToyModel):
    """Sees one batch again and again: a loader that is resumed begins anew."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = self.train_data.tensors
        return F.cross_entropy(self(inputs), labels)


class Fails(ToyModel):
    """Fails in its first forward pass."""

    def __init__(self, *, automatic: bool) -> None:
        super().__init__()
        self.automatic_optimization = automatic

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        raise RuntimeError("on purpose")


class Manual(ToyModel):
    """Steps by itself, every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer = cast(LightningOptimizer, self.optimizers())
        self.manual_backward(loss)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
        return loss


class WithLearningRate(ToyModel):
    """Has the attribute that the learning-rate finder looks for."""

    lr = 0.1


class WithBackbone(ToyModel):
    """``backbone`` and ``head`` of a sparse network: half of each weight is zero."""

    def __init__(self, *, frozen: bool = True, optimizer_has: str = "all") -> None:
        super().__init__()
        self.backbone, self.head = self.network[:3], self.network[3:]
        del self.network
        self.optimizer_has = optimizer_has
        self.zero_half("backbone.0", "backbone.2", "head.4")
        self.backbone.requires_grad_(not frozen)

    @torch.no_grad()
    def zero_half(self, *names: str) -> None:
        for name in names:
            cast(nn.Linear, self.get_submodule(name)).weight.view(-1)[::2] = 0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.backbone(inputs))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = self.parameters() if self.optimizer_has == "all" else self.head.parameters()
        return torch.optim.SGD(parameters, lr=0.1)


class Thaw(L.Callback):
    """Thaws ``part`` of the network as ``epoch`` begins."""

    def __init__(self, epoch: int = 1, part: str = "backbone") -> None:
        self.epoch, self.part = epoch, part

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            pl_module.get_submodule(self.part).requires_grad_(True)


HEAD, BACKBONE = ["head.4.weight"], ["backbone.0.weight", "backbone.2.weight"]


class TestCurves:
    def test_are_written_at_the_start_after_each_update_and_at_the_end_of_each_epoch(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, gmp(), SparsityMonitor())
        assert list(logger.curves["masks/ever_active"]) == [0, 5, 8, 9, 13, 16]
        assert list(logger.curves["masks/changed_since_update"]) == [5, 9, 13]

    def test_show_sparsity_and_its_target(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, gmp(allocation="global"), SparsityMonitor())
        # 0.75 (1 - (1 - t/12)³), of which the update at step 4 has reached what 344 weights allow
        assert logger.curves["sparsity"][5] == 1 - int(344 * (1 - 0.75 * 19 / 27)) / 344
        assert logger.curves["sparsity_target"][5] == pytest.approx(0.75 * (1 - (7 / 12) ** 3))
        assert logger.curves["sparsity"][16] == logger.curves["sparsity_target"][16] == 0.75

    def test_show_sparsity_and_target_of_each_layer(self, tmp_path: Path) -> None:
        method = gmp()
        logger, _ = fit(tmp_path, method, SparsityMonitor())
        assert len(method.registry) == 3
        for name, weight in method.registry.items():
            assert logger.curves[f"sparsity_layer/{name}"][16] == weight.sparsity
            assert logger.curves[f"sparsity_layer_target/{name}"][16] == 1 - weight.budget / weight.numel

    def test_layers_can_be_left_out(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, gmp(), SparsityMonitor(per_layer=False))
        assert not [name for name in logger.curves if name.startswith("sparsity_layer")]

    def test_are_written_once_and_agree_with_what_the_method_logs_alone(self, tmp_path: Path) -> None:
        alone, _ = fit(tmp_path, gmp())
        logger, module = fit(tmp_path, gmp(), SparsityMonitor())
        for name in ("sparsity", "sparsity_target"):
            assert list(alone.curves[name]) == [7, 15]  # Lightning's steps; ours count from 1
            assert list(logger.curves[name]) == [0, 5, 8, 9, 13, 16]
            assert alone.curves[name][7] == pytest.approx(logger.curves[name][8])
            assert module.trainer.callback_metrics[name] == pytest.approx(logger.curves[name][16])

    def test_a_monitor_can_be_pickled_as_spawned_processes_need_it(self) -> None:
        assert pickle.loads(pickle.dumps(SparsityMonitor(per_layer=False))).per_layer is False

    def test_describe_masks_as_the_functions_do(self, tmp_path: Path) -> None:
        masks = KeepMasks()
        logger, _ = fit(tmp_path, FGGP(0.8, update_every=3, stop=12), masks, SparsityMonitor())
        first, *_, before, last = masks.at_each_update
        assert logger.curves["masks/changed_since_update"][13] == mask_change(before, last)
        assert logger.curves["masks/changed_since_start"][13] == mask_change(first, last)
        union = [torch.stack(layer).any(dim=0) for layer in zip(*masks.at_each_update, strict=True)]
        assert logger.curves["masks/ever_active"][16] == exploration_rate(union)

    def test_count_dead_neurons(self, tmp_path: Path) -> None:
        method = gmp(sparsity=0.9)
        logger, _ = fit(tmp_path, method, SparsityMonitor())
        dead = [int((~weight.mask.any(dim=1)).sum()) for weight in method.registry.values()]
        assert sum(dead) > 0
        assert logger.curves["masks/num_dead_neurons"][16] == sum(dead)
        assert logger.curves["masks/dead_neurons"][16] == sum(dead) / (16 + 8 + 3)

    def test_of_a_method_that_starts_sparse_explore_what_was_active(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, gmp(sparsity=HALF_AT_FIRST), SparsityMonitor())
        assert logger.curves["masks/ever_active"][0] == logger.curves["masks/ever_active"][16] == 0.5

    def test_of_two_methods_cover_both(self, tmp_path: Path) -> None:
        first, second = gmp(include=["network.0.*"]), FGGP(0.5, update_every=4, stop=12, exclude=["network.0.*"])
        logger, _ = fit(tmp_path, first, SparsityMonitor(), second)
        assert {name for name in logger.curves if name.startswith("sparsity_layer/")} == {
            f"sparsity_layer/network.{index}.weight" for index in (0, 2, 4)
        }
        assert logger.curves["sparsity"][16] == 1 - (192 // 4 + (128 + 24) // 2) / 344
        assert logger.curves["sparsity_target"][16] == pytest.approx(logger.curves["sparsity"][16])

    def test_take_updates_together_that_come_fast_and_lose_none_of_their_changes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_sparse.trainer._LEAST_RECORDS", 2)
        method = gmp(start=0, stop=13, update_every=1)
        logger, _ = fit(tmp_path, method, SparsityMonitor(), log_every_n_steps=6)
        assert list(logger.curves["masks/ever_active"]) == [0, 6, 8, 12, 16]
        changes = logger.curves["masks/changed_since_update"]
        assert sum(changes.values()) == pytest.approx(0.75)  # what is pruned stays pruned
        assert list(changes) == [6, 8, 12]

    def test_leave_updates_to_the_end_of_epochs_where_the_trainer_logs_no_steps(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, gmp(), SparsityMonitor(), log_every_n_steps=0)
        assert list(logger.curves["masks/ever_active"]) == [0, 8, 16]

    def test_of_a_method_that_updates_at_every_step(self, tmp_path: Path) -> None:
        method = DST(alpha=0.1)
        logger, _ = fit(tmp_path, method, SparsityMonitor())
        assert logger.curves["sparsity"][16] == method.registry.sparsity > 0
        assert logger.curves["masks/ever_active"][16] == 1

    def test_reach_every_logger(self, tmp_path: Path) -> None:
        loggers = [Memory(), Memory(), CSVLogger(tmp_path, name="csv")]
        make_trainer(tmp_path, callbacks=[gmp(), SparsityMonitor()], logger=loggers).fit(ToyModel())
        assert ours(cast(Memory, loggers[0])) == ours(cast(Memory, loggers[1])) != {}
        with (tmp_path / "csv" / "version_0" / "metrics.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows if row["masks/ever_active"]] == [0, 5, 8, 9, 13, 16]

    def test_are_kept_for_the_user(self, tmp_path: Path) -> None:
        monitor = SparsityMonitor()
        logger, _ = fit(tmp_path, gmp(), monitor)
        assert monitor.values["masks/ever_active"] == logger.curves["masks/ever_active"][16]
        assert monitor.timeline.steps == [0, 5, 8, 9, 13, 16]


class TestFLOPs:
    def test_of_an_mlp_are_its_active_weights(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, gmp(), SparsityMonitor())
        sparsity = logger.curves["sparsity"]
        assert list(logger.curves["flops/inference"]) == [0, 5, 8, 9, 13, 16]
        for step, value in logger.curves["flops/inference"].items():
            assert value == pytest.approx(1 - sparsity[step])

    def test_of_training_are_the_mean_over_steps_with_the_masks_that_each_computed_with(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, gmp(), SparsityMonitor())
        inference = logger.curves["flops/inference"]
        # the update at step 4 acts from step 5 on, which is the sixth
        steps = [inference[0]] * 5 + [inference[5]] * 4 + [inference[9]] * 4 + [inference[13]] * 3
        for step, value in logger.curves["flops/training"].items():
            assert value == pytest.approx(sum(steps[:step]) / step)

    def test_dense_gradients_cost_more_at_an_update(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(GMP, "needs_dense_gradients", True)
        logger, _ = fit(tmp_path, gmp(), SparsityMonitor())
        inference = logger.curves["flops/inference"]
        steps = [inference[0]] * 5 + [inference[5]] * 4 + [inference[9]] * 4 + [inference[13]] * 3
        extra = [(1 - steps[step]) / 3 if step in (4, 8, 12) else 0 for step in range(16)]
        assert logger.curves["flops/training"][16] == pytest.approx((sum(steps) + sum(extra)) / 16)

    @pytest.mark.parametrize("monitor_first", [False, True])
    def test_dynamic_relus_count_until_they_are_phased_out(self, monitor_first: bool, tmp_path: Path) -> None:
        callbacks: list[L.Callback] = [FixedMask(masks=random_masks(ToyModel())), DyReLUPhasing(2, 8)]
        monitor = SparsityMonitor()
        callbacks.insert(0 if monitor_first else 2, monitor)
        logger, _ = fit(tmp_path, *callbacks)
        inference, density = logger.curves["flops/inference"], 1 - logger.curves["sparsity"][16]
        extra = (16 * 4 + 4 * 64) / 344  # 16 channels, reduced to 4, and four coefficients of each
        assert inference[0] == pytest.approx(density + extra)
        assert inference[16] == pytest.approx(density)
        with_them = 9 if monitor_first else 8  # a monitor before it sees the phase-out one step later
        assert logger.curves["flops/training"][16] == pytest.approx(density + extra * with_them / 16)

    def test_a_latent_method_needs_dense_gradients_at_every_step(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, DST(alpha=0.1), SparsityMonitor())
        inference, at = logger.curves["flops/inference"], 1.0
        steps = [at := inference.get(step, at) for step in range(16)]
        assert steps[-1] < 1
        expected = sum(value + (1 - value) / 3 for value in steps) / 16
        assert logger.curves["flops/training"][16] == pytest.approx(expected)

    def test_dense_gradients_are_those_of_the_method_that_needs_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(FGGP, "needs_dense_gradients", True)
        first = gmp(include=["network.0.*"])
        second = FGGP(0.5, update_every=16, start=13, stop=13, exclude=["network.0.*"])
        logger, _ = fit(tmp_path, first, second, SparsityMonitor())
        inference = logger.curves["flops/inference"]
        steps = [inference[0]] * 5 + [inference[5]] * 4 + [inference[9]] * 4 + [inference[13]] + [inference[14]] * 2
        assert logger.curves["flops/training"][16] == pytest.approx(sum(steps) / 16)  # dense until its only update

    def test_of_a_convolution_weigh_by_the_size_of_its_output(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, GMP(0.5, update_every=1, stop=2), SparsityMonitor(), model=ConvToy())
        sparsity = {name: logger.curves[f"sparsity_layer/network.{name}.weight"][16] for name in (0, 3, 6)}
        dense = {0: 8 * 2 * 9 * 36, 3: 8 * 4 * 9 * 9, 6: 72 * 3}
        expected = sum(dense[name] * (1 - sparsity[name]) for name in dense) / sum(dense.values())
        assert logger.curves["flops/inference"][16] == pytest.approx(expected)

    def test_of_layers_left_dense_stay(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, gmp(exclude=["network.0.*"]), SparsityMonitor())
        assert logger.curves["flops/inference"][16] == pytest.approx((192 + (128 + 24) / 4) / 344)

    def test_count_an_accumulated_step_once(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, gmp(stop=6), SparsityMonitor(), accumulate_grad_batches=2)
        inference = logger.curves["flops/inference"]
        assert list(inference) == [0, 4, 5, 7, 8]
        steps = [inference[0]] * 5 + [inference[5]] * 2 + [inference[7]]
        assert logger.curves["flops/training"][8] == pytest.approx(sum(steps) / 8)

    @pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # which Lightning says once a process
    def test_wait_for_a_batch_that_is_not_skipped(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, gmp(), SparsityMonitor(), model=SkipsTwo())
        assert next(iter(logger.curves["flops/inference"])) == 2
        assert nothing_is_left_on()

    def test_are_not_looked_for_for_ever(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match=r"no operation with network\.0\.weight, network\.2\.weight"):
            logger, _ = fit(tmp_path, gmp(), SparsityMonitor(), model=Hidden())
        assert not [name for name in logger.curves if name.startswith("flops/")]

    def test_of_compiled_layers_are_the_same_and_they_compile_as_often(self, tmp_path: Path) -> None:
        def compiled() -> ToyModel:
            torch.compiler.reset()
            model = ToyModel()
            model.network = cast(nn.Sequential, torch.compile(model.network, backend="eager"))
            return model

        graphs = torch._dynamo.utils.counters["stats"]
        graphs.clear()
        _, alone = fit(tmp_path, gmp(), model=compiled(), limit_val_batches=0)
        number = graphs.pop("unique_graphs")
        logger, watched = fit(tmp_path, gmp(), SparsityMonitor(), model=compiled(), limit_val_batches=0)
        assert graphs["unique_graphs"] == number
        assert_same_weights(alone, watched)
        plain, _ = fit(tmp_path, gmp(), SparsityMonitor())
        assert logger.curves["flops/inference"] == plain.curves["flops/inference"]


class TestGoodCitizen:
    @pytest.mark.parametrize("model", [ToyModel, ConvToy])
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_weights_are_the_same_bit_for_bit(
        self, model: type[L.LightningModule], precision: str, tmp_path: Path
    ) -> None:
        method = FGGP(0.8, update_every=3, stop=12)
        _, alone = fit(tmp_path, method, model=model(), precision=precision)
        logger, watched = fit(
            tmp_path, FGGP(0.8, update_every=3, stop=12), SparsityMonitor(), model=model(), precision=precision
        )
        assert_same_weights(alone, watched)
        assert logger.curves["flops/inference"][16] < 1

    def test_the_order_of_callbacks_does_not_matter(self, tmp_path: Path) -> None:
        before, _ = fit(tmp_path, SparsityMonitor(), gmp())
        after, _ = fit(tmp_path, gmp(), SparsityMonitor())
        assert before.curves == after.curves

    @pytest.mark.parametrize("steps", ["automatic", "manual"])
    def test_an_exception_leaves_nothing_behind(self, steps: str, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="on purpose"):
            fit(tmp_path, gmp(), SparsityMonitor(), model=Fails(automatic=steps == "automatic"))
        assert nothing_is_left_on()

    def test_an_epoch_that_is_skipped_leaves_nothing_behind(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, gmp(), SparsityMonitor(), model=SkipsAnEpoch(), max_epochs=3)
        assert nothing_is_left_on()
        assert logger.curves["flops/inference"]

    def test_manual_optimization(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, gmp(stop=6), SparsityMonitor(), model=Manual())
        assert nothing_is_left_on()
        assert logger.curves["flops/inference"][16] == pytest.approx(1 - logger.curves["sparsity"][16])

    def test_of_two_processes_one_writes_and_both_train_as_without(self, tmp_path: Path) -> None:
        alone, _ = fit_two_processes(ConvToy(batch_size=4), tmp_path, [gmp()])
        logger = CSVLogger(tmp_path, name="csv")
        first, second = fit_two_processes(ConvToy(batch_size=4), tmp_path, [SparsityMonitor(), gmp()], logger=logger)
        for name, value in alone["weights"].items():
            assert torch.equal(value, first["weights"][name])
        assert ("SparsityMonitor" in first["callbacks"], "SparsityMonitor" in second["callbacks"]) == (True, False)
        with (tmp_path / "csv" / "version_0" / "metrics.csv").open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["masks/ever_active"]]
        assert [int(row["step"]) for row in rows] == [0, 5, 8, 9, 13, 16]
        assert float(rows[-1]["flops/inference"]) == pytest.approx(0.25)

    def test_the_learning_rate_finder_runs_first(self, tmp_path: Path) -> None:
        finder = LearningRateFinder(num_training_steps=4, update_attr=False)
        logger, _ = fit(tmp_path, SparsityMonitor(), finder, gmp(), model=WithLearningRate())
        assert list(logger.curves["masks/ever_active"]) == [0, 5, 8, 9, 13, 16]

    def test_fast_dev_run(self, tmp_path: Path) -> None:
        monitor = SparsityMonitor()
        make_trainer(tmp_path, callbacks=[monitor, GMP(0.5, stop=0)], logger=True, fast_dev_run=True).fit(ToyModel())
        assert monitor.values["sparsity"] == 0.5

    def test_a_second_fit_begins_a_new_history(self, tmp_path: Path) -> None:
        monitor = SparsityMonitor()
        fit(tmp_path, gmp(), monitor)
        logger, _ = fit(tmp_path, gmp(), monitor)
        assert list(logger.curves["masks/ever_active"]) == [0, 5, 8, 9, 13, 16]

    def test_without_a_method_it_says_what_to_add(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match=r"nothing to watch.*GMP\(sparsity=0.9\)"):
            logger, _ = fit(tmp_path, SparsityMonitor())
        assert not ours(logger)

    def test_without_a_logger_it_says_so(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="no logger"):
            make_trainer(tmp_path, callbacks=[gmp(), SparsityMonitor()]).fit(ToyModel())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
class TestResume:
    @pytest.mark.parametrize("step", [3, 5, 8, 9, 13])
    @pytest.mark.parametrize("pause", [1, 6])
    def test_curves_go_on_as_if_training_had_never_stopped(
        self, step: int, pause: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def callbacks() -> list[L.Callback]:
            return [SparsityMonitor(), FGGP(0.8, update_every=2, stop=13)]

        monkeypatch.setattr("lightning_sparse.monitor.steps_between_records", lambda _: pause)
        whole, _ = fit(tmp_path, *callbacks(), model=SameBatch(), enable_checkpointing=True)
        saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=step, save_top_k=-1, filename="{step}")
        with pytest.raises(KilledError):
            fit(tmp_path, *callbacks(), saver, Kill(step), model=SameBatch(), enable_checkpointing=True)
        resumed, _ = fit(tmp_path, *callbacks(), model=SameBatch(), ckpt_path=tmp_path / "saved" / f"step={step}.ckpt")
        assert resumed.curves["masks/ever_active"]
        for name, curve in ours(resumed).items():
            assert curve == {at: value for at, value in whole.curves[name].items() if at in curve}
            assert [at for at in curve if at > step] == [at for at in whole.curves[name] if at > step]

    def test_the_state_is_tensors_and_primitives_at_three_bits_a_weight(self, tmp_path: Path) -> None:
        monitor = SparsityMonitor()
        fit(tmp_path, gmp(), monitor)
        buffer = io.BytesIO()
        torch.save(monitor.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        first = state["history"]["initial"]["network.0.weight"]
        assert first.nbytes == 192 // 8
        assert unpack(first, (16, 12)).all()

    def test_a_state_cut_short_is_refused(self, tmp_path: Path) -> None:
        saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
        fit(tmp_path, gmp(), SparsityMonitor(), saver, enable_checkpointing=True)
        path = tmp_path / "saved" / "last.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["callbacks"]["SparsityMonitor"]["history"]
        torch.save(checkpoint, path)
        with pytest.raises(MisconfigurationException, match="cut short: it lacks history"):
            fit(tmp_path, gmp(), SparsityMonitor(), ckpt_path=path, max_epochs=3)

    def test_a_checkpoint_without_the_monitor_begins_a_new_history(self, tmp_path: Path) -> None:
        saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
        fit(tmp_path, gmp(), saver, enable_checkpointing=True)
        path = tmp_path / "saved" / "last.ckpt"
        logger, _ = fit(tmp_path, gmp(), SparsityMonitor(), ckpt_path=path, max_epochs=3)
        assert logger.curves["masks/ever_active"] == {16: 0.25, 24: 0.25}

    def test_a_checkpoint_before_the_first_resumed_batch_has_the_history(self, tmp_path: Path) -> None:
        class SaveAtOnce(L.Callback):
            def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                trainer.save_checkpoint(tmp_path / "again.ckpt")

        saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
        fit(tmp_path, gmp(), SparsityMonitor(), saver, enable_checkpointing=True)
        path = tmp_path / "saved" / "last.ckpt"
        whole, _ = fit(tmp_path, gmp(), SparsityMonitor(), SaveAtOnce(), ckpt_path=path, max_epochs=3)
        again, _ = fit(tmp_path, gmp(), SparsityMonitor(), ckpt_path=tmp_path / "again.ckpt", max_epochs=3)
        assert again.curves == whole.curves

    @pytest.mark.parametrize(
        ("field", "value", "sentence"),
        [
            ("step", -7, "step is -7, not a whole number"),
            ("history", {"initial": {}, "latest": {}}, "history: it lacks ever_active"),
            ("timeline", {"layers": ["a"], "steps": [0], "sparsity": [[]]}, "not one sparsity for each layer"),
            ("flops", {"total": "many"}, "flops: it lacks layers"),
        ],
    )
    def test_a_state_with_a_field_that_cannot_be_is_refused(
        self, field: str, value: Any, sentence: str, tmp_path: Path
    ) -> None:
        monitor = SparsityMonitor()
        fit(tmp_path, gmp(), monitor)
        state = monitor.state_dict()
        other = SparsityMonitor()
        other.setup(cast(L.Trainer, None), ToyModel(), stage="fit")
        other.load_state_dict(state)
        with pytest.raises(MisconfigurationException, match=sentence):
            other.load_state_dict({**state, field: value})

    def test_a_test_run_changes_nothing(self, tmp_path: Path) -> None:
        monitor = SparsityMonitor()
        monitor.setup(cast(L.Trainer, None), ToyModel(), stage="test")
        monitor.load_state_dict({"step": 3})
        assert monitor.state_dict() == {"step": 3}  # what a checkpoint brought, until fit begins anew


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
class TestThaw:
    def test_the_heat_map_takes_in_what_thaws(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        logger = TensorBoardLogger(tmp_path)
        monitor = SparsityMonitor()
        make_trainer(tmp_path, callbacks=[monitor, FixedMask(), Thaw()], logger=logger).fit(WithBackbone())
        (image,) = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload().Images("sparsity_heatmap")
        assert image.step == 16
        assert monitor.timeline.layers == HEAD + BACKBONE
        assert monitor.timeline.steps == [0, 8, 16]
        first, second, last = monitor.timeline.sparsity
        assert (first[0], second[0], last) == (0.5, 0.5, [0.5] * 3)
        assert all(math.isnan(value) for value in first[1:] + second[1:])

    def test_operations_are_counted_anew(self, tmp_path: Path) -> None:
        logger, _ = fit(tmp_path, SparsityMonitor(), FixedMask(), Thaw(), model=WithBackbone())
        dense, half = (320 + 24 / 2) / 344, 0.5
        inference = logger.curves["flops/inference"]
        assert inference == pytest.approx({0: dense, 8: dense, 9: half, 16: half})
        # the layers have their masks from the ninth step on, whose forward pass came before them
        assert logger.curves["flops/training"][16] == pytest.approx((9 * dense + 7 * half) / 16)

    @pytest.mark.filterwarnings("ignore:FGGP at step 0.*head.4.weight have zeros")
    @pytest.mark.parametrize("monitor_first", [True, False])
    def test_beside_a_method_that_updates(self, monitor_first: bool, tmp_path: Path) -> None:
        callbacks: list[L.Callback] = [
            FGGP(0.8, update_every=2, stop=20, include=HEAD),
            FixedMask(exclude=HEAD),
            BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False),
        ]
        monitor = SparsityMonitor()
        callbacks.insert(0 if monitor_first else len(callbacks), monitor)
        model = WithBackbone(frozen=False, optimizer_has="head")
        logger, _ = fit(tmp_path, *callbacks, model=model, max_epochs=3)
        assert monitor.timeline.layers == HEAD + BACKBONE
        assert monitor.timeline.sparsity[-1][1:] == [0.5, 0.5]
        assert 0 < logger.curves["masks/ever_active"][24] < 1
        assert logger.curves["masks/changed_since_start"][24] <= 24 / 344  # the head alone has changed

    def test_where_nothing_has_a_mask_before_it_thaws(self, tmp_path: Path) -> None:
        monitor = SparsityMonitor()
        logger, _ = fit(tmp_path, monitor, FixedMask(include=["backbone.*"]), Thaw(), model=WithBackbone())
        assert monitor.timeline.layers == BACKBONE
        assert monitor.timeline.steps == [9, 16]
        assert logger.curves["masks/ever_active"] == {9: 0.5, 16: 0.5}

    def test_in_the_last_batch_of_an_epoch(self, tmp_path: Path) -> None:
        monitor = SparsityMonitor()
        fit(tmp_path, monitor, FixedMask(), Thaw(), model=WithBackbone(), limit_train_batches=1)
        assert monitor.timeline.layers == HEAD + BACKBONE
        assert monitor.timeline.sparsity[-1] == [0.5] * 3

    @pytest.mark.parametrize("frozen", [True, False])
    def test_a_training_goes_on_where_more_or_less_is_trained(self, frozen: bool, tmp_path: Path) -> None:
        saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
        fit(tmp_path, SparsityMonitor(), FixedMask(), Thaw(), saver, model=WithBackbone(), enable_checkpointing=True)
        monitor = SparsityMonitor()
        path = tmp_path / "saved" / "last.ckpt"
        model = WithBackbone(frozen=frozen)
        logger, _ = fit(tmp_path, monitor, FixedMask(), model=model, ckpt_path=path, max_epochs=3)
        assert set(monitor.timeline.layers) == {*HEAD, *(() if frozen else BACKBONE)}
        assert monitor.timeline.steps == [0, 8, 16, 24]
        head = monitor.timeline.layers.index(HEAD[0])
        assert [column[head] for column in monitor.timeline.sparsity] == [0.5] * 4
        assert monitor.timeline.sparsity[-1] == [0.5] * len(monitor.timeline.layers)
        dense, half = (320 + 24 / 2) / 344, 0.5
        after = dense if frozen else half
        assert logger.curves["flops/inference"][24] == pytest.approx(after)
        assert logger.curves["flops/training"][24] == pytest.approx((9 * dense + 7 * half + 8 * after) / 24)

    def test_a_training_goes_on_from_before_the_thaw_was_seen(self, tmp_path: Path) -> None:
        saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=9, save_top_k=-1, filename="{step}")
        fit(tmp_path, SparsityMonitor(), FixedMask(), Thaw(), saver, model=WithBackbone(), enable_checkpointing=True)
        monitor = SparsityMonitor()
        path = tmp_path / "saved" / "step=9.ckpt"
        logger, _ = fit(tmp_path, monitor, FixedMask(), model=WithBackbone(frozen=False), ckpt_path=path)
        assert set(monitor.timeline.layers) == {*HEAD, *BACKBONE}
        assert monitor.timeline.sparsity[-1] == [0.5] * 3
        assert logger.curves["flops/inference"][16] == pytest.approx(0.5)


class TestTensorBoard:
    @pytest.fixture(scope="class")
    @classmethod
    def events(cls, tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
        root = tmp_path_factory.mktemp("board")
        logger = TensorBoardLogger(root)
        make_trainer(root, callbacks=[SparsityMonitor(), gmp()], logger=logger).fit(ToyModel())
        return EventAccumulator(logger.log_dir, size_guidance={"histograms": 0, "images": 0, "scalars": 0}).Reload()

    def test_has_the_curves(self, events: EventAccumulator) -> None:
        assert [event.step for event in events.Scalars("masks/ever_active")] == [0, 5, 8, 9, 13, 16]
        assert events.Scalars("sparsity_layer/network.4.weight")[-1].value == 0.75

    def test_has_a_histogram_of_the_active_weights_of_each_layer_and_epoch(self, events: EventAccumulator) -> None:
        assert events.Tags()["histograms"] == [f"weights/network.{index}.weight" for index in (0, 2, 4)]
        histograms = events.Histograms("weights/network.0.weight")
        assert [histogram.step for histogram in histograms] == [8, 16]
        assert histograms[-1].histogram_value.num == 192 / 4

    def test_has_the_heat_map(self, events: EventAccumulator) -> None:
        pytest.importorskip("matplotlib")
        (image,) = events.Images("sparsity_heatmap")
        assert (image.step, image.encoded_image_string[:4]) == (16, b"\x89PNG")

    def test_is_left_without_a_heat_map_where_matplotlib_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_sparse.monitor.find_spec", lambda _: None)
        logger = TensorBoardLogger(tmp_path)
        with pytest.warns(UserWarning, match="pip install matplotlib"):
            make_trainer(tmp_path, callbacks=[SparsityMonitor(), gmp()], logger=logger).fit(ToyModel())
        assert not EventAccumulator(logger.log_dir).Reload().Tags()["images"]

    def test_can_do_without_histograms_and_heat_map(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        monitor = SparsityMonitor(histograms=False, heatmap=False)
        make_trainer(tmp_path, callbacks=[monitor, gmp()], logger=logger).fit(ToyModel())
        tags = EventAccumulator(logger.log_dir).Reload().Tags()
        assert not tags["images"]
        assert not tags["histograms"]

    def test_survives_layers_without_an_active_weight(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        method = GMP(0.99, allocation="global", stop=0)
        with pytest.warns(UserWarning, match="no active weight"):
            make_trainer(tmp_path, callbacks=[SparsityMonitor(), method], logger=logger).fit(ToyModel(seed=1))
        active = [f"weights/{name}" for name, weight in method.registry.items() if weight.num_active]
        assert len(active) < 3
        assert EventAccumulator(logger.log_dir).Reload().Tags()["histograms"] == active
