"""Methods that set pruned weights to zero and forget their values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_sparse.masks.distributed import broadcast_, true_on_every_rank
from lightning_sparse.masks.optimizer_state import all_finite, clear_moments, keeps_zeros
from lightning_sparse.masks.registry import MaskGroup
from lightning_sparse.methods.base import SparseMethod
from lightning_sparse.schedules import Timetable, UpdateTimes

__all__ = ["HardMaskMethod"]


class HardMaskMethod(SparseMethod):
    """At the times of an :class:`~lightning_sparse.schedules.UpdateTimes`, masks change; at every step, they hold.

    An update happens before the optimizer's step, on its gradients, which are the mean over accumulated batches and
    processes. Weights just pruned become zero, weights just grown are zero, and the optimizer's moments of both are
    cleared. An update that meets a gradient that is not finite waits for the next step.

    Args:
        times: When masks are updated.
        replaces_step: Whether the optimizer takes no step where masks are updated.
        include: Patterns of what is masked.
        exclude: Patterns of what stays dense.
        seed: Seed of everything that the method draws at random.
    """

    def __init__(
        self,
        *,
        times: UpdateTimes,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        seed: int,
        replaces_step: bool = False,
    ) -> None:
        super().__init__(include=include, exclude=exclude, seed=seed)
        self.times = times
        self.replaces_step = replaces_step
        self._timetable = Timetable(every=1, start=0, stop=0)
        self._resumed_stop: int | None = None

    @abstractmethod
    def update_masks(self, group: MaskGroup) -> None:
        """Write new masks into ``group.mask``, on the gradients of its weights, all finite."""

    @property
    def progress(self) -> float:
        """How far the clock is from the first update to the last, in [0, 1]."""
        return self._timetable.progress(self.step)

    @final
    @override
    def resolve_times(self, total_steps: float) -> None:
        self._timetable = self.times.resolve(total_steps)
        if self._resumed_stop not in (None, self._timetable.stop):  # this training is longer or shorter than planned
            for group in self.groups:
                group.updated_at = min(group.updated_at, self._timetable.stop - 1)
        if self.step < self._timetable.stop and self._timetable.stop >= total_steps:
            rank_zero_warn(
                f"{type(self).__name__} updates masks until step {self._timetable.stop}, but training ends after"
                f" {total_steps:g}: the last updates will not happen. Give an earlier stop, or train longer."
            )
        if isinstance(self.times.every, int) and self._timetable.only_at_its_ends:
            rank_zero_warn(
                f"{type(self).__name__}: update_every is {self._timetable.every} steps, but updates begin at step"
                f" {self._timetable.first} and end at step {self._timetable.stop}: masks change there at the most, and"
                " all at once. Give a smaller update_every, or a fraction of training."
            )

    @final
    @override
    def before_step(self, trainer: pl.Trainer, group: MaskGroup) -> None:
        if self._is_due(group) and self._gradients_are_usable(group):
            self._update(trainer, group)
        for weight in group:
            if weight.parameter.grad is not None and weight.num_active < weight.numel:
                weight.zero_pruned_(weight.parameter.grad)

    @final
    @override
    def after_step(self, group: MaskGroup) -> None:
        if not keeps_zeros(group.optimizer):
            group.apply_()

    @final
    @override
    def step_skipped(self, group: MaskGroup) -> None:
        """Nothing was moved, and nothing waits."""

    def _update(self, trainer: pl.Trainer, group: MaskGroup) -> None:
        before = group.mask.clone()
        self.update_masks(group)
        broadcast_(group.mask)
        group.updated_at = self.step
        if not torch.equal(before, group.mask):
            changed = before ^ group.mask
            for weight, its_changed in zip(group, group.split(changed), strict=True):
                clear_moments(group.optimizer, weight.parameter, its_changed)
            self.masks_changed(trainer, group)
            if self.replaces_step:
                self.registry.idle_optimizers.add(group.optimizer)

    def _is_due(self, group: MaskGroup) -> bool:
        latest = self._timetable.latest(self.step)
        return latest is not None and latest > group.updated_at

    def _gradients_are_usable(self, group: MaskGroup) -> bool:
        gradients = [weight.parameter.grad for weight in group if weight.parameter.grad is not None]
        if not gradients:
            return False  # training_step returned None
        usable = true_on_every_rank(all_finite(gradients), group.mask.device)
        if usable:
            group.not_finite_for = 0
        else:
            self.be_patient(group)
        return usable

    @final
    @override
    def extra_metrics(self) -> dict[str, float]:
        return {}

    @override
    def method_state(self) -> dict[str, Any]:
        return {"stop": self._timetable.stop}

    @override
    def load_method_state(self, state: Mapping[str, Any]) -> None:
        self._resumed_stop = state.get("stop")
