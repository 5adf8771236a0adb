"""What all methods share: the hooks, the clock, the handling of masks during training, and checkpoints.

The training loop, with the points at which a method acts::

    fit
     ├ setup                        what cannot work is refused; no weight is touched
     ├ on_train_start               all methods plan, load and resolve; then masks are broadcast and applied
     │  ├ on_train_batch_start      → on_batch
     │  ├ optimizer's pre-hook      the guard: did anyone write weights?
     │  ├ forward
     │  ├ on_before_backward        → on_loss       the loss, with its graph; did anyone write before the forward?
     │  ├ backward · all-reduce · unscale
     │  ├ on_before_optimizer_step  → before_step   gradients are final and not yet clipped
     │  ├ clip · optimizer.step
     │  ├ optimizer's post-hook     → after_step    the weights have moved; did anyone touch the gradients?
     │  ├ on_train_batch_end        → step_skipped, for a step that the GradScaler did not take; the clock moves
     │  ├ on_validation_start       every pruned weight is looked at
     │  └ on_train_epoch_end        likewise; sparsity is logged; the ranks are checked to agree
     └ on_fit_end, on_exception     hooks are removed; the module is left sparse

The clock counts optimizer steps that were really taken. With several optimizers (manual optimization) it counts the
batches in which one of them stepped.

One method may continue where another has ended, from its checkpoint (``ckpt_path``) or its module. It takes over the
masks (``inherited``), and its own training begins there; fractional durations refer to that training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sparse.masks.remarks import enumerated
from lightning_sparse.methods import begin, checkpoints, following, holding, steps, watching
from lightning_sparse.methods.card import method
from lightning_sparse.methods.interface import Method
from lightning_sparse.methods.requirements import refuse_optimizers, refuse_other_trainer, refuse_strategy
from lightning_sparse.trainer import callbacks_of, set_callbacks

__all__ = ["SparseMethod", "methods_of", "total_target_sparsity"]

_WRITTEN_BY_MONITOR = {"sparsity", "sparsity_target"}


@method
class SparseMethod(Method):
    """A method of sparse training, as a callback.

    A subclass says what happens around a step (:meth:`before_step`, :meth:`after_step`, :meth:`step_skipped`), how
    masks begin (:meth:`initialize_masks`) and which sparsity is its target; it must not override the hooks.
    """

    @final
    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_other_trainer(self, trainer)
        callbacks = callbacks_of(trainer)
        self.brought = [companion for companion in self.companions() if companion not in callbacks]
        for companion in reversed(self.brought):  # Lightning comes to it next in this very loop
            callbacks.insert(callbacks.index(self) + 1, companion)
        if stage == "fit":
            checkpoints.forget_stale(self, pl_module)
            self.is_set_up, self.had_no_state = True, False
            refuse_strategy(type(self).__name__, trainer)
            if trainer.max_epochs == -1 and trainer.max_steps == -1:
                self.timetable(math.inf)

    @final
    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_optimizers(type(self).__name__, trainer)
        checkpoints.look_before_loading(trainer, pl_module)

    @final
    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        checkpoints.look_no_more(trainer)
        if self is methods_of(trainer)[0]:
            begin.begin_together(methods_of(trainer), trainer, pl_module)
            for method in methods_of(trainer):
                method.brought = []

    @final
    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        checkpoints.look_at_saved(self)
        if batch_idx == 0 or following.is_replaced(self):
            following.follow_parameters(self, trainer, pl_module)
        holding.repair_written(self)
        self.on_batch(batch)

    @final
    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        watching.notice_within(self)
        if type(self).on_loss is not Method.on_loss:
            for group in self.groups:
                self.on_loss(group, loss)

    @final
    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if following.is_replaced(self):
            following.follow_parameters(self, trainer, pl_module)
        following.take_in_thawed(self, trainer, optimizer)
        following.follow_optimizer(self, trainer, optimizer)
        steps.announced(self, trainer, optimizer)
        if self is methods_of(trainer)[-1]:
            steps.leave_out(self, trainer, optimizer)

    @final
    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps.batch_ended(self)

    @final
    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        checkpoints.look_at_saved(self)
        holding.look_at_all(self, trainer, pl_module)

    @final
    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:  # the module's own hooks, in which averages are swapped in, come after ours
            holding.look_at_all(self, trainer, pl_module)
        holding.repair_written(self)

    @final
    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        watching.notice_within(self)
        holding.repair_written(self)

    @final
    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        holding.look_at_all(self, trainer, pl_module)
        holding.compare_processes(self)
        steps.warn_of_unseen(self)
        holding.warn_of_thawed(self)
        # The values are equal on every rank; sync_dist tells Lightning so. Two methods log the same: those of both.
        values = {"sparsity": self.registry.sparsity, "sparsity_target": total_target_sparsity(trainer)}
        values |= _numbered(self, trainer)
        theirs = _tell_of_others(self, trainer, values)
        # Loggers get sparsities once, from a monitor if there is one, which writes them at the steps of updates.
        is_watched = any(getattr(callback, "writes_sparsity", False) for callback in callbacks_of(trainer))
        for name, value in values.items():
            logger = False if is_watched and name in _WRITTEN_BY_MONITOR - theirs else None
            pl_module.log(name, value, on_step=False, on_epoch=True, sync_dist=True, logger=logger)

    @final
    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        holding.look_at_all(self, trainer, pl_module)
        holding.warn_of_dead_filters(self)
        self.training_ended()
        if trainer.is_global_zero:
            for sentence in checkpoints.denser_checkpoints(self, trainer):
                self.warn_once(sentence)

    @final
    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        checkpoints.look_at_saved(self)
        holding.look_at_all(self, trainer, pl_module)
        never_began = self.last_run is None or self.last_run.trainer() is not trainer
        if never_began and trainer.global_step == 0:  # a training that is resumed may be at its end
            rank_zero_warn(
                f"{type(self).__name__} had no batch to train on, so no weight was masked. Look at the data loader, at"
                " limit_train_batches, and whether max_epochs or max_steps were reached before."
            )
        begin.leave(self, pl_module)

    @final
    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        begin.leave(self, pl_module)
        if self.brought:  # training has not begun: leave the Trainer as it was; Lightning still calls those of before
            set_callbacks(trainer, [each for each in callbacks_of(trainer) if each not in self.brought])
            self.brought = []

    # Checkpoints.

    @final
    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # in place: the weights that are about to be written are the same tensors
        holding.look_at_all(self, trainer, pl_module)
        checkpoints.hold_saved(self, checkpoint)

    @final
    @override
    def state_dict(self) -> dict[str, Any]:
        return checkpoints.state_of(self)

    @final
    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoints.take(self, trainer, pl_module, checkpoint)

    @final
    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        checkpoints.take_state(self, state_dict)


def _numbered(method: SparseMethod, trainer: pl.Trainer) -> dict[str, float]:
    """What ``method`` logs beside sparsity, with a number where an earlier one has the key: they would be averaged."""
    earlier = methods_of(trainer)[: methods_of(trainer).index(method)]
    taken = [key for other in earlier if other.groups for key in other.extra_metrics()]
    values = method.extra_metrics()
    return {f"{key}_{1 + taken.count(key)}" if key in taken else key: value for key, value in values.items()}


def _tell_of_others(method: SparseMethod, trainer: pl.Trainer, values: Mapping[str, float]) -> set[str]:
    """Name metrics that the module logs under the same keys, and return them."""
    results = getattr(trainer, "_results", None) or {}
    metas = [item.meta for item in results.values() if hasattr(item, "meta")]
    # What goes to the progress bar alone, as SparsityMonitor's sparsity of each step does, is in nobody's way.
    theirs = {meta.name for meta in metas if meta.fx != "on_train_epoch_end" and (meta.logger or meta.on_epoch)}
    if same := sorted(theirs & values.keys()):
        method.warn_once(
            f"the module also logs {', '.join(same)}, and this callback's values replace the module's. Log yours under"
            " another name"
        )
    if folders := sorted(key for key in theirs if any(key.startswith(f"{ours}/") for ours in values)):
        method.warn_once(
            f"the module logs {enumerated(folders)}, whose first part is a metric of this callback. Loggers that keep a"
            " file for each metric, such as MLflow's, fail on that. Log yours under another name"
        )
    return theirs


def methods_of(trainer: pl.Trainer) -> list[SparseMethod]:
    """The methods among the callbacks of ``trainer``, in their order."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, SparseMethod)]


def total_target_sparsity(trainer: pl.Trainer) -> float:
    """The sparsity that the methods of ``trainer`` aim at now, over all their weights together."""
    methods = [method for method in methods_of(trainer) if method.groups]
    sizes = [sum(group.unshared_numel for group in method.groups) for method in methods]
    zeros = [size * method.target_sparsity() for size, method in zip(sizes, methods, strict=True)]
    return sum(zeros) / sum(sizes) if sizes else 0.0
