"""GraNet: gradual pruning with zero-cost neuroregeneration.

Paper:  Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021,
        https://arxiv.org/abs/2106.10404
Code:   https://github.com/VITA-Group/GraNet
Differs from the authors' code:
    - An update happens before the optimizer's step, with that step's gradients; there right after the step.
    - Counts are ⌊r·n⌋ and budgets are exact; there, weights that tie with the last one are pruned too.
    - The authors update every 1000 steps of some 56 000 on CIFAR-10; here an update comes every hundredth of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import ClassVar, final

from torch import Tensor
from typing_extensions import override

from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.growing import GrowingMethod
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.scored import Allocation
from lightning_sparse.schedules import Cosine, Duration, Schedule, as_number

__all__ = ["GraNet"]


@final
@method
class GraNet(GrowingMethod):
    r"""Gradual pruning with neuroregeneration: prunes the smallest of all weights, then exchanges some in each layer.

    At an update at step :math:`t`, with :math:`N` weights,

    1. the smallest :math:`|w|` of all layers together are pruned until :math:`\lfloor (1 - s_t) N \rfloor` are active,
       with :math:`s_t = s_f + (s_i - s_f) \bigl(1 - (t - t_0) / (n \Delta t)\bigr)^3`;
    2. each layer, with :math:`a` weights still active, prunes its :math:`\lfloor r_t\, a \rfloor` smallest :math:`|w|`
       and grows as many of its inactive weights, those with the largest :math:`|\partial L / \partial w|`.

    :math:`s_f` is ``sparsity``, :math:`s_i` is 0, :math:`t_0` is ``start``, :math:`\Delta t` is ``update_every`` and
    :math:`r_t` is ``drop_fraction``. The first stage ends after the fraction ``pruned_by`` of the time from ``start``
    to ``stop``; the second continues until ``stop``.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 97.4, 97.3, 96.7 and
    95.9 %; dense 98.0 %. It loses to no baseline. ``python -m benchmarks.evidence --only lenet300 GraNet`` trains it.
    On a small CNN it loses to no baseline.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import GraNet
        >>> granet = GraNet(sparsity=0.75)
        >>> trainer = L.Trainer(max_steps=40, callbacks=[granet], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> granet.registry
        MaskRegistry(1 weights, sparsity=0.7500)

    References:
        Liu et al., `Sparse Training via Boosting Pruning Plasticity with Neuroregeneration
        <https://arxiv.org/abs/2106.10404>`_, NeurIPS 2021.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Liu et al.",
        title="Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
        venue="NeurIPS 2021",
        url="https://arxiv.org/abs/2106.10404",
    )
    needs_dense_gradients: ClassVar[bool] = True
    begins_dense: ClassVar[bool] = True

    sparsity: float | Schedule = field(
        kw_only=False,
        metadata=doc(
            "The final sparsity, in [0, 1), reached from 0 along the cubic; or a schedule of the sparsity over the"
            " first stage: ``Polynomial(0.5, 0.95)`` begins with random ERK masks that keep half of the weights."
        ),
    )
    allocation: Allocation = field(
        default="global",
        metadata=doc('Which weights the first stage ranks together: all (``"global"``), or those of each layer.'),
    )
    pruned_by: float = field(
        default=0.5,
        metadata=doc("When the final sparsity is reached, as a fraction of the time from ``start`` to ``stop``."),
    )
    drop_fraction: float | Schedule = field(
        default=Cosine(0.5, 0.005),
        metadata=doc("Fraction of a layer's active weights that the second stage exchanges, or a schedule of it."),
    )
    stop: Duration = field(default=1.0, metadata=doc("Time after which the masks no longer change."))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pruned_by = as_number(self.pruned_by)
        if isinstance(self.pruned_by, bool) or not (
            isinstance(self.pruned_by, int | float) and 0 < self.pruned_by <= 1
        ):
            raise ValueError(f"pruned_by is {self.pruned_by!r}; give a fraction of the time to stop, in (0, 1].")

    @property
    @override
    def sparsity_now(self) -> float:
        assert isinstance(self.sparsity, Schedule)
        return self.sparsity(min(1.0, self.progress / self.pruned_by))

    @override
    def kept(self, group: MaskGroup, budgets: Sequence[int]) -> list[int]:
        left = [min(weight.num_active, budget) for weight, budget in zip(group, budgets, strict=True)]
        return [its_left - self.exchanged(weight, its_left) for weight, its_left in zip(group, left, strict=True)]

    @override
    def grow_scores(self, weight: MaskedWeight) -> Tensor:
        return weight.grad
