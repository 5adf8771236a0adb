"""SNFS: sparse networks from scratch, by sparse momentum.

Paper:  Dettmers & Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing Performance", 2019,
        https://arxiv.org/abs/1907.04840
Code:   https://github.com/TimDettmers/sparse_learning
Differs from the paper and the authors' code:
    - The method keeps the momentum of every weight, including pruned ones, as one number per weight, with any
      optimizer. There it is the optimizer's own momentum, and with Adam m / (√v + 1e-8).
    - The paper updates after every epoch; here an update comes every hundredth of training.
    - Counts are exact: a layer grows its whole share until it is full. There it grows at most 99 % of its inactive
      weights, and the next updates correct the counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import ClassVar, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sparse.functional.allocation import proportional
from lightning_sparse.masks.budgets import budget_of
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.growing import GrowingMethod
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.scored import Allocation
from lightning_sparse.schedules import Constant, Cosine, Duration, Schedule, check_fraction

__all__ = ["SNFS"]


@final
@method
class SNFS(GrowingMethod):
    r"""Sparse momentum: prunes by magnitude, grows where momentum is largest, mostly in layers with large momentum.

    Every weight has a momentum :math:`m \leftarrow \beta m + \partial L / \partial w`. At an update,

    1. each layer, with :math:`n_l` active weights, prunes its :math:`\lfloor p\, n_l \rfloor` smallest :math:`|w|`;
    2. each layer may grow a share of all pruned weights, in proportion to its mean :math:`|m|` over active weights;
    3. it grows its inactive weights with the largest :math:`|m|`, starting at zero.

    :math:`p` is ``drop_fraction`` and :math:`\beta` is ``momentum``. The layers' budgets thus change during training;
    their sum stays exact.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 96.9, 95.6, 92.6 and
    90.0 %; dense 98.0 %. It loses to one-shot magnitude pruning with fine-tuning at all four, by 0.6 to 2.7 points, and
    beats random masks (ERK). ``python -m benchmarks.evidence --only lenet300 SNFS`` trains it. On a small CNN it loses
    to a baseline at 98 and 99 % with BatchNorm, and at 90, 95, 98 and 99 % without.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import SNFS
        >>> snfs = SNFS(sparsity=0.75)
        >>> trainer = L.Trainer(max_steps=40, callbacks=[snfs], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> snfs.registry
        MaskRegistry(1 weights, sparsity=0.7500)

    References:
        Dettmers & Zettlemoyer, `Sparse Networks from Scratch: Faster Training without Losing Performance
        <https://arxiv.org/abs/1907.04840>`_, 2019.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Dettmers & Zettlemoyer",
        title="Sparse Networks from Scratch: Faster Training without Losing Performance",
        venue="2019",
        url="https://arxiv.org/abs/1907.04840",
    )
    needs_dense_gradients: ClassVar[bool] = True

    allocation: Allocation = field(
        default="uniform", metadata=doc('How layers share the budget at first: ``"uniform"``, ``"er"`` or ``"erk"``.')
    )
    momentum: float = field(default=0.9, metadata=doc("β, in [0, 1): the decay factor of the momentum."))
    drop_fraction: float | Schedule = field(
        default=Cosine(0.5, 0.005),
        metadata=doc("Fraction of each layer's active weights that an update prunes, or a schedule of it."),
    )
    stop: Duration = field(default=1.0, metadata=doc("Time after which the masks no longer change."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("momentum", Constant(self.momentum), below_one=True)

    @override
    def observe(self, weight: MaskedWeight) -> None:
        self.memory(weight, "momentum").mul_(self.momentum).add_(self.gradient(weight))

    @override
    def grow_scores(self, weight: MaskedWeight) -> Tensor:
        return self.memory(weight, "momentum")

    @override
    def budgets(self, group: MaskGroup) -> list[int]:
        left = [weight.num_active - self.exchanged(weight, weight.num_active) for weight in group]
        budget = budget_of(group, self.sparsity_now)
        if budget <= sum(left):  # a schedule that rises asks for more than the exchange prunes
            return proportional(left, budget, left, [min(self.min_active, its_left) for its_left in left])
        rooms = [weight.numel - its_left for weight, its_left in zip(group, left, strict=True)]
        grown = proportional(self._mean_momentum(group), budget - sum(left), rooms)
        return [its_left + its_grown for its_left, its_grown in zip(left, grown, strict=True)]

    @override
    def kept(self, group: MaskGroup, budgets: Sequence[int]) -> list[int]:
        return [
            min(budget, weight.num_active - self.exchanged(weight, weight.num_active))
            for weight, budget in zip(group, budgets, strict=True)
        ]

    def _mean_momentum(self, group: MaskGroup) -> list[float]:
        def mean(weight: MaskedWeight) -> Tensor:
            total = self.memory(weight, "momentum").abs().mul_(weight.mask).sum(dtype=torch.float64)
            return weight.layout.sum(total) / max(1, weight.num_active)

        return torch.stack(group.each(mean)).tolist()  # type: ignore[no-any-return]
