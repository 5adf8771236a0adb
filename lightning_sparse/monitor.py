"""SparsityMonitor: curves, histograms and a heat map of sparse training, in every logger of the Trainer."""

from __future__ import annotations

import math
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sparse.arguments import check_flag
from lightning_sparse.masks.layout import is_sharded
from lightning_sparse.masks.plan import canonical_name
from lightning_sparse.masks.registry import MaskRegistry
from lightning_sparse.methods.base import SparseMethod, total_target_sparsity
from lightning_sparse.methods.latent import LatentMethod
from lightning_sparse.metrics.flops import ForwardFLOPs
from lightning_sparse.metrics.history import MaskHistory
from lightning_sparse.metrics.registry import dead_neurons, history_of, is_spread, saved_history, taken_history
from lightning_sparse.metrics.saved import check_monitor
from lightning_sparse.metrics.spent import SpentFLOPs
from lightning_sparse.metrics.timeline import SparsityTimeline
from lightning_sparse.modules.dyrelu import phased_relus
from lightning_sparse.trainer import (
    TrainerCallback,
    batches_stepped,
    callbacks_of,
    count_dense_peak,
    steps_between_records,
    writers_of,
)

__all__ = ["SparsityMonitor"]

_PATIENCE = 10  # batches in which operations are looked for: the first may be one that training_step skips


@final
class SparsityMonitor(TrainerCallback):
    r"""Logs how sparse training proceeds, as ``LearningRateMonitor`` logs learning rates; training does not change.

    It writes these values to every logger of the Trainer: before the first optimizer step, after each update of the
    masks, and at the end of each epoch. Updates that come more often than the Trainer's ``log_every_n_steps`` and more
    than 200 times in training are written together.

    ============================== =====================================================================================
    ``sparsity``                   fraction of zeros among the weights that have a mask
    ``sparsity_target``            what the methods' schedules ask for now; masks follow at the next update
    ``sparsity_layer/<name>``      sparsity of one weight
    ``sparsity_layer_target/<n>``  the sparsity that its method asks for
    ``masks/changed_since_update`` share of mask entries that have changed since the last update
    ``masks/changed_since_start``  share of mask entries that differ from the masks at the start of training
    ``masks/ever_active``          share of weights ever active, ITOP's :math:`R_s`
    ``masks/dead_neurons``         share of neurons and filters without an active input
    ``masks/num_dead_neurons``     number of neurons and filters without an active input
    ``flops/inference``            FLOPs of a forward pass, relative to the dense network
    ``flops/training``             FLOPs of training so far, relative to dense training
    ============================== =====================================================================================

    Loggers that support them, such as ``TensorBoardLogger``, also get histograms of each layer's active weights
    (``weights/<name>``) at the end of each epoch, and a heat map of sparsity over layers and steps
    (``sparsity_heatmap``) at the end of training. The heat map needs matplotlib.

    FLOPs are counted once, in the forward pass of the first batch, by
    :class:`~lightning_sparse.metrics.ForwardFLOPs`. They are theoretical: those of an ideal sparse kernel. See
    :mod:`lightning_sparse.functional.flops`.

    Weights that get their masks later, as when a backbone is unfrozen, count from then on, and FLOPs are counted again.
    In the heat map, their cells are blank before that.

    The monitor also sets ``using_sparse_model=False`` in Lightning's ``ThroughputMonitor``, unless you have set it, in
    releases whose ``Throughput`` takes it. Training uses dense kernels, so utilisation (MFU) refers to the GPU's dense
    peak; the doubled peak of 2:4 kernels would halve it. In the list of callbacks, put ``SparsityMonitor`` before
    ``ThroughputMonitor``.

    The monitor can come before or after the methods in the list of callbacks, and watches all of them together. Its
    history is part of a checkpoint, so curves continue when training resumes; other fits begin a new history.

    Args:
        per_layer: Whether to write the curves of each layer.
        histograms: Whether to write histograms of active weights.
        heatmap: Whether to draw the heat map.
        progress_bar: Whether the progress bar shows ``sparsity``, beside the metrics that are logged with
            ``prog_bar=True``.

    Attributes:
        values: The values that were written last, by name.
        timeline: The sparsity of each layer at the steps that were recorded; :meth:`draw
            <lightning_sparse.metrics.SparsityTimeline.draw>` draws the heat map.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> from lightning_sparse import GMP
        >>> monitor = SparsityMonitor()
        >>> trainer = L.Trainer(max_steps=20, callbacks=[GMP(sparsity=0.5), monitor], logger=CSVLogger("logs"),
        ...                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> {name: round(monitor.values[name], 3) for name in ("sparsity", "masks/ever_active", "flops/inference")}
        {'sparsity': 0.5, 'masks/ever_active': 1.0, 'flops/inference': 0.5}
    """

    writes_sparsity = True  # so methods do not

    def __init__(
        self, *, per_layer: bool = True, histograms: bool = True, heatmap: bool = True, progress_bar: bool = False
    ) -> None:
        self.per_layer = check_flag("per_layer", per_layer)
        self.histograms = check_flag("histograms", histograms)
        self.heatmap = check_flag("heatmap", heatmap)
        self.progress_bar = check_flag("progress_bar", progress_bar)
        self._fits = False
        self._forget()

    def _forget(self) -> None:
        self.values: dict[str, float] = {}
        self.timeline = SparsityTimeline([])
        self._registry = MaskRegistry()
        self._history = MaskHistory({})
        self._of_masks: dict[str, float] = {}  # what changes with masks alone
        self._shapes: dict[str, tuple[int, ...]] = {}  # those of the weights that have a mask
        self._loaded: dict[str, Any] | None = None
        self._begun = self._is_spread = False
        self._step = 0  # optimizer steps up to which everything below is counted
        self._counted = self._recorded = 0  # updates that went into the operations, and into a record
        self._update_step = 0  # the step at which an update was last recorded
        self._pause = 1.0
        self._flops: SpentFLOPs | None = None
        self._counter: ForwardFLOPs | None = None
        self._attempts = 0

    # The hooks: on rank zero, whose masks are those of all; where weights are sharded, on every rank.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._fits = stage == "fit"
        if self._fits:
            self._forget()
            count_dense_peak(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not any(isinstance(callback, SparseMethod) for callback in callbacks_of(trainer)):
            rank_zero_warn(
                "SparsityMonitor has nothing to watch: no callback of this Trainer is a method of sparse training. Add"
                " one, as in Trainer(callbacks=[GMP(sparsity=0.9), SparsityMonitor()])."
            )
        if not trainer.loggers:
            rank_zero_warn(
                "SparsityMonitor has nowhere to write to: this Trainer has no logger. Give it one with logger=."
            )
        if self.heatmap and any(writers_of(trainer, "add_figure")) and find_spec("matplotlib") is None:
            rank_zero_warn("SparsityMonitor draws no heat map: matplotlib is missing. Run: pip install matplotlib")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.progress_bar:  # on every rank: it is a metric too, and whoever monitors it decides on every rank
            pl_module.log("sparsity", MaskRegistry.of(pl_module).sparsity, prog_bar=True, logger=False, on_step=True)
        if not trainer.is_global_zero and not any(map(is_sharded, pl_module.parameters())):
            return
        if not self._begun:  # by now every callback has done its part of the last step, in whatever order
            self._begin(trainer, pl_module)
        # Lightning leaves out the end of an epoch whose last batch is where a checkpoint was written.
        missed_epoch_end = batch_idx == 0 and self._step < batches_stepped(trainer)
        self._advance(trainer)
        if missed_epoch_end and self._registry:
            self._record(trainer)
        if self._registry.num_updates > self._recorded and self._step >= self._update_step + self._pause:
            self._update_step = self._step
            self._record(trainer)
        # FSDP2 computes with whole weights that are not the module's parameters.
        counted = self._is_spread or (self._flops is not None and self._flops.layers.keys() == self._registry.keys())
        if self._registry and not counted and self._attempts < _PATIENCE:
            self._attempts += 1
            parameters = {canonical_name(name): parameter for name, parameter in pl_module.named_parameters()}
            self._counter = ForwardFLOPs(parameters).__enter__()

    @override
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        self._stop_counting(trainer)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._stop_counting(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_counting(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_counting(trainer)
        if self._begun:
            self._advance(trainer)
            self._record(trainer)
            if self.histograms:
                self._write_histograms(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.heatmap and self.timeline.steps and find_spec("matplotlib") is not None:
            for add_figure in writers_of(trainer, "add_figure"):
                add_figure("sparsity_heatmap", self.timeline.draw(end=self._step), global_step=self._step)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self._begun:
            return dict(self._loaded or {})  # before the first batch: nothing where the learning-rate finder asks
        return {
            "step": self._step,
            "update_step": self._update_step,
            "uncounted": self._registry.num_updates - self._counted,
            "unrecorded": self._registry.num_updates - self._recorded,
            "history": saved_history(self._history, self._registry),
            "timeline": dict(self.timeline.state_dict()),
            "flops": None if self._flops is None else asdict(self._flops),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fits and state_dict:
            check_monitor(state_dict)
        self._loaded = state_dict or None

    # What is kept.

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._registry = MaskRegistry.of(pl_module)
        if not self._registry:
            return  # until something has a mask: all that is to be masked may be frozen yet
        self._begun = True
        self._is_spread = is_spread(self._registry)
        if self._is_spread:
            rank_zero_warn(
                "SparsityMonitor cannot count the operations of sharded weights, so it logs no flops/*. To see them,"
                " train a few steps on one device."
            )
        self._history = history_of(self._registry)
        self._shapes = {name: tuple(weight.shape) for name, weight in self._registry.items()}
        self.timeline = SparsityTimeline(list(self._registry))
        self._step = self._update_step = batches_stepped(trainer)
        self._pause = steps_between_records(trainer)
        self._counted = self._recorded = self._registry.num_updates
        if self._loaded is None:
            self._record(trainer)
        else:
            self._resume(self._loaded)

    def _resume(self, state: dict[str, Any]) -> None:
        self._history.load_state_dict(taken_history(state["history"], self._registry))
        # Checkpoints of older versions do not name the layers; their history has the same, in their order.
        self.timeline.load_state_dict({"layers": list(state["history"]["initial"])} | state["timeline"])
        self._flops = None if state["flops"] is None else SpentFLOPs(**state["flops"])
        self._step, self._update_step = state["step"], state["update_step"]
        self._counted -= state["uncounted"]
        self._recorded -= state["unrecorded"]

    @property
    def _masks(self) -> dict[str, Tensor]:
        return {name: weight.mask for name, weight in self._registry.items()}

    def _advance(self, trainer: pl.Trainer) -> None:
        """Count the steps taken since the last time, each with the masks that it computed with."""
        step = batches_stepped(trainer)
        updated = self._registry.num_updates != self._counted
        if self._flops is not None:
            self._flops.add(step - self._step, _dense_gradients(trainer, self._flops, updated=updated))
            if updated:  # a layer of a resumed training that is frozen now keeps the sparsity that it had
                self._flops.sparsity |= {name: weight.sparsity for name, weight in self._registry.items()}
            if self._flops.dynamic and not _dynamic_relus(trainer):
                self._flops.dynamic = 0
        self._step, self._counted = step, self._registry.num_updates
        self._follow_registry()

    def _follow_registry(self) -> None:
        """Make room for weights that have a mask since the last time, and let go of those that have none any more."""
        shapes = {name: tuple(weight.shape) for name, weight in self._registry.items()}
        if shapes == self._shapes:
            return
        if any(shapes.get(name) != shape for name, shape in self._shapes.items()):
            self._history = history_of(self._registry)  # a layer was replaced: what it was says nothing of what it is
        else:
            self._history.add(self._masks)
        self.timeline.add(list(self._registry))
        self._shapes = shapes
        self._of_masks = {}
        self._attempts = 0  # their operations are looked for again

    def _stop_counting(self, trainer: pl.Trainer) -> None:
        if self._counter is None:
            return
        counter, self._counter = self._counter, None
        counter.__exit__(None, None, None)
        layers = {name: counter.by_parameter.get(name, 0) for name in self._registry}
        if not any(layers.values()) and self._attempts < _PATIENCE:
            return  # a batch that training_step skipped
        if not all(layers.values()):
            rank_zero_warn(
                f"SparsityMonitor saw no operation with {', '.join(name for name in layers if not layers[name])} in the"
                " forward pass, so flops/* leave it out. Either it is not used in every batch, or code that"
                " torch.compile generates hides it; a few steps without torch.compile show it."
            )
        if not any(layers.values()):
            return
        sparsity = {name: weight.sparsity for name, weight in self._registry.items()}
        past = self._flops or SpentFLOPs(0, {}, {})
        dynamic = sum(counter.by_parameter.get(name, 0) for name in _dynamic_relus(trainer))
        self._flops = SpentFLOPs(counter.total - dynamic, layers, sparsity, past.spent, past.steps, dynamic)
        self._write(trainer, {"flops/inference": self._flops.inference})

    # What is written.

    def _record(self, trainer: pl.Trainer) -> None:
        values = {"sparsity": self._registry.sparsity, "sparsity_target": total_target_sparsity(trainer)}
        if self.per_layer:
            values |= _layers(trainer)
        if self._registry.num_updates != self._recorded:
            values["masks/changed_since_update"] = self._history.observe(self._masks)
            self._of_masks = {}
        self._of_masks = self._of_masks or self._describe_masks()
        values |= self._of_masks
        if self._flops is not None:
            values |= self._flops.values
        self._recorded = self._registry.num_updates
        weights = [self._registry.get(name) for name in self.timeline.layers]
        self.timeline.record(self._step, [math.nan if weight is None else weight.sparsity for weight in weights])
        self._write(trainer, values)

    def _describe_masks(self) -> dict[str, float]:
        dead, neurons = dead_neurons(self._registry)
        return {
            "masks/changed_since_start": self._history.changed_since_start,
            "masks/ever_active": self._history.ever_active,
            "masks/dead_neurons": dead / neurons,
            "masks/num_dead_neurons": dead,
        }

    def _write(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        self.values |= values
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self._step)

    @torch.no_grad()
    def _write_histograms(self, trainer: pl.Trainer) -> None:
        for add_histogram in writers_of(trainer, "add_histogram"):
            for name, weight in self._registry.items():
                active = weight.value[weight.mask].float()
                if len(active := active[active.isfinite()]):
                    add_histogram(f"weights/{name}", active, global_step=self._step)


def _methods(trainer: pl.Trainer) -> list[SparseMethod]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, SparseMethod)]


def _dynamic_relus(trainer: pl.Trainer) -> set[str]:
    """The parameters of the Dynamic ReLUs that are not phased out, by name."""
    sites = {name: site for name, site in phased_relus(trainer.lightning_module).items() if not site.is_phased_out}
    return {canonical_name(f"{name}.{own}") for name, site in sites.items() for own, _ in site.named_parameters()}


def _dense_gradients(trainer: pl.Trainer, flops: SpentFLOPs, *, updated: bool) -> float:
    """What the last step, which ``updated`` masks or not, spent on gradients of pruned weights that methods need."""
    return sum(
        flops.layers[weight.name] * flops.sparsity[weight.name]
        for method in _methods(trainer)
        if method.needs_dense_gradients
        for group in method.groups
        # Latent methods need them at every step, the others where they update their masks.
        if isinstance(method, LatentMethod) or (updated and group.updated_at == method.step - 1)
        for weight in group
        if weight.name in flops.layers  # not before operations are counted anew, where it has just thawed
    )


def _layers(trainer: pl.Trainer) -> dict[str, float]:
    values: dict[str, float] = {}
    for method in _methods(trainer):
        for weight in method.weights:
            values[f"sparsity_layer/{weight.name}"] = weight.sparsity
            values[f"sparsity_layer_target/{weight.name}"] = method.target_sparsity(weight.name)
    return values
