"""FGGP: fixed-rate gradient-first gradual pruning.

Paper:  Zhu, Bezek & Goksel, "Fixed-Rate Gradient-First Gradual Pruning", SCIA 2025, https://arxiv.org/abs/2411.05500
Code:   https://github.com/LingkaiZhu1999/NetworkPruning (the paper's text was not at hand; this follows the code)
Differs from the authors' code:
    - An update happens before the optimizer's step, and ranks that step's gradients and the weights before it. There it
      happens right after the step, so that an update at the same count of steps comes one step earlier.
    - ⌊N d⌋ weights stay active; there ⌈N d⌉.
    - The ablations anneal from the first update to ``stop``; there over all of training.
    - The gradient is the one that the optimizer sees: the mean over accumulated batches and processes.
    - The pool has at least as many weights as are pruned; the authors' code fails if it has fewer.
    - The authors leave the first convolution dense, and count it and the biases in the sparsity. Here sparsity is that
      of the masked weights, and every layer is masked; leave the first out with ``exclude=["conv1.weight"]``.
    - The authors update every 1000 to 2000 steps of about 125 000; here every hundredth of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sparse.functional.allocation import share
from lightning_sparse.masks.pool import MaskPool
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.checks import check_choice
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.scored import Allocation, ScoredMethod
from lightning_sparse.schedules import Schedule, as_schedule, check_fraction

__all__ = ["FGGP"]

PoolOf = Literal["active", "survivors"]
First = Literal["gradient", "magnitude"]
Criterion = Callable[[MaskedWeight], Tensor]


@final
@method
class FGGP(ScoredMethod):
    r"""Fixed-rate gradient-first gradual pruning: prunes the smallest of the weights with small gradients.

    At update time :math:`t`, with :math:`R` active of :math:`N` weights and :math:`n = R - \lfloor (1 - s_t) N \rfloor`
    to prune,

    .. math::

        C &= \text{the } \max(n, \lfloor \gamma R \rfloor) \text{ active weights with the smallest }
             |\partial L / \partial w| \\
        P &= \text{the } n \text{ members of } C \text{ with the smallest } |w|

    and :math:`P` is pruned for good. :math:`\gamma` is ``pool``, and :math:`s_t` rises from 0 to ``sparsity`` along a
    cubic.

    The paper's ablations: ``first="magnitude"`` pools by magnitude and prunes by gradient; ``pool=Cosine(0.5, 0.005)``
    anneals the rate; ``pool_of="survivors"`` takes a pool of :math:`n + \gamma (R - n)`. All three together are
    GraNet's selection, with which the authors compare theirs.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 97.7, 97.4, 96.4 and
    94.8 %; dense 98.0 %. It loses to no baseline. ``python -m benchmarks.evidence --only lenet300 FGGP`` trains it. On
    a small CNN it loses to a baseline at 99 % with BatchNorm.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import FGGP
        >>> fggp = FGGP(sparsity=0.75)
        >>> trainer = L.Trainer(max_steps=20, callbacks=[fggp], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> fggp.registry
        MaskRegistry(1 weights, sparsity=0.7500)

    References:
        Zhu, Bezek & Goksel, `Fixed-Rate Gradient-First Gradual Pruning <https://arxiv.org/abs/2411.05500>`_, SCIA 2025.

    Warning:
        The paper reports accuracies as ranks and plots. We found no table of them to compare ours with.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Zhu, Bezek & Goksel",
        title="Fixed-Rate Gradient-First Gradual Pruning",
        venue="SCIA 2025",
        url="https://arxiv.org/abs/2411.05500",
    )
    grows: ClassVar[bool] = False
    begins_dense: ClassVar[bool] = True

    sparsity: float | Schedule = field(
        kw_only=False,
        metadata=doc(
            "The final sparsity, in [0, 1), or a schedule of the sparsity: ``Polynomial(0.5, 0.95)`` begins with"
            " random ERK masks that keep half of the weights."
        ),
    )
    allocation: Allocation = field(
        default="global", metadata=doc('Which weights are ranked together: all (``"global"``), or those of a layer.')
    )
    pool: float | Schedule = field(default=0.5, metadata=doc("Rate γ of the pool, in [0, 1], or a schedule of it."))
    pool_of: PoolOf = field(
        default="active",
        metadata=doc(
            'What the rate refers to: all ``"active"`` weights, or only the ``"survivors"`` of the update; in the'
            " second case, the weights to prune are added to the pool."
        ),
    )
    first: First = field(default="gradient", metadata=doc("Which score chooses the pool; the other chooses within it."))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pool = as_schedule(self.pool)
        check_fraction("pool", self.pool, below_one=False)
        check_choice("pool_of", self.pool_of, PoolOf)
        check_choice("first", self.first, First)

    @override
    def dropped(self, pool: MaskedWeight | MaskPool, among: Tensor, n: int) -> Tensor:
        first, second = self._criteria
        # C = the max(n, ⌊γR⌋) active weights with the smallest |∂L/∂w|
        size = self._pool_size(pool.count(among), n)
        candidates = pool.smallest(self.ranked(pool, first), size, among, key=torch.abs)
        # P = the n members of C with the smallest |w|
        return pool.smallest(self.ranked(pool, second), n, candidates, key=torch.abs)

    @override
    def pattern_scores(self, weight: MaskedWeight, keep: int) -> Tensor:
        first, second = self._criteria
        size = self._pool_size(weight.num_active, weight.num_active - keep)
        safe = self.shape.feasible(weight, weight.num_active - size, weight.mask)
        outside = self.shape.largest(weight, first(weight), safe, weight.mask, key=torch.abs)
        return second(weight).masked_fill(outside, torch.inf)  # what is not in C stays

    @property
    def _criteria(self) -> list[Criterion]:
        by: list[Criterion] = [lambda weight: weight.grad, lambda weight: weight.value]
        return by if self.first == "gradient" else by[::-1]

    def _pool_size(self, remaining: int, n: int) -> int:
        assert isinstance(self.pool, Schedule)
        rate = self.pool(self.progress)
        return max(n, share(rate, remaining)) if self.pool_of == "active" else n + share(rate, remaining - n)
