r"""Methods whose pruned weights sleep: their values are kept, and can wake.

Between steps a parameter holds :math:`W \odot M`, so that forward, validation, averages, checkpoints and export see a
sparse module. At the step the dense :math:`W` is laid back, the gradient is rewritten in closed form, the optimizer
steps, and :math:`W \odot M` is laid in again. Module, ``state_dict`` keys, optimizer and scheduler are untouched,
nothing is added to the loss, and nothing more is communicated: what is computed from the all-reduced gradient is equal
on every rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_sparse.functional.masks import count_true
from lightning_sparse.masks.optimizer_state import all_finite, gradient_scale
from lightning_sparse.masks.registry import MaskedWeight, MaskGroup
from lightning_sparse.methods.base import SparseMethod

__all__ = ["LatentMethod"]


class LatentMethod(SparseMethod):
    """Keeps the dense weights beside the sparse ones that the module holds.

    Args:
        include: Patterns of what is masked.
        exclude: Patterns of what stays dense.
        seed: Seed of everything that the method draws at random.
    """

    def __init__(self, *, include: Sequence[str] | None, exclude: Sequence[str] | None, seed: int) -> None:
        super().__init__(include=include, exclude=exclude, seed=seed)
        self._latent: dict[str, Tensor] = {}
        self._gradients_were_finite = True

    # What a method implements.

    @abstractmethod
    def begin(self, group: MaskGroup) -> None:
        """Make what the method learns beside the weights of ``group``; their values are ``self.latent(weight)``."""

    @abstractmethod
    def rewrite_gradient(self, weight: MaskedWeight, latent: Tensor, scale: float) -> None:
        """Turn ``weight.parameter.grad``, with respect to W ⊙ M, into that of W, in place; note the method's own.

        Args:
            weight: The weight; its gradient is there.
            latent: The dense W.
            scale: By how much the gradient is scaled; the method's own gradients are not to be.
        """

    @abstractmethod
    def learn(self, group: MaskGroup) -> None:
        """Step what the method learns, after the optimizer of ``group`` has stepped W."""

    @abstractmethod
    def new_mask(self, weight: MaskedWeight, latent: Tensor) -> Tensor:
        """The mask of W as it is now: ``bool``, the weight's shape."""

    @abstractmethod
    def masks_renewed(self, group: MaskGroup) -> None:
        """The masks of ``group`` were renewed and counted; ``self.renew`` may be called on one again."""

    @abstractmethod
    def learned_state(self) -> dict[str, Any]:
        """What the method has learned besides the weights: tensors and primitives alone."""

    @abstractmethod
    def load_learned_state(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`learned_state` gave; :meth:`begin` was called before."""

    # What the family does.

    def latent(self, weight: MaskedWeight) -> Tensor:
        """The dense values of ``weight``, awake and asleep."""
        return self._latent[weight.name]

    @final
    @override
    def initialize_masks(self, group: MaskGroup) -> None:
        for weight in group:
            self._latent[weight.name] = weight.parameter.detach().clone()
        self.begin(group)
        self._renew_all(group)

    @final
    @override
    def before_step(self, trainer: pl.Trainer, group: MaskGroup) -> None:
        gradients = [weight.parameter.grad for weight in group if weight.parameter.grad is not None]
        self._gradients_were_finite = bool(gradients) and all_finite(gradients)
        if self._gradients_were_finite:
            group.not_finite_for = 0
        elif gradients:
            self.be_patient(group)
        scale = gradient_scale(trainer, group.optimizer)
        for weight in group:
            latent = self._latent[weight.name]
            if weight.parameter.grad is not None:
                self.rewrite_gradient(weight, latent, scale)
            weight.parameter.copy_(latent)

    @final
    @override
    def after_step(self, group: MaskGroup) -> None:
        for weight in group:
            self._latent[weight.name].copy_(weight.parameter)
        if self._gradients_were_finite:
            self.learn(group)
            before = group.mask.clone()
            self._renew_all(group)
            self._registry.num_updates += not torch.equal(before, group.mask)
        group.updated_at = self.step
        group.apply_()

    @final
    @override
    def step_skipped(self, group: MaskGroup) -> None:
        group.apply_()

    @final
    def renew(self, weight: MaskedWeight) -> None:
        """Make the mask of ``weight`` anew, and count it."""
        weight.mask.copy_(self.new_mask(weight, self._latent[weight.name]))
        weight.recount(count_true(weight.mask))
        weight.budget = weight.num_active

    def _renew_all(self, group: MaskGroup) -> None:
        for weight in group:
            weight.mask.copy_(self.new_mask(weight, self._latent[weight.name]))
        group.recount()
        for weight in group:
            weight.budget = weight.num_active
        self.masks_renewed(group)

    @final
    @override
    def method_state(self) -> dict[str, Any]:
        asleep = {weight.name: self._latent[weight.name][~weight.mask].cpu() for weight in self.weights}
        return {"asleep": asleep, "learned": self.learned_state()}

    @final
    @override
    def load_method_state(self, state: Mapping[str, Any]) -> None:
        self._latent = {}
        if not state:
            return
        missing = {"asleep", "learned"} - state.keys()
        if missing:
            raise MisconfigurationException(
                f"The checkpoint is cut short: it lacks {', '.join(sorted(missing))}. Resume from an earlier one."
            )
        for weight in self.weights:
            self._latent[weight.name] = _awake_and_asleep(weight, state["asleep"])
        for group in self.groups:
            self.begin(group)
        self.load_learned_state(state["learned"])


def _awake_and_asleep(weight: MaskedWeight, asleep: Mapping[str, Tensor]) -> Tensor:
    """The dense values: those of the parameter where it is active, those of the checkpoint where it is not."""
    latent = weight.parameter.detach().clone()
    values = asleep.get(weight.name)
    if values is None or values.numel() != weight.numel - weight.num_active:
        raise MisconfigurationException(
            f"The checkpoint holds {0 if values is None else values.numel()} sleeping values of {weight.name}, but its"
            f" mask prunes {weight.numel - weight.num_active}. The file is cut short; resume from an earlier one."
        )
    latent[~weight.mask] = values.to(latent)
    return latent
