"""GMP: gradual magnitude pruning.

Paper:  Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", ICLR 2018
        workshop, https://arxiv.org/abs/1710.01878
Code:   https://github.com/google-research/google-research/tree/master/model_pruning
Differs from the paper:
    - An update acts before the optimizer's step, on the weights that the last step left.
    - In the authors' code a pruned weight's value is kept, unused, behind the mask; here it is lost.
    - The paper states no default times: here updates come at every hundredth of training, until four fifths of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sparse.functional.masks import smallest
from lightning_sparse.methods.gradual_pruning import Allocation, GradualPruning
from lightning_sparse.methods.paper import Paper
from lightning_sparse.schedules import Duration, Schedule

__all__ = ["GMP"]


@final
class GMP(GradualPruning):
    r"""Gradual magnitude pruning: the smallest weights go, along a cubic schedule.

    At update time :math:`t`, the active weights with the smallest :math:`|w|` are pruned until the sparsity is

    .. math:: s_t = s_f + (s_i - s_f)\Bigl(1 - \frac{t - t_0}{n \Delta t}\Bigr)^3 .

    :math:`s_f` is ``sparsity``, :math:`s_i` is 0, :math:`t_0` is ``start``, :math:`t_0 + n \Delta t` is ``stop`` and
    :math:`\Delta t` is ``update_every``.

    Args:
        sparsity: The final sparsity, in [0, 1), or a schedule of it.
        allocation: Which weights are ranked together. The paper prunes every layer alike: ``"uniform"``.
        update_every: Time between updates; ``int`` = optimizer steps, ``float`` = fraction of training. The paper
            suggests 100 to 1000 steps.
        start: Time of the first update.
        stop: Time of the last update, at which the final sparsity is reached; training should go on for a while.
        min_active: Weights that every layer keeps.
        include: Patterns of what is masked; see :func:`~lightning_sparse.masks.select_weights`.
        exclude: Patterns of what stays dense.
        seed: Seed of the random masks of a schedule that does not begin dense.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import GMP
        >>> gmp = GMP(sparsity=0.9)
        >>> trainer = L.Trainer(max_steps=20, callbacks=[gmp], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> gmp.registry
        MaskRegistry(1 weights, sparsity=0.9062)

    References:
        Zhu & Gupta, `To prune, or not to prune: exploring the efficacy of pruning for model compression
        <https://arxiv.org/abs/1710.01878>`_, ICLR 2018 workshop.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Zhu & Gupta",
        title="To prune, or not to prune: exploring the efficacy of pruning for model compression",
        venue="ICLR 2018 workshop",
        url="https://arxiv.org/abs/1710.01878",
    )

    def __init__(
        self,
        sparsity: float | Schedule,
        *,
        allocation: Allocation = "uniform",
        update_every: Duration = 0.01,
        start: Duration = 0.0,
        stop: Duration = 0.8,
        min_active: int = 0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
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

    @override
    def prune(self, weights: Sequence[Tensor], grads: Sequence[Tensor], among: Tensor, n: int) -> Tensor:
        return smallest(weights, n, among, key=torch.abs)
