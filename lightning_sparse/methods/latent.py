r"""Methods that keep the values of pruned weights, so that these can become active again.

Between steps, a parameter holds the :meth:`~LatentMethod.effective` weight, usually :math:`W \odot M`, so that forward
passes, validation, averages, checkpoints and export see a sparse module. For a step, the dense :math:`W` is written
back, the gradient is rewritten in closed form, the optimizer steps, and the effective weight is written again. Module,
``state_dict`` keys, optimizer and scheduler do not change, nothing is added to the loss, and there is no extra
communication: everything computed from the all-reduced gradient is equal on every rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, cast, final

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sparse.masks.distributed import all_agree
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.layout import Layout
from lightning_sparse.masks.moments import all_finite, gradient_scale
from lightning_sparse.masks.schema import Check, list_of, mapping_of, record, refuse, tensor, wrong_names
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.base import SparseMethod
from lightning_sparse.methods.card import method
from lightning_sparse.methods.holding import refuse_nan_outputs, warn_of_empty
from lightning_sparse.methods.state import check_budgets, load_optimizer, optimizer_state
from lightning_sparse.methods.twins import (
    descend,
    saved_like,
    saved_twin,
    set_like_its_user,
    taken_like,
    taken_twin,
    twin_optimizer,
)

__all__ = ["LatentMethod"]


@dataclass
class _Learned:
    """What the family keeps for one training.

    Attributes:
        latent: The dense weights, by name.
        parameters: What is learned beside each weight, by name.
        twins: The optimizers that step them, by group.
        own: What the method itself keeps.
        finite: Whether the gradients of the coming step are finite.
    """

    latent: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    parameters: dict[str, nn.Parameter] = field(default_factory=dict[str, nn.Parameter])
    twins: dict[MaskGroup, Optimizer] = field(default_factory=dict[MaskGroup, Optimizer])
    own: Any = None
    finite: bool = True


@method
class LatentMethod(SparseMethod):
    """A method that keeps the dense weights in addition to the sparse ones in the module.

    Attributes:
        shrinks: Whether active weights also differ from the dense ones, so checkpoints must hold all dense weights.
    """

    clears_gradients: ClassVar[bool] = False
    shrinks: ClassVar[bool] = False

    # What a method implements.

    @abstractmethod
    def new_mask(self, weight: MaskedWeight, latent: Tensor) -> Tensor:
        """The mask of W as it is now: ``bool``, the weight's shape."""

    @abstractmethod
    def rewrite_gradient(self, weight: MaskedWeight, latent: Tensor, scale: float) -> None:
        """Turn ``weight.grad``, with respect to the effective weight, into that of W, in place.

        Args:
            weight: The weight; its gradient is there.
            latent: The dense W.
            scale: The scale of the gradient. Terms that the method adds must have the same scale. The gradients of
                parameters that it learns beside the weights, which it sets here, are not scaled.
        """

    # What a method may add.

    def effective(self, weight: MaskedWeight, latent: Tensor) -> Tensor:
        """The weight that the module computes with; W ⊙ M by default."""
        return latent.masked_fill(~weight.mask, 0.0)

    def written(self, weight: MaskedWeight, value: Tensor) -> Tensor:
        """The inverse of :meth:`effective` for active weights: the dense W for values that other code has written."""
        return value

    def learned(self, weight: MaskedWeight) -> Tensor | None:
        """Initial values of parameters learned beside ``weight``, stepped by an optimizer like the weight's own."""
        return None

    def layout_of_learned(self, weight: MaskedWeight) -> Layout | None:
        """Where the values of :meth:`learned` are; None where every process holds all of them."""
        return None

    def twin_settings(self) -> Mapping[str, Any]:
        """Settings in which the optimizer of the learned parameters differs from the weight's, by their names."""
        return {}

    def without_gradient(self, weight: MaskedWeight, scale: float) -> None:
        """``weight`` took no part in the loss; set the gradients of what is learned beside it, if they have any."""

    def take_step(self, group: MaskGroup) -> None:
        """The optimizer has stepped on the dense W; copy the new W into each :meth:`latent`."""
        for weight in group:
            self.latent(weight).copy_(weight.value)

    def before_masks(self, group: MaskGroup, step: int) -> None:
        """:meth:`new_mask` is about to be asked for the masks with which ``group`` takes ``step``."""

    def masks_renewed(self, group: MaskGroup) -> None:
        """The masks of ``group`` were renewed and counted; ``self.renew`` may be called on one again."""

    def own_state(self) -> dict[str, Any]:
        """What the method must save besides weights, masks and what it learns; only tensors and primitives."""
        return {}

    def own_fields(self) -> Mapping[str, Check]:
        """What each field of :meth:`own_state` may be."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`own_state` returned."""

    # What can be read.

    def latent(self, weight: MaskedWeight) -> Tensor:
        """The dense values of ``weight``, active and pruned."""
        return self._kept.latent[weight.name]

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is learned beside the weights, by their names; empty before training."""
        return {} if self.last_run is None else self._kept.parameters

    # What the family does.

    @property
    def _kept(self) -> _Learned:
        return cast("_Learned", self.run.own)

    @override
    def prepare(self) -> None:
        self.run.own = _Learned()

    @final
    @override
    def initialize_masks(self, group: MaskGroup) -> None:
        for weight in group:
            self._begin(weight, weight.value.clone())
        self.group_changed(group)
        self._renew_all(group, self.step)

    def _begin(self, weight: MaskedWeight, latent: Tensor) -> None:
        self._kept.latent[weight.name] = latent
        first = self.learned(weight)
        if first is not None:
            self._kept.parameters[weight.name] = nn.Parameter(first)

    @final
    @override
    def group_changed(self, group: MaskGroup) -> None:
        learned = {w.name: self._kept.parameters[w.name] for w in group if w.name in self._kept.parameters}
        known = {own for own in self._kept.twins if own in self.run.groups}
        self._kept.twins = {own: twin for own, twin in self._kept.twins.items() if own in known}
        if learned:
            self._kept.twins[group] = twin_optimizer(type(self).__name__, group, learned, self.twin_settings())

    @final
    @override
    def weights_added(self, group: MaskGroup, weights: Sequence[MaskedWeight]) -> None:
        for weight in weights:
            self._begin(weight, weight.value.clone())
        self.group_changed(group)
        self._renew_all(group, self.step)
        group.apply_()

    @final
    @override
    def before_step(self, trainer: pl.Trainer, group: MaskGroup) -> None:
        gradients = [weight.grad for weight in group if weight.parameter.grad is not None]
        finite = not gradients or all_finite(gradients)
        self._kept.finite = all_agree(finite, group.mask.device) if group.is_spread else finite
        if self._kept.finite:
            group.not_finite_for = 0
        else:
            self.be_patient(group)
        scale = gradient_scale(trainer, group.optimizer)
        lay = group not in self.run.steps.differentiated
        group.each(partial(self._prepare_step, scale=scale, lay=lay))

    def _prepare_step(self, weight: MaskedWeight, scale: float, lay: bool) -> None:
        """Give the dense weight its gradient, and lay it back unless the optimizer differentiates gradients."""
        latent = self.latent(weight)
        if weight.parameter.grad is None:
            self.without_gradient(weight, scale)
        else:
            self.rewrite_gradient(weight, latent, scale)
        if lay:
            weight.value.copy_(latent)

    @final
    @override
    def after_step(self, group: MaskGroup) -> None:
        if group in self.run.steps.differentiated:
            for weight in group:  # it has moved what the module computed with: W moves as far
                latent = self.latent(weight)
                weight.value.add_(latent - self.effective(weight, latent))
        self.take_step(group)
        if self._kept.finite:
            self._learn(group)
            before = group.mask.clone()
            self._renew_all(group, self.step + 1)
            changed = group.count(before ^ group.mask) > 0
            self.registry.num_updates += changed
            if changed:
                self.run.averages.apply_(group)
                self.run.guards[group].masks_changed()
        group.updated_at = self.step
        self._lay_in(group)

    @final
    @override
    def step_skipped(self, group: MaskGroup) -> None:
        self._lay_in(group)

    @final
    @override
    def weights_written(self, weights: Sequence[MaskedWeight]) -> None:
        for weight in weights:
            latent, value = self.latent(weight), weight.value
            latent.copy_(torch.where(value != self.effective(weight, latent), self.written(weight, value), latent))
            value.copy_(self.effective(weight, latent))

    @final
    @override
    def masks_are_on(self) -> None:
        for group in self.groups:
            self._lay_in(group)
            self.run.guards[group].note_weights()

    def _lay_in(self, group: MaskGroup) -> None:
        for weight in group:
            if self.shrinks:
                weight.value.copy_(self.effective(weight, self.latent(weight)))
            else:
                weight.apply_()

    def _learn(self, group: MaskGroup) -> None:
        """Step what is learned, after the optimizer of ``group`` has stepped W."""
        twin = self._kept.twins.get(group)
        if twin is None:
            return
        set_like_its_user(twin, group, self.twin_settings())
        if group in self.run.steps.differentiated:
            self.warn_once(
                f"{type(twin).__name__} differentiates gradients, but the parameters that {type(self).__name__} learns"
                " beside the weights have gradients in closed form, so plain SGD with the same learning rate steps them"
            )
            descend(twin)
        else:
            with torch.enable_grad():  # differentiable optimizers ask for it
                twin.step()
        twin.zero_grad()

    @final
    def renew(self, weight: MaskedWeight) -> None:
        """Compute the mask of ``weight`` again, and count it."""
        weight.mask.copy_(self.new_mask(weight, self.latent(weight)))
        weight.recount(weight.count(weight.mask))
        weight.budget = weight.num_active

    def _renew_all(self, group: MaskGroup, step: int) -> None:
        self.before_masks(group, step)
        group.each(lambda weight: weight.mask.copy_(self.new_mask(weight, self.latent(weight))))
        refuse_nan_outputs(self, group)
        group.recount()
        for weight in group:
            weight.budget = weight.num_active
        self.masks_renewed(group)
        warn_of_empty(self, group)

    @override
    def target_sparsity(self, name: str | None = None) -> float:
        return self.actual_sparsity() if name is None else self.registry[name].sparsity

    @final
    def actual_sparsity(self) -> float:
        """That of the weights of this method, together."""
        numel = sum(group.unshared_numel for group in self.groups)
        return 1.0 - sum(group.num_active for group in self.groups) / numel if numel else 0.0

    # Checkpoints.

    @final
    @override
    def method_state(self) -> dict[str, Any]:
        kept = self._kept
        layouts = self._layouts_of_learned()
        return {
            "asleep": {weight.name: self._asleep(weight) for weight in self.weights},
            "learned": {name: saved_like(value, layouts.get(id(value))) for name, value in kept.parameters.items()},
            "twins": [saved_twin(kept.twins[group], layouts) for group in self.groups if group in kept.twins],
            "own": self.own_state(),
        }

    def _asleep(self, weight: MaskedWeight) -> Tensor:
        """What a checkpoint has to hold of the dense values."""
        latent = weight.layout.saved(self.latent(weight))
        return (latent if self.shrinks else latent[~weight.layout.saved(weight.mask)]).clone()

    def _layouts_of_learned(self) -> dict[int, Layout]:
        """Where the values of each parameter that is learned are, by its ``id``."""
        sharded = [weight for weight in self.weights if not weight.layout.is_whole]
        own = ((self.parameters.get(weight.name), self.layout_of_learned(weight)) for weight in sharded)
        return {id(parameter): layout for parameter, layout in own if parameter is not None and layout is not None}

    @final
    @override
    def state_fields(self) -> Mapping[str, Check]:
        return {
            "asleep": mapping_of(tensor()),
            "learned": mapping_of(tensor()),
            "twins": list_of(optimizer_state),
            "own": record(self.own_fields(), closed=False),
        }

    @final
    @override
    def load_method_state(self, state: Mapping[str, Any]) -> None:
        check_budgets(self.groups, self.state_key)
        if fault := wrong_names(state["asleep"], [weight.name for weight in self.weights]):
            refuse(f"The checkpoint is damaged: its record of pruned values {fault}")
        for weight in self.weights:
            self._begin(weight, self._dense_values(weight, state["asleep"]))
        for group in self.groups:
            self.group_changed(group)
        self._load_learned(state["learned"], state["twins"])
        self.load_own_state(state["own"])

    def _dense_values(self, weight: MaskedWeight, asleep: Mapping[str, Tensor]) -> Tensor:
        """The dense values: where they are not asleep, those of the parameter."""
        latent, values = weight.value.clone(), asleep.get(weight.name)
        pruned = torch.ones_like(weight.mask) if self.shrinks else ~weight.mask
        expected = weight.numel if self.shrinks else weight.numel - weight.num_active
        if values is None or values.numel() != expected:
            raise MisconfigurationException(
                f"The checkpoint holds {0 if values is None else values.numel()} pruned values of {weight.name}, but"
                f" its mask prunes {expected}. The file is cut short; resume from an earlier one."
            )
        if weight.layout.is_whole:
            latent[pruned] = values.to(latent).flatten()
        else:
            whole = torch.zeros(weight.shape, dtype=latent.dtype)
            whole[weight.layout.whole(pruned).cpu()] = values.to(whole).flatten()
            latent[pruned] = weight.layout.take(whole).to(latent.device)[pruned]
        return latent

    @torch.no_grad()
    def _load_learned(self, learned: Mapping[str, Tensor], twins: Sequence[Mapping[str, Any]]) -> None:
        mine = self._kept.parameters
        if fault := wrong_names(learned, mine):
            refuse(f"The checkpoint is damaged: its record of learned values {fault}")
        layouts = self._layouts_of_learned()
        learned = {name: taken_like(learned[name], value, layouts.get(id(value))) for name, value in mine.items()}
        damaged = [name for name, value in mine.items() if learned[name].shape != value.shape]
        own = [self._kept.twins[group] for group in self.groups if group in self._kept.twins]
        if damaged or len(twins) != len(own):
            raise MisconfigurationException(
                f"The checkpoint is cut short: it lacks the values learned for {', '.join(damaged) or 'no weight'} or"
                " the state of its optimizers. Resume with the module that wrote it, or from an earlier checkpoint."
            )
        for name, value in mine.items():
            value.copy_(learned[name])
        for twin, saved in zip(own, twins, strict=True):
            load_optimizer(twin, taken_twin(twin, saved, layouts))
