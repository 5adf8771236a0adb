"""Methods that exchange weights: an update prunes active weights and grows as many others."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import field
from typing import ClassVar, Literal

import lightning.pytorch as pl
from typing_extensions import override

from lightning_sparse.functional.allocation import share
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.remarks import enumerated
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.checks import check_choice
from lightning_sparse.methods.scored import ScoredMethod
from lightning_sparse.methods.vanishing import vanished
from lightning_sparse.schedules import Cosine, Duration, Schedule, as_schedule, check_fraction

__all__ = ["GrowingMethod", "InitialScale"]

InitialScale = Literal["none", "density"]
"""Whether initial weights are scaled by one over the square root of the layer's density."""


@method
class GrowingMethod(ScoredMethod, ABC):
    """A scored method that exchanges active weights for others if a layer's budget does not change.

    Attributes:
        rounds_up: Whether the number of weights to exchange is rounded up instead of down.
    """

    drop_fraction: float | Schedule = field(
        default=0.3,
        metadata=doc(
            "Fraction of a layer's active weights that an update exchanges, in [0, 1], annealed to 0 along a"
            " cosine; or a schedule of it."
        ),
    )
    regrow: bool = field(
        default=True,
        metadata=doc("Whether an update may grow a weight that it has just pruned; such a weight keeps its value."),
    )
    update_replaces_step: bool = field(
        default=False,
        metadata=doc(
            "Whether an update of the masks replaces the optimizer's step. The optimizer and the module's own"
            " ``on_before_optimizer_step`` then find no gradient (``None``), not even for weights without a mask."
        ),
    )
    warm_moments: bool = field(
        default=True,
        metadata=doc(
            "Whether a grown weight's second moment (Adam, RMSprop, …) begins at the square of its gradient, or at"
            " the mean of the layer's survivors if that is larger. Otherwise it begins at 0, and the weight's first"
            " steps are up to six learning rates long."
        ),
    )
    initial_scale: InitialScale = field(
        default="none",
        metadata=doc(
            'How the initial weights are scaled: ``"density"`` multiplies the active weights of a layer with sparsity'
            " s by 1/√(1 − s), so that its outputs have the variance of the dense layer's outputs. This helps sparse"
            " networks without normalisation.",
            at_first=True,
        ),
    )
    stop: Duration = field(default=0.75, metadata=doc("Time after which the masks no longer change."))
    min_active: int = field(default=1, metadata=doc("The least number of weights that each layer keeps."))

    rounds_up: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("initial_scale", self.initial_scale, InitialScale)
        check_fraction("drop_fraction", as_schedule(self.drop_fraction), below_one=False)
        if not isinstance(self.drop_fraction, Schedule):
            self.drop_fraction = Cosine(self.drop_fraction, 0.0)
        if self.update_replaces_step and self.update_every == 1:
            raise ValueError(
                "update_every is 1 and update_replaces_step is on, so the optimizer would never step. Give an"
                " update_every of 10 steps or more, or update_replaces_step=False."
            )

    @property
    @override
    def replaces_step(self) -> bool:
        return self.update_replaces_step

    @property
    @override
    def warms_moments(self) -> bool:
        return self.warm_moments

    @property
    @override
    def regrows(self) -> bool:
        return self.regrow

    @override
    def kept(self, group: MaskGroup, budgets: Sequence[int]) -> list[int]:
        return [
            budget - self.exchanged(weight, budget) if budget == weight.num_active else min(weight.num_active, budget)
            for weight, budget in zip(group, budgets, strict=True)
        ]

    def exchanged(self, weight: MaskedWeight, active: int) -> int:
        """How many of its ``active`` weights a layer exchanges at an update."""
        assert isinstance(self.drop_fraction, Schedule)
        k = share(self.drop_fraction(self.progress), active, up=self.rounds_up)
        return k if self.regrow else min(k, weight.numel - active)

    @override
    def clock_starts(self, group: MaskGroup) -> None:
        group.updated_at = self.step  # the first exchange comes after a first stretch of training

    @override
    def before_masking(self, trainer: pl.Trainer, group: MaskGroup) -> None:
        run, module = self.run, self.run.module()
        if self.step == run.origin and run.beginning.state is None and module is not None:
            names = vanished(module, group)
            if names:
                scale = "" if self.initial_scale == "density" else ' give initial_scale="density",'
                self.warn_once(
                    f"hardly any gradient reaches {enumerated(names)} through layers this sparse, so they will hardly"
                    f" change. Normalise the network (BatchNorm, LayerNorm),{scale} or give a lower sparsity"
                )

    @override
    def masks_are_on(self) -> None:
        super().masks_are_on()
        run = self.run
        begins = run.beginning.state is None and not self.inherited
        if begins and self.initial_scale == "density":
            for group in run.groups:
                for weight in group:
                    if 0 < weight.num_active < weight.numel:
                        weight.value.mul_(math.sqrt(weight.numel / weight.num_active))
                run.guards[group].note_weights()
