"""SRigL: structured RigL, with the same fan-in for every neuron.

Paper:  Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024, https://arxiv.org/abs/2305.02299
Code:   https://github.com/calgaryml/condensed-sparsity
Differs from the authors' code:
    - If a neuron has more salient weights than its fan-in, the largest stay; there those with the lowest indices.
    - Weights that magnitude does not keep are salient if their gradients are large; there, as far as is known, any are.
    - An ablated neuron comes back once it has enough of the largest gradients.
    - Masks begin random with a constant fan-in, and weights are as the module initialized them; there weights are
      initialized again for the sparse fan-in (see ``initial_scale``).
    - The authors update every 100 steps on CIFAR-10, and every 800 on ImageNet; here every hundredth of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sparse.functional.masks import row_counts
from lightning_sparse.masks.budgets import layer_budgets
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.patterns import ConstantFanIn, Pattern
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.growing import GrowingMethod
from lightning_sparse.methods.paper import Paper
from lightning_sparse.schedules import Constant, check_fraction

__all__ = ["SRigL"]


@final
@method
class SRigL(GrowingMethod):
    r"""Structured RigL: every neuron has the same number of active inputs, and unimportant neurons are removed.

    At an update, in each layer of :math:`n` active weights, with :math:`k = \lfloor f(t)\, n \rfloor` as in
    :class:`RigL`,

    1. the salient weights are the :math:`n - k` with the largest :math:`|w|` and, among the others, the :math:`k` with
       the largest :math:`|\partial L / \partial w|`;
    2. neurons with fewer than :math:`\max(1, \gamma\, F)` salient weights are ablated, where :math:`F` is the fan-in so
       far. Enough neurons stay to hold the budget, and no neuron of the last layer is ablated;
    3. the budget, divided by the number of remaining neurons, is the new fan-in of each;
    4. each neuron keeps its salient weights with the largest magnitudes. If these are fewer than the fan-in, it grows
       the weights with the largest :math:`|\partial L / \partial w|`, starting at zero.

    :math:`\gamma` is ``ablation``. Such layers can be stored and computed as dense matrices of
    :math:`\text{neurons} \times F` weights with the indices of their inputs. A budget that is not a multiple of the
    number of neurons is rounded down.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 95.8, 94.2, 89.7 and
    80.2 %; dense 98.0 %. It loses to one-shot magnitude pruning with fine-tuning and to a dense network with equal
    weights at all four, and is level with random masks (ERK) within 0.4 points. ``python -m benchmarks.evidence --only
    lenet300 SRigL`` trains it. On a small CNN it loses to a baseline at 90, 95, 98 and 99 % with BatchNorm, and at 90,
    95, 98 and 99 % without.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import SRigL
        >>> srigl = SRigL(sparsity=0.75)
        >>> trainer = L.Trainer(max_steps=40, callbacks=[srigl], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> srigl.registry["layer.weight"].mask.sum(dim=1)
        tensor([8, 8])

    References:
        Lasby et al., `Dynamic Sparse Training with Structured Sparsity <https://arxiv.org/abs/2305.02299>`_, ICLR 2024.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Lasby et al.",
        title="Dynamic Sparse Training with Structured Sparsity",
        venue="ICLR 2024",
        url="https://arxiv.org/abs/2305.02299",
    )
    needs_dense_gradients: ClassVar[bool] = True

    pattern: Pattern | str = field(default=ConstantFanIn(), init=False)
    ablation: float = field(
        default=0.3,
        metadata=doc(
            "γ, in [0, 1]: neurons with fewer salient weights than this fraction of the fan-in are removed; 0"
            " removes none."
        ),
    )
    update_replaces_step: bool = field(
        default=True,
        metadata=doc("Whether an update of the masks replaces the optimizer's step, as in :class:`RigL`."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("ablation", Constant(self.ablation), below_one=False)
        if self.allocation == "global":
            raise ValueError(
                "allocation is 'global', but each layer needs its own fan-in. Give 'uniform', 'er' or 'erk'."
            )

    @property
    def _own(self) -> _Own:
        return cast("_Own", self.run.own)

    @override
    def prepare(self) -> None:
        self.run.own = _Own()

    @override
    def budgets(self, group: MaskGroup) -> list[int]:
        budgets = layer_budgets(group, self.sparsity_now, self.allocation, self.min_active, grow=True)  # type: ignore[arg-type]

        def leave(weight: MaskedWeight, budget: int) -> None:
            self._own.alive[weight.name] = self._neurons_left(weight, budget)

        group.each(leave, budgets)
        return budgets

    @override
    def after_update(self, group: MaskGroup) -> None:
        for temporary in (self._own.alive, self._own.largest):  # as large as the masks
            for weight in group:
                temporary.pop(weight.name, None)

    @override
    def update_failed(self, group: MaskGroup) -> None:
        self.after_update(group)

    @override
    def allowed(self, weight: MaskedWeight) -> Tensor:
        return self._own.alive[weight.name]

    @override
    def kept(self, group: MaskGroup, budgets: Sequence[int]) -> list[int]:
        return [
            min(budget, weight.num_active - self.exchanged(weight, weight.num_active))
            for weight, budget in zip(group, budgets, strict=True)
        ]

    @override
    def grow_scores(self, weight: MaskedWeight) -> Tensor:
        return weight.grad

    @override
    def pruned_to(self, weight: MaskedWeight, keep: int) -> Tensor:
        ranked, top = self._own.largest.pop(weight.name, (-1, weight.mask))
        if ranked != keep:
            top = weight.largest(weight.value, keep, weight.mask, key=torch.abs)
        return top & self._own.alive[weight.name]

    @override
    def free(self, weight: MaskedWeight, kept: Tensor) -> Tensor:
        return self._own.alive[weight.name] & ~kept

    @override
    def grown_to(self, weight: MaskedWeight, kept: Tensor, n: int, free: Tensor) -> Tensor:
        fan_in = weight.budget // max(1, weight.count_rows(row_counts(weight.rows(kept | free)) > 0))
        # All kept weights come before all others: those by magnitude, these by gradient.
        if weight.count_rows(row_counts(weight.rows(kept)) > fan_in) == 0:  # as a rule: then none of them is cut off
            ranked = weight.grad.abs().masked_fill_(kept, torch.inf)
        else:
            ranked = torch.where(kept, 2.0 + _to_one(weight, weight.value), _to_one(weight, weight.grad))
        if not self.regrows:  # what has just been pruned comes last: only where its neuron has no other place
            ranked.masked_fill_(weight.mask & ~kept, -1.0)
        return self.shape.largest(weight, ranked, weight.budget, kept | free)

    def _neurons_left(self, weight: MaskedWeight, budget: int) -> Tensor:
        """The mask of all weights of the neurons that are not ablated."""
        every = torch.ones_like(weight.mask)
        if weight is self.weights[-1] or not self.ablation:
            return every
        k = self.exchanged(weight, weight.num_active)
        top = weight.largest(weight.value, weight.num_active - k, weight.mask, key=torch.abs)
        self._own.largest[weight.name] = (weight.num_active - k, top)  # as a rule what is kept: pruned_to takes it
        wanted = weight.largest(weight.grad, k, ~top, key=torch.abs)
        salient = row_counts(weight.rows(top | wanted))
        fan_in = weight.num_active / max(1, weight.count_rows(row_counts(weight.rows(weight.mask)) > 0))
        alive = salient >= max(1.0, self.ablation * fan_in)
        row = weight.rows(every)
        needed = -(-budget // row.shape[1])
        if weight.count_rows(alive) < needed:
            alive = weight.largest_rows(salient.double(), needed, torch.ones_like(alive))
        return weight.from_rows(alive.unsqueeze(1).expand_as(row).contiguous())


@dataclass
class _Own:
    """What SRigL keeps for one update.

    Attributes:
        alive: The weights of the neurons that it leaves, as a mask, by name.
        largest: How many of the largest weights were looked for, and their mask, by name.
    """

    alive: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    largest: dict[str, tuple[int, Tensor]] = field(default_factory=dict[str, tuple[int, Tensor]])


def _to_one(weight: MaskedWeight, scores: Tensor) -> Tensor:
    """Magnitudes in [0, 1], in their order."""
    magnitudes = scores.abs().double()
    largest = torch.cat([magnitudes.flatten(), magnitudes.new_zeros(1)]).max()  # a process may hold none
    return magnitudes / weight.layout.largest(largest).clamp(min=torch.finfo(torch.float64).tiny)
