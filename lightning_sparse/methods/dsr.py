"""DSR: dynamic sparse reparameterization.

Paper:  Mostafa & Wang, "Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
        Reparameterization", ICML 2019, https://arxiv.org/abs/1902.05967
Code:   https://github.com/IntelAI/dynamic-reparameterization
Differs from the paper and the authors' code:
    - The number of weights to prune is a fraction of the active ones; there a constant, 20 000 for WRN-28-2.
    - Updates are equally spaced; there every 100, 200, 400 and 800 steps as training proceeds, until epoch 190 of 200.
    - Each layer keeps at least ``min_active`` weights, whatever the threshold, and every layer is masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast, final

from typing_extensions import override

from lightning_sparse.functional.allocation import proportional, share
from lightning_sparse.masks.budgets import budget_of
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.schema import Check, number
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.growing import GrowingMethod
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.scored import Allocation
from lightning_sparse.schedules import Constant, Duration, Schedule, as_number

__all__ = ["DSR"]

_TOLERANCE = 0.1  # by how much the pruned may differ from what is wanted before the threshold moves


@dataclass
class _Adaptive:
    """The threshold, and what it has left of each layer in this update."""

    threshold: float
    survivors: Sequence[int] = ()


@final
@method
class DSR(GrowingMethod):
    r"""Dynamic sparse reparameterization: one threshold prunes all layers; each regrows in proportion to what it kept.

    At an update, with :math:`R` active weights,

    1. every :math:`|w| < H` is pruned, :math:`K` in all;
    2. :math:`H` is halved if :math:`K > 1.1\, N_p`, and doubled if :math:`K < 0.9\, N_p`, with
       :math:`N_p = \lfloor p R \rfloor`;
    3. :math:`K` random weights grow, starting at zero; each layer's share is in proportion to its survivors.

    :math:`p` is ``drop_fraction``, and :math:`H` begins at ``threshold``.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 95.4, 93.1, 61.4 and
    15.6 %; dense 98.0 %. It loses to one-shot magnitude pruning with fine-tuning and to a dense network with equal
    weights at all four, and to random masks (ERK) from 95 % on. At 98 and 99 % it collapses: the last layer begins with
    ten or twenty random weights for ten classes, and a layer grows only as much as it has kept. ``allocation="erk"``
    reaches 96.1, 94.4, 91.3 and 86.2 % (``"DSR(erk)"``). ``python -m benchmarks.evidence --only lenet300 DSR`` trains
    it. On a small CNN it loses to a baseline at 90, 95, 98 and 99 % with BatchNorm, and at 90, 95, 98 and 99 % without.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import DSR
        >>> dsr = DSR(sparsity=0.75)
        >>> trainer = L.Trainer(max_steps=40, callbacks=[dsr], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> dsr.registry
        MaskRegistry(1 weights, sparsity=0.7500)

    References:
        Mostafa & Wang, `Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
        Reparameterization <https://arxiv.org/abs/1902.05967>`_, ICML 2019.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Mostafa & Wang",
        title="Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse Reparameterization",
        venue="ICML 2019",
        url="https://arxiv.org/abs/1902.05967",
    )

    allocation: Allocation = field(
        default="uniform", metadata=doc('How layers share the budget at first: ``"uniform"``, ``"er"`` or ``"erk"``.')
    )
    drop_fraction: float | Schedule = field(
        default=Constant(0.1),
        metadata=doc(
            "Approximate fraction of the active weights that an update prunes, in [0, 1]; or a schedule of it. A number"
            " is annealed to 0 along a cosine."
        ),
    )
    threshold: float = field(default=1e-3, metadata=doc("The first H, above 0; it doubles and halves as needed."))
    stop: Duration = field(default=0.95, metadata=doc("Time after which the masks no longer change."))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.threshold = as_number(self.threshold)
        if isinstance(self.threshold, bool) or not (isinstance(self.threshold, int | float) and self.threshold > 0):
            raise ValueError(f"threshold is {self.threshold!r}; give a magnitude above 0.")

    @property
    def _adaptive(self) -> _Adaptive:
        return cast("_Adaptive", self.run.own)

    @override
    def prepare(self) -> None:
        self.run.own = _Adaptive(self.threshold)

    @override
    def budgets(self, group: MaskGroup) -> list[int]:
        its, budget = self._adaptive, budget_of(group, self.sparsity_now)
        large = [(weight.value.abs() >= its.threshold).logical_and_(weight.mask) for weight in group]
        least = [min(self.min_active, weight.num_active) for weight in group]
        left = its.survivors = [max(*pair) for pair in zip(group.counts(large), least, strict=True)]
        if budget <= sum(left):  # a schedule that rises asks for more than the threshold prunes
            return proportional(left, budget, left, [min(self.min_active, its_left) for its_left in left])
        rooms = [weight.numel - its_left for weight, its_left in zip(group, left, strict=True)]
        grown = proportional(left, budget - sum(left), rooms)
        return [its_left + its_grown for its_left, its_grown in zip(left, grown, strict=True)]

    @override
    def kept(self, group: MaskGroup, budgets: Sequence[int]) -> list[int]:
        return [min(pair) for pair in zip(self._adaptive.survivors, budgets, strict=True)]

    @override
    def after_update(self, group: MaskGroup) -> None:
        assert isinstance(self.drop_fraction, Schedule)
        its = self._adaptive
        pruned = group.num_active - sum(its.survivors)
        wanted = share(self.drop_fraction(self.progress), group.num_active)
        if pruned > (1 + _TOLERANCE) * wanted:
            its.threshold /= 2
        elif pruned < (1 - _TOLERANCE) * wanted:
            its.threshold *= 2

    @override
    def method_state(self) -> dict[str, Any]:
        return super().method_state() | {"threshold": self._adaptive.threshold}

    @override
    def state_fields(self) -> Mapping[str, Check]:
        return {**super().state_fields(), "threshold": number(0.0)}

    @override
    def load_method_state(self, state: Mapping[str, Any]) -> None:
        super().load_method_state(state)
        self._adaptive.threshold = float(state["threshold"])
