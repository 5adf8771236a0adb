"""Methods that set pruned weights to zero and forget their values."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_sparse.masks.distributed import broadcast_masks_, vote
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.moments import (
    all_finite,
    as_stepped_on,
    clear_moments,
    gradient_scale,
    has_second_moments,
    keeps_zeros,
    warm_moments,
)
from lightning_sparse.masks.places import printable
from lightning_sparse.masks.schema import Check, any_of, mapping_of, nothing, refuse, tensor, whole
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods import holding
from lightning_sparse.methods.base import SparseMethod
from lightning_sparse.methods.card import method
from lightning_sparse.schedules import Timetable, UpdateTimes
from lightning_sparse.timetable import without_end

__all__ = ["HardMaskMethod"]


@method
class HardMaskMethod(SparseMethod):
    """A method whose masks change at the times of an :class:`~lightning_sparse.schedules.UpdateTimes` and apply always.

    An update happens before the optimizer's step, on its gradients, which are the mean over accumulated batches and
    processes. Pruned and grown weights become zero, and the optimizer's moments of both are cleared; second moments of
    grown weights begin at the mean of their neighbours'. If a gradient is not finite, the update waits for the next
    step.
    """

    # What a method implements.

    @property
    @abstractmethod
    def times(self) -> UpdateTimes:
        """When masks are updated."""

    @abstractmethod
    def update_masks(self, group: MaskGroup) -> None:
        """Write new masks into ``group.mask``; the gradients of its weights are all finite."""

    @property
    def replaces_step(self) -> bool:
        """Whether the optimizer takes no step at an update of the masks."""
        return False

    @property
    def warms_moments(self) -> bool:
        """Whether the second moments of grown weights begin with those of their neighbours, rather than at zero."""
        return True

    def before_masking(self, trainer: pl.Trainer, group: MaskGroup) -> None:
        """Change the gradients of all that the optimizer of ``group`` steps, before the pruned ones become zero."""

    def update_failed(self, group: MaskGroup) -> None:
        """:meth:`update_masks` has raised; the masks are those before it."""

    def is_ready(self, group: MaskGroup) -> bool:
        """Whether an update that is due can come at this step, after :meth:`observe`; the same in every process."""
        return True

    def waits(self, group: MaskGroup) -> bool:
        """Whether the optimizer also takes no steps until the masks are chosen."""
        return False

    def observe(self, weight: MaskedWeight) -> None:
        """Read a gradient, dense and finite, before it is masked; called at every step."""

    def observes(self, group: MaskGroup) -> bool:
        """Whether :meth:`observe` is to be called at this step."""
        return type(self).observe is not HardMaskMethod.observe

    def observed_besides(self, group: MaskGroup) -> Sequence[Tensor]:
        """What :meth:`observe` reads besides gradients, which must be finite as they must."""
        return ()

    # What the family does.

    @final
    @override
    def timetable(self, total_steps: float) -> Timetable:
        if math.isinf(total_steps) and self.times.needs_total_steps:
            given = {
                item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.type == "Duration"
            }
            if any(isinstance(value, float) for value in given.values()):
                raise ValueError(without_end(given))
        times = self.times.resolve(total_steps)
        if self.last_run is not None and self._is_before(times):
            self._warn_of(times, total_steps)
        return times

    def _is_before(self, times: Timetable) -> bool:
        """Whether the updates of these times are yet to come, and masks have not come to their end before."""
        beginning = self.run.beginning
        is_new = beginning.state is not None and not beginning.goes_on
        return not is_new and self.step - self.run.origin < times.stop

    def _warn_of(self, times: Timetable, total_steps: float) -> None:
        if times.stop >= total_steps:
            rank_zero_warn(
                f"{type(self).__name__} updates masks until step {times.stop}, but training ends after"
                f" {total_steps:g}: the last updates will not happen. Give an earlier stop, or train longer."
            )
        if isinstance(self.times.every, int) and times.only_at_its_ends:
            rank_zero_warn(
                f"{type(self).__name__}: update_every is {times.every} steps, but updates begin at step {times.first}"
                f" and end at step {times.stop}: masks change only at these steps. Give a smaller update_every, or"
                " a fraction of training."
            )

    @final
    @override
    def updates_now(self, group: MaskGroup) -> bool:
        return self._is_due(group)

    @final
    @override
    def before_step(self, trainer: pl.Trainer, group: MaskGroup) -> None:
        due = self._is_due(group)
        observes = self.observes(group)
        before: Tensor | None = None
        if (due or observes) and self._gradients_are_usable(group, due=due):
            self.run.gradient_scale = gradient_scale(trainer, group.optimizer)
            if observes:
                for weight in group:
                    self.observe(weight)
            if due:
                before = self._update(group)
        self.before_masking(trainer, group)
        for weight in group:
            if weight.parameter.grad is not None and weight.num_active < weight.numel:
                weight.zero_pruned_(weight.grad)
        if before is not None and self.warms_moments:
            _warm(trainer, group, before)
        if self.waits(group):
            self.registry.idle_optimizers.add(group.optimizer)

    @final
    @override
    def after_step(self, group: MaskGroup) -> None:
        if not keeps_zeros(group.optimizer):
            group.apply_()

    @final
    @override
    def step_skipped(self, group: MaskGroup) -> None:
        """Does nothing: no weight has moved, and no update is pending."""

    @final
    @override
    def weights_written(self, weights: Sequence[MaskedWeight]) -> None:
        for weight in weights:
            weight.apply_()

    @final
    def _update(self, group: MaskGroup) -> Tensor | None:
        """Let masks change; return those before, or None where none has."""
        before, budgets = group.mask.clone(), [weight.budget for weight in group]
        try:
            self.update_masks(group)
            holding.refuse_nan_outputs(self, group)
        except Exception:  # nothing half-applied
            group.mask.copy_(before)
            group.recount()
            for weight, budget in zip(group, budgets, strict=True):
                weight.budget = budget
            self.update_failed(group)
            raise
        broadcast_masks_(group)
        group.updated_at = self.step
        changed = before ^ group.mask
        if not group.count(changed):
            return None
        for weight, its_changed in zip(group, group.split(changed), strict=True):
            clear_moments(group.optimizer, weight.parameter, its_changed)
        holding.masks_changed(self, group)
        if self.replaces_step:
            self.registry.idle_optimizers.add(group.optimizer)
        return before

    def _is_due(self, group: MaskGroup) -> bool:
        times = self.run.timetable
        latest = None if times is None else times.latest(self.step)
        return latest is not None and latest > group.updated_at and self.is_ready(group)

    def _gradients_are_usable(self, group: MaskGroup, *, due: bool) -> bool:
        gradients = [weight.grad for weight in group if weight.parameter.grad is not None]
        # There is no gradient where training_step returned None.
        finite = bool(gradients) and all_finite([*gradients, *self.observed_besides(group)])
        # A process without gradients votes too. Where readiness is counted, all count the same steps; and some parts of
        # a sharded gradient may be finite, and others not.
        together = due or group.is_spread or type(self).is_ready is not HardMaskMethod.is_ready
        usable = vote(finite, group) if together else finite
        if usable:
            group.not_finite_for = 0
        elif gradients and due:
            self.be_patient(group)
        return usable

    # What a method asks and remembers of each weight.

    @final
    def gradient(self, weight: MaskedWeight) -> Tensor:
        """``weight.grad`` without the scale that a fused optimizer in float16 removes inside its step.

        Ask for it where gradients are compared with weights, or with gradients of other steps.
        """
        scale = self.run.gradient_scale
        return weight.grad if scale == 1.0 else weight.grad / scale

    @final
    def memory(self, weight: MaskedWeight, name: str) -> Tensor:
        """A tensor shaped like ``weight.value`` that is kept in checkpoints; zero at first."""
        tensors = self.run.memory.setdefault(name, {})
        if weight.name not in tensors:
            tensors[weight.name] = torch.zeros_like(weight.value)
        return tensors[weight.name]

    @override
    def method_state(self) -> dict[str, Any]:
        times = self.run.timetable
        return {
            "stop": None if times is None else times.stop - self.run.origin,
            "memory": {
                name: {key: self._saved(key, value) for key, value in tensors.items()}
                for name, tensors in self.run.memory.items()
            },
        }

    def _saved(self, name: str, value: Tensor) -> Tensor:
        weight = self.registry.get(name)  # none of a layer that was lost
        return (value.detach().cpu() if weight is None else weight.layout.saved(value)).clone()

    @override
    def state_fields(self) -> Mapping[str, Check]:
        return {"stop": any_of(nothing, whole()), "memory": mapping_of(mapping_of(tensor()))}

    @override
    def load_method_state(self, state: Mapping[str, Any]) -> None:
        run, times = self.run, self.run.timetable
        for name, tensors in state.get("memory", {}).items():
            _check_memory(name, tensors, self)
        run.memory = {
            name: {key: _taken(run.registry[key], value) for key, value in tensors.items()}
            for name, tensors in state.get("memory", {}).items()
        }
        if times is not None and state.get("stop") != times.stop - run.origin:
            # This training is longer or shorter than planned.
            for group in run.groups:
                group.updated_at = min(group.updated_at, times.stop - 1)


def _warm(trainer: pl.Trainer, group: MaskGroup, before: Tensor) -> None:
    """Warm the moments of what was pruned ``before`` and is active now; gradients are masked already."""
    if not has_second_moments(group.optimizer, [weight.parameter for weight in group]):
        return
    seen = as_stepped_on(trainer, group.optimizer)

    def warm(weight: MaskedWeight, was: Tensor) -> None:
        grown, survivors = weight.mask & ~was, weight.mask & was
        warm_moments(group.optimizer, weight.parameter, grown, survivors, seen(weight.grad), weight.layout)

    group.each(warm, group.split(before))


def _taken(weight: MaskedWeight, value: Tensor) -> Tensor:
    """What this process holds of something saved."""
    return weight.layout.take(value).to(weight.value.device).clone()


def _check_memory(name: str, tensors: Mapping[str, torch.Tensor], method: HardMaskMethod) -> None:
    """Refuse what is remembered of other weights, or of weights of other shapes."""
    shapes = {weight.name: weight.shape for weight in method.weights}
    wrong = [key for key, value in tensors.items() if shapes.get(key) != value.shape]
    if wrong:
        refuse(
            f"The checkpoint's state of {method.state_key} is damaged: its {printable(name)} of"
            f" {', '.join(map(printable, wrong))} is not of a weight that it masks, or of another shape"
        )
