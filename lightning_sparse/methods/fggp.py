"""FGGP: fixed-rate gradient-first gradual pruning.

Paper:  Zhu, Bezek & Goksel, "Fixed-Rate Gradient-First Gradual Pruning", SCIA 2025, https://arxiv.org/abs/2411.05500
Code:   https://github.com/LingkaiZhu1999/NetworkPruning (the paper's text was not at hand; this follows the code)
Differs from the authors' code:
    - An update acts before the optimizer's step rather than right after it; the gradients are the same.
    - The gradient is the one that the optimizer sees: the mean over accumulated batches and processes.
    - The pool holds at least as many weights as are pruned; the authors' code fails where it does not.
    - The authors leave the first convolution dense and count it, and biases, in the sparsity. Here sparsity is that
      of the masked weights, and every layer is masked; leave the first out with ``exclude=["conv1.weight"]``.
    - Their times are 1000 to 2000 steps of about 125 000; here a hundredth of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sparse.functional.allocation import share
from lightning_sparse.functional.masks import count_true, smallest
from lightning_sparse.methods.budgets import check_choice
from lightning_sparse.methods.gradual_pruning import Allocation, GradualPruning
from lightning_sparse.methods.paper import Paper
from lightning_sparse.schedules import Duration, Schedule, as_schedule, check_fraction

__all__ = ["FGGP"]

PoolOf = Literal["active", "survivors"]
First = Literal["gradient", "magnitude"]


@final
class FGGP(GradualPruning):
    r"""Fixed-rate gradient-first gradual pruning: of the weights with small gradients, the smallest go.

    At update time :math:`t`, with :math:`R` active of :math:`N` weights and :math:`n = R - \lfloor (1 - s_t) N \rfloor`
    to prune,

    .. math::

        C &= \text{the } \max(n, \lfloor \gamma R \rfloor) \text{ active weights with the smallest }
             |\partial L / \partial w| \\
        P &= \text{the } n \text{ members of } C \text{ with the smallest } |w|

    and :math:`P` is pruned for good. :math:`\gamma` is ``pool``, and :math:`s_t` is cubic from dense to ``sparsity``.

    The paper's ablations: ``first="magnitude"`` pools by magnitude and prunes by gradient; ``pool=Cosine(0.5, 0.005)``
    anneals the rate; ``pool_of="survivors"`` takes a pool of :math:`n + \gamma (R - n)`. GraNet's selection, as the
    authors compare with it, is all three.

    Args:
        sparsity: The final sparsity, in [0, 1), or a schedule of it: ``Polynomial(0.5, 0.95)`` begins with half of the
            weights, drawn at random by ERK.
        pool: Rate of the pool, in [0, 1], or a schedule of it.
        pool_of: Whether the pool is a rate of all ``"active"`` weights, or the pruned ones and a rate of the
            ``"survivors"``.
        first: What chooses the pool; the other chooses in it.
        allocation: Which weights are ranked together: all of them (``"global"``), or those of a layer.
        update_every: Time between updates; ``int`` = optimizer steps, ``float`` = fraction of training.
        start: Time of the first update.
        stop: Time of the last update, at which the final sparsity is reached.
        min_active: Weights that every layer keeps: its largest, which take no part in the ranking.
        include: Patterns of what is masked; see :func:`~lightning_sparse.masks.select_weights`.
        exclude: Patterns of what stays dense.
        seed: Seed of the random masks of a schedule that does not begin dense.

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
        The paper publishes its accuracies as ranks and plots; no table of them was found to measure this against.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Zhu, Bezek & Goksel",
        title="Fixed-Rate Gradient-First Gradual Pruning",
        venue="SCIA 2025",
        url="https://arxiv.org/abs/2411.05500",
    )

    def __init__(
        self,
        sparsity: float | Schedule,
        *,
        pool: float | Schedule = 0.5,
        pool_of: PoolOf = "active",
        first: First = "gradient",
        allocation: Allocation = "global",
        update_every: Duration = 0.01,
        start: Duration = 0.0,
        stop: Duration = 0.8,
        min_active: int = 0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        rate = as_schedule(pool)
        check_fraction("pool", rate, below_one=False)
        check_choice("pool_of", pool_of, PoolOf)
        check_choice("first", first, First)
        super().__init__(
            sparsity,
            allocation=allocation,
            update_every=update_every,
            start=start,
            stop=stop,
            min_active=min_active,
            include=include,
            exclude=exclude,
            seed=seed,
        )
        self.pool = rate
        self.pool_of: PoolOf = pool_of
        self.first: First = first

    @override
    def prune(self, weights: Sequence[Tensor], grads: Sequence[Tensor], among: Tensor, n: int) -> Tensor:
        pool_scores, prune_scores = grads, weights
        if self.first == "magnitude":
            pool_scores, prune_scores = prune_scores, pool_scores
        # C = the max(n, ⌊γR⌋) active weights with the smallest |∂L/∂w|
        pool = smallest(pool_scores, self._pool_size(count_true(among), n), among, key=torch.abs)
        # P = the n members of C with the smallest |w|
        return smallest(prune_scores, n, among=pool, key=torch.abs)

    def _pool_size(self, remaining: int, n: int) -> int:
        rate = self.pool(self.progress)
        if self.pool_of == "active":
            return max(n, share(rate, remaining))
        return n + share(rate, remaining - n)
